"""``detached_keys``: statistics and query gradients from one sweep over keys that carry no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import grad, gradcheck, gradgradcheck

from cacr_kernels import cacr_momentum_loss, cacr_queue_loss
from cacr_kernels.operators import detached_keys
from cacr_kernels.operators.contrast import plain_contrast
from cacr_kernels.operators.registry import Target, operator
from cacr_kernels.types import ALL, OTHER, SAME, SAME_NOT_SELF, ContrastSpec

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
OP, BACKWARD = operator("detached_keys_cpu"), operator("detached_keys_backward")

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    scale = 0.8 / max(1, shape[-1]) ** 0.5
    return (scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


class Problem(NamedTuple):
    """Kind and temperature, shapes Vq, Vk, N, M, D, view pairs, ids, flags."""

    kind: int
    tau: float
    shape: tuple[int, int, int, int, int] = (1, 1, 5, 7, 3)
    pairs: tuple[tuple[int, int], ...] = ((0, 0),)
    q_id: tuple[int, ...] = (0, 1, 2, 0, 1)
    k_id: tuple[int, ...] = (0, 1, 2, 0, 1, 2, 0)
    inner: bool = False
    detach_weights: bool = False
    detach_value: bool = False
    normalize: bool = False

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """Those of the operator but for what is wanted."""
        vq, vk, n, m, d = self.shape
        ids = [torch.tensor(i, dtype=torch.int32) if self.kind != ALL else None for i in (self.q_id, self.k_id)]
        tau = torch.tensor([self.tau], dtype=torch.float64)
        indices = [self.kind], [x for x, _ in self.pairs], [y for _, y in self.pairs]
        flags = self.inner, self.detach_weights, self.detach_value, self.normalize
        return randn(vq, n, d, dtype=dtype), randn(vk, m, d, seed=1, dtype=dtype), *ids, tau, *indices, *flags


def cyclic(n: int, period: int, first: int = 0) -> tuple[int, ...]:
    return tuple((first + i) % period for i in range(n))


LONG = (1, 1, 37, 601, 33)
PROBLEMS = {
    "all": Problem(ALL, -1.3),
    "all, attracting": Problem(ALL, 1.3),
    "all, inner": Problem(ALL, -1.3, inner=True),
    "all, detached weights": Problem(ALL, -1.3, detach_weights=True),
    "all, inner, detached value": Problem(ALL, -1.3, inner=True, detach_value=True),
    "zero temperature": Problem(ALL, 0.0),
    "other": Problem(OTHER, -1.3),
    "other, negative ids": Problem(OTHER, 0.6, q_id=(-2, 0, 0, 1, 5), k_id=(0, 0, -1, -2, 2, 9, 1)),
    "other, inner, detached weights": Problem(OTHER, -1.0, inner=True, detach_weights=True),
    "other, detached value": Problem(OTHER, -1.0, detach_value=True),
    "some empty": Problem(OTHER, -0.5, q_id=(0, 4, 4, 0, 1), k_id=(4,) * 7),
    "all empty": Problem(OTHER, -0.5, q_id=(4,) * 5, k_id=(4,) * 7),
    "large temperature": Problem(OTHER, -300.0),
    "views": Problem(ALL, -1.0, (3, 2, 19, 7, 2), ((0, 0), (1, 0), (2, 0))),
    "views, repeated and unused": Problem(ALL, -1.0, (3, 2, 5, 7, 2), ((0, 1), (2, 1), (0, 0), (2, 1))),
    "views, other": Problem(OTHER, -1.0, (2, 1, 21, 43, 5), ((0, 0), (1, 0)), cyclic(21, 43, 9), cyclic(43, 43)),
    "one of each": Problem(ALL, -1.0, (1, 1, 1, 1, 1)),
    "tiles": Problem(ALL, -2.0, LONG),
    "tiles, out of the range of 2^x": Problem(ALL, -400.0, LONG),
    "tiles, other": Problem(OTHER, -2.0, LONG, ((0, 0),), cyclic(37, 601, 211), cyclic(601, 601)),
    "tiles, a member in the last": Problem(OTHER, -2.0, LONG, ((0, 0),), (3,) * 37, (3,) * 600 + (4,)),
    "tiles, a member in the first": Problem(OTHER, 2.0, LONG, ((0, 0),), (3,) * 37, (4,) + (3,) * 600),
    "tiles, other, out of range": Problem(OTHER, 400.0, LONG, ((0, 0),), cyclic(37, 5), cyclic(601, 5)),
}  # fmt: skip
PROBLEMS |= {
    f"raw rows: {name}": PROBLEMS[name]._replace(normalize=True)
    for name in ("all", "other, inner, detached weights", "views, repeated and unused")
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))


def of_operator(
    q: Tensor, tau: Tensor, arguments: tuple[Any, ...], want: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """Value and lse by the Function."""
    q, k, tau, spec, detach_value = detached_keys.pack(q, *arguments[1:4], tau, *arguments[5:])
    return detached_keys.one_sweep(q, k, tau, spec, detached_keys.Call(detach_value, want, Target("cpu")))


def plain(q: Tensor, tau: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The same in float64 by the formula, as N x M arrays."""
    _, k, q_id, k_id, _, *rest, detach_value, normalize = arguments
    value, lse = plain_contrast(q, k.double(), tau, ContrastSpec(q_id, k_id, *rest, normalize=normalize))
    return value.detach() if detach_value else value, lse.detach() if rest[-1] else lse


