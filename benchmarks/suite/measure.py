"""Timing in interleaved rounds, so that ratios compare what ran next to each other on a machine that others share.

A round measures one block of calls of every row, in an order that changes from round to round. Times are quantiles over
the rounds; a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec
from torch.utils.benchmark.utils.timer import timer as clock  # waits for the GPU, where there is one

from benchmarks.host import quantile

from .gate import threads
from .rows import Step

BLOCK_SECONDS = 0.02
SLOW_CALL = 0.05  # a call that takes longer than this is not preceded by one that does not count
MIN_ROUNDS, MAX_ROUNDS = 7, 60
FEWEST_ROUNDS, OVERTIME = 3, 2.0  # after so many rounds they end once they have taken so many times their budget


class Budget(NamedTuple):
    """Seconds for the rounds of one case, and the share of them that one slow row may take."""

    seconds: float
    slow_share: float = 0.5


class Timing(NamedTuple):
    """Seconds per call of one row by round."""

    rounds: dict[int, float]

    @property
    def measurement(self) -> Measurement:
        """The times as a ``Measurement`` of ``torch.utils.benchmark``."""
        return Measurement(1, list(self.rounds.values()), TaskSpec("step()", "pass"))

    def quantile(self, q: float) -> float:
        """The quantile ``q`` of the seconds per call, interpolated."""
        return quantile(list(self.rounds.values()), q)


def ratios(timing: Timing, ours: Timing) -> list[float]:
    """How many times longer than ours, round by round."""
    return [seconds / ours.rounds[r] for r, seconds in timing.rounds.items() if r in ours.rounds]


def once(step: Step) -> float:
    """Seconds of one call: the best of three, unless they take long."""
    best, begin = math.inf, clock()
    for _ in range(3):
        start = clock()
        step()
        best = min(best, float(clock() - start))
        if clock() - begin > SLOW_CALL:
            break
    return best


def block(step: Step, calls: int, device: str) -> float:
    """Seconds per call of a block of calls; ``triton.testing.do_bench`` measures it on a GPU."""
    if device != "cpu" and importlib.util.find_spec("triton"):
        do_bench = importlib.import_module("triton.testing").do_bench
        milliseconds: float = do_bench(step, warmup=2, rep=max(5, int(1e3 * BLOCK_SECONDS)), return_mode="median")
        return milliseconds / 1e3
    start = clock()
    for _ in range(calls):
        step()
    return float(clock() - start) / calls


def plan(seconds: dict[str, float], budget: Budget) -> tuple[int, dict[str, int], dict[str, int]]:
    """Rounds, calls per block and rounds per row, from the seconds of one warm call.

    A row so slow that it alone would use up the budget takes part in the first rounds only.
    """
    calls = {name: max(1, round(BLOCK_SECONDS / max(s, 1e-7))) for name, s in seconds.items()}
    cost = {name: s * (calls[name] + (s < SLOW_CALL)) for name, s in seconds.items()}
    slow = {name for name, c in cost.items() if c * MIN_ROUNDS > budget.slow_share * budget.seconds}
    fast = sum(c for name, c in cost.items() if name not in slow)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget.seconds / max(fast, 1e-6))))
    share = budget.slow_share * budget.seconds / max(len(slow), 1)
    rows = dict.fromkeys(seconds, rounds)
    for name in slow:
        few = FEWEST_ROUNDS if FEWEST_ROUNDS * cost[name] <= budget.seconds else 1
        rows[name] = min(rounds, max(few, int(share / cost[name])))
    return rounds, calls, rows


def interleave(
    steps: dict[str, Step],
    first: dict[str, float],
    budget: Budget,
    thread_count: int,
    device: str,
    compiles: Collection[str] = (),
    on_round: Callable[[float], None] = lambda done: None,
) -> dict[str, Timing]:
    """Times every step. ``first`` holds the seconds of its first call, made by the caller.

    A step is planned by a second call; one that took seconds the first time, and not to compile, by the first.
    """
    times: dict[str, dict[int, float]] = {name: {} for name in steps}
    with threads(thread_count):
        seconds = {n: first[n] if first[n] > 2.0 and n not in compiles else once(step) for n, step in steps.items()}
        rounds, calls, rows = plan(seconds, budget)
        gc.collect()
        gc.disable()
        try:
            begin = clock()
            for r in range(rounds):
                if r >= FEWEST_ROUNDS and clock() - begin > OVERTIME * budget.seconds:
                    break  # a busy machine
                for name in order(list(steps), r):
                    if r >= rows[name]:
                        continue
                    if seconds[name] < SLOW_CALL:
                        steps[name]()  # the caches are those of the row before
                    times[name][r] = block(steps[name], calls[name], device)
                on_round((r + 1) / rounds)
        finally:
            gc.enable()
    return {name: Timing(times[name]) for name in steps}


def order(names: list[str], r: int) -> list[str]:
    """The order of round ``r``: rotated, and turned around every other time."""
    at = r // 2 % len(names)
    rotated = names[at:] + names[:at]
    return rotated if r % 2 == 0 else rotated[::-1]
