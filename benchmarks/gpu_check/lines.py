"""What the processes of all steps write into one file: JSON, a line at the start and at the end of every task.

A line is written by one call: processes side by side do not mix theirs, and what is written outlives the writer.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

START, RESULT, SKIP, NOTE = "start", "result", "skip", "note"
ENOUGH = "enough"  # the line of a share of which only optional tasks are left
ABSENT = "absent"  # the line that says why steps that need a GPU, or its kernels, cannot run
LONGEST, SHORT = 1000, 100  # characters of a text, and of one in a file that is full
FULL = 6 << 20  # bytes
Line = dict[str, Any]


def shorten(value: Any, longest: int) -> Any:
    """The end of a text, which says what went wrong."""
    return value[-longest:] if isinstance(value, str) else value


class Lines:
    """The file as one step sees it."""

    def __init__(self, path: Path, step: str) -> None:
        self.path, self.step = path, step

    def write(self, event: str, **data: Any) -> None:
        full = self.path.exists() and self.path.stat().st_size > FULL
        data = {key: shorten(value, SHORT if full and key != "task" else LONGEST) for key, value in data.items()}
        line = json.dumps({"step": self.step, "event": event, "at": round(time.time(), 3)} | data, default=str) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self) -> list[Line]:
        """The lines of this step."""
        return [line for line in read(self.path) if line["step"] == self.step]

    def started(self) -> set[str]:
        """Tasks that an earlier process of this step has begun; a crash or a hang is not tried twice."""
        return {line["task"] for line in self.read() if line["event"] == START}


def read(path: Path) -> list[Line]:
    """All lines but a broken one, which a killed process may leave."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"step", "event"} <= line.keys():
            found.append(line)
    return found


class Tally(NamedTuple):
    """The tasks of a step. ``dropped``: could not be done, which is no failure; ``lost``: begun and never ended."""

    good: list[Line]
    failed: list[Line]
    dropped: list[Line]
    lost: list[str]


def tally(lines: list[Line]) -> Tally:
    results = {line["task"]: line for line in lines if line["event"] == RESULT}
    begun = dict.fromkeys(line["task"] for line in lines if line["event"] == START)
    by_verdict: dict[Any, list[Line]] = {True: [], False: [], None: []}
    for line in results.values():
        by_verdict[line.get("ok")].append(line)
    lost = [task for task in begun if task not in results]
    optional = {line["task"] for line in lines if line["event"] == START and line.get("optional")}
    dropped = [{"task": task, "problem": "begun and not ended"} for task in lost if task in optional]
    needed = [task for task in lost if task not in optional]
    return Tally(by_verdict[True], by_verdict[False], by_verdict[None] + dropped, needed)
