"""Measure the losses against other ways to compute them: ``python -m benchmarks``.

First every row (backends, the eager matmul form, ``torch.compile`` of it, the published broadcasting formulation, …) is
checked against the float64 reference; if any is wrong, nothing is timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .cases import BenchmarkCase
    from .rows import Row

EXTRAS = ("matplotlib", "rich")
LATEST = "benchmarks/results/latest"
SECONDS = {"quick": 2.0, "goals": 5.0, "full": 10.0, "distributed": 10.0}
DISTRIBUTED = "distributed"  # whose rows are numbers of processes


def positive(kind: type[int] | type[float]) -> Any:
    """An option that is a positive, finite number."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    return parse


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and refuses ``--readme`` without ``--load``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add(
        "--suite",
        choices=tuple(SECONDS),
        default="quick",
        help="quick: within three minutes on two cores; goals: the promised figures; full: all sweeps; "
        "distributed: several processes (%(default)s)",
    )
    add("--filter", default="", metavar="TEXT", help="only cases whose name has every word of TEXT")
    add("--rows", default="", metavar="NAMES", help="only these rows, separated by commas, beside ours")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--threads", type=positive(int), default=None, help="CPU threads (what PyTorch picks)")
    add("--seconds", type=positive(float), default=None, help="for the rounds of a case (quick 2, goals 5, others 10)")
    add("--no-processes", action="store_true", help="no peak memory and no cold start, which take processes")
    add("--out", type=Path, default=None, help=f"where results and pictures go ({LATEST}; with --load beside the file)")
    add(
        "--compare",
        metavar="OLD",
        help="results.json of an earlier run; or a commit, or the folder of a built checkout, which then takes turns "
        "with this one. Exit status 1 if the library is slower",
    )
    add("--threshold", type=positive(float), default=None, help="margin of --compare (1.05 in turns, 1.1 for two runs)")
    add("--count", action="store_true", help="instructions of each row by perf or callgrind; nothing is timed")
    add("--profile", action="store_true", help="where the time of our CPU kernels goes, by perf; nothing is compared")
    add("--load", type=Path, metavar="RESULTS.json", help="measure nothing, show and compare these results")
    add(
        "--readme", action="store_true", help="with --load: write the section of README.md (or page) from these results"
    )
    add("--list", action="store_true", help="print the cases and end")
    options = parser.parse_args(arguments)
    if options.readme and options.load is None:
        parser.error("--readme needs --load, results that are committed beside it")
    if options.threshold is not None and options.threshold < 1:
        parser.error("--threshold is a factor of at least 1")
    if options.suite == DISTRIBUTED and (options.device != "cpu" or options.rows or options.threads):
        parser.error("--suite distributed has one thread in each process and its own rows, on the CPU")
    return options


def select(options: argparse.Namespace) -> list[BenchmarkCase]:
    """The cases of the suite whose names have every word of ``--filter``."""
    import torch

    from .cases import SUITES

    threads = options.threads or torch.get_num_threads()
    words = options.filter.split()
    return [case for case in SUITES[options.suite](threads, options.device) if all(w in case.key for w in words)]


def named_rows(options: argparse.Namespace) -> tuple[list[Row], set[str]]:
    """All rows, and the names of those that ``--rows`` asks for."""
    from .rows import rows

    names = {name.strip() for name in options.rows.split(",") if name.strip()}
    known = rows()
    if names - {row.name for row in known}:
        accepted = ", ".join(row.name for row in known)
        raise SystemExit(f"--rows: {options.rows!r} has an unknown name; accepted: {accepted}")
    return known, names


def measure(options: argparse.Namespace, cases: list[BenchmarkCase], console: Console) -> dict[str, Any]:
    """Runs the suite under a progress bar. Raises ``RedGateError`` before anything wrong is timed."""
    from rich import progress as bars

    from . import machine, scaling
    from .measure import Budget
    from .rows import ours
    from .runner import Suite

    def chosen() -> list[Row]:
        known, names = named_rows(options)
        always = {case.base or ours(case) for case in cases}
        return [row for row in known if not names or row.name in names | always]

    environment = machine.environment(options.device)
    times = bars.TimeElapsedColumn(), bars.TextColumn("eta"), bars.TimeRemainingColumn()
    columns = bars.BarColumn(bar_width=28), bars.TaskProgressColumn(), *times, bars.TextColumn("{task.description}")
    with bars.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("")

        def progress(text: str, weight: float) -> None:
            bar.update(task, advance=weight, **({"description": text} if text else {}))

        budget = Budget(options.seconds or SECONDS[options.suite])
        if options.suite == DISTRIBUTED:
            found = scaling.run(cases, budget, environment, progress)
        else:
            suite = Suite(cases, budget, environment, progress, chosen, not options.no_processes)
            bar.update(task, total=suite.weight())
            found = suite.run()
    return {"environment": environment, "rows": found, "suite": options.suite}


