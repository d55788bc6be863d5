"""``python -m benchmarks.codegen.prototype``: what sweeps by hand for sm_90a would gain at best; nothing is timed.

It compiles ``prototypes/hopper.cu``, counts its main loops as those of the Triton kernels are counted, and adds them up
to a loss of two views of raw bfloat16 rows of 128 features: one sweep of statistics, two of gradients, and all other
launches of the Triton backend as they are predicted. The grid is one of persistent blocks, so all cores end together.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.host import nvcc

from . import predict, sass
from .rows import OUT, load

SOURCE = Path(__file__).parent / "prototypes" / "hopper.cu"
FLAGS = ("-std=c++20", "-arch=sm_90a", "-diag-suppress=177")
TILE = 128  # rows of x and of y of a block, and features
CONSUMERS = 256  # threads that share the similarities of a tile
PRODUCTS = {"statistics": 1, "gradient": 2}  # of 2 D FLOP for a similarity
SWEEPS = {"statistics": 1, "gradient": 2}  # of a loss
SHARED_BYTES = 128  # a clock and core
GPU = next(gpu for gpu in predict.GPUS if gpu.name == "H200")
PROBLEM = predict.Problem(2, 65536, TILE, "bf16")


class Counted(NamedTuple):
    """One kernel of the prototype: what it takes, and clocks per similarity and core, by unit."""

    report: sass.Report
    per_similarity: dict[str, float]  # instructions of a thread, by kind
    cycles: dict[str, float]

    @property
    def limit(self) -> str:
        """The unit that sets the bound."""
        return max(self.cycles, key=lambda unit: self.cycles[unit])


def count() -> dict[str, Counted]:
    """Compiles both kernels and counts them; needs nvcc."""
    compiler = nvcc()
    assert compiler is not None, "needs nvcc"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "prototype.cubin")
        subprocess.run([compiler, "-O3", *FLAGS, "-cubin", "-o", cubin, SOURCE], check=True, capture_output=True)
        usage = sass.tool("cuobjdump", "--dump-resource-usage", str(cubin))
        text = sass.tool("nvdisasm", "-c", str(cubin))
    code = re.split(r"(?m)^\.text\.(\w+):", text)
    found = {}
    for name, body in zip(code[1::2], code[2::2], strict=True):
        taken = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", usage)
        assert taken is not None
        report = sass.make(int(taken[1]), int(taken[2]), 0, sass.parse_sass(body))
        per = {kind: n / (TILE * TILE / CONSUMERS) for kind, n in report.loop.items()}
        found[name] = Counted(report, per, cycles(name, per))
    return found


def cycles(name: str, per: dict[str, float]) -> dict[str, float]:
    """As ``predict.clocks``, and reads of shared memory: two bytes of each operand that a warpgroup multiplies.

    A warpgroup reads 128 rows of y for each product of its 64 rows, and those 64 rows once.
    """
    device = GPU.device
    operands = 2 * TILE * (PRODUCTS[name] / 64 + 1 / TILE)
    return {
        "tensor": 2 * TILE * PRODUCTS[name] / device.tensor["half"],
        "ex2": (per.get("ex2", 0) + per.get("special", 0)) / device.ex2,
        "fp32": per.get("fp32", 0) / device.fp32,
        "issue": sum(n for kind, n in per.items() if kind != "tensor") / device.issue,
        "shared": operands / SHARED_BYTES,
        "L2": 2 * TILE / TILE / predict.L2_BYTES,
    }


def seconds(found: dict[str, Counted]) -> tuple[float, float]:
    """Of the loss: with the Triton kernels as predicted, and with these sweeps at their bound."""
    rows = load(OUT / "codegen.json")
    whole = predict.triton_launches(PROBLEM, GPU)
    assert whole is not None
    triton = predict.add_up(rows, whole, PROBLEM, GPU)
    others = whole._replace(launches=[launch for launch in whole.launches if launch.sweep is None])
    rest = predict.add_up(rows, others, PROBLEM, GPU)
    assert triton is not None
    assert rest is not None
    clocks = sum(SWEEPS[name] * kernel.cycles[kernel.limit] for name, kernel in found.items())
    return triton.seconds, rest.seconds + clocks * PROBLEM.similarities / (GPU.device.cores * GPU.device.ghz * 1e9)


def main() -> int:
    """Prints registers, clocks by unit, and the two times of the loss."""
    if nvcc() is None:
        print("There is no nvcc (NVCC, CUDA_HOME, PATH).")
        return 1
    found = count()
    for name, kernel in found.items():
        report, clocks = kernel.report, ", ".join(f"{unit} {n:.4f}" for unit, n in kernel.cycles.items())
        instructions = sum(kernel.per_similarity.values())
        print(f"{name}: {report.registers} registers, {report.stack} bytes of stack, {instructions:.2f} instructions")
        print(f"    clocks per similarity: {clocks}")
    triton, least = (1e3 * x for x in seconds(found))
    print(f"V = 2, B = 65536, D = 128, bf16, raw rows on an {GPU.name}: Triton {triton:.2f} ms,")
    print(f"    with these sweeps at least {least:.2f} ms, {1 - least / triton:.1%} less")
    return 0


if __name__ == "__main__":
    sys.exit(main())
