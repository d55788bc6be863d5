"""The speed section of README.md: a table and a picture made from committed results, between two markers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.host import quantile

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
    EAGER: "PyTorch, matmul form",
    COMPILED: "`torch.compile` of it",
    BROADCASTING: "published formulation",
    PRODUCTS: "four `torch.mm` alone",
}
OTHER_LOSSES = {
    NTXENT: "NT-Xent, matmul form",
    "ntxent lightly": "NT-Xent, lightly",
    "ntxent pml": "NT-Xent, metric-learning",
    "supcon pml": "SupCon, metric-learning",
}
# What is shown of all that a full run measures: functions beside other formulations, modules beside other losses.
FUNCTIONS = (
    *(cacr(V, B, 128) for V, B in ((5, 128), (2, 512), (2, 2048), (2, 16384))),
    queue(2, 128, 128, 65536),
)
CALLED = (*(raw(cacr(2, B, D)) for B, D in ((32, 64), (128, 128), (2048, 128))), raw(supervised(1024, 128, 100)))


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
        raise ValueError("no case of README.md was measured beside the eager form (two threads, float32)")
    return lines


def _modules(rows: list[dict[str, Any]]) -> list[str]:
    """Modules, which normalise, beside those of other losses."""
    keys = [BenchmarkCase(problem, threads=THREADS, module=True).key for problem in CALLED]
    lines = list(_lines(rows, keys, OTHER_LOSSES, "module call and gradients"))
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
        cells = [f"{milliseconds(ours[key]['p50_ms'])} ms", f"{100 * ours[key]['fraction']:.0f} %"]
        cells += ["" if other is None else _factor(other["ratio"]) for other in others]
        yield f"| {_name(ours[key])} | " + " | ".join(cells) + " |"


def _name(row: dict[str, Any]) -> str:
    name, *options = problem_label(row).split(", ")
    function, *sizes = name.split(" ")
    if row["module"]:
        function, options = MODULES[function], [o for o in options if o != "normalize=True"]
    return ", ".join([f"`{function}`", *(size.replace("=", " = ") for size in sizes), *options])


def _factor(value: float) -> str:
    return f"{value:.1f} ×" if value < 10 else f"{value:.0f} ×"


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    first = next(row for row in rows if row["status"] == TIMED and row["ours"])
    peak = quantile(
        [row["peak_gflops"] for row in rows if row["status"] == TIMED and row["case"] == first["case"]], 0.5
    )
    text = (
        "Other columns are multiples of our time. Medians of interleaved rounds, by "
        f"`python -m benchmarks` on {first['machine']} ({first['cores']} cores, {where(first)}, {peak:.0f} GFLOP/s), "
        f"{first['isa']} kernels, torch {first['torch']}, commit {first['commit']}, {first['date'][:10]}."
    )
    memory = [row for row in rows if row["ours"] and row["memory_mib"] is not None and row["status"] in (TIMED, SINGLE)]
    if memory:
        largest = max(memory, key=lambda row: row["B"])
        text += f" Memory above the inputs, gradients included: {largest['memory_mib']:.0f} MiB for {_name(largest)}."
    whole = re.sub(r"`[^`]*`| = ", lambda found: found[0].replace(" ", "\0"), text)  # no line ends in these
    return [line.replace("\0", " ") for line in textwrap.wrap(whole, 120, break_on_hyphens=False)]


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
