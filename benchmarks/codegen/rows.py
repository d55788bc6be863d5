"""Rows of ``python -m benchmarks.codegen``: what was compiled, for which processor, what it takes, what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

OUT = Path(__file__).parents[1] / "results" / "codegen"

SIZES = (64, 128, 256, 512)
DTYPES = ("bf16", "fp16", "tf32", "tf32x3", "ieee", "fp64")
PIECES = {"bf16": 3, "fp16": 2}  # of a coefficient that is not rounded, whose products are one for each
ON_TENSOR_CORES = {"bf16": "half", "fp16": "half", "tf32": "tf32", "tf32x3": "tf32", "fp64": "fp64"}


class Device(NamedTuple):
    """A processor: what it is compiled for, and what it does per clock and core (multiprocessor)."""

    name: str
    target: tuple[str, int | str, int]
    family: str  # of the launch table
    shared: int  # bytes that a program may have
    cores: int
    ghz: float
    tensor: dict[str, float]  # FLOP per clock of tensor-core products, by type
    fp32: int  # lanes
    ex2: int
    fp64: int

    @property
    def issue(self) -> int:
        """Instructions of a thread per clock: four schedulers of 32 lanes."""
        return 128

    @property
    def arch(self) -> str:
        """As nvcc names it: "80"."""
        return str(self.target[1])


def _tensor(half: float, fp64: float = 0) -> dict[str, float]:
    return {"half": half, "tf32": half / 2} | ({"fp64": fp64} if fp64 else {})


# Data sheets: dense FLOP/s over cores and boost clock; half types with sums in float32, for which GeForce has half the
# rate. B200 has tensor cores for float64, no faster than its ordinary units, and compilers use the latter.
DEVICES = (
    Device("A100", ("cuda", 80, 32), "sm_80", 163 << 10, 108, 1.41, _tensor(2048, 128), 64, 16, 32),
    Device("RTX 3090", ("cuda", 86, 32), "sm_80", 99 << 10, 82, 1.70, _tensor(512), 128, 16, 2),
    Device("RTX 4090", ("cuda", 89, 32), "sm_80", 99 << 10, 128, 2.52, _tensor(512), 128, 16, 2),
    Device("H100", ("cuda", 90, 32), "sm_90", 227 << 10, 132, 1.83, _tensor(4096, 256), 128, 16, 64),
    Device("B200", ("cuda", 100, 32), "sm_100", 227 << 10, 148, 1.85, _tensor(8192), 128, 16, 64),
    Device("RTX 5090", ("cuda", 120, 32), "sm_120", 99 << 10, 170, 2.41, _tensor(512), 128, 16, 2),
    Device("MI300X", ("hip", "gfx942", 64), "cdna3", 64 << 10, 304, 2.1, _tensor(2048, 256), 128, 16, 64),
)


class Code(NamedTuple):
    """What holds for all kernels of a backend."""

    principal: tuple[str, ...]  # kernels of the summary
    of_family: bool  # its launch configurations serve all processors of a family
    fp64_on_tensor_cores: bool  # where those are faster
    bounded_exponentials: bool  # a similarity may cost no more than its row says
    pictured: bool
    stand_in: str = ""  # processor whose instructions are taken where its code cannot be read


CODE = {
    "triton": Code(("statistics", "gradient of queries", "detached keys"), True, True, True, True),
    "cuda": Code(("statistics", "gradients"), False, False, False, False, "A100"),
}


def device_of(name: str) -> Device:
    """The processor of that name."""
    return next(device for device in DEVICES if device.name == name)


class KernelCase(NamedTuple):
    """Which kernel a row is about, compiled for which device, dtype and number of features."""

    backend: str
    kernel: str
    device: str
    dtype: str
    D: int  # 0: the same for all

    @property
    def name(self) -> str:
        """The name of the row."""
        return ", ".join(self[:4]) + (f", D={self.D}" if self.D else "")


class Row(NamedTuple):
    """One compiled kernel, or one phase of it."""

    backend: str
    kernel: str
    device: str
    dtype: str
    D: int
    tile: dict[str, int]
    registers: int
    stack: int
    spills: int
    shared: int
    tensor: int
    opcodes: dict[str, int]  # that a CUDA kernel is meant to use
    exponentials: int  # that a similarity may cost; 0: a kernel that forms none
    passes: int  # programs that see one similarity: those for different features of a gradient
    per_similarity: dict[str, float]  # instructions of a thread, by kind
    cycles: dict[str, float]  # per similarity and core, by unit

    @property
    def code(self) -> Code:
        return CODE[self.backend]

    @property
    def formed(self) -> int:
        """How many times a similarity is formed."""
        return self.passes if self.exponentials else 0

    @property
    def limit(self) -> str:
        """The unit that sets the bound; none where nothing was counted."""
        return max(self.cycles, key=lambda unit: self.cycles[unit], default="")


def cycles(device: Device, dtype: str, D: int, products: int, row: Row) -> dict[str, float]:
    """Clocks of a core per similarity, by unit, if nothing but that unit had to be waited for.

    ``products``: those of a similarity beside that which makes it, one for each piece.
    """
    per, kind = row.per_similarity, ON_TENSOR_CORES.get(dtype, "")
    found = {
        "ex2": (per.get("ex2", 0) + per.get("special", 0)) / device.ex2,
        "fp32": (per.get("fp32", 0) + 2 * per.get("fp32x2", 0)) / device.fp32,
        "fp64": per.get("fp64", 0) / device.fp64,
        "issue": sum(n for name, n in per.items() if name != "tensor") / device.issue,
    }
    if not row.tensor or kind not in device.tensor:
        return found
    flop = 2 * D * (3 if dtype == "tf32x3" else 1) * (row.formed + products)
    return found | {"tensor": flop / device.tensor[kind]}


def wants_tensor_cores(row: Row) -> bool:
    """Whether its products have to be there: float64 only where the backend uses them, and they are faster."""
    kind = ON_TENSOR_CORES.get(row.dtype)
    if not row.cycles or kind is None:
        return False
    return kind != "fp64" or (row.code.fp64_on_tensor_cores and kind in device_of(row.device).tensor)


def shared_limit(row: Row) -> int:
    """Bytes of shared memory; entries of the launch table serve the smallest processor of a family."""
    device = device_of(row.device)
    if not row.code.of_family:
        return device.shared
    return min(other.shared for other in DEVICES if other.family == device.family)


def problems(row: Row) -> list[str]:
    """What must not be in a shipped configuration."""
    found = []
    if row.stack or row.spills:
        found.append(f"spills: {row.stack} bytes of stack, {row.spills} instructions")
    if row.shared > shared_limit(row):
        found.append(f"{row.shared} bytes of shared memory, of {shared_limit(row)}")
    if wants_tensor_cores(row) and not row.tensor:
        found.append("no tensor-core instructions")
    found += [f"no {opcode}" for opcode, count in row.opcodes.items() if not count]
    if row.code.bounded_exponentials and row.exponentials and row.dtype != "fp64":
        # Every thread that holds part of a row rescales it once per tile: eight, or sixteen without tensor cores.
        rows_too = (16 if row.dtype == "ieee" else 8) * row.exponentials / row.tile["block_n"]
        each = row.per_similarity.get("ex2", 0) / row.passes
        if each > row.exponentials + rows_too:
            found.append(f"{each:.2f} exponentials per similarity, of {row.exponentials}")
    return found


def describe(row: Row) -> str:
    """Registers, shared memory and clocks of a row in one line."""
    found = f"{row.registers} registers, {row.shared} bytes shared"
    return found + (f", {row.cycles[row.limit]:.3f} clocks per similarity ({row.limit})" if row.cycles else "")


def load(path: Path) -> dict[str, Row]:
    """Rows of an earlier report by name."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {name: Row(**{key: row.get(key) for key in Row._fields}) for name, row in rows.items()}
