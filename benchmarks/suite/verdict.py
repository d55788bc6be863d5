"""Whether one set of times is faster, slower or the same as another, and how sure that is.

No distribution is assumed. Of n rounds, the k-th smallest and the k-th largest hold the median between them with
probability ``1 - 2 P(X < k)``, X binomial of n fair coins; k is the largest for which that reaches the confidence
(seven rounds: smallest and largest, 98.4 %). Where new and old took turns, that is the interval of the ratio within a
round. Where they are two runs, each median has an interval of its own, at half of what may be wrong, and the ratio lies
between the quotients of their ends.

The verdict needs a margin, since a difference that nobody would notice is none:

    slower        the whole interval is above the margin
    faster        the whole interval is below one over it
    same          the whole interval is between the two
    cannot tell   otherwise
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FASTER, SLOWER, SAME, CANNOT_TELL = VERDICTS = ("faster", "slower", "same", "cannot tell")
CONFIDENCE = 0.95
INTERLEAVED_MARGIN, RUNS_MARGIN = 1.05, 1.10  # two runs also differ in what a machine does for minutes


class Interval(NamedTuple):
    """What a number lies between with at least the confidence that was asked for."""

    low: float
    high: float

    def over(self, other: Interval) -> Interval:
        """Of the quotient of two positive numbers; wrong at most as often as both together."""
        return Interval(self.low / other.high, self.high / other.low)

    def times(self, factor: float) -> Interval:
        """The interval of a multiple of the number."""
        return Interval(self.low * factor, self.high * factor)


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """That of the median by order statistics; ``None`` where there are too few values for the confidence."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2:
        outside += math.comb(n, k) / 2**n  # P(X <= k): the median lies below the (k + 1)-th smallest
        if 2 * outside > 1 - confidence:
            break
        k += 1
    return Interval(ordered[k - 1], ordered[n - k]) if k else None


def ratio_of_medians(new: Sequence[float], old: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """That of the median of ``new`` over that of ``old``, two runs that know nothing of each other."""
    each = 1 - (1 - confidence) / 2
    both = median_interval(new, each), median_interval(old, each)
    return None if both[0] is None or both[1] is None else both[0].over(both[1])


def judge(interval: Interval | None, margin: float) -> str:
    """One of ``VERDICTS`` on new over old."""
    if interval is None or not margin >= 1:
        return CANNOT_TELL
    if interval.low > margin:
        return SLOWER
    if interval.high < 1 / margin:
        return FASTER
    return SAME if interval.low >= 1 / margin and interval.high <= margin else CANNOT_TELL
