"""How the host splits the work of a launch, on an H100 of 132 processors with 3 blocks each."""

from __future__ import annotations

import json

import pytest

from .building import emulated, run

pytestmark = pytest.mark.exhaustive

BLOCKS = 396
QUEUE = {"q_views": 2, "k_views": 1, "N": 256, "M": 65536, "D": 128, "pairs": 2, "keys_are_queries": 0}
OWN = {"q_views": 2, "k_views": 2, "N": 2048, "M": 2048, "D": 128, "pairs": 1, "keys_are_queries": 1}


def plan(arithmetic: str = "bf16", wanted: str = "q", **shape: int) -> dict[str, int]:
    """``wanted``: of q, k, v (variances), those that are."""
    done = run(emulated("check_plan.cpp"), arithmetic, BLOCKS, *shape.values(), *(int(w in wanted) for w in "qkv"))
    found: dict[str, int] = json.loads(done.stdout)
    assert 1 <= found["grid"] <= BLOCKS
    return found


@pytest.mark.parametrize(("arithmetic", "splits"), [("bf16", 24), ("tf32x3", 12), ("double", 6)])
def test_keys_without_a_gradient(arithmetic: str, splits: int) -> None:
    """Few queries against a queue: every query tile is split until the device is full, or nearly."""
    found = plan(arithmetic, **QUEUE)
    assert (found["q_splits"], found["k_units"]) == (splits, 0)
    assert BLOCKS * 0.9 < found["q_units"] <= BLOCKS
    assert found["bytes_of_splits"] == pytest.approx(splits * 2 * 256 * 128 * (8 if arithmetic == "double" else 4))


def test_variances_alone() -> None:
    """One group of features is enough for them, and there is no gradient to be split."""
    found = plan(wanted="v", **QUEUE)
    assert found["q_units"] == 8 * found["q_splits"] > BLOCKS * 0.9
    assert found["bytes_of_splits"] == (found["q_splits"] - 1) * 2 * 256 * 8


def test_each_side_by_the_tiles_on_the_other() -> None:
    """1024 tiles of keys for every query, 4 tiles of queries for every key."""
    found = plan(wanted="qk", **QUEUE)
    assert found["k_splits"] == 1
    assert found["k_units"] == 65536 // 64 * 2
    assert found["q_splits"] == 16
    small = plan(wanted="qk", **QUEUE | {"N": 64, "M": 256})
    assert small["k_splits"] == 1  # one tile cannot be split
    assert small["q_splits"] == 4


def test_one_set_for_both() -> None:
    """Queries that are the keys: no units of keys."""
    found = plan(wanted="qk", **OWN)
    assert (found["q_units"], found["k_units"], found["q_splits"]) == (384, 0, 3)


def test_large_problems_are_not_split() -> None:
    found = plan(wanted="qk", **OWN | {"N": 65536, "M": 65536})
    assert (found["q_splits"], found["bytes_of_splits"]) == (1, 0)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (64, 10**7, 16), (10**7, 64, 16), (300, 700, 4096), (5, 0, 3)])
def test_memory_of_splits_is_bounded(sizes: tuple[int, int, int], wanted: str) -> None:
    """Every split of a side with several is at work on a block of its own: 64 rows, at most 64 features."""
    found = plan(wanted=wanted, **QUEUE | dict(zip(("N", "M", "D"), sizes, strict=True)))
    variances = 8 * 2 * sizes[0] * found["q_splits"]
    assert found["bytes_of_splits"] <= 2 * BLOCKS * 64 * 64 * 4 + variances + 512


def test_no_shape_overflows() -> None:
    found = plan("double", "qkv", **QUEUE | {"N": 2**20, "M": 2**31, "D": 64})
    assert found["k_units"] == 2**25 * 4
