"""Two runs: the rows that both timed, and a verdict on each.

Two runs did not take turns, so what the machine did meanwhile has to be taken out: times are those over the eager row
of the same rounds where both runs have it, else those by the peak of multiply-adds that each run measured. A verdict of
faster or slower stands only if the time itself went the same way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cacr_kernels.backends.table import TABLE

from .cases import EAGER
from .results import TIMED
from .rows import OURS
from .verdict import CANNOT_TELL, FASTER, SLOWER, Interval, judge, ratio_of_medians

DEFINITIONS = {backend.name for backend in TABLE if backend.n_by_m_arrays}  # whose speed nobody promises
SAME_MACHINE = ("machine", "cores", "isa", "torch")
BY_EAGER, BY_PEAK = "eager", "peak"
Row = dict[str, Any]


class Comparison(NamedTuple):
    """One row in two runs. ``time`` is new over old, ``interval`` that after ``by`` took out the machine."""

    case: str
    row: str
    family: str
    old_ms: float
    new_ms: float
    time: float
    interval: Interval | None
    by: str
    verdict: str
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether the row is one whose speed the library promises."""
        return self.family == OURS and self.row not in DEFINITIONS

    @property
    def slower(self) -> bool:
        """Whether the library got slower, and not just the machine."""
        return self.counts and self.verdict == SLOWER


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of the machine is another in the environments of two runs."""
    return [name for name in SAME_MACHINE if old[name] != new[name]]


def compare(old: list[Row], new: list[Row], margin: float, differ: list[str] | None = None) -> list[Comparison]:
    """The rows timed in both runs; nothing can be told where the machines ``differ``."""

    def timed(rows: list[Row]) -> dict[tuple[str, str], Row]:
        return {(row["case"], row["row"]): row for row in rows if row["status"] == TIMED}

    before, after = timed(old), timed(new)
    found = []
    for (case, name), row in after.items():
        if (case, name) not in before:
            continue
        was = before[case, name]
        time = row["p50_ms"] / was["p50_ms"]
        interval, by = None, ""
        reason = f"another {', '.join(differ)}" if differ else _unreadable(was, row)
        if not reason:
            yardsticks = (before.get((case, EAGER)), after.get((case, EAGER))) if name != EAGER else (None, None)
            interval, by = _interval(was, row, *yardsticks)
            reason = "" if interval else "too few rounds"
        verdict = judge(interval, margin)
        if (verdict == SLOWER and time <= 1) or (verdict == FASTER and time >= 1):
            verdict, reason = CANNOT_TELL, f"the time itself says the opposite of that by {by}"
        found.append(
            Comparison(case, name, row["family"], was["p50_ms"], row["p50_ms"], time, interval, by, verdict, reason)
        )
    return found


def _unreadable(*rows: Row) -> str:
    """Why two rows cannot be compared, if so."""
    return "" if all(row["round_ms"] for row in rows) else "results without the times of their rounds"


def _interval(was: Row, now: Row, eager_then: Row | None, eager_now: Row | None) -> tuple[Interval | None, str]:
    """The interval of new over old, and what took out the machine."""
    if eager_then and eager_now and eager_then["round_ms"] and eager_now["round_ms"]:
        return ratio_of_medians(_by_round(now, eager_now), _by_round(was, eager_then)), BY_EAGER
    found = ratio_of_medians(now["round_ms"], was["round_ms"])
    peaks = was["peak_gflops"], now["peak_gflops"]
    if found is None or not all(peaks) or was["peak_source"] != now["peak_source"]:
        return found, ""
    return found.times(peaks[1] / peaks[0]), BY_PEAK


def _by_round(row: Row, yardstick: Row) -> list[float]:
    """Times in units of another row's, within each round that both took part in: the first ones."""
    return [a / b for a, b in zip(row["round_ms"], yardstick["round_ms"], strict=False)]
