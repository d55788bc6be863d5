"""The operators ``torch.ops.cacr_kernels.*``: registration, fakes, and their numbers against the plain formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import normalize as unit_rows

from cacr_kernels.backends.cuda import COMPILED
from cacr_kernels.operators import cacr, contrast
from cacr_kernels.operators.cacr import loss_and_parts
from cacr_kernels.operators.contrast import plain_contrast
from cacr_kernels.operators.registry import NAMESPACE, operator
from cacr_kernels.types import ALL, OTHER, OTHER_NOT_SELF, SAME, SAME_NOT_SELF, CACROptions, ContrastSpec

BACKENDS = ("cpu", "torch")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}

both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


# torch 2.14 warns of an access of its own
quiet_opcheck = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    scale = 0.8 / max(1, shape[-1]) ** 0.5
    return (scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


# ---- cacr ------------------------------------------------------------------------------------------------------------
DTYPES = [torch.float32, torch.float64] * 3
CACR_ARGUMENTS = [
    # pairing, rbf, want_grad, want_grad_numbers
    (0, False, True, True),
    (1, False, True, False),
    (2, False, False, True),
    (0, True, True, True),
    (1, True, False, False),
    (2, True, True, True),
]


def cacr_arguments(
    case: tuple[int, bool, bool, bool], dtype: torch.dtype, requires_grad: bool, normalize: bool = False
) -> tuple[Any, ...]:
    pairing, rbf, want_grad, want_grad_numbers = case
    views = randn(3, 5, 4, dtype=dtype).requires_grad_(requires_grad and want_grad)
    numbers = torch.tensor([0.7, 1.3, 0.9, 1.1, 2.0], dtype=torch.float64)
    numbers.requires_grad_(requires_grad and want_grad_numbers)
    return views, numbers, 0.0, 0.0, 0.0, 0.0, pairing, rbf, 0.0, normalize, want_grad, want_grad_numbers


def with_numbers(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same outside of a tensor: nothing flows to the temperatures."""
    views, numbers, _, _, _, _, pairing, rbf, _, normalize, want_grad, _ = arguments
    tau_pos, tau_neg, alpha, beta, rbf_scale = numbers.tolist()
    return views, None, tau_pos, tau_neg, alpha, beta, pairing, rbf, rbf_scale, normalize, want_grad, False


@quiet_opcheck
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # The second, the third and the fourth hold every value of an argument.
        pytest.param(case, dtype, marks=() if i == 3 else pytest.mark.exhaustive)
        for i, (case, dtype) in enumerate(zip(CACR_ARGUMENTS, DTYPES, strict=True))
    ],
    ids=str,
)
def test_opcheck_cacr(case: tuple[int, bool, bool, bool], dtype: torch.dtype) -> None:
    arguments = cacr_arguments(case, dtype, requires_grad=True, normalize=case[1])
    torch.library.opcheck(operator("cacr_cpu"), arguments)


@quiet_opcheck
@pytest.mark.exhaustive
@pytest.mark.parametrize(("case", "dtype"), list(zip(CACR_ARGUMENTS, DTYPES, strict=True)), ids=str)
def test_opcheck_cacr_with_numbers_and_products_of_bfloat16(
    case: tuple[int, bool, bool, bool], dtype: torch.dtype
) -> None:
    arguments = cacr_arguments(case, dtype, requires_grad=True, normalize=case[1])
    torch.library.opcheck(operator("cacr_cpu"), with_numbers(arguments))
    torch.library.opcheck(operator("cacr_cpu_bf16"), arguments)


@pytest.mark.parametrize("case", CACR_ARGUMENTS, ids=str)
def test_numbers_outside_of_a_tensor(case: tuple[int, bool, bool, bool]) -> None:
    arguments = cacr_arguments(case, torch.float64, requires_grad=False)
    *expected, _ = operator("cacr_cpu")(*arguments)
    *found, grad_numbers = operator("cacr_cpu")(*with_numbers(arguments))
    assert all(map(torch.equal, found, expected))
    assert grad_numbers.shape == (0,)


