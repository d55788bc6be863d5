"""The speed section of README.md: a table and a picture made from committed results, between two markers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.host import quantile

from . import results
from .cases import BROADCASTING, COMPILED, EAGER
from .goals import GOALS
from .machine import ROOT
from .results import SINGLE, TIMED, problem_label, where
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
COLUMNS = {EAGER: "PyTorch, matmul form", COMPILED: "`torch.compile` of it", BROADCASTING: "published formulation"}


def committed() -> list[str]:
    """Results files of the repository, relative to it; not those of the last run."""
    return sorted(
        path.relative_to(ROOT).as_posix() for path in RESULTS.glob("*/results.json") if path.parent.name != "latest"
    )


def render(name: str, root: Path = ROOT) -> str:
    """The block for a results file, markers included."""
    rows = results.read(root / name)["rows"]
    pictures = [picture for picture in PICTURES if (root / name).with_name(picture).exists()]
    lines = [BEGIN.format(name=name), "", *_table(rows), "", *_caption(rows), ""]
    if pictures:
        text = "Time against the batch size" if pictures[0] == "sweep.png" else "Time over ours"
        lines += [f"![{text}]({Path(name).with_name(pictures[0]).as_posix()})", ""]
    return "\n".join([*lines, END])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    found = {(row["case"], row["row"]): row for row in rows if row["status"] == TIMED}
    ours = {row["case"]: row for row in found.values() if row["ours"]}
    shown = [case for case in dict.fromkeys(goal.case for goal in GOALS) if (case, EAGER) in found and case in ours]
    if not shown:
        raise ValueError("no case that a goal is set for was measured beside the eager form (two threads, float32)")
    lines = [
        "| loss and gradients, float32 | cacr_kernels | of the FMA peak | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * (2 + len(COLUMNS)),
    ]
    for case in shown:
        others = [found.get((case, name)) for name in COLUMNS]
        cells = [f"{milliseconds(ours[case]['p50_ms'])} ms", f"{100 * ours[case]['fraction']:.0f} %"]
        cells += ["" if other is None else _factor(other["ratio"]) for other in others]
        lines.append(f"| {_name(ours[case])} | " + " | ".join(cells) + " |")
    return lines


def _name(row: dict[str, Any]) -> str:
    name, *options = problem_label(row).split(", ")
    function, *sizes = name.split(" ")
    return ", ".join([f"`{function}`", *(size.replace("=", " = ") for size in sizes), *options])


def _factor(value: float) -> str:
    return f"{value:.1f} ×" if value < 10 else f"{value:.0f} ×"


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    first = next(row for row in rows if row["status"] == TIMED and row["ours"])
    peak = quantile(
        [row["peak_gflops"] for row in rows if row["status"] == TIMED and row["case"] == first["case"]], 0.5
    )
    lines = [
        "The other columns are multiples of our time: 2 × took twice as long. Medians of interleaved rounds, by",
        f"`python -m benchmarks` on {first['machine']} ({first['cores']} cores, {where(first)}, {peak:.0f} GFLOP/s),",
        f"{first['isa']} kernels, torch {first['torch']}, commit {first['commit']}, {first['date'][:10]}.",
    ]
    memory = [row for row in rows if row["ours"] and row["memory_mib"] is not None and row["status"] in (TIMED, SINGLE)]
    if memory:
        largest = max(memory, key=lambda row: row["B"])
        lines.append(
            f"Memory above the inputs, gradients included: {largest['memory_mib']:.0f} MiB for {_name(largest)}."
        )
    return lines


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
