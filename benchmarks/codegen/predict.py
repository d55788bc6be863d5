"""Time of a whole loss with its gradients, predicted from counts, bytes and launches: nothing here is timed.

    a launch     the longest of: clocks of its units for its similarities; bytes from L2; bytes from memory
    the loss     the sum over its launches, and LAUNCH for each; BARRIER for each barrier of a cooperative launch
    the share    the 3U that the loss needs (U = 2 P B^2 D; pooled 2U, U = 2 (V B)^2 D, as its similarities are
                 symmetric) over that time, of the peak of what multiplies

The launches of the Triton kernels are those that ``backends/triton`` makes for a GPU, recorded on tensors without data,
each with the row of the report (``python -m benchmarks.codegen``) that counts its main loop. Those of the CUDA kernels
are one cooperative launch, whose phases have their rows. A core has to do the programs that fall to it, so a grid of
133 programs takes 132 cores as long as one of 264.

What is neglected makes a real run slower: units that wait for each other, prologues, clocks below the boost clock.
Where ``mma.sync`` is known to be below the peak of the tensor cores, its own rate counts.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from .rows import CODE, ON_TENSOR_CORES, PIECES, Device, KernelCase, Row, device_of

LAUNCH = 3e-6  # seconds from one launch to the next on a stream: assumed
BARRIER = 1.5e-6  # of a grid: assumed
L2_BYTES = 64  # a clock and core, of all these GPUs, on the side of the core
WARP_PRODUCT = 2 * 16 * 8 * 16  # FLOP of the largest mma.sync, of a warp
PHASES = 7  # barriers of the fused loss between the phases of ``csrc/cuda/kernel.cuh``
CUDA_SWEEPS = {"statistics": 1, "gradients": 2}  # times that a phase meets every pair of rows: as queries and as keys
Rows = dict[str, Row]


class Gpu(NamedTuple):
    """A GPU whose times are predicted. ``code``: the processor of the report that its kernels are compiled for."""

    name: str
    code: str
    bandwidth: float  # bytes/s of its memory, by the data sheet
    mma_sync: float = 1.0  # of the tensor peak that mma.sync reaches
    plain_tensor: float = 0.0  # FLOP per clock of float32 on tensor cores, where there are such

    @property
    def device(self) -> Device:
        """Cores, clock and rates of the units."""
        return device_of(self.code)


# mma.sync reaches 63 % of an H100's peak by published micro-benchmarks; for B200, whose tensor cores have another
# instruction, the same FLOP a clock are assumed.
GPUS = (
    Gpu("A100", "A100", 2.04e12),
    Gpu("H100", "H100", 3.35e12, 0.63),
    Gpu("H200", "H100", 4.8e12, 0.63),
    Gpu("B200", "B200", 8.0e12, 0.315),
    Gpu("MI300X", "MI300X", 5.3e12, plain_tensor=256),
)


class Problem(NamedTuple):
    """``cacr_loss`` of V views of B instances with D features, raw or unit rows.

    Pairs of views in one order, or all views pooled.
    """

    V: int
    B: int
    D: int
    dtype: str  # bf16, fp16, or what multiplies float32: tf32, tf32x3, ieee; fp64
    normalize: bool = True
    pairing: str = "unordered"  # or "pooled"

    @property
    def pooled(self) -> bool:
        return self.pairing == "pooled"

    @property
    def similarities(self) -> float:
        """Those of all pairs of views, each once; pooled: those of all rows with all rows."""
        return (self.V**2 if self.pooled else self.V * (self.V - 1) / 2) * self.B**2

    @property
    def flop(self) -> float:
        """What the loss needs: 3U, pooled 2U."""
        return (2 if self.pooled else 3) * 2.0 * self.similarities * self.D

    @property
    def itemsize(self) -> int:
        """Bytes that a feature has."""
        return {"bf16": 2, "fp16": 2, "fp64": 8}.get(self.dtype, 4)


class Sweep(NamedTuple):
    """A pass over ``similarities`` by the kernel that ``case`` counts, in ``programs`` (0: one for each core)."""

    case: KernelCase
    products: int  # of a similarity beside that which makes it, one for each piece
    similarities: float
    programs: int = 0


class Launch(NamedTuple):
    """Bytes that have to move at least, and the sweep it makes, if any."""

    bytes: float
    sweep: Sweep | None = None


@dataclass(frozen=True)
class Predicted:
    """Seconds of a loss, by what bounds its launches, and what it means."""

    by_unit: dict[str, float]
    overhead: float
    launches: int
    share: float
    stand_in: bool  # counts of another processor's code were taken for some kernel

    @property
    def seconds(self) -> float:
        """The time of the whole loss."""
        return sum(self.by_unit.values()) + self.overhead

    @property
    def limit(self) -> str:
        """What most of the time is due to."""
        known = self.by_unit | {"launches": self.overhead}
        return max(known, key=lambda unit: known[unit])


# ---- counts ----------------------------------------------------------------------------------------------------------
def counted(rows: Rows, case: KernelCase) -> Row | None:
    """The row of a case; for more features than the report has, from two rows of the same tile.

    A pass has a part that does not depend on D and one that is proportional to the chunks of features, and there are as
    many passes as groups of features that a program owns.
    """
    if (exact := rows.get(case.name)) is not None:
        return exact if exact.per_similarity else None
    known = sorted((row for row in rows.values() if row[:4] == case[:4] and row.per_similarity), key=lambda row: row.D)
    if len(known) < 2 or known[-2].tile != known[-1].tile or case.D < known[-1].D:
        return None
    first, last = known[-2:]
    block, out = last.tile["block_d"], last.tile["block_out"]
    grouped = bool(out) and all(row.passes == -(-row.D // out) for row in (first, last))
    passes = -(-case.D // out) if grouped else 1
    chunks, low, high = (-(-D // block) for D in (case.D, first.D, last.D))
    per = {}
    for kind in first.per_similarity | last.per_similarity:
        a, b = (row.per_similarity.get(kind, 0.0) / row.passes for row in (first, last))
        per[kind] = passes * (b + (b - a) * (chunks - high) / (high - low))
    return last._replace(D=case.D, passes=passes, per_similarity=per, cycles={})


def clocks(gpu: Gpu, row: Row, products: int) -> dict[str, float]:
    """Clocks of a core per similarity, by unit; L2 is one of them."""
    device, per = gpu.device, row.per_similarity
    found = {
        "ex2": (per.get("ex2", 0) + per.get("special", 0)) / device.ex2,
        "fp32": (per.get("fp32", 0) + 2 * per.get("fp32x2", 0)) / device.fp32,
        "fp64": per.get("fp64", 0) / device.fp64,
        "issue": sum(n for name, n in per.items() if name != "tensor") / device.issue,
        "L2": l2_bytes(row) / L2_BYTES,
    }
    rate = gpu.plain_tensor if row.dtype == "ieee" else device.tensor.get(ON_TENSOR_CORES.get(row.dtype, ""), 0)
    if row.tensor and rate and per.get("tensor"):
        pieces = 3 if row.dtype == "tf32x3" else 1
        flop = 2 * row.D * pieces * (row.formed + products)
        small = 32 * flop / per["tensor"] <= WARP_PRODUCT and row.dtype in ("bf16", "fp16", "tf32", "tf32x3")
        found["tensor"] = flop / (rate * (gpu.mma_sync if small else 1))
    return found


def l2_bytes(row: Row) -> float:
    """Bytes of tiles that a similarity asks for: the other rows once a pass, and of chunks both sides.

    Of a product: a coefficient and the other rows once a pass.
    """
    tile, size = row.tile, {"bf16": 2, "fp16": 2, "fp64": 8}.get(row.dtype, 4)
    if not row.formed:
        return size * row.passes * (1 + tile["block_out"] / tile["block_m"])
    chunked = tile["block_d"] < row.D
    features = row.D / tile["block_m"] + (row.D / tile["block_n"] if chunked else 0)
    again = min(tile["block_out"], row.D) / tile["block_m"] if chunked and row.passes and "grad" in row.kernel else 0
    return size * row.passes * (features + again)


# ---- launches --------------------------------------------------------------------------------------------------------
class Whole(NamedTuple):
    """What a loss asks of the GPU, and what its launches cost by themselves."""

    launches: list[Launch]
    number: int
    overhead: float


def triton_launches(problem: Problem, gpu: Gpu) -> Whole | None:
    """What ``backends/triton`` launches on that GPU, recorded instead of launched."""
    import torch

    from cacr_kernels.backends.triton import cacr
    from cacr_kernels.backends.triton.table import Processor
    from cacr_kernels.types import PAIRINGS

    from . import triton_kernels

    variants, functions = triton_kernels.variants(), triton_kernels.kernels()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    dtype = dtypes.get(problem.dtype, torch.float32)
    views = torch.empty(problem.V, problem.B, problem.D, dtype=dtype, device="meta")
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if 0 in grid:
            return
        tensors = {id(x): x for x in args if isinstance(x, torch.Tensor)}
        moved = float(sum(x.numel() * x.element_size() for x in tensors.values()))
        for variant in variants:
            flags = dict.fromkeys(("NORMALIZE", "INNER_PRODUCT", "GIVEN_SELF", "BOTH_ROLES"), False)
            wanted = flags | variant.constants
            if functions[variant.kernel] is kernel and all(constants.get(k, v) == v for k, v in wanted.items()):
                case = KernelCase("triton", variant.name, gpu.code, problem.dtype, problem.D)
                products, programs = variant.multiplied(problem.dtype), math.prod(grid)
                if "HEIGHT" in kernel.arg_names:
                    given = dict(zip(kernel.arg_names, args, strict=False))
                    moved, similarities, programs = of_block(given, grid, constants)
                else:
                    similarities = problem.similarities
                found.append(Launch(moved, Sweep(case, products, similarities, programs)))
                return
        found.append(Launch(moved))

    processor = Processor(gpu.device.family, gpu.device.cores)
    with _replaced(start=record, processor_of=lambda device: processor, fp32_products=lambda: problem.dtype):
        flags = PAIRINGS.index(problem.pairing), False, 2.0, problem.normalize, True, False
        whole: Any = cacr.cacr
        whole.__wrapped__(views, None, 1.0, 2.0, 1.0, 1.0, *flags)
    if any(launch.sweep and launch.sweep.case.kernel.startswith("product") for launch in found):
        found.append(Launch(float(views.numel() * max(4, problem.itemsize))))  # zeros, to which products are added
    return Whole(found, len(found), LAUNCH * len(found))


def of_block(given: dict[str, Any], grid: tuple[int, ...], constants: dict[str, Any]) -> tuple[float, float, int]:
    """Bytes that a launch of the kernels of blocks moves at least, the similarities it sees, programs that see some."""
    height, width, D = (given[name] for name in ("HEIGHT", "WIDTH", "D"))
    pairs = given["PAIRS"] if "PAIRS" in given else grid[0] * constants["BLOCK_M"] // height
    size = given["block"].element_size()
    moved = size * pairs * (height * width + D * (height + width))
    if "grad" in given:  # read, and written
        moved += 2 * given["grad"].element_size() * pairs * D * (height if constants["QUERY"] else width)
    if constants.get("BOTH_ROLES") and given["i_first"] == given["j_first"]:
        return float(moved), *triangle(height, given["split_size"], constants["BLOCK_M"], constants["BLOCK_N"])
    return float(moved), float(pairs * height * width), math.prod(grid)


def triangle(side: int, split: int, block_m: int, block_n: int) -> tuple[float, int]:
    """Similarities of a square that are not below its diagonal, in whole tiles, and the programs that form them."""
    first = [i // block_n * block_n for i in range(0, side, block_m)]  # columns of the first tile of each row of tiles
    return float(sum(block_m * (side - j) for j in first)), sum(-(-side // split) - j // split for j in first)


@contextlib.contextmanager
def _replaced(**functions: Any) -> Iterator[None]:
    """Replaces functions of the Triton backend in every module of it that has them."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("cacr_kernels.backends.triton") and module is not None:
                for function, other in functions.items():
                    if function in vars(module):
                        stack.enter_context(mock.patch.object(module, function, other))
        yield