@pytest.mark.parametrize("want_grad", [False, True])
@pytest.mark.parametrize("scale", [-60.0, -12.0, -6.0])
def test_a_negative_scale(scale: float, want_grad: bool) -> None:
    """exp(-s c) is larger than 1 then: beyond the range of 2^x unless the largest is known first."""
    views = unit_rows(randn(2, 70, 8), dim=-1).float()
    views[:, ::2] = views[:, :1]  # and some opposite, so that costs are 0 to 4
    views[:, 1] = -views[:, 0]
    numbers = torch.tensor([1.0, 1.0, 1.0, 1.0, scale], dtype=torch.float64)
    loss, _, grad_views, _ = operator("cacr_cpu")(views, numbers, 0, 0, 0, 0, 0, True, 0, False, want_grad, False)
    exact = views.double().requires_grad_()
    expected, _ = loss_and_parts(exact, numbers, CACROptions(0, 0, 0, 0, 0, True, 0, False))
    assert_close([loss], [expected], torch.float32, 100.0)
    if want_grad:
        assert_close([grad_views], grad(expected, exact), torch.float32, 100.0)


def test_a_negative_scale_at_the_largest_exponents() -> None:
    """tau_neg c = 44 and s c = -88: the sums of a row fit float32, their ratio times a cost does not. So two sweeps."""
    first = unit_rows(randn(1, 8) + 0.02 * randn(70, 8), dim=-1)
    views = torch.stack([first, -first.flip(0)]).float()
    numbers = torch.tensor([1.0, 11.0, 1.0, 1.0, -22.0], dtype=torch.float64)
    loss, _, grad_views, _ = operator("cacr_cpu")(views, numbers, 0, 0, 0, 0, 0, True, 0, False, True, False)
    exact = views.double().requires_grad_()
    expected, _ = loss_and_parts(exact, numbers, CACROptions(0, 0, 0, 0, 0, True, 0, False))
    assert_close([loss], [expected], torch.float32, 100.0)
    assert_close([grad_views], grad(expected, exact), torch.float32, 100.0)


@pytest.mark.parametrize("asked", [(True, False), (False, True), (False, False)])
def test_gradients_that_were_not_asked_for(asked: tuple[bool, bool]) -> None:
    """Autograd wants them all the same: they are computed on the way back."""
    views, numbers, *options, _, _ = cacr_arguments(CACR_ARGUMENTS[0], torch.float64, requires_grad=True)
    loss, *_ = operator("cacr_cpu")(views, numbers, *options, *asked)
    expected, _ = loss_and_parts(views, numbers, CACROptions(*options))
    assert_close(grad(loss, (views, numbers)), grad(expected, (views, numbers)), torch.float64)


def test_results_of_the_operator_stay_its_own() -> None:
    """The gradient that it returned is not the one that autograd hands out, which users write to."""
    views, numbers, *options = cacr_arguments(CACR_ARGUMENTS[0], torch.float64, requires_grad=True)
    loss, _, grad_views, _ = operator("cacr_cpu")(views, numbers, *options)
    before = grad_views.clone()
    loss.backward()
    assert torch.equal(views.grad, before)
    views.grad.zero_()
    assert torch.equal(grad_views, before)


def test_ids_in_turn_but_for_the_last_key() -> None:
    """Equal ids lie on diagonals where they are i modulo a period: of all keys."""
    period = 40  # longer than any vector
    q, k, q_id = randn(1, 90, 4), randn(1, 203, 4, seed=1), torch.arange(90, dtype=torch.int32) % period
    tau = torch.tensor([-1.0], dtype=torch.float64)
    for last in (2, 30):  # 202 % 40, and one of rows far from those
        k_id = torch.arange(203, dtype=torch.int32) % period
        k_id[-1] = last
        arguments = q, k, q_id, k_id, tau, [OTHER], [0], [0], False, False, None, False
        found, expected = (operator(f"contrast_{name}")(*arguments) for name in ("cpu", "torch"))
        assert_close(found[:2], expected[:2], torch.float64)


