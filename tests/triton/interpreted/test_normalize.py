"""Unit rows inside the Triton kernels, in Triton's interpreter, against unit rows and the plain formula in float64.

Collected only under ``TRITON_INTERPRET=1``: ``tests/triton/test_interpreter.py`` starts them. The interpreter rounds
twice in an FMA: differences of nearly equal rows are for the tests that execute PTX.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from cacr_kernels import cacr_loss
from cacr_kernels.backends.triton import pairs
from cacr_kernels.backends.triton.launch import cdiv
from cacr_kernels.operators.cacr import loss_and_parts
from cacr_kernels.operators.contrast import plain_contrast
from cacr_kernels.operators.registry import operator
from cacr_kernels.reference import unit_rows
from cacr_kernels.types import ALL, OTHER, OTHER_NOT_SELF, SAME, SAME_NOT_SELF, CACROptions, ContrastSpec
from tests.covering import covering
from tests.operators.test_ops import Problem, cyclic

FORWARD, BACKWARD = operator("contrast_triton"), operator("contrast_backward_triton")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ZERO, LONG, SHORT, TINY = 3, 0, 2, 1  # rows of lengths that are not ordinary
LENGTHS = {
    torch.float64: (1e10, 1e-17, 1e-8),
    torch.float32: (1e10, 1e-17, 1e-8),
    torch.float16: (30.0, 0.1, 0.1),  # none is shorter than 1e-12; others: test_lengths_of_float16_that_are_far_apart
    torch.bfloat16: (1e10, 1e-15, 1e-8),
}
ROUNDED_ONCE = torch.finfo(torch.float16).eps / torch.finfo(torch.float32).eps
GRADIENT_EPS = dict.fromkeys(LENGTHS, 8.0) | {torch.float16: ROUNDED_ONCE}
PROBLEMS = {
    "one softmax": Problem(((OTHER, -3.0),), (2, 1, 35, 71, 33), ((0, 0), (1, 0)), cyclic(35, 5), cyclic(71, 5)),
    "chunks of features": Problem(((SAME, 1.0), (OTHER, -2.0)), (1, 1, 35, 41, 131), ((0, 0),), cyclic(35, 3),
                                  cyclic(41, 3)),
    "inner product": Problem(((ALL, -2.0),), (1, 1, 19, 37, 40), inner=True),
    "keys that are the queries": Problem(((SAME_NOT_SELF, 1.0), (OTHER_NOT_SELF, -1.0)), (2, 2, 39, 39, 16),
                                         ((0, 1), (1, 0)), cyclic(39, 4), cyclic(39, 4)),
    "rows wider than a tile": Problem(((OTHER, -1.0),), (1, 1, 5, 7, 1031), q_id=(0, 1, 2, 0, 1)),
}  # fmt: skip


def raw(views: int, rows: int, D: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of lengths about 1, from 0.1 to 10, and four others."""
    g = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(views, rows, D, generator=g, dtype=torch.float64), dim=-1)
    x = u * 10.0 ** (2.0 * torch.rand(views, rows, 1, generator=g, dtype=torch.float64) - 1.0)
    for row, length in zip((LONG, SHORT, TINY, ZERO), (*LENGTHS[dtype], 0.0), strict=True):
        x[:, row] = length * u[:, row]
    return x.to(dtype)


def largest(x: Tensor, by_row: bool) -> Tensor:
    return x.abs().amax(-1, keepdim=True) if by_row else x.abs().max()


def assert_promise(found: Tensor, eager: Tensor, true: Tensor, by_row: bool = False, eps: float = 8.0) -> None:
    """At most twice the error of the same formula in the type of the arithmetic, and 8 eps.

    In float64 the truth is no better than the formula: there it is 64 eps.
    """
    eps = 64.0 if eager.dtype == torch.float64 else eps
    scale = largest(true, by_row).clamp(min=torch.finfo(torch.float64).tiny)
    error, yardstick = (((x.double() - true) / scale).abs().max().item() for x in (found, eager))
    assert error <= 2.0 * yardstick + eps * torch.finfo(eager.dtype).eps, (error, yardstick)


