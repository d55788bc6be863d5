"""Runs a suite: the gate for every row of every case, then the timing, then memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import machine, predicted, processes
from .cases import BROADCASTING, EAGER, BenchmarkCase
from .gate import Check, Gate, agree, broken, embeddings, threads
from .measure import Budget, Timing, clock, interleave
from .peak import Peaks
from .results import SINGLE, SKIPPED, TIMED, figures, record
from .rows import Row, Step, ours, rows


class Progress(Protocol):
    """What the suite tells while it runs; the weights add up to the ``total`` of ``Suite.weight``."""

    def __call__(self, text: str, weight: float) -> None:
        """``weight`` more is done, now comes ``text``."""


class RedGateError(Exception):
    """Numbers are wrong: nothing may be timed."""

    def __init__(self, checks: list[Check]) -> None:
        self.checks = checks
        super().__init__(f"{len(checks)} checks are red")


NOT_WANTED = "not measured in this suite"
GATE_WEIGHT, PROCESS_WEIGHT = 0.15, 2.5  # seconds, roughly, per row
COMPILE_WEIGHT = 8.0
LARGE = 2**26  # similarities; two processes with more may not fit beside each other
Checks = dict[tuple[str, str], Check]
Task = Callable[[BenchmarkCase, Row], dict[str, Any]]  # what a process of its own measures


@dataclass
class Suite:
    """The cases to measure. ``make_rows`` exists for tests, which plant a wrong row."""

    cases: list[BenchmarkCase]
    budget: Budget
    environment: dict[str, Any]
    progress: Progress
    make_rows: Callable[[], list[Row]] = rows
    with_processes: bool = True
    gate: Gate = field(default_factory=Gate)
    peaks: Peaks = field(default_factory=Peaks)

    def __post_init__(self) -> None:
        self.rows = self.make_rows()
        self.ours = {case.key: case.base or ours(case) for case in self.cases}

    def reason(self, case: BenchmarkCase, row: Row) -> str | None:
        """Why a row is left out of a case."""
        wanted = not case.only or row.name in case.only or row.name == self.ours[case.key]
        if not wanted or row.name in case.leave_out:
            return NOT_WANTED
        return row.why_not(case)

    def measured(self, case: BenchmarkCase) -> list[Row]:
        """The rows of a case."""
        return [row for row in self.rows if self.reason(case, row) is None]

    def weight(self) -> float:
        """Seconds that everything will take, roughly."""
        total = 0.0
        for case in self.cases:
            found = self.measured(case)
            total += self.budget.seconds * case.share * case.timed + sum(self._gate_weight(row) for row in found)
            total += PROCESS_WEIGHT * len(self._jobs(case, found)) * self.with_processes
        return total

    def _gate_weight(self, row: Row) -> float:
        return COMPILE_WEIGHT if row.compiles else GATE_WEIGHT

    def _jobs(self, case: BenchmarkCase, found: list[Row]) -> list[tuple[Task, Row]]:
        """The processes to be started for a case."""
        checked = [row for row in found if row.checked]
        starts = (*case.start, self.ours[case.key]) if case.start else ()
        return [
            *((processes.memory, row) for row in checked if case.memory),
            *((processes.start, row) for row in checked if row.name in starts),
        ]

    def check(self) -> Checks:
        """The gate. Raises ``RedGateError`` if any row is wrong."""
        checks = {}
        for case in self.cases:
            for row in self.measured(case):
                self.progress(f"gate  {row.name}  {case.key}", 0.0)
                if row.checked:
                    checks[case.key, row.name] = self.gate.check(case, row)
                self.progress("", self._gate_weight(row))
        red = [check for check in checks.values() if not check.ok]
        if red:
            raise RedGateError(red)
        return checks

    def run(self) -> list[dict[str, Any]]:
        """All results. Nothing is timed before every row of every case has passed the gate."""
        checks = self.check()
        found = []
        for case in self.cases:
            found += self._case(case, checks)
        self._fractions(found)
        if self.with_processes:
            self._processes(found)
        return found

    def _case(self, case: BenchmarkCase, checks: Checks) -> list[dict[str, Any]]:
        first, timings, failed = self.ours[case.key], dict[str, Timing](), dict[str, str]()
        if case.timed:
            with quiet():
                timings = self._time(case, failed)
            self.peaks.see(case.arithmetic, case.threads, case.device)
        results = []
        for row in self.rows:
            reason = self.reason(case, row) or failed.get(row.name)
            values: dict[str, Any] = {"status": SKIPPED, "reason": reason}
            if reason is None:
                values = {"status": SINGLE}
                if case.timed:
                    values = figures(case, row, timings[row.name], timings.get(first))
                    values["mm_gflops"] = machine.product_gflops(case.arithmetic, case.threads, case.device)
                    values["bandwidth_gbs"] = machine.bandwidth(case.threads, case.device)
                values["predicted_ms"] = predicted.milliseconds(case, row.name)
                check = checks.get((case.key, row.name))
                if check:
                    values |= {"loss_error": check.loss_error, "gradient_error": check.gradient_error}
            results.append(record(case, row, row.name == first, self.environment, **values))
        return results

    def _time(self, case: BenchmarkCase, failed: dict[str, str]) -> dict[str, Timing]:
        """Times the rows of a case, after their first results at full size have been compared with each other.

        A row of another function that cannot run ends up in ``failed``; one of ours or a baseline is red.
        """
        inputs = case.inputs()
        like = embeddings(inputs)
        steps: dict[str, Step] = {}
        first: dict[str, float] = {}
        red, others = [], None
        found = self.measured(case)
        with threads(case.threads):
            for row in sorted(found, key=lambda row: row.name != EAGER):  # the eager row first: compared with
                self.progress(f"first call  {row.name}  {case.key}", 0.0)
                try:
                    step = self.gate.step(case, row, inputs)
                    start = clock()
                    outputs = step()
                    first[row.name] = clock() - start
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    if row.checked:
                        red.append(broken(row, f"{case.key} (full size)", reason))
                    failed[row.name] = reason
                    continue
                steps[row.name] = step
                if row.checked:
                    others = outputs if others is None else others
                    check = agree(row, case, outputs, like, others)
                    red += [] if check.ok else [check]
                del outputs
        if red:
            raise RedGateError(red)
        del others
        told, budget = 0.0, self.budget._replace(seconds=self.budget.seconds * case.share)

        def on_round(done: float) -> None:
            nonlocal told
            self.progress(f"timing  {case.key}", budget.seconds * (done - told))
            told = done

        order = {row.name: steps[row.name] for row in found if row.name in steps}
        compiles = {row.name for row in found if row.compiles}
        return interleave(order, first, budget, case.threads, case.device, compiles, on_round)

    def _fractions(self, results: list[dict[str, Any]]) -> None:
        """Adds the peak and what share of it was reached."""
        by_key = {case.key: case for case in self.cases}
        for result in results:
            if result["status"] == TIMED:
                case = by_key[result["case"]]
                highest = self.peaks.highest(case.arithmetic, case.threads, case.device)
                result |= {"peak_gflops": highest.gflops, "peak_source": highest.source}
                if result["gflops"] is not None:
                    result["fraction"] = result["gflops"] / highest.gflops

    def _processes(self, results: list[dict[str, Any]]) -> None:
        """Adds what takes a process per row, after everything has been timed.

        Memory: two processes at a time where they fit. Starts, which are timed, and large ones: one.
        """
        by_row = {(result["case"], result["row"]): result for result in results if result["status"] != SKIPPED}
        together: list[tuple[Task, BenchmarkCase, Row]] = []
        alone: list[tuple[Task, BenchmarkCase, Row]] = []
        for case in self.cases:
            for task, row in self._jobs(case, [row for row in self.measured(case) if (case.key, row.name) in by_row]):
                P, N, M, _ = case.extent
                single = task is processes.start or row.name == BROADCASTING or P * N * M > LARGE
                (alone if single else together).append((task, case, row))

        def run(job: tuple[Task, BenchmarkCase, Row]) -> None:
            task, case, row = job
            self.progress(f"{task.__name__}  {row.name}  {case.key}", 0.0)
            by_row[case.key, row.name].update(task(case, row))
            self.progress("", PROCESS_WEIGHT)

        for jobs, workers in ((together, 2), (alone, 1)):
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(run, jobs))


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of the libraries compared with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