@both_dtypes
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", CACR_ARGUMENTS, ids=str)
def test_cacr_against_reference(case: tuple[int, bool, bool, bool], normalize: bool, dtype: torch.dtype) -> None:
    views, numbers, *options, want_grad, want_grad_numbers = cacr_arguments(case, dtype, False, normalize)
    loss, parts, grad_views, grad_numbers = operator("cacr_cpu")(views, numbers, *options, want_grad, want_grad_numbers)
    views, numbers = views.double().requires_grad_(), numbers.requires_grad_()
    true_loss, true_parts = loss_and_parts(views, numbers, CACROptions(*options))
    true_views, true_numbers = grad(true_loss, (views, numbers))
    assert_close([loss, parts], [true_loss, true_parts], dtype)
    if want_grad:
        assert_close([grad_views], [true_views], dtype)
    if want_grad_numbers:
        assert_close([grad_numbers], [true_numbers], dtype)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", [c for c in CACR_ARGUMENTS if c[2] and c[3]], ids=str)
def test_autograd_of_every_output_of_cacr(case: tuple[int, bool, bool, bool], normalize: bool) -> None:
    """The registered formula: loss, parts and both gradients are outputs, each differentiable, in any mixture."""
    views, numbers, *rest = cacr_arguments(case, torch.float64, True, normalize)
    gg, options = randn(*views.shape, seed=3), CACROptions(*rest[:-2])

    def mixture(loss: Tensor, parts: Tensor, grad_views: Tensor, grad_numbers: Tensor) -> Tensor:
        return loss.sin() + (parts[:2] * parts[:2]).sum() + (gg * grad_views).sum() + grad_numbers.square().sum()

    loss, parts = loss_and_parts(views, numbers, options)
    first = grad(loss, (views, numbers), create_graph=True)
    expected = grad(mixture(loss, parts, *first), (views, numbers))
    for differentiable in (False, True):  # the gradient of the loss itself takes another way where it is differentiated
        found = mixture(*operator("cacr_cpu")(views, numbers, *rest))
        assert_close(grad(found, (views, numbers), create_graph=differentiable), expected, torch.float64)


