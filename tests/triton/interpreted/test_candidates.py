"""Autotuning with the kernels themselves, in Triton's interpreter: every tile that may be chosen computes the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.triton.interpreted.test_operators as operators
from cacr_kernels import testing
from cacr_kernels.backends.triton import pairs, table, tuning
from tests.agreement import LOSSES, assert_agree, cast, run, small_inputs
from tests.operators import test_detached_keys, test_ops
from tests.operators.test_ops import Problem, cyclic

WIDE = Problem(
    ((test_ops.OTHER, -2.0), (test_ops.ALL, 1.0)), (1, 1, 35, 71, 67), q_id=cyclic(35, 4), k_id=cyclic(71, 4)
)
NARROW = Problem(((test_ops.OTHER, -1.0),), (1, 1, 37, 35, 33), q_id=cyclic(37, 4), k_id=cyclic(35, 4))
SYMMETRIC = testing.Case("cacr_loss", {"V": 2, "B": 19, "D": 33}, {"tau_pos": 2.0, "tau_neg": 5.0})
SWEEPS = {"statistics_sweep", "query_sweep", "key_sweep", "detached_keys_sweep"}
EXPECTED = testing.expect(SYMMETRIC, torch.float32, count=1)


@pytest.fixture
def number(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chooses the tiles: ``number(i)`` the i-th of each kernel around the entry of an sm_80; all that were used."""
    used: set[tuple[str, table.Tile]] = set()
    index = 0

    def choose(sets: pairs.SetPairs, kernel: str, entry: table.Tile, sweep: Any, args: tuple[Any, ...]) -> table.Tile:
        two = sets.S == 2 or (kernel == "detached_keys" and args[1])
        entry = table.tile_of("sm_80", kernel, sets.precision, sets.D, two)
        tiles = tuning.candidates(kernel, sets.precision, sets.D, entry, "sm_80")
        # Warps and stages do nothing in the interpreter.
        different = list(dict.fromkeys(t._replace(num_warps=4, num_stages=2) for t in tiles))
        used.add((kernel, different[index % len(different)]))
        return different[index % len(different)]

    def number(i: int) -> set[tuple[str, table.Tile]]:
        nonlocal index
        index = i
        return used

    monkeypatch.setattr(tuning, "ON", True)
    monkeypatch.setattr(tuning, "_fastest", choose)
    return number


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(WIDE, torch.float32), (WIDE, torch.float16), (NARROW, torch.float64), (NARROW, torch.float16)],
    ids=["two softmaxes, float32", "two softmaxes, float16", "float64", "float16"],
)
def test_every_candidate(shape: Problem, dtype: torch.dtype, number: Any) -> None:
    """Values and gradients of queries, keys and temperatures."""
    for i in range(5):
        used = number(i)
        operators.check(shape, dtype)
    by_blocks = shape is WIDE and dtype == torch.float16  # for whose gradients one tile is known
    for kernel in ("statistics",) if by_blocks else ("statistics", "gradient"):
        tiles = {tile for name, tile in used if name == kernel}
        assert len({tile.block_n for tile in tiles}) > 1
        assert len({tile.block_d for tile in tiles}) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
def test_every_candidate_with_detached_keys(dtype: torch.dtype, number: Any) -> None:
    for i, name in itertools.product(range(4), ("views", "other")):
        used = number(i)
        operators.test_of_detached_keys(test_detached_keys.PROBLEMS[name], dtype)
    assert len({tile.block_n for _, tile in used}) > 1


def test_every_candidate_where_keys_are_queries(number: Any) -> None:
    for i in range(4):
        number(i)
        assert all(result.ok for result in testing.measure(SYMMETRIC, EXPECTED, "triton", torch.float32))


def test_tuned_from_the_first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All losses, with made up times; arguments and results are whole, and the second call has the same bits."""
    monkeypatch.setattr(tuning, "ON", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path))
    times = itertools.cycle((3.0, 1.0, 2.0))

    def measure(call: Any, device: torch.device) -> float:
        call()
        return next(times)

    monkeypatch.setattr(tuning, "measure", measure)
    for loss in LOSSES:
        tensors = cast(small_inputs(loss), torch.float64)
        options = {"normalize": True} if loss == "momentum" else {}
        expected = run(loss, tensors, "reference", **options)
        first, second = (run(loss, tensors, "triton", **options) for _ in range(2))
        assert_agree(first, expected, 1e-10)
        assert all(torch.equal(a, b) for a, b in zip(first.parts, second.parts, strict=True))
    kernels = {key.kernel for key in tuning._chosen}
    assert kernels == set(table.ONE_SOFTMAX)
    assert {key.sweep for key in tuning._chosen} >= SWEEPS
    assert len(list(tmp_path.iterdir())) == len(tuning._chosen)
    assert any(tile.block_n != 32 for tile in tuning._chosen.values())  # 32: the entry for the interpreter


@pytest.mark.parametrize("moments", [False, True])
def test_sweeps_leave_their_arguments_alone(moments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the same again: they may be timed."""
    seen: set[str] = set()

    def twice(sets: pairs.SetPairs, kernel: str, entry: table.Tile, sweep: Any, args: tuple[Any, ...]) -> table.Tile:
        given = [x for x in (*vars(sets).values(), *args) if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in given]
        results = [sweep(sets, entry, *args) for _ in range(2)]
        first, second = ([x] if isinstance(x, torch.Tensor) else x for x in results)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not {x.data_ptr() for x in first if x.numel()} & {x.data_ptr() for x in second if x.numel()}
        seen.add(sweep.__name__)
        return entry

    monkeypatch.setattr(tuning, "ON", True)
    monkeypatch.setattr(tuning, "_fastest", twice)
    operators.check(NARROW, torch.float32)
    q, k, *rest = test_detached_keys.PROBLEMS["other"].arguments(torch.float32)
    operators.DETACHED_KEYS(q, k, *rest, True, moments)
    assert seen == SWEEPS
