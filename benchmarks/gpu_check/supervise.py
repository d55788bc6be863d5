"""Runs the processes of a step: in a session of their own, all ended when its time is over, begun again after a crash.

Nothing here imports torch, so nothing that happens on the GPU reaches this process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.host import cores

from . import sessions
from .lines import ENOUGH, SKIP, START, Lines
from .steps import Step

ROOT = Path(__file__).resolve().parents[2]
TRIES = 20  # processes that one share of a step may use up
LOG_BYTES = 12 << 20  # the log may have at most 16 MiB
POLL, TICK, PATIENCE = 0.05, 3.0, 5.0  # seconds
DONE, SKIPPED, CRASHED, OUT_OF_TIME, RUNNING, WAITING = (
    "done",
    "skipped",
    "crashed",
    "out of time",
    "running",
    "waiting",
)


class Outcome(NamedTuple):
    """How a step ended, after how many seconds of how many."""

    status: str
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""


class Share:
    """One of the processes of a step, and those that took its place."""

    def __init__(self, number: int, commands: list[list[str]], lines: Lines, log: Path) -> None:
        self.number, self.command, self.lines, self.log = number, commands[number], lines, log
        self.environment = environment(len(commands))
        self.tries = self.begun = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.problem = ""
        self.start()

    def start(self) -> None:
        self.tries += 1
        self.begun = self._count()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def _count(self) -> int:
        """Tasks begun by this share."""
        return sum(line["event"] == START and line.get("share", 0) == self.number for line in self.lines.read())

    def over(self, resumes: bool) -> bool:
        """Whether no process is left; one that did not end well is replaced if it had begun something."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        self.kill()
        self.wait(time.monotonic() + PATIENCE)
        if code == 0:
            return True
        said = f"signal {-code}" if code < 0 else f"exit status {code}"
        if resumes and self.tries < TRIES and self._count() > self.begun:
            self.start()
            return False
        self.problem = f"ended with {said}"
        return True

    def kill(self) -> None:
        """Ends the process and whatever it started."""
        assert self.process is not None
        sessions.end(self.process.pid)

    def wait(self, until: float) -> None:
        """For the end of a killed process, but not for one that hangs in a driver."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=max(0.0, until - time.monotonic()))
        if self.process.stdin is not None:
            self.process.stdin.close()


def environment(processes: int) -> dict[str, str]:
    """Of so many processes, which share the cores: what is set here, but nothing that changes how tests end."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_ADDOPTS")}
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // processes))} if processes > 1 else {}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | threads


def shorten(log: Path) -> None:
    """Cuts off what no longer fits; processes append to the file, so they go on at its new end."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        os.truncate(log, LOG_BYTES // 2)


@contextlib.contextmanager
def shares_of(step: Step, commands: list[list[str]], lines: Lines, log: Path) -> Iterator[list[Share]]:
    """The processes of a step, none of which outlives the block."""
    found: list[Share] = []
    try:
        for number in range(len(commands)):
            found.append(Share(number, commands, lines, log))
        yield found
    finally:
        for share in found:
            share.kill()
        until = time.monotonic() + PATIENCE
        for share in found:
            share.wait(until)


def run(
    step: Step, commands: list[list[str]], lines: Lines, log: Path, limit: float, tick: Callable[[Outcome], None]
) -> Outcome:
    """Runs a step, calling ``tick`` every few seconds."""
    begin = told = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n==== {step.name}: {' '.join(commands[0])}\n")
    with shares_of(step, commands, lines, log) as shares:
        running = list(shares)
        while running:
            now = time.monotonic()
            if now - begin > limit:
                break
            if now - told > TICK:
                told = now
                tick(Outcome(RUNNING, now - begin, limit))
                shorten(log)
            time.sleep(POLL)
            running = [share for share in running if not share.over(step.resumes)]
        seconds = time.monotonic() - begin
    shorten(log)
    enough = {line["share"] for line in lines.read() if line["event"] == ENOUGH}
    if running and enough >= {share.number for share in running}:
        return Outcome(DONE, seconds, limit, f"ended after its limit of {limit:.0f} s, without what is optional")
    if running:
        return Outcome(OUT_OF_TIME, seconds, limit, f"ended after its limit of {limit:.0f} s")
    if skips := [line["reason"] for line in lines.read() if line["event"] == SKIP]:
        return Outcome(SKIPPED, seconds, limit, skips[0])
    problems = dict.fromkeys(share.problem for share in shares if share.problem)
    return Outcome(CRASHED if problems else DONE, seconds, limit, ", ".join(problems))
