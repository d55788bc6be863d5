"""Runs a suite: the gate for every row of every case, then the timing, then memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import machine, memory
from .cases import Case
from .gate import Check, Gate, agree, embeddings, threads
from .measure import Budget, Timing, clock, interleave
from .results import SKIPPED, TIMED, figures, record
from .rows import BASELINE, OURS, Row, Step, ours, rows


class Progress(Protocol):
    """What the suite tells while it runs; the weights add up to the ``total`` of ``Suite.weight``."""

    def __call__(self, text: str, weight: float) -> None:
        """``weight`` more is done, now comes ``text``."""


class RedGateError(Exception):
    """Numbers are wrong: nothing may be timed."""

    def __init__(self, checks: list[Check]) -> None:
        self.checks = checks
        super().__init__(f"{len(checks)} checks are red")


GATE_WEIGHT, MEMORY_WEIGHT = 0.15, 2.5  # seconds, roughly, per row
COMPILE_WEIGHT = 8.0
LARGE = 2**26  # similarities; two processes with more may not fit beside each other


@dataclass
class Suite:
    """The cases to measure. ``make_rows`` exists for tests, which plant a wrong row."""

    cases: list[Case]
    budget: Budget
    environment: dict[str, Any]
    progress: Progress
    make_rows: Callable[[str], list[Row]] = rows
    with_memory: bool = True
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        self.rows = {case.device: self.make_rows(case.device) for case in self.cases}

    def reason(self, case: Case, row: Row) -> str | None:
        """Why a row is left out of a case."""
        return "not measured in this suite" if row.name in case.leave_out else row.why_not(case)

    def measured(self, case: Case) -> list[Row]:
        """The rows of a case."""
        return [row for row in self.rows[case.device] if self.reason(case, row) is None]

    def weight(self) -> float:
        """Seconds that everything will take, roughly."""
        total = 0.0
        for case in self.cases:
            found = self.measured(case)
            total += self.budget.seconds + sum(self._gate_weight(row) for row in found)
            total += MEMORY_WEIGHT * len(found) if case.memory and self.with_memory else 0.0
        return total

    def _gate_weight(self, row: Row) -> float:
        return COMPILE_WEIGHT if row.compiles else GATE_WEIGHT

    def check(self) -> dict[tuple[str, str], Check]:
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
        if self.with_memory:
            self._memory(found)
        return found

    def _case(self, case: Case, checks: dict[tuple[str, str], Check]) -> list[dict[str, Any]]:
        first = ours(case.device)
        found = self.measured(case)
        with quiet():
            timings = self._time(case, found)
        results = []
        for row in self.rows[case.device]:
            reason = self.reason(case, row)
            values: dict[str, Any] = {"status": SKIPPED, "reason": reason}
            if reason is None:
                ceiling = machine.ceiling(case.arithmetic, case.threads, case.device)
                values = figures(case, row, timings[row.name], timings.get(first), ceiling)
                values["bandwidth_gbs"] = machine.bandwidth(case.threads, case.device)
                check = checks.get((case.key, row.name))
                if check:
                    values |= {"loss_error": check.loss_error, "gradient_error": check.gradient_error}
            results.append(record(case, row, row.name == first, self.environment, **values))
        return results

    def _time(self, case: Case, found: list[Row]) -> dict[str, Timing]:
        """Times the rows of a case, after their first results at full size have been compared with each other."""
        inputs = case.inputs()
        like = embeddings(inputs)
        steps: dict[str, Step] = {}
        cold: dict[str, float] = {}
        red, others = [], None
        with threads(case.threads):
            for row in sorted(found, key=lambda row: row.name != "eager"):  # the eager row first: compared with
                self.progress(f"first call  {row.name}  {case.key}", 0.0)
                steps[row.name] = self.gate.step(case, row, inputs)
                start = clock()
                outputs = steps[row.name]()
                cold[row.name] = clock() - start
                if row.checked:
                    others = outputs if others is None else others
                    check = agree(row, case, outputs, like, others)
                    red += [] if check.ok else [check]
        if red:
            raise RedGateError(red)
        del others, outputs
        told = 0.0

        def on_round(done: float) -> None:
            nonlocal told
            self.progress(f"timing  {case.key}", self.budget.seconds * (done - told))
            told = done

        order = {row.name: steps[row.name] for row in found}
        compiles = {row.name for row in found if row.compiles}
        return interleave(order, cold, self.budget, case.threads, case.device, compiles, on_round)

    def _memory(self, results: list[dict[str, Any]]) -> None:
        """Adds the peak memory, after everything has been timed: two processes at a time, large ones alone."""
        wanted = {case.key: case for case in self.cases if case.memory}
        jobs = [r for r in results if r["case"] in wanted and r["status"] == TIMED and r["family"] in (OURS, BASELINE)]

        def alone(result: dict[str, Any]) -> bool:
            P, N, M, _ = wanted[result["case"]].extent
            return result["row"] == "broadcasting" or P * N * M > LARGE

        def measure(result: dict[str, Any]) -> None:
            peak = memory.measure(wanted[result["case"]], result["row"])
            result["memory_mib" if isinstance(peak, float) else "memory_reason"] = peak
            self.progress(f"memory  {result['row']}  {result['case']}", MEMORY_WEIGHT)

        for large, workers in ((False, 2), (True, 1)):
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(measure, [job for job in jobs if alone(job) == large]))


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of the libraries compared with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
