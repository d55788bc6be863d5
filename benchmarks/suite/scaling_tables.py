"""What the suite of several processes prints, and the table of it in the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import results
from .machine import ROOT
from .results import problem_label
from .tables import milliseconds

Result = dict[str, Any]
PAGE = ROOT / "docs" / "several_processes.md"
BEGIN, END = "<!-- processes: made by `python -m benchmarks --load", "<!-- processes: end -->"
HEADINGS = (
    "processes",
    "B a rank",
    "B",
    "ms",
    "20–80 %",
    "speed-up",
    "of the ideal",
    "CPU ms",
    "collectives",
    "sent",
    "needed",
)
NOTE = (
    "A step: loss and gradients of a module, one thread a process. Speed-up: over one process with the same batch, "
    "median over the rounds. Ideal: all processes at once, as far as there are cores, and nothing else to do. "
    "CPU ms: what the busiest process needs of a core, which is what others leave of it to measure. "
    "Collectives: share of the step in which a rank starts them or waits in them. MiB of a step and rank: sent, as the "
    "system counts it; needed, by the sizes of the collectives."
)


def ideal(row: Result, alone: Result) -> float:
    """Time of the same work where every core does its part all the time, over the time that was measured.

    The work is batch x batch, so a batch a rank that stays the same means as many times the work as processes.
    """
    work = (row["B"] / alone["B"]) ** 2 / min(row["processes"], row["cores"])
    share: float = work * alone["p50_ms"] / row["p50_ms"]
    return share


def cells(row: Result, alone: Result) -> list[str]:
    """A line of a table; ``alone``: what one process does, with this batch or with the batch of a rank."""
    sent = "–" if row["sent_mib"] is None else f"{row['sent_mib']:.2f}"
    return [
        str(row["processes"]), str(row["B"] // row["processes"]), str(row["B"]), milliseconds(row["p50_ms"]),
        f"{milliseconds(row['p20_ms'])}–{milliseconds(row['p80_ms'])}", f"{1 / row['ratio']:.2f}×",
        f"{100 * ideal(row, alone):.0f} %", milliseconds(row["cpu_ms"]),
        f"{100 * row['collective_share']:.0f} %", sent, f"{row['needed_mib']:.2f}",
    ]  # fmt: skip


def by_batch(rows: list[Result]) -> dict[str, list[list[str]]]:
    """Lines by batch: a fixed batch of all, then a fixed batch a rank (where more than one process has it)."""
    alone = {row["B"]: row for row in rows if row["processes"] == 1}
    found: dict[str, list[list[str]]] = {}
    for B in sorted(alone):
        found[f"B = {B} in all"] = [cells(row, alone[B]) for row in rows if row["B"] == B]
    for B in sorted(alone):
        same = [row for row in rows if row["B"] == B * row["processes"]]
        if len(same) > 2:
            found[f"B = {B} a rank"] = [cells(row, alone[B]) for row in same]
    return found


def print_scaling(console: Console, rows: list[Result]) -> None:
    """A table for each batch of all processes and for each batch a rank."""
    console.print(
        f"[bold]{escape(problem_label(rows[0] | {'B': None}))}, float32, loss and gradients, gloo", soft_wrap=True
    )
    for title, lines in by_batch(rows).items():
        table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        for heading in HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        console.print()
    console.print(f"[dim]{NOTE}[/dim]\n", soft_wrap=True)


def markdown(rows: list[Result]) -> str:
    """The same for a page, without the quantiles."""
    keep = [i for i, heading in enumerate(HEADINGS) if heading != "20–80 %"]
    lines = ["| | " + " | ".join(HEADINGS[i] for i in keep) + " |", "|---|" + "---:|" * len(keep)]
    for title, some in by_batch(rows).items():
        lines += [
            f"| {title if i == 0 else ''} | " + " | ".join(line[k] for k in keep) + " |" for i, line in enumerate(some)
        ]
    return "\n".join(lines)


def block(results_file: Path) -> str:
    """What the page shows of results, between its markers."""
    rows = results.read(results_file)["rows"]
    first, name = rows[0], results_file.resolve().relative_to(ROOT).as_posix()
    machine = f"{first['machine']} ({first['cores']} cores, load before the run {first['load']})"
    caption = (
        f"`python -m benchmarks --suite distributed` on {machine}, {first['isa']} kernels, torch {first['torch']}, "
        f"commit {first['commit']}, {first['date'][:10]}:"
    )
    return "\n".join([f"{BEGIN} {name} --readme` -->", caption, "", markdown(rows), "", END])


def write(results_file: Path, page: Path = PAGE) -> None:
    """Writes the block of the page from results."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + block(results_file) + rest.split(END)[1], encoding="utf-8")
