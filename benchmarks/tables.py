"""What a run prints: one table per case, goals, comparison, red checks."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .gate import Check
from .measure import quantile
from .results import TIMED, Comparison, Verdict, label
from .rows import BASELINE, OURS

BUSY = 0.5  # running processes per core, without our own


def milliseconds(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def factor(value: float | None) -> str:
    """A ratio."""
    return "–" if value is None else f"{value:.2f}×" if value < 10 else f"{value:,.0f}×"


def print_environment(console: Console, environment: dict[str, Any]) -> None:
    """What was measured where."""
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
        timed = [row for row in mine if row["status"] == TIMED]
        table = Table(
            title=escape(label(mine[0])), title_justify="left", title_style="bold", show_edge=False, pad_edge=False
        )
        table.add_column("")
        memory = any(row["memory_mib"] is not None for row in timed)
        headings = ("p20 ms", "p50 ms", "p80 ms", "× ours", "20–80 %", "GFLOP/s", "of mm", "cold ms")
        for heading in (*headings, *(["MiB"] if memory else [])):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in timed:
            table.add_row(*_cells(row, memory), style="bold green" if row["ours"] else "")
        console.print(table)
        left_out = [f"{row['row']}: {row['reason']}" for row in mine if row["status"] != TIMED]
        if left_out:
            console.print(f"[dim]left out: {escape('; '.join(left_out))}[/dim]", soft_wrap=True)
        console.print()
    console.print(
        "[dim]Times per call over interleaved rounds; × ours: median over the rounds of the ratio within a round. "
        "GFLOP/s count the products the loss needs (3U with gradients, U = 2·pairs·N·M·D); of mm: share of a large "
        "torch.mm. * another function or less work, for orientation.[/dim]",
        soft_wrap=True,
    )


def _cells(row: dict[str, Any], memory: bool) -> list[str]:
    spread = "–" if row["ratio_p20"] is None else f"{row['ratio_p20']:.2f}–{row['ratio_p80']:.2f}"
    starred = row["row"] + (" *" if row["family"] not in (OURS, BASELINE) else "")
    gflops = "–" if row["gflops"] is None else f"{row['gflops']:.3g}" if row["gflops"] < 10 else f"{row['gflops']:.0f}"
    fraction = "–" if row["fraction"] is None else f"{100 * row['fraction']:.2g} %"
    if row["fraction"] is not None and row["fraction"] >= 0.1:
        fraction = f"{100 * row['fraction']:.0f} %"
    cells = [starred, *(milliseconds(row[f"{p}_ms"]) for p in ("p20", "p50", "p80")), factor(row["ratio"]), spread]
    cells += [gflops, fraction, milliseconds(row["cold_ms"])]
    if memory:
        cells.append("–" if row["memory_mib"] is None else f"{row['memory_mib']:,.0f}")
    return cells


def print_goals(console: Console, verdicts: list[Verdict]) -> None:
    """The figures the project promises, as far as their cases were measured."""
    if not verdicts:
        return
    title = "Goals: how many times faster than …"
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for heading, justify in (("case", "left"), ("than", "left"), ("required", "right"), ("aim", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("here", justify="right")
    table.add_column("")
    for v in verdicts:
        text = "[bold red]missed" if not v.met else "[green]met" if v.aimed else "[yellow]below the aim"
        table.add_row(escape(v.label), v.row, factor(v.required), factor(v.aim), factor(v.found), text)
    console.print(table)
    console.print("[dim]The aims were set on two threads of a machine with AVX2.[/dim]\n")


def print_red(console: Console, checks: list[Check]) -> None:
    """What is wrong."""
    table = Table(title="RED GATE: nothing is timed", title_style="bold red", title_justify="left", show_edge=False)
    for heading in ("row", "case", "loss error (allowed)", "gradient error (allowed)", ""):
        table.add_column(heading)
    for c in checks:
        errors = f"{c.loss_error:.1e} ({c.loss_tolerance:.1e})", f"{c.gradient_error:.1e} ({c.gradient_tolerance:.1e})"
        table.add_row(c.row, escape(c.case), *errors, escape(c.problem))
    console.print(table)


def print_comparison(console: Console, compared: list[Comparison], threshold: float, same_machine: bool) -> bool:
    """Times of this run over those of the old one; whether nothing of the library got slower beyond the threshold."""
    if not compared:
        console.print("[red]no case of the old results was measured now[/red]")
        return False
    table = Table(title="Compared with the old results", title_justify="left", title_style="bold", show_edge=False)
    for heading in ("case", "row", "old ms", "new ms", "new / old", "by eager", ""):
        table.add_column(heading, justify="left" if heading in ("case", "row", "") else "right")
    for c in compared:
        verdict = "[bold red]slower" if c.slower(threshold) else ""
        times = milliseconds(c.old_ms), milliseconds(c.new_ms), factor(c.time), factor(c.relative)
        table.add_row(escape(c.case), c.row, *times, verdict)
    console.print(table)
    slower = [c for c in compared if c.slower(threshold)]
    mine = [c.time for c in compared if c.family == OURS]
    typical = f", median of the library's rows {quantile(mine, 0.5):.2f}×" if mine else ""
    console.print(f"{len(slower)} of {len(compared)} rows slower by more than {threshold:g}×{typical}", soft_wrap=True)
    if not same_machine:
        console.print("[yellow]the old results come from another machine, thread count or torch[/yellow]")
    return not slower
