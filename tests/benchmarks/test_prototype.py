"""The prototype of sweeps for sm_90a: what is counted, and its arithmetic, executed as PTX."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.codegen import prototype
from tests import ptx
from tests.building import ROOT, kept
from tests.cuda_emulation.building import tool
from tests.ptx.test_arithmetic import bfloat, pack

pytestmark = pytest.mark.exhaustive

ROWS = 5 * prototype.TILE  # tiles for all stages, and one more
SCHEDULES = [ptx.Lockstep(), ptx.Random(1, eager=0.5), ptx.Priority(2, eager=0)]


@pytest.fixture(scope="module")
def kernels() -> ptx.Kernels:
    command = [tool("nvcc"), *prototype.FLAGS, "-DCOPIED", "-ptx", str(prototype.SOURCE)]
    places = (str(prototype.SOURCE.relative_to(ROOT)),)
    return ptx.load(kept(ROOT / "build" / "ptx" / "hopper.ptx", command, places).read_text())


def test_it_is_bounded_by_products() -> None:
    """No spills, one exponential a similarity, products on tensor cores: so the tensor cores or they are the bound."""
    tool("nvcc")
    found = prototype.count()
    for name, kernel in found.items():
        assert not kernel.report.spilled, name
        assert kernel.per_similarity["ex2"] == 1
        assert kernel.per_similarity["tensor"] == prototype.PRODUCTS[name] / 8
        assert kernel.cycles[kernel.limit] == kernel.cycles["tensor"]
    triton, least = prototype.seconds(found)
    assert 0 < least < triton


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_arithmetic(kernels: ptx.Kernels, schedule: ptx.Lockstep) -> None:
    """Both sweeps against NumPy, with copies by cp.async."""
    rng = np.random.default_rng(0)
    x, y = (bfloat(rng.normal(size=(ROWS, prototype.TILE))) for _ in range(2))
    factor, a, b, unit, bias = rng.uniform(0.5, 1.5, size=(5, ROWS)).astype(np.float32)
    factor *= 0.1
    z = x.astype(np.float64) @ y.astype(np.float64).T * factor[:, None] * unit - bias
    e = np.where(np.eye(ROWS, dtype=bool), 0.0, 2.0**z)
    columns = np.stack([unit, -bias], 1)

    def run(kernel: str, of_rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        arrays = [("u64", array) for array in (pack(x), pack(y), of_rows, columns, out)]
        grid, shared = (ROWS // prototype.TILE,), 5 * 2 * 2 * prototype.TILE**2 // 2 + 5 * 1024 + 1024
        arguments = [ptx.Struct([*arrays, ("s32", ROWS)])]
        kernels.launch(kernel, grid, (prototype.CONSUMERS,), arguments, shared, schedule)
        return out

    sums = run("statistics_copied", factor, np.full((2, ROWS), np.nan, np.float32))
    np.testing.assert_allclose(sums, [e.sum(1), (e * z).sum(1)], rtol=1e-4, atol=1e-3)
    g = e * (a[:, None] + b[:, None] * z) * unit
    found = run("gradient_copied", np.stack([factor, a, b]), np.full((ROWS, prototype.TILE), np.nan, np.float32))
    assert (np.abs(found - g @ y) <= 2.0**-8 * (np.abs(g) @ np.abs(y))).all()
