"""Is the rule right by which ``"auto"`` chooses between two backends of a GPU? Said from times; needs Python alone.

The rule takes one backend for losses of up to so much work, the other beyond (``suits`` of their entries). What a limit
costs is how much longer than the faster backend its choice takes, in the geometric mean over all problems that both
were timed on. The best limit lies between two problems, or beyond all of them.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

from .lines import RESULT, Line

ENOUGH_BETTER = 1.02  # a limit that saves less is no reason to change the rule
SLOW = 1.1  # choices that take so many times the better one are listed
MOST_LISTED = 12
RULES = {  # by kind of products: how it is said, and what to change in cacr_kernels/backends/cuda.py
    "UP_TO": ("bf16, fp16 and TF32", "UP_TO ="),
    "ieee": ("IEEE float32", "`suits`, in place of `ieee or`, a limit of"),
}


class Race(NamedTuple):
    """A problem that both backends were timed on."""

    name: str
    work: float  # as the backend with a limit reckons it
    limit: float  # of the rule as it is
    within: float  # milliseconds of the backend that is taken up to the limit
    beyond: float
    names: tuple[str, str]

    def slowdown(self, limit: float) -> float:
        """How many times as long as the faster backend the one takes that the limit chooses."""
        return (self.within if self.work <= limit else self.beyond) / min(self.within, self.beyond)


def races(lines: list[Line]) -> dict[str, list[Race]]:
    """By rule, from the lines of the step that measures; the backend with a limit is the one that says its work."""
    rows: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line["event"] == RESULT and line.get("ok") and line.get("ours") and line.get("p50 ms") is not None:
            rows[line["products"], line["problem name"]].append(line)
    found: dict[str, list[Race]] = defaultdict(list)
    for (products, name), timed in rows.items():
        within = [line for line in timed if "work" in line]
        beyond = [line for line in timed if "work" not in line]
        for a, b in itertools.product(within, beyond):
            limit = math.inf if a["limit"] is None else a["limit"]
            race = Race(name, a["work"], limit, a["p50 ms"], b["p50 ms"], (a["row"], b["row"]))
            found["ieee" if products == "ieee" else "UP_TO"].append(race)
    return found


def cost(found: list[Race], limit: float) -> float:
    """The geometric mean of all slowdowns."""
    return math.exp(sum(math.log(race.slowdown(limit)) for race in found) / len(found))


def best_limit(found: list[Race]) -> float:
    """The limit that costs least: half-way between two problems, in two digits where they are far enough apart."""
    works = sorted({race.work for race in found})
    between = [_between(low, high) for low, high in itertools.pairwise(works)]
    return min((0.0, *between, math.inf), key=lambda limit: cost(found, limit))


def _between(low: float, high: float) -> float:
    middle = math.sqrt(low * high)
    short = float(f"{middle:.1e}")
    return short if low <= short < high else middle


def written(limit: float) -> str:
    """As a line of Python has it."""
    return "math.inf" if math.isinf(limit) else f"{round(limit):_}"


def verdicts(lines: list[Line]) -> list[str]:
    """What to tell of every rule, in Markdown."""
    found = races(lines)
    said = []
    for rule, (about, change) in RULES.items():
        if not (known := found.get(rule)):
            said.append(f"- What `auto` takes for {about}: not checked, no problem has times of both backends.")
            continue
        now, best = known[0].limit, best_limit(known)
        costs = cost(known, now), cost(known, best)
        told = f"over {len(known)} problems it takes {100 * (costs[0] - 1):.1f} % longer than the faster backend"
        if costs[0] <= ENOUGH_BETTER * costs[1]:
            said.append(f"- What `auto` takes for {about}: right; {told}.")
            continue
        said.append(
            f"- What `auto` takes for {about}: **wrong**; {told}. Put in {change} {written(best)} "
            f"(now {written(now)}): {100 * (costs[1] - 1):.1f} %."
        )
        slow = sorted((race for race in known if race.slowdown(now) > SLOW), key=lambda race: -race.slowdown(now))
        for race in slow[:MOST_LISTED]:
            (a, b), name = race.names, race.name
            said.append(f"  - {name}: {a} {race.within:.3g} ms, {b} {race.beyond:.3g} ms")
    return said
