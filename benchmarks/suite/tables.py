"""What a run prints: one table per case, goals, comparison, red checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .gate import Check
from .goals import GOALS, Verdict
from .results import SINGLE, SKIPPED, TIMED, label, where
from .rows import BASELINE, OURS
from .runner import NOT_WANTED
from .verdict import CANNOT_TELL, CONFIDENCE, FASTER, SLOWER, VERDICTS

BUSY = 0.5  # running processes per core, without our own


def milliseconds(value: float | None) -> str:
    """Milliseconds with about three significant digits; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def factor(value: float | None) -> str:
    """A ratio with a multiplication sign; a dash for none."""
    return "–" if value is None else f"{value:.2f}×" if value < 10 else f"{value:,.0f}×"


def print_environment(console: Console, environment: dict[str, Any]) -> None:
    """Prints versions, machine and date, and a warning if the machine was busy."""
    e = environment
    console.print(
        f"[bold]cacr_kernels {e['version']}[/bold] {e['commit']}, CPU kernels {e['isa']}, torch {e['torch']} "
        f"({e['torch_isa']}), Python {e['python']}\n{escape(e['machine'])}, {e['cores']} cores, {e['date']}",
        soft_wrap=True,
    )
    if e["load"] is not None and e["load"] > BUSY * e["cores"]:
        console.print(
            f"[bold yellow]the machine was busy before the run (load {e['load']}): do not trust the figures\n"
        )


