"""``python -m benchmarks.codegen``: what the compilers make of the GPU kernels, on a machine without a GPU.

It counts, it does not time. Every kernel is compiled for every processor, dtype and number of features, with the launch
configuration that would be used there. The machine code says how many registers, spills and bytes of shared memory that
takes, and how many instructions of each kind a similarity costs. What the units of a processor execute per clock then
bounds how fast the kernel can be: the slowest unit sets the bound, a real run is slower.

    python -m benchmarks.codegen [--only TEXT] [--out benchmarks/results/codegen]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import aot, sass

OUT = Path(__file__).parent / "results" / "codegen"
SIZES = (64, 128, 256, 512)
DTYPES = ("bf16", "fp16", "tf32", "tf32x3", "ieee", "fp64")


class Device(NamedTuple):
    """A processor: what it is compiled for, and what it does per clock and core (multiprocessor)."""

    name: str
    target: tuple[str, int | str, int]
    family: str
    shared_limit: int  # bytes that a program may have, on the smallest member of the family
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


A100, H100, B200 = (
    {"half": 2048.0 * f, "tf32": 1024.0 * f, "fp64": x} for f, x in ((1, 128.0), (2, 256.0), (4, 128.0))
)
MI300X = {"half": 2048.0, "tf32": 1024.0, "fp64": 256.0}
# Data sheets: dense FLOP/s over cores and boost clock. The limits of shared memory are those of the smallest member.
DEVICES = (
    Device("A100", ("cuda", 80, 32), "sm_80", 99 << 10, 108, 1.41, A100, 64, 16, 32),
    Device("H100", ("cuda", 90, 32), "sm_90", 227 << 10, 132, 1.83, H100, 128, 16, 64),
    Device("B200", ("cuda", 100, 32), "sm_100", 227 << 10, 148, 1.85, B200, 128, 16, 64),
    Device("MI300X", ("hip", "gfx942", 64), "cdna3", 64 << 10, 304, 2.1, MI300X, 128, 16, 64),
)


class Variant(NamedTuple):
    """One kernel as one call uses it."""

    name: str
    kernel: str  # a key of the launch table
    constants: dict[str, Any]
    ex2: int  # exponentials that a similarity may cost
    products: int  # matrix products of a similarity beside that which makes it
    writes_features: bool = True


def variants() -> tuple[Variant, ...]:
    """Those that the losses use, and the ones that take the most registers."""
    one, two, rbf = {"KIND0": 2, "KIND1": -1}, {"KIND0": 3, "KIND1": 2}, {"KIND0": 2, "KIND1": 2}
    queries, keys = {"QUERY": True, "CANCELLING": False}, {"QUERY": False, "CANCELLING": False, "WANT_TAU": False}
    return (
        Variant("statistics", "statistics", one, 1, 0, False),
        Variant("statistics, two softmaxes", "statistics", two, 2, 0, False),
        Variant("gradient of queries", "gradient", one | queries | {"WANT_TAU": False}, 1, 1),
        Variant("gradient of keys", "gradient", one | keys, 1, 1),
        Variant("gradient of queries, two softmaxes", "gradient", two | queries | {"WANT_TAU": True}, 2, 1),
        Variant("gradient of keys, two softmaxes", "gradient", two | keys, 2, 1),
        Variant("gradient of keys, rbf", "gradient", rbf | keys | {"CANCELLING": True}, 2, 1),
        Variant("frozen keys", "frozen", one | {"WANT_MEAN": True, "MOMENTS": False}, 1, 1),
        Variant("frozen keys, full gradient", "frozen", one | {"WANT_MEAN": True, "MOMENTS": True}, 1, 2),
    )


class Row(NamedTuple):
    """One compiled kernel."""

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
    per_similarity: dict[str, float]  # instructions of a thread, by kind
    cycles: dict[str, float]  # per similarity and core, by unit

    @property
    def limit(self) -> str:
        """The unit that sets the bound."""
        return max(self.cycles, key=lambda unit: self.cycles[unit])


def kernels() -> dict[str, Any]:
    """Triton functions by key of the launch table."""
    from cacr_kernels._triton.kernels.frozen import frozen_kernel
    from cacr_kernels._triton.kernels.gradient import gradient_kernel
    from cacr_kernels._triton.kernels.statistics import statistics_kernel

    return {"statistics": statistics_kernel, "gradient": gradient_kernel, "frozen": frozen_kernel}


def compile_triton(variant: Variant, device: Device, dtype: str, D: int) -> Row:
    """Compiles one row of the matrix with its entry of the launch table."""
    from triton.backends.compiler import GPUTarget

    from cacr_kernels._triton.table import tile_of

    half = dtype in ("bf16", "fp16")
    two = variant.constants["KIND1"] >= 0 or variant.constants.get("MOMENTS", False)
    tile = tile_of(device.family, variant.kernel, "half" if half else dtype, D, two)  # type: ignore[arg-type]
    constants = tile.constants(variant.writes_features)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    product = dtype if dtype in ("tf32", "tf32x3") else "ieee"
    constants |= variant.constants | {"INNER": False, "PRECISION": product, "CHUNKS": tile.chunks(D)}
    element = dtype if half or dtype == "fp64" else "fp32"
    compiled = aot.compile_kernel(kernels()[variant.kernel], element, constants, GPUTarget(*device.target), **options)
    found = sass.report(compiled, tile.chunks(D))
    threads = tile.num_warps * device.target[2]
    per = {kind: count * threads / (tile.block_m * tile.block_n) for kind, count in found.loop.items()}
    return Row(
        "triton", variant.name, device.name, dtype, D, tile._asdict(), found.registers, found.stack, found.spills,
        found.shared, found.tensor, per, cycles(device, dtype, D, variant, per),
    )  # fmt: skip


def cycles(device: Device, dtype: str, D: int, variant: Variant, per: dict[str, float]) -> dict[str, float]:
    """Clocks of a core per similarity, by unit, if nothing but that unit had to be waited for."""
    pieces = {"bf16": 3, "fp16": 2}.get(dtype, 1)  # of a coefficient
    each = 3 if dtype == "tf32x3" else 1
    flop = 2 * D * each * (1 + variant.products * pieces)
    kind = {"bf16": "half", "fp16": "half", "tf32": "tf32", "tf32x3": "tf32", "fp64": "fp64"}.get(dtype)
    found = {
        "ex2": (per.get("ex2", 0) + per.get("special", 0)) / device.ex2,
        "fp32": per.get("fp32", 0) / device.fp32,
        "fp64": per.get("fp64", 0) / device.fp64,
        "issue": sum(n for name, n in per.items() if name != "tensor") / device.issue,
    }
    return found | ({"tensor": flop / device.tensor[kind]} if kind else {})


Source = Callable[[], Iterator[tuple[str, Callable[[], Row]]]]


def triton_rows() -> Iterator[tuple[str, Callable[[], Row]]]:
    """The matrix of the Triton kernels: a name, and what compiles the row."""
    for variant in variants():
        for device in DEVICES:
            for dtype in DTYPES:
                if dtype == "tf32x3" and device.family == "cdna3":
                    continue  # not offered there
                for D in SIZES:
                    name = f"triton, {variant.name}, {device.name}, {dtype}, D={D}"
                    yield name, lambda v=variant, d=device, t=dtype, n=D: compile_triton(v, d, t, n)  # type: ignore[misc]


# Where rows come from. Kernels of another compiler are one more function here.
SOURCES: tuple[Source, ...] = (triton_rows,)


def problems(row: Row) -> list[str]:
    """What must not be in a shipped configuration."""
    device = next(d for d in DEVICES if d.name == row.device)
    allowed = next((v.ex2 for v in variants() if v.name == row.kernel), 1)
    # Every thread that holds part of a row rescales it once per tile: eight, or sixteen without tensor cores.
    rows_too = (16 if row.dtype == "ieee" else 8) * allowed / row.tile["block_n"]
    found = []
    if row.stack or row.spills:
        found.append(f"spills: {row.stack} bytes of stack, {row.spills} instructions")
    if row.shared > device.shared_limit:
        found.append(f"{row.shared} bytes of shared memory, of {device.shared_limit}")
    if not row.tensor and row.dtype != "ieee":
        found.append("no tensor-core instructions")
    if row.dtype != "fp64" and row.per_similarity.get("ex2", 0) > allowed + rows_too:
        found.append(f"{row.per_similarity['ex2']:.2f} exponentials per similarity, of {allowed}")
    return found


def picture(rows: list[Row], path: Path) -> None:
    """Clocks per similarity by unit, bfloat16."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = ("statistics", "gradient of queries", "frozen keys")
    devices = [d for d in DEVICES if any(r.device == d.name for r in rows)]
    figure, axes = plt.subplots(len(names), len(devices), figsize=(3.2 * len(devices), 7), sharey="row", squeeze=False)
    colours = {"tensor": "#4c72b0", "issue": "#dd8452", "fp32": "#55a868", "ex2": "#c44e52"}
    for y, name in enumerate(names):
        for x, device in enumerate(devices):
            axis = axes[y][x]
            here = [r for r in rows if (r.kernel, r.device, r.dtype) == (name, device.name, "bf16")]
            for i, (unit, colour) in enumerate(colours.items()):
                at = [j + 0.2 * (i - 1.5) for j in range(len(here))]
                axis.bar(at, [r.cycles.get(unit, 0) for r in here], 0.2, color=colour, label=unit)
            axis.set_xticks(range(len(here)), [str(r.D) for r in here])
            axis.set_title(f"{name}, {device.name}", fontsize=8)
    axes[0][0].legend(fontsize=7)
    for row in axes:
        row[0].set_ylabel("clocks per similarity", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("D", fontsize=8)
    figure.suptitle("Counted from compiled code (bfloat16), not timed: the longest bar bounds the speed", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def load(path: Path) -> dict[str, Row]:
    """Rows of an earlier report by name."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {name: Row(**{key: row[key] for key in Row._fields}) for name, row in rows.items()}


def save(rows: dict[str, Row], path: Path) -> None:
    """The report."""
    import triton

    found = {name: row._asdict() | {"limit": row.limit, "problems": problems(row)} for name, row in rows.items()}
    text = json.dumps({"triton": triton.__version__, "timed": False, "rows": found}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Compiles, writes JSON and picture, prints what is wrong; exit status 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with all words of TEXT, others are kept")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for codegen.json and codegen.png")
    options = parser.parse_args(argv)
    print("Compiled and inspected, not timed: there is no GPU in this.")
    options.out.mkdir(parents=True, exist_ok=True)
    report = options.out / "codegen.json"
    rows = load(report) if options.only else {}
    known = {name for source in SOURCES for name, _ in source()}
    rows = {name: row for name, row in rows.items() if name in known}
    words, wrong = options.only.split(), 0
    for source in SOURCES:
        for name, build in source():
            if all(word in name for word in words):
                row = rows[name] = build()
                bad = problems(row)
                wrong += bool(bad)
                print(f"{name}: {describe(row)} {'; '.join(bad)}", flush=True)
                save(rows, report)
    picture(list(rows.values()), options.out / "codegen.png")
    print(f"{len(rows)} kernels in the report, {wrong} of those compiled now have something wrong")
    return int(wrong > 0)


def describe(row: Row) -> str:
    """In a line."""
    clocks = f"{row.cycles[row.limit]:.3f} clocks per similarity ({row.limit})"
    return f"{row.registers} registers, {row.shared} bytes shared, {clocks}"


if __name__ == "__main__":
    sys.exit(main())
