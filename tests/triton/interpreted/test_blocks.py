"""Gradients by blocks of stored coefficients, in Triton's interpreter, against the plain formula in float64.

Collected only under ``TRITON_INTERPRET=1``: ``tests/triton/test_interpreter.py`` starts them. Blocks are small here, so
that there are several along both sides, and the last ones are padded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import testing
from cacr_kernels.backends.triton import blocks, contrast, pairs
from cacr_kernels.cases import Case
from cacr_kernels.operators.registry import operator
from cacr_kernels.types import ALL, OTHER, SAME, SAME_NOT_SELF
from tests.operators.test_ops import Problem, cyclic, randn

from .test_normalize import raw
from .test_operators import check

FORWARD, BACKWARD = operator("contrast_triton"), operator("contrast_backward_triton")
D = 70  # more than a program of gradient_kernel writes there, which is 64
TWO = ((0, 1), (1, 0), (1, 1))
PROBLEMS = {
    "one softmax": Problem(((OTHER, -3.0),), (2, 2, 75, 139, D), TWO, cyclic(75, 5), cyclic(139, 5)),
    "two softmaxes": Problem(((SAME, 1.0), (OTHER, -1.0)), (1, 1, 75, 67, D), q_id=cyclic(75, 3), k_id=cyclic(67, 3)),
    "given self": Problem(((SAME_NOT_SELF, 1.0), (OTHER, -1.0)), (1, 1, 35, 67, D), q_id=cyclic(35, 4),
                          k_id=cyclic(67, 4), q_self=tuple(range(2, 72, 2))),
    "inner product": Problem(((ALL, -2.0),), (1, 1, 37, 71, D), inner=True),
    "weights that are constants": Problem(((ALL, -2.0),), (1, 1, 37, 71, D), detach=True),
    "features of two chunks": Problem(((OTHER, -2.0),), (1, 1, 35, 41, 131), q_id=cyclic(35, 3), k_id=cyclic(41, 3)),
}  # fmt: skip
UNIT = {"tau_pos": 2.0, "tau_neg": 5.0, "normalize": True}
CASES = (
    Case("cacr_loss", {"V": 3, "B": 45, "D": D}, UNIT),
    Case("cacr_loss", {"V": 2, "B": 37, "D": D}, {"tau_neg": 5.0, "pairing": "pooled", "cost": "rbf"}),
    Case("cacr_loss", {"V": 2, "B": 41, "D": D}, {"tau_neg": 5.0, "pairing": "ordered", "reduction": "none"}),
    Case("supervised_cacr_loss", {"B": 67, "D": D, "C": 5}, UNIT, data="near-equal"),
    Case("cacr_queue_loss", {"V": 2, "B": 39, "D": D, "K": 35}, UNIT),
)


@pytest.fixture(params=[64, 8192], ids=["several blocks", "one block"], autouse=True)
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most queries and keys of a block. New arrays hold NaN."""
    monkeypatch.setattr(blocks, "SIDE", request.param)
    new = pairs.SetPairs.empty
    monkeypatch.setattr(pairs.SetPairs, "empty", lambda self, *a, **k: new(self, *a, **k).fill_(torch.nan))
    return int(request.param)


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[blocks.Block]:
    """The blocks that are filled."""
    found: list[blocks.Block] = []
    fill = blocks.fill

    def record(given: Any, tile: Any, block: blocks.Block, *rest: Any) -> None:
        found.append(block)
        rest[0].block.fill_(torch.nan)
        fill(given, tile, block, *rest)

    monkeypatch.setattr(blocks, "fill", record)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name: str, dtype: torch.dtype, filled: list[blocks.Block], side: int) -> None:
    check(PROBLEMS[name], dtype)
    _, _, n, m, _ = PROBLEMS[name].shape
    assert (len(filled) > 1) == (side < max(n, m))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_the_promise(case: Case, dtype: torch.dtype, filled: list[blocks.Block]) -> None:
    assert all(result.ok for result in testing.compare(case, "triton", dtype))
    assert filled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