def print_results(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table per case, and below it what was left out."""
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        measured = [row for row in mine if row["status"] != SKIPPED]
        console.print(f"[bold]{escape(label(mine[0]))}", soft_wrap=True)
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("")
        columns = [column for column in COLUMNS if any(row[column.needs] is not None for row in measured)]
        columns = [c for c in columns if c.needs != "single_ms" or any(row["status"] == SINGLE for row in measured)]
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
        for row in measured:
            starred = row["row"] + (" *" if row["family"] not in (OURS, BASELINE) else "")
            cells = [column.cell(row) for column in columns]
            table.add_row(starred, *cells, style="bold green" if row["ours"] else "")
        console.print(table)
        left_out = [f"{row['row']}: {row['reason']}" for row in mine if row["reason"] not in ("", NOT_WANTED)]
        left_out += [f"memory of {row['row']}: {row['memory_reason']}" for row in measured if row["memory_reason"]]
        if left_out:
            console.print(f"[dim]left out: {escape('; '.join(left_out))}[/dim]", soft_wrap=True)
        console.print()
    console.print(
        "[dim]Times per call over interleaved rounds; × ours: median over the rounds of the ratio within a round. "
        "GFLOP/s count the products the loss needs (3U with gradients, U = 2·pairs·N·M·D). Cold: first call of a fresh "
        "process with empty compiler caches, warm: with filled ones. MiB: peak above the inputs, gradients included. "
        "* another function or less work, for orientation.[/dim]",
        soft_wrap=True,
    )
    for line in dict.fromkeys(_ceilings(row) for row in rows if row["status"] == TIMED):
        console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)
    console.print()


def _ceilings(row: dict[str, Any]) -> str:
    arithmetic = "float64" if row["dtype"] == "float64" else "float32"
    return (
        f"{arithmetic}, {where(row)}: peak {row['peak_gflops']:.0f} GFLOP/s ({row['peak_source']}), large torch.mm "
        f"{row['mm_gflops']:.0f} GFLOP/s, large copy {row['bandwidth_gbs']:.1f} GB/s."
    )


def _spread(row: dict[str, Any]) -> str:
    if row["ratio_p20"] is None:
        return "–"
    return "one round" if row["rounds"] == 1 else f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}"


def _gflops(row: dict[str, Any]) -> str:
    value = row["gflops"]
    return "–" if value is None else f"{value:.3g}" if value < 10 else f"{value:.0f}"


def _fraction(row: dict[str, Any]) -> str:
    value = row["fraction"]
    return "–" if value is None else f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


class Column(NamedTuple):
    """A column of the tables, shown where any row has a figure in the field that it ``needs``."""

    heading: str
    needs: str
    cell: Callable[[dict[str, Any]], str]


def _time(heading: str, name: str) -> Column:
    return Column(heading, name, lambda row: milliseconds(row[name]))


COLUMNS = (
    *(_time(f"{p} ms", f"{p}_ms") for p in ("p20", "p50", "p80")),
    _time("predicted ms", "predicted_ms"),
    Column("× ours", "ratio", lambda row: factor(row["ratio"])),
    Column("20–80 %", "ratio_p20", _spread),
    Column("GFLOP/s", "gflops", _gflops),
    Column("of peak", "fraction", _fraction),
    _time("cold ms", "cold_ms"),
    _time("warm ms", "warm_ms"),
    _time("one call ms", "single_ms"),
    Column("MiB", "memory_mib", lambda row: "–" if row["memory_mib"] is None else f"{row['memory_mib']:,.0f}"),
)


def figure(value: float, unit: str) -> str:
    """A figure of the goals with its unit."""
    digits = f"{value:.0f}" if value >= 100 or unit == "call" else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return digits + ("×" if unit == "×" else f" {unit}")


def print_goals(console: Console, verdicts: list[Verdict]) -> None:
    """The figures the project promises, as far as they were measured."""
    if not verdicts:
        return
    console.print("[bold]Goals, two threads; float32, loss and gradients where not said")
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("case")
    table.add_column("figure")
    for heading in ("required", "measured", "20–80 %", "needs of peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for verdict in verdicts:
        goal = verdict.goal
        required = ("≤ " if goal.at_most else "≥ ") + figure(goal.required, goal.unit)
        ends = [figure(end, "").strip() for end in (verdict.low, verdict.high)]
        spread = "" if verdict.low == verdict.high else "–".join(ends)
        text = "[green]met" if verdict.met else "[bold red]missed"
        needed = "" if verdict.needed is None else f"{verdict.needed:.0f} %"
        table.add_row(
            escape(verdict.label), goal.text, required, figure(verdict.found, goal.unit), spread, needed, text
        )
    console.print(table)
    met = sum(verdict.met for verdict in verdicts)
    beyond = sum((verdict.needed or 0) > 100 for verdict in verdicts)
    rest = len(GOALS) - len(verdicts)
    console.print(
        f"{met} of {len(verdicts)} goals met"
        + (f"; {rest} need cases that were not measured (--suite goals measures all, on two threads)" if rest else "")
        + (f"; {beyond} ask for more than the FMA peak of this machine" if beyond else "")
        + "\n[dim]The ratios to other forms of the loss were set on another machine, with AVX2.[/dim]\n",
        soft_wrap=True,
    )


def print_red(console: Console, checks: list[Check]) -> None:
    """Prints the checks that failed, with errors and tolerances."""
    table = Table(title="RED GATE: nothing is timed", title_style="bold red", title_justify="left", show_edge=False)
    for heading in ("row", "case", "loss error (allowed)", "gradient error (allowed)", ""):
        table.add_column(heading)
    for c in checks:
        errors = f"{c.loss_error:.1e} ({c.loss_tolerance:.1e})", f"{c.gradient_error:.1e} ({c.gradient_tolerance:.1e})"
        table.add_row(c.row, escape(c.case), *errors, escape(c.problem))
    console.print(table)


def print_comparison(console: Console, compared: list[Comparison], margin: float) -> int:
    """Times of now over those of before, and verdicts. The exit status: 1 if the library got slower, 2 for no row."""
    if not compared:
        console.print("[red]no case of the old results was measured now[/red]")
        return 2
    table = Table(title="New over old", title_justify="left", title_style="bold", show_edge=False)
    headings = ("case", "row", "old ms", "new ms", "new / old", "of which", f"{100 * CONFIDENCE:.0f} % interval", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("case", "row", "") else "right")
    for c in compared:
        interval = "–" if c.interval is None else f"{c.interval.low:.3f}–{c.interval.high:.3f}"
        times = milliseconds(c.old_ms), milliseconds(c.new_ms), factor(c.time), c.by and f"by {c.by}", interval
        colour = {SLOWER: "bold red", FASTER: "green", CANNOT_TELL: "yellow"}.get(c.verdict, "")
        told = f"{c.verdict}: {c.reason}" if c.reason else c.verdict
        table.add_row(escape(c.case), c.row, *times, Text(told, colour if c.counts else "dim"))
    console.print(table)
    mine = [c for c in compared if c.counts]
    counts = ", ".join(f"{sum(c.verdict == verdict for c in mine)} {verdict}" for verdict in VERDICTS)
    console.print(
        f"Rows of the library: {counts}. A row is slower if the {100 * CONFIDENCE:.0f} % interval of its "
        f"ratio lies above {margin:g}, faster if below {1 / margin:.3f}, the same if between.",
        soft_wrap=True,
    )
    return int(any(c.slower for c in compared))
