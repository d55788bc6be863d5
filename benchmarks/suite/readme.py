"""The speed section of README.md: a table and a picture made from committed results, between two markers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import results
from .cases import (
    BROADCASTING,
    COMPILED,
    EAGER,
    NTXENT,
    PRODUCTS,
    BenchmarkCase,
    cacr,
    queue,
    raw,
    supervised,
)  # fmt: skip
from .goals import THREADS
from .machine import ROOT
from .results import SINGLE, TIMED, problem_label, where
from .rows import MODULES
from .tables import milliseconds

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- benchmarks: the following is made from {name} by `python -m benchmarks --load {name} --readme` -->"
END = "<!-- benchmarks: end -->"
BLOCK = re.compile(
    BEGIN.replace("{name}", "(?P<name>[^ ]+)", 1).replace("{name}", "(?P=name)") + ".*?" + END, re.DOTALL
)
NO_RESULTS = "none"
PICTURES = ("sweep.png", "speedup.png")
COLUMNS = {
    EAGER: "eager PyTorch",
    COMPILED: "compiled by torch",
    BROADCASTING: "published form",
    PRODUCTS: "bare `torch.mm`",
}
OTHER_LOSSES = {
    NTXENT: "NT-Xent, eager PyTorch",
    "ntxent lightly": "NT-Xent, lightly",
    "ntxent pml": "NT-Xent, pytorch-metric-learning",
    "supcon pml": "SupCon, pytorch-metric-learning",
}
# What is shown of all that a full run measures: functions beside other formulations, modules beside other losses.
FUNCTIONS = (
    *(cacr(*shape) for shape in ((5, 128, 128), (2, 2048, 128), (2, 2048, 512))),
    queue(2, 128, 128, 65536),
    queue(2, 128, 128, 1024),
)
CALLED = (raw(cacr(2, 32, 64)), raw(cacr(2, 2048, 128)), raw(supervised(1024, 128, 100)))
POOLED = raw(cacr(2, 2048, 128, pairing="pooled"))  # with the pairs of NT-Xent
FEW = 5  # rounds; cells of fewer are marked
SAME_BUT_BF16 = {"amx": "avx512", "avx512_bf16": "avx512"}  # what a set computes float32 with


def committed() -> list[str]:
    """Results files of the repository, relative to it; not those of the last run."""
    return sorted(
        path.relative_to(ROOT).as_posix() for path in RESULTS.glob("*/results.json") if path.parent.name != "latest"
    )


def render(name: str, root: Path = ROOT) -> str:
    """The block for a results file, markers included."""
    rows = results.read(root / name)["rows"]
    pictures = [picture for picture in PICTURES if (root / name).with_name(picture).exists()]
    lines = [BEGIN.format(name=name), "", *_table(rows), *_modules(rows), "", *_caption(rows), ""]
    if pictures:
        text = "Time against the batch size" if pictures[0] == "sweep.png" else "Time over ours"
        lines += [f"![{text}]({Path(name).with_name(pictures[0]).as_posix()})", ""]
    return "\n".join([*lines, END])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Functions on unit rows beside other formulations of the same loss."""
    keys = [BenchmarkCase(problem, threads=THREADS).key for problem in FUNCTIONS]
    lines = list(_lines(rows, keys, COLUMNS, "loss and gradients, float32"))
    if not lines:
        raise ValueError("no case of README.md was measured beside another form (two threads, float32)")
    return lines


def _modules(rows: list[dict[str, Any]]) -> list[str]:
    """Modules, which normalise, beside those of other losses."""
    keys = [BenchmarkCase(problem, threads=THREADS, module=True).key for problem in CALLED]
    lines = list(_lines(rows, keys, OTHER_LOSSES, "module call on raw rows, and gradients, float32"))
    return ["", *lines] if lines else []


def _lines(rows: list[dict[str, Any]], keys: list[str], columns: dict[str, str], title: str) -> Iterator[str]:
    found = {(row["case"], row["row"]): row for row in rows if row["status"] == TIMED}
    ours = {row["case"]: row for row in found.values() if row["ours"]}
    shown = [key for key in keys if key in ours and any((key, name) in found for name in columns)]
    if shown:
        yield f"| {title} | cacr_kernels | of the FMA peak | " + " | ".join(columns.values()) + " |"
        yield "|---|" + "---:|" * (2 + len(columns))
    for key in shown:
        others = [found.get((key, name)) for name in columns]
        share = 100 * ours[key]["fraction"]
        cells = [f"{milliseconds(ours[key]['p50_ms'])} ms", f"{share:.0f} %" if share >= 1 else "< 1 %"]
        cells += ["" if other is None else _factor(other) for other in others]
        yield f"| {_name(ours[key])} | " + " | ".join(cells) + " |"


def _name(row: dict[str, Any]) -> str:
    name, *options = problem_label(row).split(", ")
    function, *sizes = name.split(" ")
    if row["module"]:
        function, options = MODULES[function], [o for o in options if o != "normalize=True"]
    return ", ".join([f"`{function}`", *(size.replace("=", " = ") for size in sizes), *options])


def _factor(row: dict[str, Any]) -> str:
    value, few = row["ratio"], "" if row["rounds"] >= FEW else " *"
    return f"{value:.1f} ×{few}" if value < 10 else f"{value:.0f} ×{few}"


def _caption(rows: list[dict[str, Any]]) -> Iterator[str]:
    timed = {row["case"]: row for row in rows if row["status"] == TIMED and row["ours"]}
    first = next(iter(timed.values()))
    rounds = f"2 × took twice our time. Medians of rounds in turns (* of fewer than {FEW}),"
    yield f"{rounds} `python -m benchmarks --suite full`, on"
    yield (
        f"{first['machine']}, {first['cores']} cores, {where(first)}, {first['peak_gflops']:.0f} GFLOP/s, "
        f"{SAME_BUT_BF16.get(first['isa'], first['isa'])}, torch {first['torch']}, "
        f"commit {first['commit']}, {first['date'][:10]}."
    )
    memory = [row for row in rows if row["ours"] and row["memory_mib"] is not None and row["status"] in (TIMED, SINGLE)]
    if memory:
        largest = max(memory, key=lambda row: row["B"])
        yield f"Memory above the inputs, gradients included: {largest['memory_mib']:.0f} MiB for {_name(largest)}."
    few, many = (timed.get(BenchmarkCase(p, threads=THREADS, module=True).key) for p in (CALLED[1], POOLED))
    if few and many:
        yield (
            'NT-Xent and SupCon have four times the pairs of `CACRLoss`; with as many, `pairing="pooled"`, it takes '
            f"{many['p50_ms'] / few['p50_ms']:.1f} × as long (B = 2048)."
        )


def shown(text: str) -> str | None:
    """The results file that a README shows; ``None`` if none. ``ValueError`` without the markers."""
    found = BLOCK.search(text)
    if found is None:
        raise ValueError(f"README has no block from {BEGIN.format(name='NAME')!r} to {END!r}")
    return None if found["name"] == NO_RESULTS else found["name"]


def replace(text: str, block: str) -> str:
    """The README with another block."""
    shown(text)
    return BLOCK.sub(lambda _: block, text, count=1)


def write(results_file: Path, readme: Path = README, root: Path = ROOT) -> str:
    """Writes the block for a results file, and says which."""
    try:
        name = results_file.resolve().relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"{results_file} does not lie in the repository, {root}") from error
    readme.write_text(replace(readme.read_text(encoding="utf-8"), render(name, root)), encoding="utf-8")
    return name
