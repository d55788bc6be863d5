"""The figures the project promises, and what a run says about them.

All of them are for two threads, and for float32, loss and gradients, where not said. The rows of ``cases.table`` call
modules, which normalise. Ratios to other formulations were set on a machine with
AVX2 on which those were slower or faster than here: what a machine gives is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cacr_kernels.backends.table import TABLE

from .cases import (
    BROADCASTING,
    COMPILED,
    EAGER,
    KEPT,
    LOSS,
    NTXENT,
    PRODUCTS,
    SUM,
    BenchmarkCase,
    cacr,
    queue,
    table,
)  # fmt: skip
from .peak import FMA
from .results import problem_label

THREADS = 2
Row = dict[str, Any]
Figure = tuple[float, float, float]  # 20 %, median, 80 %


DEFINITION = TABLE[0].name
OTHER_FORMS = (EAGER, COMPILED, PRODUCTS, BROADCASTING)


class Goal(NamedTuple):
    """``row`` of ``case`` has to give at least (or ``at_most``) ``required`` of what ``figure`` reads off it."""

    case: str
    row: str | None  # None: ours
    text: str
    unit: str
    required: float
    figure: Callable[[Row], Figure | None]
    at_most: bool = False


class Verdict(NamedTuple):
    """A goal and what was measured: 20 %, median and 80 % of it.

    A ratio asks for a time of ours, and the products of that time for a share of the peak: above 100 % no
    implementation meets it on the machine that was measured.
    """

    goal: Goal
    label: str
    low: float
    found: float
    high: float
    needed: float | None = None  # the share of the FMA peak at which our time would meet a ratio, in percent

    @property
    def met(self) -> bool:
        """Whether the median reaches what is required."""
        return self.found <= self.goal.required if self.goal.at_most else self.found >= self.goal.required


def _slower(row: Row) -> Figure | None:
    return (row["ratio_p20"], row["ratio"], row["ratio_p80"]) if row["ratio"] else None


def _times(row: Row) -> Figure | None:
    """Our time in units of the row's."""
    return (1 / row["ratio_p80"], 1 / row["ratio"], 1 / row["ratio_p20"]) if row["ratio"] else None


def _of_peak(row: Row) -> Figure | None:
    if not row["fraction"] or row["peak_source"] != FMA:  # a large product is no peak
        return None
    middle = 100 * row["fraction"]
    return middle * row["p50_ms"] / row["p80_ms"], middle, middle * row["p50_ms"] / row["p20_ms"]


def _memory(row: Row) -> Figure | None:
    return None if row["memory_mib"] is None else (row["memory_mib"],) * 3


def _runs(row: Row) -> Figure | None:
    """Once, if the call in the process that measures memory came to its end; what was not tried says nothing."""
    tried = row["single_ms"] is not None or row["memory_reason"] is not None
    return (float(row["single_ms"] is not None),) * 3 if tried else None


# Problem, and how many times longer the eager form, torch.compile of it and four bare products per pair take.
RATIOS = (
    (cacr(5, 128, 128), 6.0, 4.0, 1.5),
    (cacr(2, 512, 128), 2.8, 2.8, 1.4),
    (cacr(2, 1024, 128), 3.0, 2.8, 1.4),
    (cacr(2, 2048, 128), 3.3, 3.0, 1.5),
    (cacr(2, 4096, 128), 8.0, 2.8, 1.55),
    (cacr(2, 16384, 128), 9.0, 4.0, 2.0),
    (cacr(2, 2048, 64), 7.0, 4.0, 1.6),
    (cacr(2, 2048, 256), 2.6, 2.2, 1.5),
    (cacr(2, 2048, 512), 1.7, 1.5, 1.45),
    (queue(2, 128, 128, 65536), 10.0, 2.4, None),
    (cacr(2, 1024, 128, pairing="pooled"), 4.0, 3.5, 2.0),
)


# Of the table's cases, in their order: what share of the FMA peak, in percent; or a ratio to another row.
SHARES = (86, 86, 86, 82, 74, 52, 66, 80, 87, 80, 80, 84, 72, None, None, 75, 65, 75, 75, 75, 75, 74, 86, 50, 60) + (
    (None,) * 4 + (66, 85, 70, 80) + (None,) * 4
)


def _table() -> list[Goal]:
    """The goals for the cases of ``cases.table``."""
    cases = table(THREADS, "cpu")
    shares = [
        Goal(case.key, None, "share of the FMA peak", "%", float(share), _of_peak)
        for case, share in zip(cases, SHARES, strict=True)
        if share is not None
    ]
    ratios = []
    for case in cases:
        if KEPT in case.only:
            ratios.append(Goal(case.key, KEPT, "kept queue / handed in", "×", 1.05, _slower, at_most=True))
        if DEFINITION in case.only:
            ratios.append(Goal(case.key, DEFINITION, f"{DEFINITION} / {case.base or 'ours'}", "×", 1.0, _slower))
        if NTXENT in case.only:
            ratios.append(Goal(case.key, NTXENT, f"{NTXENT} / ours", "×", 2.0, _slower))
        if SUM in case.only:
            ratios.append(Goal(case.key, SUM, f"ours / {SUM}", "×", 3.5, _times, at_most=True))
    return [*shares, *ratios]


def _goals() -> list[Goal]:
    def key(*shape: int) -> str:
        return BenchmarkCase(cacr(*shape), threads=THREADS).key

    ratios = [
        Goal(BenchmarkCase(problem, threads=THREADS).key, row, f"{row} / ours", "×", required, _slower)
        for problem, *figures in RATIOS
        for row, required in zip((EAGER, COMPILED, PRODUCTS), figures, strict=True)
        if required is not None
    ]
    peaks = [
        Goal(key(2, B, 128), None, "share of the FMA peak", "%", 80.0, _of_peak) for B in (512, 1024, 2048, 4096, 16384)
    ]
    return [
        *ratios,
        *peaks,
        Goal(key(2, 2048, 128), BROADCASTING, f"{BROADCASTING} / ours", "×", 300.0, _slower),
        Goal(key(2, 32, 64), SUM, f"ours / {SUM}", "×", 3.0, _times, at_most=True),
        Goal(key(2, 32768, 128), None, "memory above the inputs", "MiB", 160.0, _memory, at_most=True),
        Goal(key(2, 65536, 128), None, "runs to its end", "call", 1.0, _runs),
        *_table(),
    ]


GOALS = _goals()


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The goals that these results say something about."""
    found = {(row["case"], None if row["ours"] else row["row"]): row for row in rows}
    judged = []
    for goal in GOALS:
        row = found.get((goal.case, goal.row))
        figure = goal.figure(row) if row else None
        if row and figure:
            judged.append(Verdict(goal, _label(row), *figure, _needed(goal, figure[1], found)))
    return judged


def _label(row: Row) -> str:
    """The problem, and what of it is not usual."""
    special = [row["dtype"]] if row["dtype"] != "float32" else []
    special += ["loss only"] if row["mode"] == LOSS else []
    return ", ".join([problem_label(row), *special])


def _needed(goal: Goal, ratio: float, found: dict[tuple[str, str | None], Row]) -> float | None:
    """What ``Verdict.needed`` says; None for figures that are no ratio of other formulations to ours."""
    ours = found.get((goal.case, None))
    of_others = goal.figure is _slower and goal.row in OTHER_FORMS
    share = _of_peak(ours) if ours and of_others else None
    return share[1] * goal.required / ratio if share else None
