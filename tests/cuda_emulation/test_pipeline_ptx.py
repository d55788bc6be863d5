"""The kernel of pipeline.cuh as nvcc compiles it: what the emulation finds, the PTX interpreter finds too."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import ptx

from . import warps
from .building import by_nvcc
from .test_planted_bugs import BUGS

pytestmark = pytest.mark.exhaustive

BLOCKS, QUERIES, KEYS, D = 2, 32, 16, 48
SHARED_BYTES = 2 * (QUERIES + KEYS) * 24 * 2
SCHEDULES = (ptx.Lockstep(), ptx.Random(1), ptx.Priority(2), ptx.Random(3, split=0.5))


def outcome(kernels: ptx.Kernels, bug: str, schedule: ptx.Lockstep) -> NDArray[np.bool_]:
    """Which of the results are right."""
    bits = np.random.default_rng(1).integers(0x3F00, 0x40FF, (BLOCKS * QUERIES + KEYS, D), dtype=np.uint16)
    bits |= np.random.default_rng(2).integers(0, 2, bits.shape, dtype=np.uint16) << 15
    x, y = np.ascontiguousarray(bits[:-KEYS]), np.ascontiguousarray(bits[-KEYS:])
    total, out = np.full(BLOCKS, np.nan, np.float32), np.full(BLOCKS * QUERIES, np.nan, np.float32)
    problem = [("u64", x), ("u64", y), ("u64", total), ("u64", out), ("s32", D), ("s32", BUGS.index(bug))]
    launch = {"shared_bytes": SHARED_BYTES, "schedule": schedule, "cooperative": True}
    kernels.launch("run_pipeline", (BLOCKS,), (64,), [ptx.Struct(problem)], **launch)
    expected = np.square(warps.bf16(x) @ warps.bf16(y).T).sum(1)
    return np.isclose(out, expected / expected.sum(), rtol=1e-5)


@pytest.fixture(scope="module")
def kernels() -> ptx.Kernels:
    return ptx.load(by_nvcc("pipeline.cu", "ptx").read_text())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_without_a_bug(kernels: ptx.Kernels, schedule: ptx.Lockstep) -> None:
    assert outcome(kernels, "None", schedule).all()


# A buffer is followed by another one here, not by a redzone.
FOUND = sorted(set(BUGS) - {"None", "SharedPointer", "StaleLayout"})


@pytest.mark.parametrize("bug", FOUND)
def test_bug_is_found(kernels: ptx.Kernels, bug: str) -> None:
    def found(seed: int) -> bool:
        try:
            return not outcome(kernels, bug, ptx.Random(seed, mean=12, split=0.5)).all()
        except ptx.PtxError:
            return True

    assert any(found(seed) for seed in range(24))