# ---- contrast --------------------------------------------------------------------------------------------------------
class Problem(NamedTuple):
    """Arguments of ``contrast``: kinds with temperatures, shapes Vq, Vk, N, M, D, view pairs, ids, flags, q_self."""

    sets: tuple[tuple[int, float], ...]
    shape: tuple[int, int, int, int, int] = (1, 1, 5, 7, 3)
    pairs: tuple[tuple[int, int], ...] = ((0, 0),)
    q_id: tuple[int, ...] = (0, 1, 2, 0, 1)
    k_id: tuple[int, ...] = (0, 1, 2, 0, 1, 2, 0)
    inner: bool = False
    detach: bool = False
    q_self: tuple[int, ...] | None = None
    normalize: bool = False

    def arguments(self, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> tuple[Any, ...]:
        vq, vk, n, m, d = self.shape
        q, k = randn(vq, n, d, dtype=dtype), randn(vk, m, d, seed=1, dtype=dtype)
        tau = torch.tensor([t for _, t in self.sets], dtype=torch.float64)
        masked = any(kind != ALL for kind, _ in self.sets)
        ids = [torch.tensor(i, dtype=torch.int32) if masked else None for i in (self.q_id, self.k_id)]
        indices = [kind for kind, _ in self.sets], [x for x, _ in self.pairs], [y for _, y in self.pairs]
        q, k, tau = (t.requires_grad_(requires_grad) for t in (q, k, tau))
        q_self = None if self.q_self is None else torch.tensor(self.q_self, dtype=torch.int32)
        return q, k, *ids, tau, *indices, self.inner, self.detach, q_self, self.normalize


def cyclic(n: int, period: int) -> tuple[int, ...]:
    return tuple(i % period for i in range(n))


def blocks(n: int, size: int) -> tuple[int, ...]:
    return tuple(i // size for i in range(n))


def draws(n: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(n)).tolist())


NOT_SELF = (SAME_NOT_SELF, 1.5), (OTHER_NOT_SELF, -0.7)


PROBLEMS = {
    "all": Problem(((ALL, -1.3),)),
    "all, inner": Problem(((ALL, -1.3),), inner=True),
    "all, detached": Problem(((ALL, -1.3),), detach=True),
    "other, periodic": Problem(((OTHER, -1.3),)),
    "other, not periodic": Problem(((OTHER, 0.6),), q_id=(2, 0, 0, 1, 5), k_id=(0, 0, 1, 2, 2, 9, 1)),
    "other, inner": Problem(((OTHER, -1.0),), inner=True),
    "other, detached": Problem(((OTHER, -1.0),), detach=True),
    "same": Problem(((SAME, 2.0),)),
    "same, inner": Problem(((SAME, 2.0),), inner=True),
    "same not self": Problem(((SAME_NOT_SELF, 2.0),), (1, 1, 7, 7, 3), q_id=cyclic(7, 3), k_id=cyclic(7, 3)),
    "negative ids": Problem(((SAME, 1.0), (OTHER, -1.0)), q_id=(-1, -2, 5, -1, 0), k_id=(-1, -1, 5, 0, -2, -7, 2**30)),
    "all different: same is empty": Problem(((SAME, 1.0), (OTHER, -1.0)), q_id=(1, 2, 3, 4, 5), k_id=cyclic(7, 1)),
    "all same: other is empty": Problem(((OTHER, 1.0), (SAME, -1.0)), q_id=(4,) * 5, k_id=(4,) * 7),
    "some empty": Problem(((SAME, 1.5), (OTHER, -0.5)), q_id=(0, 0, 8, 1, 1), k_id=(0, 1, 0, 1, 0, 1, 0)),
    "two softmaxes of all": Problem(((ALL, -1.0), (ALL, -3.0))),
    "two softmaxes of other": Problem(((OTHER, -1.0), (OTHER, -3.0)), detach=True),
    "same and all": Problem(((SAME, 1.0), (ALL, -1.0))),
    "zero temperature": Problem(((OTHER, 0.0), (SAME_NOT_SELF, 0.0)), (1, 1, 7, 7, 3), q_id=(0,) * 7, k_id=(0,) * 7),
    "large temperature": Problem(((OTHER, -300.0), (SAME, 250.0))),
    "views": Problem(((OTHER, -1.0),), (3, 2, 5, 7, 2), ((0, 0), (2, 1), (0, 1), (0, 0), (2, 1))),
    "views, two softmaxes": Problem(((OTHER, -1.0), (SAME, 1.0)), (2, 3, 5, 7, 2), ((1, 2), (1, 0))),
    "one of each": Problem(((ALL, -1.0),), (1, 1, 1, 1, 1)),
    "one key, in no set": Problem(((OTHER, -1.0),), (1, 1, 5, 1, 2), q_id=(3,) * 5, k_id=(3,)),
    "panels and tiles": Problem(
        ((OTHER, -1.0), (SAME, 0.5)), (1, 1, 67, 301, 17), q_id=cyclic(67, 67), k_id=cyclic(301, 67)
    ),
    "long period": Problem(((OTHER, -1.0),), (1, 1, 131, 157, 33), q_id=cyclic(131, 41), k_id=cyclic(157, 41)),
    "no member in the first tiles": Problem(
        ((SAME_NOT_SELF, 1.0), (OTHER, -1.0)), (1, 1, 9, 601, 8), q_id=(3,) * 8 + (0,), k_id=blocks(601, 200)
    ),
    "negatives in the last tile only": Problem(
        ((OTHER, -1.0),), (1, 1, 9, 601, 8), q_id=(0,) * 9, k_id=blocks(601, 600)
    ),
    "short period": Problem(((OTHER, -1.0),), (1, 1, 131, 157, 33), q_id=cyclic(131, 3), k_id=cyclic(157, 3)),
    "not self": Problem(NOT_SELF, (1, 1, 7, 7, 3), q_id=(0, 1, -1, 1, -3, 0, 2), k_id=(2, 1, -1, 0, -4, 0, 2)),
    "other not self": Problem(((OTHER_NOT_SELF, -2.0),), q_id=(0, -1, 2, 0, 1), inner=True),
    "given self": Problem(NOT_SELF, k_id=(-1, 1, 2, 0, -2, 2, 0), q_self=(3, -1, 2, 6, 1)),
    "given self, positives alone": Problem(NOT_SELF[:1], k_id=(0, 1, 0, 1, 0, 2, 0), q_self=(2, -1, 5, 6, 0)),
    "given self of another id": Problem(NOT_SELF, (2, 2, 5, 7, 3), ((0, 1), (1, 1)), q_self=(1, 2, 0, 0, 6)),
    "given self, in all tiles": Problem(
        NOT_SELF, (1, 1, 67, 301, 17), q_id=draws(67, -2, 4), k_id=draws(301, -2, 4), q_self=draws(67, -1, 301)
    ),
    # Of many classes a panel of queries meets few: most keys need no mask.
    "many classes": Problem(
        ((SAME, 0.5), (OTHER, -1.0)), (1, 1, 67, 301, 17), q_id=draws(67, 0, 500), k_id=draws(301, 0, 500)
    ),
    "many classes, positives alone": Problem(
        ((SAME, 0.5),), (1, 1, 67, 301, 17), q_id=draws(67, 0, 200), k_id=draws(301, 0, 200)
    ),
    "many classes, given self": Problem(
        NOT_SELF, (1, 1, 67, 301, 17), q_id=draws(67, 0, 500), k_id=draws(301, -40, 500), q_self=draws(67, -1, 301)
    ),
    "equal low bits": Problem(
        ((OTHER, -1.0), (SAME, 0.5)), (1, 1, 67, 301, 17), q_id=(5,) * 67, k_id=(5, 1029, 6, 5 - 2**20) * 75 + (2053,)
    ),
}
PROBLEMS |= {
    f"raw rows: {name}": PROBLEMS[name]._replace(normalize=True)
    for name in ("all, inner", "other, detached", "views, two softmaxes", "not self", "given self")
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))


