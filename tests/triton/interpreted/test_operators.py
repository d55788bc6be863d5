"""The operators of the Triton backend in Triton's interpreter, against the plain formula in float64.

Collected only under ``TRITON_INTERPRET=1``: ``tests/triton/test_interpreter.py`` starts them. bfloat16 is multiplied in
float32 here, and TF32 is IEEE: what compiled kernels do with those is for the tests that execute their PTX.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from cacr_kernels.operators import cacr, contrast, detached_keys, repulsion
from cacr_kernels.operators.registry import operator
from cacr_kernels.reference import unit_rows
from tests.covering import covering
from tests.operators import test_detached_keys, test_ops, test_repulsion
from tests.operators.test_ops import PROBLEMS, Problem, assert_close, assert_like, cyclic, gradients, plain, randn

FORWARD, BACKWARD = operator("contrast_triton"), operator("contrast_backward_triton")
DETACHED_KEYS = operator("detached_keys_triton")
LARGE = ("panels and tiles", "long period", "no member in the first tiles", "negatives in the last tile only",
         "short period")  # fmt: skip
SMALL = {name: problem for name, problem in PROBLEMS.items() if name not in LARGE}
SYMMETRIC = Problem(((test_ops.SAME_NOT_SELF, 2.0), (test_ops.OTHER, -1.0)), (1, 1, 39, 39, 5), q_id=cyclic(39, 4))
CHUNKS = Problem(((test_ops.SAME, 1.0), (test_ops.OTHER, -1.0)), (2, 2, 35, 41, 131), ((0, 1), (1, 0)), cyclic(35, 3),
                 cyclic(41, 3))  # fmt: skip
WIDE = Problem(((test_ops.OTHER, -1.0),), (1, 1, 3, 5, 1031), q_id=(0, 1, 2), k_id=(0, 1, 2, 0, 1))
MORE = {"chunks of features": CHUNKS, "1031 features": WIDE, "panels and tiles": PROBLEMS["panels and tiles"]}
# All features of a tile, and rows for more than one, of which the last begins in the one before. Some sets are empty.
WHOLE = {
    "whole tiles": Problem(((test_ops.OTHER, -1.0),), (2, 2, 33, 45, 64), ((0, 1), (1, 0)), cyclic(33, 3),
                           cyclic(45, 3)),
    "whole tiles, empty sets": Problem(((test_ops.SAME, 2.0), (test_ops.OTHER, -1.0)), (1, 1, 33, 39, 32),
                                       q_id=(*cyclic(30, 2), 7, 8, 9), k_id=(0,) * 20 + (1,) * 19),
    "whole tiles, nothing but empty sets": Problem(((test_ops.OTHER, -1.0),), (1, 1, 32, 41, 64), q_id=(0,) * 32,
                                                   k_id=(0,) * 41),
    "whole tiles, one set twice": Problem(((test_ops.ALL, 1.0), (test_ops.ALL, -1.0)), (1, 1, 43, 35, 64),
                                          normalize=True),
}  # fmt: skip


def check(problem: Problem, dtype: torch.dtype) -> None:
    """Values, log-sum-exps and all gradients."""
    arguments = problem.arguments(dtype, requires_grad=True)
    value, lse, _ = FORWARD(*arguments)
    factor = max(1.0, *(abs(t) for _, t in problem.sets))
    exact = torch.float32 if dtype == torch.float16 else dtype
    assert_close((value.detach(), lse.detach()), plain(arguments), exact, factor / 10)
    q, k, _, _, tau, *_ = arguments
    given = (q.detach(), k.detach(), *arguments[2:4], tau.detach(), *arguments[5:])
    g_value, g_lse = randn(*value.shape, seed=5), randn(*lse.shape, seed=6)
    _, _, weights = FORWARD(*given)
    mine = BACKWARD(*given, value.detach(), weights, g_value, g_lse, True, True, True)
    wide = tuple(t.detach().double().requires_grad_() for t in (q, k, tau))
    true = gradients(plain((wide[0], wide[1], *arguments[2:4], wide[2], *arguments[5:])), wide)
    assert [g.dtype for g in mine] == [exact, exact, torch.float64]
    assert_gradients(mine, true, dtype, max(1.0, *(t**2 for _, t in problem.sets)) / 10)


def assert_gradients(mine: Any, true: Any, dtype: torch.dtype, factor: float) -> None:
    """Those of rows before that of tau; in float16 what multiplies rows is rounded once to it."""
    if dtype == torch.float16:
        for a, b in zip(mine[:-1], true[:-1], strict=True):
            assert_rounded_once(a, b, factor)
        mine, true, dtype = mine[-1:], true[-1:], torch.float32
    assert_close(mine, true, dtype, factor)


def assert_rounded_once(found: Tensor, true: Tensor, factor: float = 1.0) -> None:
    """Within an eps of float16 of the largest entry."""
    assert found.shape == true.shape
    most = true.abs().max().item() if true.numel() else 0.0
    assert (found - true).abs().le(max(1.0, factor) * torch.finfo(torch.float16).eps * most).all()


@pytest.mark.parametrize("problem", (SMALL | MORE | WHOLE).values(), ids=list(SMALL | MORE | WHOLE))
def test_float64(problem: Problem) -> None:
    check(problem, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["same not self", "some empty", "two softmaxes of other", "large temperature",
                                  "zero temperature", "views, two softmaxes"])  # fmt: skip
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    check(PROBLEMS[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", list(WHOLE))
def test_whole_tiles(name: str, dtype: torch.dtype) -> None:
    """Without a mask on any load: with it the sums are the same, but for their order."""
    check(WHOLE[name], dtype)


@pytest.mark.parametrize("length", [1e4, 1e12])
def test_long_rows_that_do_not_count_in_a_whole_tile(length: float) -> None:
    """Where no key is in the set, none that a tile has for the second time is, however large the similarities."""
    q, k, *rest = WHOLE["whole tiles, nothing but empty sets"].arguments(torch.float32)
    value, lse, (_, sum_e, sum_ez) = FORWARD(length * q, length * k, *rest)
    assert not value.any()
    assert lse.eq(-torch.inf).all()
    assert not sum_e.any()
    assert not sum_ez.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_chunks_of_features(dtype: torch.dtype) -> None:
    check(CHUNKS, dtype)


def test_coefficients_are_taken_into_the_range_of_float16() -> None:
    """Gradients of very different rows, and of weights far below that range."""
    problem = Problem(((test_ops.OTHER, -2.0),), (1, 1, 33, 129, 16), q_id=cyclic(33, 7), k_id=cyclic(129, 7))
    q, k, *rest = problem.arguments(torch.float16)
    value, _, weights = FORWARD(q, k, *rest)
    g_value = 1e-9 * randn(*value.shape, seed=5)
    mine = BACKWARD(q, k, *rest, value, weights, g_value, 0 * g_value, True, True, False)
    single = BACKWARD(q.float(), k.float(), *rest, value, weights, g_value, 0 * g_value, True, True, False)
    for a, b in zip(mine[:2], single[:2], strict=True):
        assert_rounded_once(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
def test_keys_that_are_the_queries(dtype: torch.dtype) -> None:
    """One gradient, the sum of both; also where only the temperature is wanted."""
    q, _, ids, _, tau, *rest = SYMMETRIC.arguments(dtype)
    value, lse, weights = FORWARD(q, None, ids, None, tau, *rest)
    same = FORWARD(q, q, ids, ids, tau, *rest)
    assert torch.equal(value, same[0])
    assert torch.equal(lse, same[1])
    g_value, g_lse = randn(*value.shape, seed=5), randn(*value.shape, seed=6)
    grads = g_value, g_lse, True, True, True
    of_q, nothing, of_tau = BACKWARD(q, None, ids, None, tau, *rest, value, weights, *grads)
    two_q, two_k, two_tau = BACKWARD(q, q, ids, ids, tau, *rest, value, weights, *grads)
    assert nothing.shape == (0,)
    assert_gradients([of_q, of_tau], [two_q + two_k, two_tau], dtype, 0.1)
    only = BACKWARD(q, None, ids, None, tau, *rest, value, weights, g_value, g_lse, False, False, True)
    assert torch.equal(only[2], of_tau)
    assert only[0].shape == (0,)


def test_near_positives_are_differences() -> None:
    """1e-6 of a cost that is 1e-6 of the norms."""
    k = randn(1, 45, 24, dtype=torch.float32)
    q = k[:, :33] + 1e-3 * randn(1, 33, 24, seed=1, dtype=torch.float32)
    ids = torch.arange(45, dtype=torch.int32)
    arguments = (q, k, ids[:33], ids, torch.ones(1, dtype=torch.float64), [test_ops.SAME], [0], [0], False, False)
    value, _, _ = FORWARD(*arguments, None, False)
    true = (q.double() - k[:, :33].double()).square().sum(-1)
    assert ((value[0] - true).abs() <= 1e-6 * true).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "tau"])
def test_bad_numbers_show(where: str, bad: float) -> None:
    """In every row that sees them, and in no other value."""
    q, k, q_id, k_id, tau, *rest = PROBLEMS["panels and tiles"].arguments(torch.float32)
    x = {"q": q, "k": k, "tau": tau}[where]
    x.view(-1)[0] = bad
    value, lse, weights = FORWARD(q, k, q_id, k_id, tau, *rest)
    seen = torch.zeros(2, 1, q.shape[1], dtype=torch.bool)
    if where == "q":
        seen[:, :, 0] = True
    elif where == "k":
        seen[0], seen[1, :, 0] = q_id != k_id[0], True
    else:
        seen[0] = True
    assert torch.equal(value.isnan(), seen)
    assert torch.equal(lse.isnan(), seen)
    found = BACKWARD(q, k, q_id, k_id, tau, *rest, value, weights, value * 0 + 1, value * 0, True, True, True)
    assert all(g.isnan().any() for g in found)


def test_empty_sets_are_exact() -> None:
    """-inf and 0 with zero gradient, whatever arrives."""
    q, k, *rest = PROBLEMS["all same: other is empty"].arguments(torch.float32)
    value, lse, weights = FORWARD(q, k, *rest)
    assert lse[0].eq(-torch.inf).all()
    assert value[0].eq(0).all()
    g = torch.zeros_like(value)
    g[0] = torch.nan
    assert all(x.eq(0).all() for x in BACKWARD(q, k, *rest, value, weights, g, g, True, True, True))


@pytest.mark.parametrize("n", [0, 5])
def test_no_keys_and_no_queries(n: int) -> None:
    shape = (1, 1, n, 5 - n, 3)
    problem = Problem(((test_ops.OTHER, -1.0), (test_ops.SAME, 1.0)), shape, q_id=cyclic(n, 2), k_id=cyclic(5 - n, 2))
    q, k, *rest = problem.arguments(torch.float32)
    value, lse, weights = FORWARD(q, k, *rest)
    assert lse.eq(-torch.inf).all()
    assert value.eq(0).all()
    found = BACKWARD(q, k, *rest, value, weights, value, value, True, True, True)
    assert all(g.eq(0).all() for g in found)
    assert found[1].shape == k.shape


def test_strided_arguments_and_the_same_bits_again() -> None:
    q, k, q_id, k_id, tau, *rest = PROBLEMS["views, two softmaxes"].arguments(torch.float32)
    expected = FORWARD(q, k, q_id, k_id, tau, *rest)
    strided = [torch.stack([t, t.flip(-1)], -1)[..., 0] for t in (q, k, q_id, k_id, tau)]
    assert not any(t.is_contiguous() for t in strided)
    assert all(torch.equal(a, b) for a, b in zip(FORWARD(*strided, *rest), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fakes(dtype: torch.dtype) -> None:
    arguments = PROBLEMS["views, two softmaxes"].arguments(dtype)
    fake = test_ops.as_fake(arguments)
    real = FORWARD(*arguments)
    assert_like(contrast.fake(*fake), real)
    value, lse, weights = real
    full = (*arguments, value, weights, value, lse, True, True, True)
    assert_like(contrast.backward_fake(*test_ops.as_fake(full)), BACKWARD(*full))
    detached = (*test_detached_keys.PROBLEMS["views"].arguments(dtype), True, True)
    assert_like(detached_keys.fake(*test_ops.as_fake(detached)), DETACHED_KEYS(*detached))
    views = (randn(3, 5, 4, dtype=dtype), None, 0.7, 1.3, 0.9, 1.1, 0, False, 2.0, False, True, False)
    assert_like(cacr.fake(*test_ops.as_fake(views)), operator("cacr_triton")(*views))
    gathered = (*test_repulsion.tensors(test_repulsion.SMALL, dtype), 2, True, True, True, True)
    assert_like(repulsion.fake(*test_ops.as_fake(gathered)), operator("repulsion_triton")(*gathered))


# ---- detached keys --------------------------------------------------------------------------------------------------
def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@covering({"problem": test_detached_keys.PROBLEMS, "dtype": {"float64": torch.float64, "float16": torch.float16}})
def test_of_detached_keys(problem: test_detached_keys.Problem, dtype: torch.dtype) -> None:
    arguments = problem.arguments(dtype)
    value, lse, means, variance = DETACHED_KEYS(*arguments, True, True)
    true = expected_detached_keys(problem, dtype)
    exact = torch.float32 if dtype == torch.float16 else dtype
    factor = max(1.0, abs(problem.tau)) / 10
    assert_close([value, lse], true[:2], exact, factor)
    if dtype == torch.float16 and not variance.numel():
        assert_rounded_once(means[0], true[2])
    else:
        assert_close([means[0]], [true[2]], exact, factor)
    if variance.numel():
        assert_close([problem.tau * means[1], variance], [problem.tau * true[3], true[4]], exact, factor**2 * 100)


def expected_detached_keys(problem: test_detached_keys.Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Value, lse, mean, spread and variance by the definition."""
    q, k, q_id, k_id, tau, _, q_index, k_index, inner, *_ = map(wide, problem.arguments(dtype))
    q, k = (unit_rows(q), unit_rows(k)) if problem.normalize else (q, k)
    q, k = q[q_index], k[k_index]
    c = -2 * q @ k.mT if inner else torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square()
    inside = torch.ones_like(c, dtype=torch.bool) if q_id is None else (q_id[:, None] != k_id).expand_as(c)
    logit = torch.where(inside, tau * c, -torch.inf)
    lse = logit.logsumexp(-1)
    w = torch.where(inside, (logit - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp(), 0.0)
    value = (w * c).sum(-1)
    centred = torch.where(inside, c - value[..., None], 0.0)
    return value[None], lse[None], w @ k, (w * centred) @ k, (w * centred.square()).sum(-1)[None]


# ---- repulsion -------------------------------------------------------------------------------------------------------
@covering(
    {
        "pairing": {"unordered": 0, "ordered": 1, "pooled": 2},
        "dtype": {"float64": torch.float64, "float16": torch.float16},
        "normalize": {"unit": True, "as they are": False},
    }
)
def test_of_repulsion(pairing: int, dtype: torch.dtype, normalize: bool) -> None:
    for shape in (test_repulsion.SMALL, test_repulsion.Shape(2, 19, 45, 7)):
        test_repulsion.check("triton", test_repulsion.tensors(shape, dtype), pairing, normalize)


# ---- autograd --------------------------------------------------------------------------------------------------------
def test_opcheck() -> None:
    arguments = PROBLEMS["some empty"].arguments(torch.float64, requires_grad=True)
    torch.library.opcheck(FORWARD, arguments)
    value, _, weights = (t.detach() for t in FORWARD(*arguments))
    incoming = [randn(*value.shape, seed=i).requires_grad_() for i in (5, 6)]
    quick = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(BACKWARD, (*arguments, value, weights, *incoming, True, True, True), **quick)
    detached = list(test_detached_keys.PROBLEMS["other"].arguments(torch.float64))
    for i in (0, 4):
        detached[i] = detached[i].requires_grad_()
    torch.library.opcheck(DETACHED_KEYS, (*detached, True, True), **quick)
    views = test_ops.cacr_arguments(test_ops.CACR_ARGUMENTS[0], torch.float64, requires_grad=True)
    torch.library.opcheck(operator("cacr_triton"), views, **quick)
    gathered = test_repulsion.tensors(test_repulsion.SMALL, requires_grad=True)
    torch.library.opcheck(operator("repulsion_triton"), (*gathered, 0, True, True, True, True), **quick)
    nothing = test_ops.with_numbers(test_ops.cacr_arguments((0, False, False, False), torch.float64, False))
    torch.library.opcheck(operator("cacr_triton"), nothing, **quick)  # no two outputs are one tensor
    torch.library.opcheck(BACKWARD, (*arguments, value, weights, *incoming, False, False, False), **quick)


def test_second_derivatives() -> None:
    from cacr_kernels import cacr_loss

    def penalty(backend: str) -> Tensor:
        z = randn(2, 5, 3).requires_grad_()
        (first,) = grad(cacr_loss(z, backend=backend), z, create_graph=True)
        (second,) = grad(first.square().sum() + first.sum(), z)
        return second

    torch.testing.assert_close(penalty("triton"), penalty("reference"), rtol=0, atol=1e-12)
