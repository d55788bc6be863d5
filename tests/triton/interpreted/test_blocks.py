"""Gradients by blocks of stored coefficients, in Triton's interpreter, against the plain formula in float64.

Collected only under ``TRITON_INTERPRET=1``: ``tests/triton/test_interpreter.py`` starts them. Blocks are small here, so
that there are several along both sides, and the last ones are padded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cacr_kernels.backends.triton import blocks, pairs, table
from cacr_kernels.cases import Case
from cacr_kernels.operators.registry import operator
from cacr_kernels.types import ALL, OTHER, OTHER_NOT_SELF, SAME, SAME_NOT_SELF
from tests.agreement import assert_within_budget
from tests.operators.test_ops import Problem, cyclic, gradients, plain, randn

from .test_normalize import arithmetic, assert_gradient, contrast_of_unit_rows, raw
from .test_normalize import check as check_of_raw_rows
from .test_operators import assert_gradients, check

FORWARD, BACKWARD = operator("contrast_triton"), operator("contrast_backward_triton")
D = 70  # more than a program of gradient_kernel writes there, which is 64
TWO = ((0, 1), (1, 0), (1, 1))
PROBLEMS = {
    "one softmax": Problem(((OTHER, -3.0),), (2, 2, 35, 71, D), TWO, cyclic(35, 5), cyclic(71, 5)),
    "two softmaxes": Problem(((SAME, 1.0), (OTHER, -1.0)), (1, 1, 45, 37, D), q_id=cyclic(45, 3), k_id=cyclic(37, 3)),
    "given self": Problem(((SAME_NOT_SELF, 1.0), (OTHER, -1.0)), (1, 1, 35, 67, D), q_id=cyclic(35, 4),
                          k_id=cyclic(67, 4), q_self=tuple(range(2, 72, 2))),
    "inner product": Problem(((ALL, -2.0),), (1, 1, 37, 71, D), inner=True),
    "weights that are constants": Problem(((ALL, -2.0),), (1, 1, 37, 71, D), detach=True),
    "features of two chunks": Problem(((OTHER, -2.0),), (1, 1, 35, 41, 131), q_id=cyclic(35, 3), k_id=cyclic(41, 3)),
}  # fmt: skip
TAUS = {"tau_pos": 2.0, "tau_neg": 5.0}
UNIT = TAUS | {"normalize": True}
CASES = (
    Case("cacr_loss", {"V": 3, "B": 35, "D": D}, UNIT),
    Case("cacr_loss", {"V": 2, "B": 37, "D": D}, TAUS | {"pairing": "pooled", "cost": "rbf"}),
    Case("cacr_loss", {"V": 2, "B": 41, "D": D}, TAUS | {"pairing": "ordered", "reduction": "none"}),
    Case("supervised_cacr_loss", {"B": 41, "D": D, "C": 5}, UNIT, data="near-equal"),
    Case("cacr_queue_loss", {"V": 2, "B": 39, "D": D, "K": 35}, UNIT),
)
TURNS = (torch.float16, torch.float16, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, which serve all types here. New arrays hold NaN."""
    monkeypatch.setattr(blocks, "SIDE", 32)
    monkeypatch.setattr(blocks, "has_blocks", lambda precision: True)
    new = pairs.SetPairs.empty
    monkeypatch.setattr(pairs.SetPairs, "empty", lambda self, *a, **k: new(self, *a, **k).fill_(torch.nan))


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


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name: str, filled: list[blocks.Block]) -> None:
    check(PROBLEMS[name], torch.float64)
    assert len(filled) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_raw_rows(dtype: torch.dtype, filled: list[blocks.Block]) -> None:
    """Of lengths 0.1 to 10, and others: both factors of what a block holds count."""
    check_of_raw_rows(PROBLEMS["one softmax"], dtype)
    assert len(filled) > 3