def assert_gradient(found: Tensor, eager: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    """Row by row, since a short row has a large gradient. None for rows shorter than 1e-12.

    In float16 coefficients of keys of all lengths share a range, and are rounded once.
    """
    assert found.dtype == eager.dtype
    assert_promise(found, eager, true, by_row=True, eps=GRADIENT_EPS[dtype])
    assert found[:, ZERO].eq(0).all()
    assert found[:, SHORT].eq(0).all() == (LENGTHS[dtype][1] < 1e-12)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def contrast_of_unit_rows(problem: Problem, arguments: tuple[Any, ...], incoming: Any, dtype: torch.dtype) -> Any:
    """Value, lse and the gradients of q, k and tau."""
    q, k, q_id, k_id, tau, *rest = arguments
    q, tau = q.to(dtype).requires_grad_(), tau.detach().requires_grad_()
    k = None if k is None else k.to(dtype).requires_grad_()
    spec = ContrastSpec(q_id, q_id if k is None else k_id, *rest[:5])
    units = unit_rows(q), None if k is None else unit_rows(k)
    value, lse = plain_contrast(units[0], units[0] if units[1] is None else units[1], tau, spec)
    inputs = (q, tau) if k is None else (q, k, tau)
    return value, lse, grad([value, lse], inputs, [g.to(value.dtype) for g in incoming])


def check(problem: Problem, dtype: torch.dtype, symmetric: bool = False) -> None:
    """Value, lse and all gradients."""
    _, _, q_id, k_id, *rest = problem.arguments(dtype)
    vq, vk, n, m, d = problem.shape
    q, k = raw(vq, n, d, dtype, 0), None if symmetric else raw(vk, m, d, dtype, 1)
    arguments = q, k, q_id, None if symmetric else k_id, *rest[:-1], True
    value, lse, row_state = FORWARD(*arguments)
    incoming = [torch.randn(value.shape, generator=torch.Generator().manual_seed(i)).double() for i in (5, 6)]
    of_q, of_k, of_tau = BACKWARD(*arguments, value, row_state, *incoming, True, True, True)
    found = [of_q, of_tau] if symmetric else [of_q, of_k, of_tau]
    eager, true = (contrast_of_unit_rows(problem, arguments, incoming, t) for t in (arithmetic(dtype), torch.float64))
    for x, y, z in zip((value, lse), eager[:2], true[:2], strict=True):
        assert_promise(x, y, z)
    for x, y, z in zip(found[:-1], eager[2][:-1], true[2][:-1], strict=True):
        assert_gradient(x, y, z, dtype)
    assert_promise(of_tau, eager[2][-1].to(arithmetic(dtype)), true[2][-1])


@covering({"problem": {name: name for name in PROBLEMS}, "dtype": DTYPES})
def test_contrast(problem: str, dtype: torch.dtype) -> None:
    check(PROBLEMS[problem], dtype, symmetric=problem == "keys that are the queries")


def test_lengths_of_float16_that_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients share the range of float16: of lengths 1e5 apart they keep its own precision."""
    monkeypatch.setitem(LENGTHS, torch.float16, (1e3, 1e-2, 1e-2))
    check(PROBLEMS["inner product"], torch.float16)


@pytest.mark.parametrize("size", [120.0, 4e4])
@pytest.mark.parametrize("features", [64, 160])
def test_long_rows_of_float16(features: int, size: float) -> None:
    """Their factors are small: what makes up for that does not meet the coefficients of rows that do not count."""
    g = torch.Generator().manual_seed(0)
    z = (size * torch.randn(2, 33, features, generator=g).sign()).half().requires_grad_()
    exact = z.detach().double().requires_grad_()
    for name, x in (("triton", z), ("reference", exact)):
        (cacr_loss(x, tau_neg=0.4, normalize=True, backend=name) * 3e4).backward()
    assert z.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=0, atol=2e-3 * exact.grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_several_splits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the keys and of the queries: gradients become those of raw rows once, after their sum."""
    one_block = lambda self, programs, length, block, result_bytes: pairs.Split(block, max(1, cdiv(length, block)))  # noqa: E731
    monkeypatch.setattr(pairs.SetPairs, "split", one_block)
    check(PROBLEMS["one softmax"], dtype)
    test_detached_keys(False, dtype)


@covering({"case": {f"{p}, rbf={r}": (p, r) for p, r in ((0, False), (1, True), (2, False), (2, True))},
           "dtype": DTYPES})  # fmt: skip
def test_cacr(case: tuple[int, bool], dtype: torch.dtype) -> None:
    views, numbers = raw(3, 11, 19, dtype, 2), torch.tensor([1.5, 2.5, 0.7, 1.3, 2.0], dtype=torch.float64)
    loss, _, of_views, of_numbers = operator("cacr_triton")(
        views, numbers, 0.0, 0.0, 0.0, 0.0, *case, 0.0, True, True, True
    )
    results = []
    for t in (arithmetic(dtype), torch.float64):
        x, y = views.to(t).requires_grad_(), numbers.clone().requires_grad_()
        expected, _ = loss_and_parts(unit_rows(x), y, CACROptions(0.0, 0.0, 0.0, 0.0, *case, 0.0, False))
        results.append((expected, *grad(expected, (x, y))))
    eager, true = results
    assert_promise(loss, eager[0], true[0])
    assert_gradient(of_views, eager[1], true[1], dtype)
    assert_promise(of_numbers[:2], eager[2][:2].to(eager[0].dtype), true[2][:2])


@covering({"inner": {"costs": False, "inner product": True}, "dtype": DTYPES})
def test_detached_keys(inner: bool, dtype: torch.dtype) -> None:
    """Means and spreads are of unit keys."""
    q, k = raw(2, 9, 70, dtype, 3), raw(1, 83, 70, dtype, 4)
    arguments = q, k, None, None, torch.tensor([-2.0], dtype=torch.float64), [ALL], [1, 0], [0, 0], inner
    found = operator("detached_keys_triton")(*arguments, False, False, True, True, True)
    results = []
    for t in (arithmetic(dtype), torch.float64):
        x, y = unit_rows(q.to(t))[[1, 0]], unit_rows(k.to(t))[[0, 0]]
        c = -2 * x @ y.mT if inner else x.square().sum(-1)[..., None] + y.square().sum(-1)[:, None] - 2 * x @ y.mT
        w = (-2 * c).softmax(-1)
        value = (w * c).sum(-1)
        centred = c - value[..., None]
        moments = (w * centred) @ y, (w * centred.square()).sum(-1)
        results.append((value, (-2 * c).logsumexp(-1), w @ y, *moments))
    value, lse, means, variance = found
    names = "value", "lse", "mean", "spread", "variance"
    for name, x, y, z in zip(names, (value[0], lse[0], *means, variance[0]), *results, strict=True):
        moment = name in ("spread", "variance")  # a small difference of two, in units of which eps is more
        assert_promise(x, y, z, eps=32.0 if moment else 8.0)


def test_the_shortest_row_that_becomes_a_unit_vector() -> None:
    """One of 1e-12 has a gradient; of shorter ones the costs are those of the shorter vectors."""
    q = torch.zeros(1, 4, 3, dtype=torch.float64)
    q[0, :, 0] = torch.tensor([1e-12, 0.999e-12, 5e-13, 2.0], dtype=torch.float64)
    k = raw(1, 7, 3, torch.float64, 1)
    arguments = q, k, None, None, -torch.ones(1, dtype=torch.float64), [ALL], [0], [0], False, False, None, True
    value, lse, row_state = FORWARD(*arguments)
    true, _ = plain_contrast(unit_rows(q), unit_rows(k), arguments[4], ContrastSpec(None, None, [ALL], [0], [0]))
    torch.testing.assert_close(value, true, rtol=1e-14, atol=0)
    of_q, _, _ = BACKWARD(*arguments, value, row_state, value * 0 + 1, lse * 0, True, True, True)
    assert of_q.ne(0).any(-1).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_rows_show(bad: float) -> None:
    """In every row that sees them, and in no other."""
    q, k = raw(1, 5, 3, torch.float32, 0), raw(1, 7, 3, torch.float32, 1)
    for x, seen in ((q, [True, False, False, False, False]), (k, [True] * 5)):
        changed = x.clone()
        changed[0, 0, 1] = bad
        given = (changed, k) if x is q else (q, changed)
        for inner in (False, True):
            arguments = *given, None, None, -torch.ones(1, dtype=torch.float64), [ALL], [0], [0], inner, False, None
            value, lse, row_state = FORWARD(*arguments, True)
            assert value[0, 0].isnan().tolist() == seen
            assert lse[0, 0].isnan().tolist() == seen
            grads = BACKWARD(*arguments, True, value, row_state, value * 0 + 1, lse * 0, True, True, False)
            assert (grads[0] if x is q else grads[1])[0, 0].isnan().any()