def plain(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """``contrast`` in float64 by the formula, as N x M arrays."""
    q, k, q_id, k_id, tau, *rest = arguments
    return plain_contrast(q.double(), k.double(), tau, ContrastSpec(q_id, k_id, *rest))


def assert_close(actual: Any, expected: Any, dtype: torch.dtype, factor: float = 1.0) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert torch.equal(a.isinf(), e.isinf())
        a, e = a.double().masked_fill(a.isinf(), 0.0), e.double().masked_fill(e.isinf(), 0.0)
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        assert (a - e).abs().le(factor * TOLERANCE[dtype] * scale).all()


def gradients(outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a sum in which every row has a weight of its own, the log-sum-exp of empty sets left out."""
    value, lse = outputs
    g_value, g_lse = randn(*value.shape, seed=5), randn(*lse.shape, seed=6)
    total = (g_value * value).sum() + (g_lse * torch.where(lse == -torch.inf, 0.0, lse)).sum()
    return grad(total, inputs, allow_unused=True, materialize_grads=True)


@problems
@both_dtypes
@both_backends
def test_contrast(backend: str, dtype: torch.dtype, problem: Problem) -> None:
    arguments = problem.arguments(dtype)
    value, lse, _ = operator(f"contrast_{backend}")(*arguments)
    factor = max(1.0, *(abs(t) for _, t in problem.sets))
    assert_close((value, lse), plain(arguments), dtype, factor)


@problems
@both_dtypes
@both_backends
def test_contrast_gradients(backend: str, dtype: torch.dtype, problem: Problem) -> None:
    arguments = problem.arguments(dtype, requires_grad=True)
    mine = gradients(operator(f"contrast_{backend}")(*arguments)[:2], (arguments[0], arguments[1], arguments[4]))
    exact = problem.arguments(dtype)
    q, k, tau = (exact[i].double().requires_grad_() for i in (0, 1, 4))
    true = gradients(plain((q, k, *exact[2:4], tau, *exact[5:])), (q, k, tau))
    assert [g.dtype for g in mine] == [dtype, dtype, torch.float64]
    assert_close(mine, true, dtype, max(10.0, *(t**2 for _, t in problem.sets)))


@both_backends
def test_empty_sets_are_exact(backend: str) -> None:
    """-inf and 0 with zero gradient, also where the row's log-sum-exp receives one (logaddexp sends NaN there)."""
    problem = PROBLEMS["all same: other is empty"]
    arguments = problem.arguments(requires_grad=True)
    value, lse, _ = operator(f"contrast_{backend}")(*arguments)
    assert lse[0].eq(-torch.inf).all()
    assert value[0].eq(0).all()
    for incoming in (1.0, torch.nan):
        total = incoming * lse[0].sum() + 0.0 * value[1].sum()
        found = grad(total, (arguments[0], arguments[1], arguments[4]), retain_graph=True)
        assert all(g.eq(0).all() for g in found)


@pytest.mark.parametrize("n", [1, 5])
@both_backends
def test_no_keys(backend: str, n: int) -> None:
    problem = Problem(((OTHER, -1.0), (SAME, 1.0)), (1, 1, n, 0, 3), q_id=cyclic(n, 2), k_id=())
    arguments = problem.arguments(requires_grad=True)
    value, lse, _ = operator(f"contrast_{backend}")(*arguments)
    assert lse.eq(-torch.inf).all()
    assert value.eq(0).all()
    found = grad(value.sum() + lse.sum(), (arguments[0], arguments[1], arguments[4]))
    assert all(g.eq(0).all() for g in found)
    assert found[1].shape == (1, 0, 3)


@both_backends
def test_strided_and_expanded_arguments(backend: str) -> None:
    problem = PROBLEMS["panels and tiles"]
    q, k, q_id, k_id, tau, *rest = problem.arguments()
    op = operator(f"contrast_{backend}")
    expected = op(q, k, q_id, k_id, tau, *rest)
    strided = [torch.stack([t, t.flip(-1)], -1)[..., 0] for t in (q, k, q_id, k_id, tau)]
    assert not any(t.is_contiguous() for t in strided)
    assert all(torch.equal(a, b) for a, b in zip(op(*strided, *rest), expected, strict=True))
    spread = torch.stack([tau, tau + 1], -1)[:, 0]  # beside each temperature another number
    assert all(torch.equal(a, b) for a, b in zip(op(q, k, q_id, k_id, spread, *rest), expected, strict=True))
    one = q[:, :1].expand_as(q)
    for a, b in zip(op(one, k, q_id, k_id, tau, *rest), op(one.contiguous(), k, q_id, k_id, tau, *rest), strict=True):
        assert torch.equal(a, b)


@both_backends
def test_second_derivatives_of_an_empty_set(backend: str) -> None:
    """They are 0 whatever flows into its lse, -inf."""
    q, k, tau = randn(1, 3, 4).requires_grad_(), randn(1, 5, 4, seed=1), torch.ones(1, dtype=torch.float64)
    ids = torch.tensor([7, 0, 1], dtype=torch.int32), torch.tensor([0, 1, 1, 0, 0], dtype=torch.int32)
    _, lse, _ = operator(f"contrast_{backend}")(q, k, *ids, tau, [SAME], [0], [0], False, False, None, False)
    incoming = randn(1, 1, 3, seed=2).requires_grad_()
    (first,) = grad(lse, q, incoming, create_graph=True)
    second = grad(first.square().sum(), (q, incoming))
    assert not first[0, 0].any()
    assert not second[0][0, 0].any()
    assert second[0].isfinite().all()
    assert second[1][0, 0, 0] == 0
    assert second[1][0, 0, 1:].all()


def test_given_selves_of_every_block() -> None:
    """More queries than one block of them holds."""
    problem = Problem(
        NOT_SELF, (1, 1, 1500, 41, 5), q_id=draws(1500, -2, 4), k_id=draws(41, -2, 4), q_self=draws(1500, -1, 41)
    )
    found, expected = (operator(f"contrast_{name}")(*problem.arguments()) for name in ("cpu", "torch"))
    assert_close(found[:2], expected[:2], torch.float64)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@problems
@both_backends
def test_backward_of_what_is_wanted(backend: str, problem: Problem, wanted: tuple[bool, bool, bool]) -> None:
    arguments = problem.arguments()
    value, _, row_state = operator(f"contrast_{backend}")(*arguments)
    g_value, g_lse = randn(*value.shape, seed=5), randn(*value.shape, seed=6)
    backward, given = operator(f"contrast_backward_{backend}"), (value, row_state, g_value, g_lse)
    all_three = backward(*arguments, *given, True, True, True)
    for mine, full, want in zip(backward(*arguments, *given, *wanted), all_three, wanted, strict=True):
        assert_close([mine], [full if want else full.new_empty(0)], torch.float64, 100.0)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    n, m = (data.draw(st.sampled_from([1, 2, 3, 16, 17, 31, 37, 97, 149]), label=x) for x in "NM")
    d = data.draw(st.sampled_from([1, 2, 3, 7, 16, 19, 33, 64, 65, 128]), label="D")
    every = [ALL, SAME, OTHER, SAME_NOT_SELF, OTHER_NOT_SELF]
    kinds = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=2))
    taus = data.draw(st.lists(st.sampled_from([-30.0, -1.0, 0.0, 0.5, 20.0]), min_size=2, max_size=2))
    period = data.draw(st.sampled_from([1, 2, 8, 33, 1000]), label="period")
    lowest = data.draw(st.sampled_from([0, 0, -2]), label="lowest id")
    ids = [torch.tensor(cyclic(size, period)) + lowest for size in (n, m)]
    if data.draw(st.booleans(), label="shuffled"):
        ids = [i[torch.randperm(len(i), generator=torch.Generator().manual_seed(1))] for i in ids]
    views = data.draw(st.sampled_from([((0, 0),), ((0, 1), (1, 1), (0, 1))]), label="pairs")
    shape = (2, 2, n, m, d)
    flags = data.draw(st.booleans(), label="inner"), data.draw(st.booleans(), label="detach")
    selves = data.draw(st.sampled_from([None, tuple((7 * i) % (m + 1) - 1 for i in range(n))]), label="q_self")
    ids = [tuple(i.tolist()) for i in ids]
    problem = Problem(tuple(zip(kinds, taus, strict=False)), shape, views, *ids, *flags, selves)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), label="dtype")
    for backend in BACKENDS:
        test_contrast(backend, dtype, problem)
        test_contrast_gradients(backend, dtype, problem)