def test_blocks_of_unequal_sizes(filled: list[blocks.Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one along each side has fewer tiles, and fewer sums of them."""
    monkeypatch.setattr(blocks, "SIDE", 64)
    check(Problem(((ALL, -1.0),), (1, 1, 71, 69, D)), torch.float64)
    assert {(block.height, block.width) for block in filled} == {(64, 64), (64, 32), (32, 64), (32, 32)}


@pytest.mark.parametrize("name", ["one softmax", "two softmaxes"])
def test_one_block(name: str, filled: list[blocks.Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all pairs of sets."""
    monkeypatch.setattr(blocks, "SIDE", 8192)
    check(PROBLEMS[name], torch.float32)
    assert [block.pairs for block in filled] == [len(PROBLEMS[name].pairs)]


@pytest.mark.parametrize(("case", "dtype"), list(zip(CASES, TURNS, strict=True)), ids=[case.name for case in CASES])
def test_within_the_promise(case: Case, dtype: torch.dtype, filled: list[blocks.Block]) -> None:
    assert_within_budget(case, "triton", dtype, draws=1)
    assert filled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
def test_one_side_alone(dtype: torch.dtype) -> None:
    """The gradient of the queries, of the keys, or of the temperature is that of a call for all three."""
    problem = PROBLEMS["one softmax"]._replace(normalize=True)
    _, _, q_id, k_id, *rest = problem.arguments(dtype)
    q, k = raw(2, 35, D, dtype, 0), raw(2, 71, D, dtype, 1)
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


# ---- one set, whose rows are queries and keys ------------------------------------------------------------------------
ONE_SET = {
    "one softmax": Problem(((OTHER, -3.0),), (1, 1, 107, 107, D), q_id=cyclic(107, 5)),
    "two softmaxes": Problem(((SAME_NOT_SELF, 1.0), (OTHER, -1.0)), (1, 1, 107, 107, D), q_id=cyclic(107, 4)),
    "one set twice": Problem(((OTHER, 2.0), (OTHER, 1.0)), (1, 1, 75, 75, D), q_id=cyclic(75, 6)),
    "empty sets": Problem(((SAME_NOT_SELF, 1.0), (OTHER_NOT_SELF, -1.0)), (1, 1, 75, 75, D),
                          q_id=(*cyclic(40, 3), *range(10, 33), *(-1,) * 12)),
    "nothing but empty sets": Problem(((OTHER, -1.0),), (1, 1, 71, 71, D), q_id=(0,) * 71),
    "inner product": Problem(((ALL, -2.0),), (1, 1, 75, 75, D), inner=True),
    "weights that are constants": Problem(((ALL, -2.0),), (1, 1, 75, 75, D), detach=True),
    "features of two chunks": Problem(((OTHER, -2.0),), (1, 1, 71, 71, 131), q_id=cyclic(71, 3)),
}  # fmt: skip
CONSTANT = (
    Case("cacr_loss", {"V": 2, "B": 53, "D": D}, UNIT | {"pairing": "pooled"}, learnable=False),
    Case("cacr_loss", {"V": 3, "B": 33, "D": D}, TAUS | {"pairing": "pooled"}, learnable=False),
    Case("cacr_loss", {"V": 2, "B": 35, "D": D}, UNIT | {"pairing": "pooled", "cost": "rbf"}),
    Case("supervised_cacr_loss", {"B": 97, "D": D, "C": 5}, TAUS, data="near-equal", learnable=False),
    Case("supervised_cacr_loss", {"B": 75, "D": D, "C": 41}, UNIT, learnable=False),
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that blocks are filled and multiplied with. A block has four tiles."""
    found: list[str] = []
    start = blocks.start

    def record(kernel: Any, *rest: Any, **constants: Any) -> None:
        found.append(kernel.fn.__name__)
        start(kernel, *rest, **constants)

    monkeypatch.setattr(blocks, "SIDE", 64)
    monkeypatch.setattr(blocks, "start", record)
    return found


def of_one_set(problem: Problem, dtype: torch.dtype, normalize: bool = False, want_tau: bool = False) -> Any:
    """The arguments, what flows in, and the gradients of rows in both roles and, if wanted, of the temperatures."""
    q, _, ids, _, tau, *rest = problem.arguments(dtype)
    q = raw(*q.shape, dtype, 0) if normalize else q
    given = q, None, ids, None, tau, *rest[:-1], normalize
    value, lse, row_state = FORWARD(*given)
    incoming = randn(*value.shape, seed=5), randn(*lse.shape, seed=6)
    return given, incoming, BACKWARD(*given, value, row_state, *incoming, True, False, want_tau)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize("name", ONE_SET)
def test_rows_in_both_roles(name: str, dtype: torch.dtype, filled: list[blocks.Block], launched: list[str]) -> None:
    """Of four blocks the one below the diagonal is not filled, and those on it are multiplied once."""
    (q, _, ids, _, tau, *rest), _, (found, _, _) = of_one_set(ONE_SET[name], dtype)
    z = q.double().requires_grad_()
    (true,) = gradients(plain((z, z, ids, ids, tau, *rest)), (z,))
    nothing = torch.zeros(0, dtype=torch.float64)  # in the place of the temperatures
    assert_gradients([found, nothing], [true, nothing], dtype, max(1.0, *(t**2 for _, t in ONE_SET[name].sets)) / 10)
    assert [(block.i, block.j) for block in filled] == [(0, 0), (0, 64), (64, 64)]
    products = [1, 2, 1]
    expected = [kernel for count in products for kernel in ("block_kernel", *["product_kernel"] * count)]
    assert [kernel for kernel in launched if kernel != "scale_kernel"] == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["float64", "float32", "float16"])
@pytest.mark.parametrize("name", ["one softmax", "two softmaxes", "empty sets"])
def test_raw_rows_in_both_roles(name: str, dtype: torch.dtype, filled: list[blocks.Block], launched: list[str]) -> None:
    """Of lengths 0.1 to 10, and zeros."""
    given, incoming, (found, _, _) = of_one_set(ONE_SET[name], dtype, normalize=True)
    eager, true = (
        contrast_of_unit_rows(ONE_SET[name], given, incoming, t)[2][0] for t in (arithmetic(dtype), torch.float64)
    )
    assert_gradient(found, eager, true, dtype)
    assert len(filled) == 3


@pytest.mark.parametrize("case", CONSTANT, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_both_roles_within_the_promise(
    case: Case, dtype: torch.dtype, filled: list[blocks.Block], launched: list[str]
) -> None:
    assert_within_budget(case, "triton", dtype, draws=1)
    assert filled
    assert all(block.i <= block.j for block in filled)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sizes", [(16, 64), (64, 16), (32, 32)])
def test_tiles_of_both_roles(
    sizes: tuple[int, int], normalize: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, of tiles that are higher or wider; each is filled for itself or as a mirror image."""
    monkeypatch.setattr(blocks, "SIDE", 128)
    tile = pairs.SetPairs.tile
    made = lambda *given: tile(*given)._replace(block_m=sizes[0], block_n=sizes[1])  # noqa: E731
    monkeypatch.setattr(pairs.SetPairs, "tile", lambda self, name, two=False: (
        made if name == "triangles" else tile)(self, name, two))  # fmt: skip
    _, _, (found, _, _) = of_one_set(ONE_SET["one softmax"], torch.float64, normalize)
    assert launched == ["block_kernel", "product_kernel"]
    monkeypatch.setattr(blocks, "of_both_roles", lambda *_: False)
    _, _, (true, _, _) = of_one_set(ONE_SET["one softmax"], torch.float64, normalize)
    assert launched[2:] == ["block_kernel", "product_kernel", "product_kernel"]
    assert (found - true).abs().max() <= 1e-14 * true.abs().max()


def test_moments_belong_to_queries(filled: list[blocks.Block], launched: list[str]) -> None:
    """With the gradient of a temperature all blocks are filled, for both roles apart; the result is the same."""
    _, _, (alone, _, _) = of_one_set(ONE_SET["two softmaxes"], torch.float64)
    assert len(filled) == 3
    _, _, (found, _, of_tau) = of_one_set(ONE_SET["two softmaxes"], torch.float64, want_tau=True)
    assert [(block.i, block.j) for block in filled[3:]] == [(0, 0), (0, 64), (64, 0), (64, 64)]
    assert of_tau.ne(0).all()
    assert (found - alone).abs().max() <= 1e-14 * alone.abs().max()


def test_both_roles_of_one_set_alone() -> None:
    """Not of keys that are other rows, of several pairs of sets, or of queries that are given as keys."""
    sets = pairs_of(5, 5, 1, D)
    assert not blocks.of_both_roles(sets, False)
    one = dataclasses.replace(sets, keys_are_queries=True)
    assert blocks.of_both_roles(one, False)
    assert not blocks.of_both_roles(one, True)
    assert not blocks.of_both_roles(dataclasses.replace(one, given_self=True), False)
    assert not blocks.of_both_roles(dataclasses.replace(pairs_of(5, 5, 2, D), keys_are_queries=True), False)
    assert not blocks.of_both_roles(dataclasses.replace(one, q=one.q.expand(2, 5, D)), False)


# ---- which blocks ----------------------------------------------------------------------------------------------------
def plan(N: int, M: int, P: int, D: int = D) -> list[blocks.Block]:
    """All blocks of P pairs of sets, for tiles of 128."""
    return list(blocks.blocks(pairs_of(N, M, P, D), 128))


def pairs_of(N: int, M: int, P: int, D: int) -> pairs.SetPairs:
    """Sets without data."""
    q, k = torch.empty(1, N, D, device="meta"), torch.empty(1, M, D, device="meta")
    views = torch.zeros(P, dtype=torch.int32)
    norms = (q[..., 0], k[..., 0], None, None, views, views, torch.empty(1), views, views)
    return pairs.SetPairs(q, k, *norms, (ALL,), False, False)


SIZES = [
    (1, 1, 1),
    (130, 7000, 3),
    (8192, 8192, 2),
    (8193, 20000, 2),
    (300, 300, 5000),
    (256, 262145, 1),
    (70000, 300, 2),
]


@pytest.mark.parametrize("sizes", SIZES)
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


@pytest.mark.parametrize("N", [1, 300, 8193, 20000])
def test_triangles_meet_every_pair_once(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are squares but for the last column of them, none is below the diagonal."""
    monkeypatch.setattr(blocks, "SIDE", 8192)
    sizes = {}
    for block in blocks.blocks(pairs_of(N, N, 1, D), 128, True):
        sizes[block.i, block.j] = min(block.height, N - block.i) * min(block.width, N - block.j)
        assert block.i < block.j or block.height == block.width
    assert all(i <= j for i, j in sizes)
    assert sum(n if i == j else 2 * n for (i, j), n in sizes.items()) == N * N


@pytest.mark.parametrize("N", [3000, 4096, 8192])
def test_triangles_have_programs_for_the_whole_processor(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each core that have tiles to form."""
    monkeypatch.setattr(blocks, "SIDE", 8192)
    monkeypatch.setattr(pairs, "processor_of", lambda device: table.Processor("sm_90", 132))
    tile = table.tile_of("sm_90", "triangles", "half", 512, False)
    sets = pairs_of(N, N, 1, 512)
    side, split = plan(N, N, 1)[0].height, blocks.split_size(sets, tile, 128, True)
    assert sum(-(-side // split) - i // split for i in range(0, side, tile.block_m)) >= 2 * 132


def test_blocks_are_long_where_one_side_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries against the keys of many processes: few launches, each with work for the whole processor."""
    monkeypatch.setattr(blocks, "SIDE", 8192)
    assert [(b.height, b.width) for b in plan(256, 262144, 1)] == [(256, 262144)]
    assert [(b.height, b.width) for b in plan(262144, 200, 1)] == [(262144, 256)]
    assert len(plan(8192, 65536, 1)) == 8


def test_which_gradients_take_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of half types with more features than the other kernel writes at a time."""
    monkeypatch.setattr(blocks, "has_blocks", table.has_blocks)
    monkeypatch.setattr(pairs, "processor_of", lambda device: table.Processor("sm_90", 132))
    for dtype, D, taken in ((torch.float16, 129, True), (torch.bfloat16, 128, False), (torch.float64, 768, False)):
        sets = pairs_of(5, 5, 1, D)
        assert blocks.pay(dataclasses.replace(sets, q=sets.q.to(dtype))) == taken


def test_no_keys_and_no_queries() -> None:
    for n in (0, 5):
        problem = Problem(((OTHER, -1.0),), (1, 1, n, 5 - n, D), q_id=cyclic(n, 2), k_id=cyclic(5 - n, 2))
        q, k, *rest = problem.arguments(torch.float32)
        value, _, row_state = FORWARD(q, k, *rest)
        found = BACKWARD(q, k, *rest, value, row_state, value, value, True, True, True)
        assert all(g.eq(0).all() for g in found)
        assert (found[0].shape, found[1].shape) == (q.shape, k.shape)
