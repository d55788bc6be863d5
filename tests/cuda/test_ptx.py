"""Execution of the PTX that nvcc emits for the kernels of ``csrc/cuda``: whole losses with their gradients.

The package and the host side of the kernels are as they are; launches run in the interpreter of ``tests/ptx``. The
yardstick and the tolerance are those of ``testing.py``; for TF32 products, of the eager form with TF32 products.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
import torch

from cacr_kernels import testing
from cacr_kernels.cases import Case
from cacr_kernels.testing import Result
from tests import ptx
from tests.cpu.test_raw_rows import attraction, near
from tests.ptx import cuda_ptx
from tests.ptx.tf32 import TF32Products

pytestmark = pytest.mark.exhaustive

TAUS = {"tau_pos": 2.0, "tau_neg": 5.0}
FUSED = Case("cacr_loss", {"V": 2, "B": 67, "D": 33}, TAUS)
ALIGNED = Case("cacr_loss", {"V": 2, "B": 67, "D": 40}, TAUS)  # rows that cp.async can copy
POOLED = Case("cacr_loss", {"V": 3, "B": 23, "D": 13}, TAUS | {"pairing": "pooled", "cost": "rbf"})
GENERAL = Case("supervised_cacr_loss", {"B": 37, "D": 17, "C": 5, "M": 75}, TAUS, data="near-equal")
QUEUE = Case("cacr_queue_loss", {"V": 2, "B": 9, "D": 40, "K": 71}, TAUS | {"weight_grad": "full"})
UNIT = Case("cacr_loss", {"V": 2, "B": 35, "D": 33}, TAUS | {"normalize": True})
UNIT_SETS = Case("supervised_cacr_loss", {"B": 37, "D": 17, "C": 5}, TAUS | {"normalize": True}, data="near-equal")
WIDE = Case("cacr_loss", {"V": 2, "B": 19, "D": 301}, TAUS | {"reduction": "none"})
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "double": torch.float64}
PRODUCTS = {
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
    "f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16",
    "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32",
    "tf32x3": "mma.sync.aligned.m16n8k8.row.col.f32.tf32",
    "float": "fma.rn.f32",
    "double": "fma.rn.f64",
}


def tf32_yardstick(eager: list[dict[str, float]]) -> dict[str, float]:
    """The worst of all draws; distant positives are products in the kernels only: numbers share one."""
    worst = {name: max(errors[name] for errors in eager) for name in eager[0]}
    numbers = {name: error for name, error in worst.items() if name == "loss" or name in testing.TEMPERATURES}
    return worst | dict.fromkeys(numbers, max(numbers.values()))


def wrong(case: Case, arithmetic: str) -> list[Result]:
    """The quantities of a case that are not right."""
    dtype = DTYPES.get(arithmetic, torch.float32)
    expected = testing.expect(case, dtype, count=1)
    if arithmetic == "tf32":
        with TF32Products():
            eager = [draw.errors(testing.eager_quantities(case, draw.inputs, dtype)) for draw in expected.draws]
        expected = expected._replace(yardstick=tf32_yardstick(eager))
    return [result for result in testing.measure(case, expected, "cuda", dtype) if not result.ok]


@pytest.mark.parametrize(
    ("arithmetic", "cases"),
    [
        ("bf16", (POOLED, GENERAL, QUEUE, WIDE, UNIT)),
        ("f16", (FUSED, GENERAL, UNIT_SETS)),
        ("tf32", (FUSED, GENERAL._replace(data="unit"))),
        ("tf32x3", (FUSED, GENERAL, UNIT)),
        ("float", (POOLED, UNIT_SETS)),
        ("double", (GENERAL,)),
    ],
)
def test_results(arithmetic: str, cases: tuple[Case, ...]) -> None:
    assert PRODUCTS[arithmetic] in cuda_ptx.phases(arithmetic)
    with cuda_ptx.interpreted_cuda(float32=arithmetic, resident_blocks=0):
        for case in cases:
            assert not wrong(case, arithmetic), case.name


def test_one_cooperative_launch() -> None:
    """The fused loss: all phases in one launch of blocks that wait for each other."""
    with cuda_ptx.interpreted_cuda() as run:
        assert not wrong(FUSED, "bf16")
    assert len(run.launches) == 1


@pytest.mark.parametrize(("distance", "tolerance"), [(1e-3, 1e-6), (1e-5, 1e-4)])
def test_unit_rows_that_are_nearly_equal(distance: float, tolerance: float) -> None:
    """No product is fused with a sum that has to be exact without it: raw rows are compared before they are rounded."""
    z = near(distance, 33, seed=0, count=9)
    with cuda_ptx.interpreted_cuda(resident_blocks=0):
        for operands in ("views", "a set and another"):
            found, truth = attraction(z, operands, "cuda")[0], attraction(z.double(), operands, "plain")[0]
            assert abs(found - truth) <= tolerance * truth


@pytest.mark.parametrize("schedule", [ptx.Random, ptx.Priority])
def test_hostile_schedules(schedule: Callable[[int], ptx.Lockstep]) -> None:
    """Whichever warp or block is ahead: no barrier and no wait for a copy is missing."""
    seeds = iter(range(1000))
    with cuda_ptx.interpreted_cuda(lambda: schedule(next(seeds)), resident_blocks=2):
        assert not wrong(ALIGNED, "bf16")


MMA = re.compile(r"(mma\.sync\S+\s+\{[^}]*\},\s*)\{([^},]*),([^},]*),([^},]*),([^}]*)\}")
BUGS = {
    "operand": lambda text: MMA.sub(r"\1{\2,\4,\3,\5}", text),
    "wait": lambda text: re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 7", text),
    "barrier": lambda text: re.sub(r"(?:bar|barrier)\.sync\s+0;", "", text),
    "lane": lambda text: text.replace("shfl.sync.bfly", "shfl.sync.idx"),
    "mask": lambda text: re.sub(r"setp\.ge\.s64", "setp.gt.s64", text),
    "stride": lambda text: re.sub(r"(mul\.lo\.s64\s+\S+ )(%rd\d+), (%rd\d+);", r"\1\2, \2;", text),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_in_the_ptx_are_found(bug: str) -> None:
    """Swapped operands, missing waits and barriers, shuffles with the wrong lane, a row too many, wrong strides."""
    changed: list[bool] = []

    def patch(text: str) -> str:
        changed.append(BUGS[bug](text) != text)
        return BUGS[bug](text)

    seeds = iter(range(1000))
    run = cuda_ptx.interpreted_cuda(lambda: ptx.Priority(next(seeds)), patch, resident_blocks=0)
    with contextlib.suppress(ptx.PtxError), run:
        assert wrong(ALIGNED, "bf16")
    assert any(changed)
