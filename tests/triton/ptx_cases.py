"""What the tests of Triton's PTX share: for which GPUs kernels are compiled, the cases, and how one is compared."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import NamedTuple

import pytest
import torch
from triton.runtime.jit import JITFunction

from cacr_kernels import testing
from cacr_kernels.backends.precision import VARIABLE
from cacr_kernels.testing import Case, Result
from tests.ptx import triton_ptx
from tests.ptx.tf32 import TF32Products

KERNELS = importlib.import_module("cacr_kernels.backends.triton.kernels")
PRECISIONS = {
    "bf16": (torch.bfloat16, "none"),
    "fp16": (torch.float16, "none"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "none"),
    "ieee": (torch.float32, "ieee"),
    "fp64": (torch.float64, "none"),
}


class Target(NamedTuple):
    """What is compiled for, and the instructions that form the products there."""

    architecture: int
    cores: int
    products: dict[str, str]

    @property
    def family(self) -> str:
        return f"sm_{self.architecture}"


OF_WARPS, OF_WARPGROUPS = "mma.sync.aligned.*.row.col.", "wgmma.mma_async.sync.aligned.*."
TARGETS = {
    target.family: target
    for target in (
        Target(
            80,
            108,
            {
                "bf16": OF_WARPS + "f32.bf16",
                "fp16": OF_WARPS + "f32.f16",
                "tf32": OF_WARPS + "f32.tf32",
                "tf32x3": OF_WARPS + "f32.tf32",
                "ieee": "fma.rn.f32",
                "fp64": OF_WARPS + "f64",
            },
        ),
        Target(
            90,
            132,
            {
                "bf16": OF_WARPGROUPS + "f32.bf16",
                "fp16": OF_WARPGROUPS + "f32.f16",
                "tf32": OF_WARPGROUPS + "f32.tf32",
                "tf32x3": OF_WARPGROUPS + "f32.tf32",
                "ieee": "fma.rn.f32",
                "fp64": OF_WARPS + "f64",
            },
        ),
    )
}
TAUS = {"tau_pos": 2.0, "tau_neg": 5.0}
UNIT = TAUS | {"normalize": True}
FUSED = Case("cacr_loss", {"V": 2, "B": 67, "D": 33}, TAUS)
CASES = (
    FUSED,
    Case("cacr_loss", {"V": 3, "B": 23, "D": 13}, TAUS | {"pairing": "pooled", "cost": "rbf"}),
    Case("cacr_queue_loss", {"V": 2, "B": 9, "D": 19, "K": 67}, TAUS | {"weight_grad": "full"}),
    Case("supervised_cacr_loss", {"B": 37, "D": 17, "C": 5, "M": 601}, TAUS, data="near-equal"),
    Case(
        "cacr_momentum_loss", {"V": 2, "B": 21, "D": 7, "M": 70}, {"cost": "rbf", "temperature": 0.2, "key_offset": 3}
    ),
)
NORMALIZED = (
    Case("cacr_loss", {"V": 2, "B": 35, "D": 33}, UNIT),
    Case("cacr_queue_loss", {"V": 2, "B": 9, "D": 19, "K": 67}, UNIT),
    Case("supervised_cacr_loss", {"B": 37, "D": 17, "C": 5}, UNIT, data="near-equal"),
)
FULL = Case("cacr_loss", {"V": 2, "B": 67, "D": 64}, TAUS)  # rows that are copied in 16 bytes
WIDE = Case("cacr_loss", {"V": 2, "B": 19, "D": 601}, TAUS | {"reduction": "none"})
NARROW = Case("cacr_loss", {"V": 2, "B": 131, "D": 1}, TAUS, data="long")
SIZES = (64, 128, 256)


def of_size(D: int) -> tuple[Case, ...]:
    """All sweeps over similarities with tiles for D features: one softmax and two, of rows as they are and of length 1.

    One case has some features less than the tile.
    """
    momentum = {"cost": "rbf", "temperature": 0.2, "key_offset": 3}
    return (
        Case("cacr_loss", {"V": 2, "B": 67, "D": D}, TAUS),
        Case("cacr_queue_loss", {"V": 2, "B": 9, "D": D - 31, "K": 67}, TAUS | {"weight_grad": "full"}),
        Case("cacr_momentum_loss", {"V": 2, "B": 21, "D": D, "M": 70}, momentum),
        Case("cacr_loss", {"V": 2, "B": 35, "D": D}, UNIT | {"pairing": "pooled"}),
    )


def jit_functions() -> dict[str, JITFunction]:
    """Every function of the kernels by its name."""
    modules = [importlib.import_module(f"{KERNELS.__name__}.{m.name}") for m in pkgutil.iter_modules(KERNELS.__path__)]
    return {x.__name__: x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}


def compile_for(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as those of a GPU of this family."""
    monkeypatch.setattr(triton_ptx, "ARCHITECTURE", target.architecture)
    table = importlib.import_module("cacr_kernels.backends.triton.table")
    backends = importlib.import_module("cacr_kernels.backends.table")
    usable = [b._replace(why_not=lambda device: None) if b.name == "triton" else b for b in backends.TABLE]
    monkeypatch.setattr(backends, "TABLE", tuple(usable))
    for name in ("pairs", "contrast", "detached_keys", "cacr"):
        module = importlib.import_module(f"cacr_kernels.backends.triton.{name}")
        processor = table.Processor(target.family, target.cores)
        monkeypatch.setattr(module, "processor_of", lambda device, found=processor: found, raising=False)


def tf32_yardstick(eager: list[dict[str, float]]) -> dict[str, float]:
    """The worst of all draws; distant positives are products in the kernels only: numbers share one."""
    worst = {name: max(errors[name] for errors in eager) for name in eager[0]}
    numbers = {name: error for name, error in worst.items() if name == "loss" or name in testing.TEMPERATURES}
    return worst | dict.fromkeys(numbers, max(numbers.values()))


def compared(case: Case, precision: str) -> list[Result]:
    """Error, yardstick and tolerance of the loss and its gradients; of one draw, of all if that is not enough."""
    if precision == "tf32" and case.data == "near-equal":
        case = case._replace(data="unit")  # derivatives by tau_pos would be what TF32 leaves of tiny costs
    dtype, setting = PRECISIONS[precision]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    os.environ[VARIABLE] = str(int(precision == "tf32x3"))
    try:
        results = measured(case, dtype, precision == "tf32", 1)
        if wrong(results) and precision == "tf32":
            return measured(case, dtype, True, testing.DRAWS)
        return testing.compare(case, "triton", dtype) if wrong(results) else results
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        del os.environ[VARIABLE]


def measured(case: Case, dtype: torch.dtype, tf32: bool, draws: int) -> list[Result]:
    expected = testing.expect(case, dtype, count=draws)
    if tf32:
        with TF32Products():
            eager = [draw.errors(testing.eager_quantities(case, draw.inputs, dtype)) for draw in expected.draws]
        expected = expected._replace(yardstick=tf32_yardstick(eager))
    return testing.measure(case, expected, "triton", dtype)


def wrong(results: list[Result]) -> list[Result]:
    return [result for result in results if not result.ok]


def multiplications(launch: triton_ptx.Launched) -> int:
    return launch.count("mma.sync") + launch.count("wgmma.mma_async")