def test_one_side_alone(dtype: torch.dtype) -> None:
    """The gradient of the queries, of the keys, or of the temperature is that of a call for all three."""
    problem = PROBLEMS["one softmax"]._replace(normalize=True)
    _, _, q_id, k_id, *rest = problem.arguments(dtype)
    q, k = raw(2, 75, D, dtype, 0), raw(2, 139, D, dtype, 1)
    given = q, k, q_id, k_id, *rest
    value, lse, row_state = FORWARD(*given)
    incoming = randn(*value.shape, seed=5), randn(*lse.shape, seed=6)
    every = BACKWARD(*given, value, row_state, *incoming, True, True, True)
    for i in range(3):
        wanted = [i == j for j in range(3)]
        alone = BACKWARD(*given, value, row_state, *incoming, *wanted)
        assert torch.equal(alone[i], every[i])
        assert all(alone[j].numel() == 0 for j in range(3) if j != i)


def test_the_other_way_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities that are formed again give the same gradients, bit by bit rounded as often."""
    arguments = PROBLEMS["two softmaxes"].arguments(torch.float64)
    value, lse, row_state = FORWARD(*arguments)
    given = *arguments, value, row_state, randn(*value.shape, seed=5), randn(*lse.shape, seed=6), True, True, True
    found = BACKWARD(*given)
    monkeypatch.setattr(blocks, "pay", lambda pairs: False)
    for x, y in zip(found, BACKWARD(*given), strict=True):
        assert (x - y).abs().max() <= 1e-14 * y.abs().max()


@pytest.mark.parametrize("lengths", [(1e3, 1e-2), (1e-2, 1e3)], ids=["short keys", "short queries"])
def test_lengths_of_float16_that_are_far_apart(lengths: tuple[float, float]) -> None:
    """A block holds products of both factors, which are taken into the range of float16."""
    q, k = (length * torch.nn.functional.normalize(randn(1, 67, D, seed=i), dim=-1) for i, length in enumerate(lengths))
    q[0, 0], k[0, 0] = 30 * q[0, 0], k[0, 0] / 30
    grads = []
    for dtype in (torch.float16, torch.float64):
        given = (q.half().to(dtype), k.half().to(dtype), None, None, -torch.ones(1, dtype=torch.float64), [ALL], [0],
                 [0], False, False, None, True)  # fmt: skip
        value, _, row_state = FORWARD(*given)
        grads.append(BACKWARD(*given, value, row_state, value * 0 + 1, value * 0, True, True, False)[:2])
    for found, true in zip(*grads, strict=True):
        assert (found - true).abs().max() <= 2 * torch.finfo(torch.float16).eps * true.abs().max()


# ---- which blocks ----------------------------------------------------------------------------------------------------
def plan(N: int, M: int, P: int, D: int = D) -> list[blocks.Block]:
    """All blocks of P pairs of sets, for tiles of 128."""
    shape = functools.partial(pairs_of, D=D)
    return list(blocks.blocks(shape(N, M, P), 128))


def pairs_of(N: int, M: int, P: int, D: int) -> pairs.SetPairs:
    """Sets without data."""
    q, k = torch.empty(1, N, D, device="meta"), torch.empty(1, M, D, device="meta")
    views = torch.zeros(P, dtype=torch.int32)
    norms = (q[..., 0], k[..., 0], None, None, views, views, torch.empty(1), views, views)
    return pairs.SetPairs(q, k, *norms, (ALL,), False, False)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (130, 7000, 3), (8192, 8192, 2), (8193, 20000, 2), (300, 300, 5000)])
def test_blocks_meet_every_pair_once_in_a_bounded_workspace(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SIDE", 8192)
    N, M, P = sizes
    seen = 0
    for block in plan(N, M, P):
        assert block.pairs * block.height * block.width <= 8192 * 8192
        assert block.height % 128 == block.width % 128 == 0
        rows, columns = min(block.height, N - block.i), min(block.width, M - block.j)
        assert block.height - rows < 128
        assert block.width - columns < 128
        seen += rows * columns * min(block.pairs, P - block.p)
    assert seen == N * M * P


def test_no_keys_and_no_queries() -> None:
    for n in (0, 5):
        problem = Problem(((OTHER, -1.0),), (1, 1, n, 5 - n, D), q_id=cyclic(n, 2), k_id=cyclic(5 - n, 2))
        q, k, *rest = problem.arguments(torch.float32)
        value, _, row_state = FORWARD(q, k, *rest)
        found = BACKWARD(q, k, *rest, value, row_state, value, value, True, True, True)
        assert all(g.eq(0).all() for g in found)
        assert (found[0].shape, found[1].shape) == (q.shape, k.shape)