def cuda_launches(problem: Problem, gpu: Gpu) -> Whole | None:
    """The phases of the one launch: each reads all rows, that of the gradients writes as many numbers."""
    if gpu.device.target[0] != "cuda":
        return None
    rows = float(problem.V * problem.B * problem.D)
    reads, writes = rows * problem.itemsize, rows * max(4, problem.itemsize)
    found, pieces = [Launch(reads), Launch(reads)], PIECES.get(problem.dtype, 1)  # lengths, attraction
    for phase, times in CUDA_SWEEPS.items():
        case = KernelCase("cuda", phase, gpu.code, problem.dtype, problem.D)
        moved = reads + (writes if phase == "gradients" else 0)
        found.append(Launch(moved, Sweep(case, pieces * (phase == "gradients"), times * problem.similarities)))
    return Whole(found, 1, LAUNCH + PHASES * BARRIER)


LAUNCHES = {"triton": triton_launches, "cuda": cuda_launches}


# ---- the prediction --------------------------------------------------------------------------------------------------
def predict(rows: Rows, backend: str, problem: Problem, gpu: Gpu) -> Predicted | None:
    """The time of a loss and its gradients; ``None`` where the report has no counts."""
    whole = LAUNCHES[backend](problem, gpu)
    return None if whole is None else add_up(rows, whole, problem, gpu)