def mixture(value: Tensor, lse: Tensor) -> Tensor:
    """A sum in which every row has a weight of its own, the log-sum-exp of empty sets left out."""
    g_value, g_lse = randn(*value.shape, seed=5), randn(*lse.shape, seed=6)
    return (g_value * value).sum() + (g_lse * torch.where(lse == -torch.inf, 0.0, lse)).sum()


def assert_close(actual: Any, expected: Any, dtype: torch.dtype = torch.float64, factor: float = 1.0) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert torch.equal(a.isinf(), e.isinf())
        a, e = a.double().masked_fill(a.isinf(), 0.0), e.double().masked_fill(e.isinf(), 0.0)
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        assert (a - e).abs().le(factor * TOLERANCE[dtype] * scale).all()


def leaves(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    return arguments[0].clone().requires_grad_(), arguments[4].clone().requires_grad_()


def gradients(of: Callable[..., Any], arguments: tuple[Any, ...], *rest: Any) -> tuple[Tensor, ...]:
    inputs = leaves(arguments)
    total = mixture(*of(*inputs, arguments, *rest))
    if not total.requires_grad:  # zero by definition
        return tuple(torch.zeros_like(t) for t in inputs)
    return grad(total, inputs, allow_unused=True, materialize_grads=True)


# ---- numbers ---------------------------------------------------------------------------------------------------------
@problems
@both_dtypes
def test_statistics(dtype: torch.dtype, problem: Problem) -> None:
    arguments = problem.arguments(dtype)
    expected = plain(arguments[0].double(), arguments[4], arguments)
    for want in (False, True):
        value, lse, _, _ = OP(*arguments, want, want)
        assert_close((value, lse), expected, dtype, max(1.0, abs(problem.tau)))


@pytest.mark.parametrize("want", [(True, True), (False, False), (True, False), (False, True)], ids=str)
@problems
@both_dtypes
def test_gradients(dtype: torch.dtype, problem: Problem, want: tuple[bool, bool]) -> None:
    """Also those that autograd asks for later: of q, of tau."""
    arguments = problem.arguments(dtype)
    mine = gradients(of_operator, arguments, want)
    true = gradients(plain, (arguments[0].double(), *arguments[1:]))
    assert [g.dtype for g in mine] == [dtype, torch.float64]
    assert_close(mine, true, dtype, max(10.0, problem.tau**2))


@pytest.mark.parametrize("want", [(True, True), (True, False), (False, True)], ids=str)
@problems
@both_dtypes
def test_backward_in_python_and_in_cpp(dtype: torch.dtype, problem: Problem, want: tuple[bool, bool]) -> None:
    """Two implementations: on the CPU the compiled library has one, on other devices it is PyTorch operations."""
    arguments = problem.arguments(dtype)
    found = OP(*arguments, *want)
    incoming = randn(*found[0].shape, seed=5), randn(*found[1].shape, seed=6)
    given = *arguments, *found, *incoming, *want
    expected = detached_keys.backward(*given)
    actual = BACKWARD(*given)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert_close(actual, expected, dtype, max(1.0, abs(problem.tau)))


def test_a_temperature_alone_that_is_asked_for_later() -> None:
    arguments = PROBLEMS["all"].arguments()
    found, expected = [], []
    for of, into, rest in ((of_operator, found, ((False, False),)), (plain, expected, ())):
        tau = arguments[4].clone().requires_grad_()
        into += grad(mixture(*of(arguments[0], tau, arguments, *rest)), tau)
    assert_close(found, expected)


@problems
def test_registered_autograd(problem: Problem) -> None:
    """The operator itself: the same formula, first and second order."""
    arguments = problem.arguments()
    if problem.detach_value and problem.detach_weights:
        return

    def run(of: Callable[..., Any]) -> tuple[Tensor, ...]:
        q, tau = inputs = leaves(arguments)
        first = grad(mixture(*of(q, tau)), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        total = sum((g.sin().sum() for g in first), q.square().sum())
        return *first, *grad(total, inputs, allow_unused=True, materialize_grads=True)

    mine = run(lambda q, tau: OP(q, *arguments[1:4], tau, *arguments[5:], True, True)[:2])
    assert_close(mine, run(lambda q, tau: plain(q, tau, arguments)), factor=max(10.0, abs(problem.tau) ** 3))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", [ALL, OTHER])
def test_gradcheck(kind: int, inner: bool) -> None:
    arguments = Problem(kind, -0.9, inner=inner).arguments()
    assert gradcheck(lambda q, tau: of_operator(q, tau, arguments), leaves(arguments))
    assert gradgradcheck(lambda q, tau: of_operator(q, tau, arguments), leaves(arguments))


def test_gradcheck_of_the_lse_alone() -> None:
    arguments = Problem(ALL, -0.9, inner=True, detach_value=True).arguments()
    value, lse = of_operator(*leaves(arguments), arguments)
    assert not value.requires_grad
    assert lse.requires_grad
    assert gradcheck(lambda q, tau: of_operator(q, tau, arguments)[1], leaves(arguments))
    assert gradgradcheck(lambda q, tau: of_operator(q, tau, arguments)[1], leaves(arguments))


def test_what_is_wanted() -> None:
    arguments = PROBLEMS["all"].arguments()
    value, lse, means, variance = OP(*arguments, True, True)
    g = randn(*value.shape, seed=5), randn(*value.shape, seed=6)
    both = BACKWARD(*arguments, value, lse, means, variance, *g, True, True)
    for want in ((True, False), (False, True)):
        found = OP(*arguments, *want)
        mine = BACKWARD(*arguments, *found, *g, *want)
        assert_close(mine, [b if w else b.new_empty(0) for b, w in zip(both, want, strict=True)])


def test_function_transforms() -> None:
    arguments = PROBLEMS["other"].arguments()
    q, tau = arguments[0], arguments[4]

    def penalty(of: Callable[..., Any]) -> Callable[..., Tensor]:
        def norm(q: Tensor, tau: Tensor) -> Tensor:
            found = torch.func.grad(lambda *x: mixture(*of(*x, arguments)).square(), (0, 1))(q, tau)
            return found[0].square().sum() + found[1].square().sum()

        return norm

    for order in (lambda of: lambda *x: mixture(*of(*x, arguments)), penalty):
        mine, true = (torch.func.grad(order(of), (0, 1))(q, tau) for of in (of_operator, plain))
        assert_close(mine, true, factor=10.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.exhaustive
@pytest.mark.parametrize("weight_grad", ["in_batch", "full", "none"])
def test_compiled_queue(weight_grad: str) -> None:
    """The operator is in the graph, and gives what it gives in eager mode."""
    torch._dynamo.reset()
    graphs = []

    def inspect(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=inspect)

    queue = randn(11, 4, seed=2)

    def loss(z: Tensor, tau: Tensor) -> Tensor:
        return cacr_queue_loss(z, z.flip(1), queue, tau_pos=tau, tau_neg=tau, weight_grad=weight_grad, backend="cpu")

    def run(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        args = randn(2, 5, 4).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        value = f(*args)
        return value.detach(), *grad(value, args, allow_unused=True, materialize_grads=True)

    assert_close(run(torch.compile(loss, fullgraph=True, backend=backend)), run(loss))
    assert "cacr_kernels.detached_keys_cpu.default" in graphs
    assert "cacr_kernels.detached_keys_backward.default" in graphs


# ---- sets and numbers at the edge ------------------------------------------------------------------------------------
def test_empty_sets_are_exact() -> None:
    """-inf and 0 with zero gradient, also where the row's log-sum-exp receives one (logaddexp sends NaN there)."""
    arguments = PROBLEMS["all empty"].arguments()
    q, tau = leaves(arguments)
    value, lse = of_operator(q, tau, arguments)
    assert lse.eq(-torch.inf).all()
    assert value.eq(0).all()
    assert all(g.eq(0).all() for g in grad(torch.nan * lse.sum() + torch.nan * value.sum(), (q, tau)))


@pytest.mark.parametrize(("n", "m"), [(5, 0), (1, 0), (0, 7), (0, 0)])
def test_no_keys_or_queries(n: int, m: int) -> None:
    arguments = Problem(ALL, -1.0, (1, 1, n, m, 3)).arguments()
    q, tau = leaves(arguments)
    value, lse = of_operator(q, tau, arguments)
    assert value.shape == lse.shape == (1, 1, n)
    assert lse.eq(-torch.inf).all()
    assert value.eq(0).all()
    assert all(g.eq(0).all() for g in grad(value.sum() + lse.sum(), (q, tau)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@both_dtypes
def test_bad_numbers_show(dtype: torch.dtype, bad: float) -> None:
    """A key in the last tile reaches every row that has it in its set; a query its own row; a temperature all rows."""
    m, n = 601, 19
    for kind in (ALL, OTHER):
        arguments = list(Problem(kind, -1.0, (1, 1, n, m, 17), ((0, 0),), cyclic(n, m), cyclic(m, m)).arguments(dtype))
        clean = OP(*arguments, True, True)
        assert all(t.isfinite().all() for t in clean)
        spoiled = arguments[1].clone()
        spoiled[0, 11, 3] = bad  # the positive of query 11
        has_it = torch.arange(n) != 11 if kind == OTHER else torch.ones(n, dtype=torch.bool)
        value, lse, means, variance = OP(arguments[0], spoiled, *arguments[2:], True, True)
        for t in (value, lse, variance):
            assert torch.equal(~t[0, 0].isfinite(), has_it)
        assert (~means[:, 0].isfinite()).any(-1)[:, has_it].all()
        for i, where in ((0, torch.arange(n) == 4), (4, torch.ones(n, dtype=torch.bool))):
            spoiled = arguments[i].clone()
            spoiled.view(-1)[4 * 17 + 2 if i == 0 else 0] = bad
            changed = [*arguments[:i], spoiled, *arguments[i + 1 :]]
            value, lse, means, _ = OP(*changed, True, True)
            assert torch.equal(~value[0, 0].isfinite(), where)
            assert (~lse[0, 0].isfinite())[where].all()
            assert (~means[:, 0].isfinite()).any(-1)[:, where].all()
            assert means[:, 0, ~where].isfinite().all()


@pytest.mark.parametrize("tau", [-40.0, 40.0, -1e4])
def test_top_that_moves_late(tau: float) -> None:
    """The key with all the weight comes last, after many tiles that the sums have to forget."""
    arguments = list(Problem(ALL, tau, (1, 1, 3, 1201, 8)).arguments(torch.float32))
    q = torch.nn.functional.normalize(arguments[0], dim=-1)
    k = torch.nn.functional.normalize(arguments[1], dim=-1)
    k[0, -3:] = (q[0] if tau < 0 else -q[0]) + 1e-3 * k[0, -3:]
    arguments[:2] = q, k
    mine = gradients(of_operator, tuple(arguments))
    true = gradients(plain, (q.double(), *arguments[1:]))
    assert_close(mine[:1], true[:1], torch.float32, 40.0)


def test_strided_arguments() -> None:
    q, k, q_id, k_id, tau, *rest = PROBLEMS["tiles, other"].arguments()
    expected = OP(q, k, q_id, k_id, tau, *rest, True, True)
    strided = [torch.stack([t, t.flip(-1)], -1)[..., 0] for t in (q, k, q_id, k_id, tau)]
    assert not any(t.is_contiguous() for t in strided[:4])
    assert all(torch.equal(a, b) for a, b in zip(OP(*strided, *rest, True, True), expected, strict=True))


@pytest.mark.parametrize("kinds", [[SAME], [SAME_NOT_SELF], [ALL, OTHER], []])
def test_other_sets_are_refused(kinds: list[int]) -> None:
    q, k, q_id, k_id, _, _, *rest = PROBLEMS["other"].arguments()
    tau = torch.ones(len(kinds), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"one softmax over all or other keys|one or two softmaxes"):
        OP(q, k, q_id, k_id, tau, kinds, *rest, True, True)


# ---- threads ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [ALL, OTHER])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 3), (3, 7), (2, 131)], ids=str)
def test_shares_of_keys_and_queries(threads: Callable[[int], None], shape: tuple[int, int], kind: int) -> None:
    """Any number of threads agrees with the formula, and gives the same bits again."""
    views, n = shape
    m, pairs = 20_011, tuple((v, 0) for v in range(views))
    problem = Problem(kind, -3.0, (views, 1, n, m, 24), pairs, cyclic(n, m, 9_000), cyclic(m, m))
    arguments = problem.arguments(torch.float32)
    exact = (arguments[0].double(), *arguments[1:])
    true = gradients(plain, exact)
    value, lse = plain(exact[0], exact[4], exact)
    for count in (1, 2, 3, 64):
        threads(count)
        found = OP(*arguments, True, True)
        assert_close(found[:2], (value, lse), torch.float32)
        assert_close(gradients(of_operator, arguments), true, torch.float32, 10.0)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(found, OP(*arguments, True, True), strict=True))


# ---- registration ----------------------------------------------------------------------------------------------------
CHECKED = ["some empty", "views, repeated and unused", "all, inner, detached value", "all, detached weights"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14 in opcheck
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str) -> None:
    arguments = PROBLEMS[name].arguments(torch.float32 if "views" in name else torch.float64)
    q, tau = leaves(arguments)
    arguments = (q, *arguments[1:4], tau, *arguments[5:])
    torch.library.opcheck(OP, (*arguments, True, True))
    torch.library.opcheck(operator("detached_keys_cpu_bf16"), (*arguments, True, True))
    found = [t.detach() for t in OP(*arguments, True, True)]
    incoming = [randn(*found[0].shape, seed=i).requires_grad_() for i in (5, 6)]
    torch.library.opcheck(BACKWARD, (*arguments, *found, *incoming, True, True))


@problems
@both_dtypes
def test_fakes(dtype: torch.dtype, problem: Problem) -> None:
    arguments = problem.arguments(dtype)

    def assert_like(fake: Callable[..., Any], op: Any, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        fakes = fake(*(a.to("meta") if isinstance(a, Tensor) else a for a in given))
        reals: tuple[Tensor, ...] = op(*given)
        assert [(f.shape, f.dtype, f.stride()) for f in fakes] == [(r.shape, r.dtype, r.stride()) for r in reals]
        return reals

    for want in ((True, True), (True, False), (False, True), (False, False)):
        found = assert_like(detached_keys.fake, OP, (*arguments, *want))
        assert_like(detached_keys.backward_fake, BACKWARD, (*arguments, *found, *found[:2], *want))


@pytest.mark.parametrize("cost", ["rbf", "sqeuclidean"])
def test_losses_use_it(cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum and queue losses compute similarities with their keys once, for value and gradient."""
    from cacr_kernels import losses

    def never(*_: Any) -> Any:
        raise AssertionError("the general operator was called")

    monkeypatch.setattr(losses, "contrast", never)
    monkeypatch.setattr(detached_keys, "contrast", never)
    z = randn(2, 5, 4).requires_grad_()
    cacr_momentum_loss(z, randn(9, 4, seed=1), cost=cost, normalize=True, backend="cpu").backward()
    cacr_queue_loss(z, z.detach(), randn(9, 4, seed=1), in_batch=False, backend="cpu").backward()
