"""Rows of the CUDA C++ kernels: ``run_phases`` of every arithmetic and architecture, as nvcc compiles it.

Registers, stack and shared memory are those of the kernel, which holds all phases. What a similarity costs is counted
in its two main loops (``cuda_way.py``): a row for the phase of the statistics and one for that of the gradients.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.host import nvcc

from . import cuda_code, sass
from .cuda_way import THREADS, TILE, UnreadableError, needs, per_similarity
from .rows import DEVICES, DTYPES, PIECES, Device, KernelCase, Row, cycles, device_of

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-O3", "-std=c++20", "-DNDEBUG", f"-I{ROOT / 'csrc/cuda'}")  # of setup.py that change code
SIZES = (128, 512)  # the kernel is the same, its loops run longer
INSTANCES = {"bf16": "bf16", "fp16": "f16", "tf32": "tf32", "tf32x3": "tf32x3", "ieee": "float", "fp64": "double"}
PHASES = ("statistics", "gradients")
NOTE = (
    "CUDA rows: registers and memory of the whole kernel; instructions on the shortest way through the main loop of a "
    "phase, for one softmax over all keys. For float64 they cannot be read off (its exponentials branch): its "
    "multiplications alone are counted there. Where the compiler gave the loops a form that the count does not "
    "understand there is none."
)


def why_not() -> str | None:
    """Why no row can be made here, if none can."""
    return None if nvcc() else "There is no nvcc (NVCC, CUDA_HOME, PATH): the CUDA kernels are left out."


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def version() -> str | None:
    """The release of nvcc as it prints it, or ``None`` without nvcc."""
    compiler = nvcc()
    found = re.search(r"release [\d.]+, V([\d.]+)", run(compiler, "--version")) if compiler else None
    return found[1] if found else None


def devices() -> list[Device]:
    return [device for device in DEVICES if device.target[0] == "cuda"]


def cases() -> Iterator[KernelCase]:
    """The matrix, a kernel at a time."""
    for device in devices():
        for dtype in DTYPES:
            for phase in PHASES:
                for D in SIZES:
                    yield KernelCase("cuda", phase, device.name, dtype, D)


def build(wanted: list[KernelCase]) -> list[Row]:
    """Compiles the kernel that all of them are about."""
    compiler, (_, _, name, dtype, _) = nvcc(), wanted[0]
    assert compiler is not None
    device, instance = device_of(name), INSTANCES[dtype]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        source = ROOT / f"csrc/cuda/instances/{instance}.cu"
        run(compiler, *FLAGS, f"-arch=sm_{device.arch}", "-cubin", "-o", cubin, source)
        (kernel,) = cuda_code.kernels(cubin)
        code = sass.parse_sass(sass.tool("nvdisasm", "-c", str(cubin)))
    return [row_of(case, kernel, code, *sizes(compiler)[instance]) for case in wanted]


@cache
def sizes(compiler: Path) -> dict[str, tuple[int, int, int]]:
    """By instance, what the C++ code says: bytes that a launch asks for, features of a chunk, chunks of a block."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "sizes")
        run(compiler, *FLAGS, "-o", program, ROOT / "benchmarks/codegen/cuda_sizes.cu")
        return {name: (int(a), int(b), int(c)) for name, a, b, c in map(str.split, run(program).splitlines())}


def row_of(case: KernelCase, kernel: cuda_code.Kernel, code: sass.Code, shared: int, chunk: int, owned: int) -> Row:
    """``shared``: bytes a launch asks for, ``chunk``: features of a chunk, ``owned``: chunks that a block writes."""
    device, dtype, D = device_of(case.device), case.dtype, case.D
    count, gradients = kernel.instructions, case.kernel == "gradients"
    meant = ("LDGSTS",) if dtype in ("ieee", "fp64") else ("LDGSTS", "HMMA", "LDSM")
    passes = -(-D // (chunk * owned)) if gradients else 1
    if dtype == "fp64":
        per = {"fp64": float(D * (passes + gradients) / passes)}
    else:
        try:
            per = per_similarity(code, dtype, case.kernel, needs(dtype, D, chunk, owned, case.kernel))
        except UnreadableError:
            per = {}
    per = {kind: passes * n for kind, n in per.items()}
    tile = {"block_m": TILE, "block_n": TILE, "block_d": chunk, "num_warps": THREADS // 32, "block_out": chunk * owned}
    spills = count["LDL"] + count["STL"]
    row = Row(
        *case, tile, kernel.registers, kernel.stack + kernel.local, spills, shared, count["HMMA"] + count["DMMA"],
        {opcode: count[opcode] for opcode in meant}, 1, passes, per, {},
    )  # fmt: skip
    if not per:
        return row
    found = cycles(device, dtype, D, int(gradients) * PIECES.get(dtype, 1), row)
    return row._replace(cycles={"fp64": found["fp64"]} if dtype == "fp64" else found)