def add_up(rows: Rows, whole: Whole, problem: Problem, gpu: Gpu) -> Predicted | None:
    """The formula at the head of this file."""
    device, by_unit, stand_in = gpu.device, dict[str, float](), False
    for launch in whole.launches:
        units = {"memory": launch.bytes / gpu.bandwidth}
        if launch.sweep is not None:
            case = launch.sweep.case
            row, other = counted(rows, case), CODE[case.backend].stand_in
            if row is None and other:
                row, stand_in = counted(rows, case._replace(device=other)), True
            if row is None:
                return None
            programs = launch.sweep.programs or device.cores
            busiest = -(-programs // device.cores) / programs  # of the similarities
            for unit, each in clocks(gpu, row, launch.sweep.products).items():
                units[unit] = each * launch.sweep.similarities * busiest / (device.ghz * 1e9)
        unit = max(units, key=lambda name: units[name])
        by_unit[unit] = by_unit.get(unit, 0.0) + units[unit]
    seconds = sum(by_unit.values()) + whole.overhead
    share = problem.flop / seconds / peak(gpu, problem.dtype)
    return Predicted(by_unit, whole.overhead, whole.number, share, stand_in)


def peak(gpu: Gpu, dtype: str) -> float:
    """FLOP/s of what multiplies: tensor cores, for IEEE float32 the ordinary units; 3 products of TF32 are three."""
    device = gpu.device
    per_clock = gpu.plain_tensor or 2 * device.fp32
    if dtype != "ieee":
        per_clock = device.tensor.get(ON_TENSOR_CORES[dtype], 2 * device.fp64)
    return per_clock * device.cores * device.ghz * 1e9 / (3 if dtype == "tf32x3" else 1)