# ---- registration ----------------------------------------------------------------------------------------------------
# opcheck takes seconds per call: every feature once, in ``make test`` the first two. All of its tests hold.
CHECKED = [
    ("cpu", torch.float64, "some empty"),
    ("cpu", torch.float32, "views"),
    ("cpu", torch.float64, "same, inner"),
    ("torch", torch.float32, "some empty"),
    ("cpu", torch.float32, "given self"),
    ("cpu", torch.float64, "raw rows: views, two softmaxes"),
    ("torch", torch.float32, "raw rows: not self"),
    ("cpu_bf16", torch.float32, "views"),
]
checked = pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [pytest.param(*case, marks=() if i < 2 else pytest.mark.exhaustive) for i, case in enumerate(CHECKED)],
)


@checked
@quiet_opcheck
def test_opcheck_contrast(backend: str, dtype: torch.dtype, name: str) -> None:
    arguments = PROBLEMS[name].arguments(dtype, requires_grad=True)
    torch.library.opcheck(operator(f"contrast_{backend}"), arguments)


@pytest.mark.exhaustive
@checked
@quiet_opcheck
def test_opcheck_contrast_backward(backend: str, dtype: torch.dtype, name: str) -> None:
    arguments = PROBLEMS[name].arguments(dtype, requires_grad=True)
    value, _, row_state = (t.detach() for t in operator(f"contrast_{backend}")(*arguments))
    incoming = [randn(*value.shape, seed=i).requires_grad_() for i in (5, 6)]
    arguments = (*arguments, value, row_state, *incoming, True, True, True)
    torch.library.opcheck(operator(f"contrast_backward_{backend}"), arguments)


