"""The report, one Markdown file and one JSON, made anew from the lines of all processes while the steps run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from . import compared, reckoned, rule
from .lines import NOTE, Line, Tally, read, tally
from .steps import Step
from .supervise import DONE, RUNNING, SKIPPED, WAITING, Outcome

HIDDEN = {"step", "event", "at", "task", "ok", "problem", "seconds", "problem name", "ours", "work", "limit"}
MOST_ROWS = 400
SILENT = ("device_tests", "warm", "verify")  # steps of which only failures are listed


def write(folder: Path, steps: tuple[Step, ...], outcomes: dict[str, Outcome]) -> None:
    """``report.md`` and ``report.json``, each replaced as a whole: a reader never meets half a file."""
    by_step: dict[str, list[Line]] = {step.name: [] for step in steps}
    for line in read(folder / "results.jsonl"):
        by_step.setdefault(line["step"], []).append(line)
    data = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": {
            step.name: outcomes.get(step.name, Outcome(WAITING))._asdict() | {"lines": by_step[step.name]}
            for step in steps
        },
    }
    _replace(folder / "report.json", json.dumps(data, indent=1, default=str))
    _replace(folder / "report.md", markdown(steps, outcomes, by_step))


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(path.suffix + ".tmp")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)


def failed(outcome: Outcome, found: Tally) -> bool:
    """Whether a step counts as a failure."""
    ended_well = outcome.status in (DONE, SKIPPED, RUNNING, WAITING)
    return bool(found.failed or not ended_well or (found.lost and outcome.status != RUNNING))


def markdown(steps: tuple[Step, ...], outcomes: dict[str, Outcome], by_step: dict[str, list[Line]]) -> str:
    tallies = {step.name: tally(by_step[step.name]) for step in steps}
    rows = []
    for step in steps:
        outcome, found = outcomes.get(step.name, Outcome(WAITING)), tallies[step.name]
        verdict = "**FAILED**" if failed(outcome, found) else "ok" if outcome.status == DONE else "–"
        counts = [len(found.good), len(found.failed), len(found.dropped), len(found.lost)]
        time_used = f"{outcome.seconds:.1f} of {outcome.limit:.0f}" if outcome.limit else ""
        rows.append([step.name, verdict, outcome.status, *counts, time_used, outcome.reason])
    head = ["step", "", "how it ended", "good", "failed", "dropped", "not ended", "seconds", "why"]
    parts = ["# GPU check", table(head, rows)]
    for step in steps:
        if body := section(step, by_step[step.name], tallies[step.name]):
            parts += [f"## {step.title}", *body]
    return "\n\n".join(parts)


def section(step: Step, lines: list[Line], found: Tally) -> list[str]:
    """What a step found: what went wrong first."""
    parts = []
    if notes := [line["text"] for line in lines if line["event"] == NOTE]:
        parts.append("\n".join(f"- {note}" for note in notes))
    if (compiled := reckoned.measured(lines)) is not None:
        parts.append(f"- {compiled}")
    problems = [(line["task"], line.get("problem", "")) for line in found.failed]
    if problems:
        text = "\n".join(f"{task}: {problem.strip()[-1500:]}" for task, problem in problems[:60])
        more = f"\n… and {len(problems) - 60} more, see results.jsonl" if len(problems) > 60 else ""
        parts.append(f"Failed:\n\n```text\n{text}{more}\n```")
    if found.lost:
        parts.append("Begun and not ended: " + ", ".join(f"`{task}`" for task in found.lost[:60]))
    if found.dropped:
        listed = "\n".join(f"- {line['task']}: {line.get('problem', '')}" for line in found.dropped[:60])
        parts.append(f"Dropped:\n\n{listed}")
    if step.name == "times" and found.good:
        head, rows = compared.table(lines)
        parts += [table(head, rows)] if rows else []
        parts.append("\n".join(rule.verdicts(lines)))
    shown = [*found.failed, *([] if step.name in SILENT else found.good)]
    shown = [line for line in shown if line.keys() - HIDDEN]
    if shown:
        columns = list(dict.fromkeys(key for line in shown for key in line if key not in HIDDEN))
        rows = [[line["task"], *(line.get(column) for column in columns)] for line in shown[:MOST_ROWS]]
        parts.append(table(["", *columns], rows))
    return parts


def cell(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
