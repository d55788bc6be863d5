"""Measure the losses against other ways to compute them: ``python -m benchmarks``.

First every row (backends, the eager matmul form, ``torch.compile`` of it, the published broadcasting formulation, …) is
checked against the float64 reference; if any is wrong, nothing is timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .cases import Case

EXTRAS = ("matplotlib", "rich")
SECONDS = {"quick": 4.0, "full": 12.0}


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
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add(
        "--suite",
        choices=("quick", "full"),
        default="quick",
        help="quick: within two minutes on two cores (%(default)s)",
    )
    add("--filter", default="", metavar="TEXT", help="only cases whose name has every word of TEXT")
    add("--rows", default="", metavar="NAMES", help="only these rows, separated by commas, beside ours")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--threads", type=positive(int), default=None, help="CPU threads (what PyTorch picks)")
    add("--seconds", type=positive(float), default=None, help="for the rounds of one case (quick 4, full 12)")
    add("--no-memory", action="store_true", help="no peak memory, which takes a process per row")
    add("--out", type=Path, default=Path("benchmarks/results/latest"), help="where results and plots go (%(default)s)")
    add("--compare", type=Path, metavar="OLD.json", help="ratios to an earlier run; exit status 1 if slower")
    add("--threshold", type=positive(float), default=1.25, help="times slower that --compare allows (%(default)s)")
    add("--load", type=Path, metavar="RESULTS.json", help="measure nothing, show and compare these results")
    add("--list", action="store_true", help="print the cases and end")
    return parser.parse_args(arguments)


def select(options: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    import torch

    from .cases import SUITES

    threads = options.threads or torch.get_num_threads()
    words = options.filter.split()
    return [case for case in SUITES[options.suite](threads, options.device) if all(w in case.key for w in words)]


def measure(options: argparse.Namespace, cases: list[Case], console: Console) -> dict[str, Any]:
    """Runs the suite under a progress bar. Raises ``RedGateError`` before anything wrong is timed."""
    from rich import progress as bars

    from . import machine
    from .measure import Budget
    from .rows import Row, ours, rows
    from .suite import Suite

    def chosen(device: str) -> list[Row]:
        names = {name.strip() for name in options.rows.split(",") if name.strip()}
        known = rows(device)
        if names - {row.name for row in known}:
            accepted = ", ".join(row.name for row in known)
            raise SystemExit(f"--rows: {options.rows!r} has an unknown name; accepted: {accepted}")
        return [row for row in known if not names or row.name in names or row.name == ours(device)]

    environment = machine.environment(options.device)
    times = bars.TimeElapsedColumn(), bars.TextColumn("eta"), bars.TimeRemainingColumn()
    columns = bars.BarColumn(bar_width=28), bars.TaskProgressColumn(), *times, bars.TextColumn("{task.description}")
    with bars.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("")

        def progress(text: str, weight: float) -> None:
            bar.update(task, advance=weight, **({"description": text} if text else {}))

        budget = Budget(options.seconds or SECONDS[options.suite])
        suite = Suite(cases, budget, environment, progress, chosen, not options.no_memory)
        bar.update(task, total=suite.weight())
        found = suite.run()
    return {"environment": environment, "rows": found, "suite": options.suite}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, write, compare."""
    options = parse_arguments(arguments)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"the benchmarks need {' and '.join(missing)}: pip install cacr_kernels[bench]")
    import torch
    from rich.console import Console

    from . import plots, results, tables
    from .suite import RedGateError

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {options.device}: there is no such GPU here")
    try:
        old = results.read(options.compare) if options.compare else None
        data = results.read(options.load) if options.load else None
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if data is None:
        cases = select(options)
        if options.list or not cases:
            console.print("\n".join(case.key for case in cases) or f"no case has {options.filter!r}", markup=False)
            return 0 if cases else 1
        try:
            data = measure(options, cases, console)
        except RedGateError as error:
            tables.print_red(console, error.checks)
            return 1
        written = [*results.write(options.out, data["rows"], data["environment"], data["suite"])]
        written += plots.draw(options.out, data["rows"])
    else:
        written = plots.draw(options.out, data["rows"]) if options.out.is_dir() else []
    tables.print_environment(console, data["environment"])
    tables.print_results(console, data["rows"])
    tables.print_goals(console, results.verdicts(data["rows"]))
    if written:
        console.print("written: " + ", ".join(str(path) for path in written), soft_wrap=True)
    if old is None:
        return 0
    same = all(old["environment"][k] == data["environment"][k] for k in ("machine", "cores", "isa", "torch"))
    compared = results.compare(old["rows"], data["rows"])
    return 0 if tables.print_comparison(console, compared, options.threshold, same) else 1


if __name__ == "__main__":
    sys.exit(main())