def as_fake(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)


def assert_like(fakes: tuple[Tensor, ...], reals: tuple[Tensor, ...]) -> None:
    assert [(f.shape, f.dtype, f.stride()) for f in fakes] == [(r.shape, r.dtype, r.stride()) for r in reals]


@problems
@both_dtypes
@both_backends
def test_fakes_of_contrast(backend: str, dtype: torch.dtype, problem: Problem) -> None:
    arguments = problem.arguments(dtype)
    real = operator(f"contrast_{backend}")(*arguments)
    assert_like(contrast.fake(*as_fake(arguments)), real)
    value, lse, row_state = real
    for wanted in ((True, True, True), (True, False, False), (False, True, True)):
        full = (*arguments, value, row_state, value, lse, *wanted)
        reals = operator(f"contrast_backward_{backend}")(*full)
        assert_like(contrast.backward_fake(*as_fake(full)), reals)


@both_dtypes
@pytest.mark.parametrize("case", CACR_ARGUMENTS, ids=str)
def test_fake_of_cacr(case: tuple[int, bool, bool, bool], dtype: torch.dtype) -> None:
    arguments = cacr_arguments(case, dtype, requires_grad=False)
    assert_like(cacr.fake(*as_fake(arguments)), operator("cacr_cpu")(*arguments))