def show(options: argparse.Namespace, data: dict[str, Any], written: list[Path], console: Console) -> None:
    """Prints results, and writes README.md from them if asked to."""
    from . import goals, readme, scaling_tables, tables

    tables.print_environment(console, data["environment"])
    if data["suite"] == DISTRIBUTED:
        scaling_tables.print_scaling(console, data["rows"])
    else:
        tables.print_results(console, data["rows"])
        tables.print_goals(console, goals.verdicts(data["rows"]))
    if written:
        console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)
    if options.readme and data["suite"] == DISTRIBUTED:
        scaling_tables.write(options.load)
    elif options.readme:
        console.print(f"README.md now shows {readme.write(options.load)}", soft_wrap=True)


def compare(options: argparse.Namespace, data: dict[str, Any], console: Console) -> int:
    """The exit status: 1 if anything of the library got slower than in the old results."""
    from . import compare, results, tables, verdict

    if options.compare is None:
        return 0
    old = results.read(Path(options.compare))
    differ = compare.differing(old["environment"], data["environment"])
    margin = options.threshold or verdict.RUNS_MARGIN
    return tables.print_comparison(console, compare.compare(old["rows"], data["rows"], margin, differ), margin)


def count(options: argparse.Namespace, cases: list[BenchmarkCase], console: Console) -> int:
    """Counts instructions, of ours unless ``--rows`` names others, too; always 0."""
    from . import count
    from .rows import ours

    tool = count.find_tool()
    if isinstance(tool, str):
        console.print(tool, soft_wrap=True)
        return 0
    known, names = named_rows(options)

    def chosen(case: BenchmarkCase) -> list[Row]:
        wanted = names | {case.base or ours(case)}
        return [row for row in known if row.name in wanted and row.why_not(case) is None]

    jobs, large = count.jobs_of(cases, chosen)
    found = tool.count(jobs)
    count.show(console, tool.name, found, large)
    out = (options.out or Path(LATEST)) / "counts.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [counted._asdict() for counted in found]
    out.write_text(json.dumps({"counted_by": tool.name, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {out}", soft_wrap=True)
    return 0


def profile(options: argparse.Namespace, cases: list[BenchmarkCase], console: Console) -> int:
    """Profiles what ``"auto"`` takes; the exit status: 1 where perf is missing."""
    from . import machine, profile, tables
    from .peak import Peaks

    if reason := profile.why_not():
        console.print(reason, soft_wrap=True)
        return 1
    environment = machine.environment(options.device)
    tables.print_environment(console, environment)
    peaks, seconds = Peaks(), options.seconds or SECONDS[options.suite]
    found = [profile.profile(case, seconds, peaks) for case in cases if case.timed]
    profile.show(console, found)
    out = (options.out or Path(LATEST)) / "profile.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": environment, "rows": [p.to_json() for p in found]}
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {out}", soft_wrap=True)
    return 0


def take_turns(options: argparse.Namespace, cases: list[BenchmarkCase], console: Console) -> int:
    """Compares with another checkout, round by round; the exit status."""
    from . import machine, tables, verdict, versus
    from .measure import Budget

    margin = options.threshold or verdict.INTERLEAVED_MARGIN
    folder = versus.checkout(options.compare, console.print)
    tables.print_environment(console, machine.environment(options.device))
    budget = Budget(options.seconds or SECONDS[options.suite])
    with versus.workers(folder) as both:
        found = [versus.take_turns(both, case, budget, margin) for case in cases if case.timed]
    return tables.print_comparison(console, found, margin)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure or load, show, compare. Raises ``ValueError`` for files that cannot be used."""
    from . import plots, results, tables
    from .runner import RedGateError

    in_turns = options.compare is not None and not Path(options.compare).is_file()
    if options.compare and not in_turns:
        results.read(Path(options.compare))  # refused now rather than in the end
    if options.load:
        data = results.read(options.load)
        written = [] if data["suite"] == DISTRIBUTED else plots.draw(options.out or options.load.parent, data["rows"])
    else:
        cases = select(options)
        if options.list or not cases:
            print("\n".join(case.key for case in cases) or f"no case has {options.filter!r}")
            return 0 if cases else 1
        if in_turns:
            return take_turns(options, cases, console)
        if options.count:
            return count(options, cases, console)
        if options.profile:
            return profile(options, cases, console)
        try:
            data = measure(options, cases, console)
        except RedGateError as error:
            tables.print_red(console, error.checks)
            return 1
        out = options.out or Path(LATEST)
        written = [*results.write(out, data["rows"], data["environment"], data["suite"])]
        written += [] if data["suite"] == DISTRIBUTED else plots.draw(out, data["rows"])
    show(options, data, written, console)
    return compare(options, data, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = parse_arguments(arguments)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the benchmarks need {' and '.join(missing)}: pip install cacr_kernels[bench]")
    import torch
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {options.device}: there is no such GPU here")
    try:
        return run(options, console)
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
