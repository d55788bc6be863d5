"""``python -m benchmarks.gpu_check``: runs the steps, whatever the others found, and writes one folder to attach.

report.md, report.json   what was found, also if this is killed on the way
results.jsonl            every task as it ended
log.txt                  what the processes printed

Exit status: 0 all right, 1 something failed, 2 no backend can use a GPU here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.host import cores

from . import reckoned, report, supervise
from .lines import ABSENT, Lines, read, tally
from .steps import CORES, MINUTES, ONLY, STEPS, Step, workers
from .supervise import RUNNING, SKIPPED, Outcome

FILES = ("report.md", "report.json", "results.jsonl", "log.txt")
NEEDED = ("smoke", "times", "verify", "device_tests")  # steps that say themselves that there is no GPU


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu-check", description="Checks and times the backends of the GPU here."
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("gpu-check"),
        help="folder of the report; one that lies there is replaced (%(default)s)",
    )
    add("--only", choices=ONLY, help="this step, and what it needs")
    add("--minutes", type=float, default=MINUTES, help="time limits of all steps together (%(default)s)")
    add("-n", "--processes", type=int, default=workers(), help="processes side by side (as many as there are cores)")
    options = parser.parse_args(arguments)
    if not (0 < options.minutes < 1e4 and options.processes > 0):
        parser.error("--minutes and --processes must be positive")
    return options


def main(arguments: list[str] | None = None, steps: tuple[Step, ...] = STEPS) -> int:
    """Runs the steps; returns the exit status."""
    options = parse(arguments)
    folder: Path = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    chosen = tuple(step for step in steps if options.only is None or options.only in step.only)
    scale = 60 * options.minutes / sum(step.seconds for step in chosen) if options.only else options.minutes / MINUTES
    outcomes: dict[str, Outcome] = {}
    limits = sum(max(step.least, step.seconds * scale) for step in chosen)
    print(f"at most {limits / 60:.1f} minutes; {reckoned.sentence(chosen, options.processes)}", flush=True)
    for step in chosen:

        def tell(outcome: Outcome, name: str = step.name) -> None:
            outcomes[name] = outcome
            report.write(folder, chosen, outcomes)

        limit = max(step.least, step.seconds * scale)
        tell(Outcome(RUNNING, 0.0, limit))
        print(f"{step.name}: up to {limit:.0f} s", flush=True)
        lines = Lines(folder / "results.jsonl", step.name)
        if (reason := why_not(step, lines.path)) is not None:
            tell(Outcome(SKIPPED, 0.0, limit, reason))
            print(f"{step.name}: {summary(outcomes[step.name], lines)}", flush=True)
            continue
        commands = step.commands(lines.path, limit / step.seconds, options.processes)
        tell(supervise.run(step, commands, lines, folder / "log.txt", limit, tell))
        print(f"{step.name}: {summary(outcomes[step.name], lines)}", flush=True)
    print(f"report: {folder / 'report.md'}; please attach the folder to an issue, whatever it says")
    return status(chosen, outcomes, folder / "results.jsonl")


def why_not(step: Step, results: Path) -> str | None:
    """Why a step need not start, as the environment step has found."""
    if step.needs == CORES and cores() <= 2:
        return f"{cores()} cores are too few to say how a loss scales"
    reasons = [line.get(step.needs) for line in read(results) if line["event"] == ABSENT]
    return next(filter(None, reasons), None)


def summary(outcome: Outcome, lines: Lines) -> str:
    """One line on a step."""
    found = tally(lines.read())
    counts = zip(("good", "failed", "dropped", "not ended"), found, strict=True)
    said = [f"{len(tasks)} {word}" for word, tasks in counts if tasks]
    return ", ".join([f"{outcome.status} in {outcome.seconds:.1f} s", *said, *filter(None, [outcome.reason])])


def status(steps: tuple[Step, ...], outcomes: dict[str, Outcome], results: Path) -> int:
    """The exit status: what failed counts before what could not run."""
    found = read(results)
    for step in steps:
        if report.failed(outcomes[step.name], tally([line for line in found if line["step"] == step.name])):
            return 1
    needed = [outcomes[step.name] for step in steps if step.name in NEEDED]
    return 2 if needed and all(outcome.status == SKIPPED for outcome in needed) else 0


if __name__ == "__main__":
    sys.exit(main())