@pytest.mark.parametrize("memory", ["strided", "expanded"])
def test_fakes_of_noncontiguous_inputs(memory: str) -> None:
    """The kernels answer contiguously whatever the strides of their inputs."""
    views = randn(5, 3, 4).transpose(0, 1) if memory == "strided" else randn(1, 5, 4).expand(3, 5, 4)
    arguments = (views, *cacr_arguments(CACR_ARGUMENTS[0], torch.float64, requires_grad=False)[1:])
    assert_like(cacr.fake(*as_fake(arguments)), operator("cacr_cpu")(*arguments))


@quiet_opcheck
def test_opcheck_gradient_of() -> None:
    torch.library.opcheck(operator("gradient_of"), (randn(3, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_()))


@quiet_opcheck
def test_opcheck_outside_backward() -> None:
    torch.library.opcheck(operator("outside_backward"), (randn(3, 4),))


@quiet_opcheck
def test_opcheck_overwrite() -> None:
    torch.library.opcheck(operator("overwrite"), (randn(3, 4), randn(3, 4, seed=1)))


def test_every_operator_is_checked() -> None:
    """A new operator needs an ``opcheck``: here or in the tests of that operator, of a backend, or ``interpreted``.

    The compiled ones behind ``<name>_cuda``, with one more argument, have a namespace of their own.
    """
    found = [name.split(".")[0].split("::") for name in torch._C._dispatch_get_all_op_names()]
    of_tests = ("_toy", "_trial")  # test_backend_table.py, test_self_check.py
    found = [(where, name) for where, name in found if not name.endswith(of_tests)]
    names, compiled = ({name for where, name in found if where == space} for space in (NAMESPACE, COMPILED))
    contrasts = {f"{name}_{backend}" for name in ("contrast", "contrast_backward") for backend, *_ in CHECKED}
    detached = {"detached_keys_cpu", "detached_keys_cpu_bf16", "detached_keys_backward"}
    repulsions = {"repulsion_cpu", "repulsion_cpu_bf16", "repulsion_torch", "repulsion_cuda"}
    triton = {f"{name}_triton" for name in ("cacr", "contrast", "contrast_backward", "detached_keys", "repulsion")}
    cuda = {"cacr", "contrast", "contrast_backward"}
    aligned = {f"aligned{way}_cpu{products}" for way in ("", "_backward") for products in ("", "_bf16")}
    assert compiled == cuda
    assert names == {
        "cacr_cpu",
        "cacr_cpu_bf16",
        "gradient_of",
        "outside_backward",
        "overwrite",
        *aligned,
        *contrasts,
        *detached,
        *repulsions,
        *triton,
        *(f"{name}_cuda" for name in cuda),
    }
