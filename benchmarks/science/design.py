"""The design of the experiment, fixed before its first run: arms, temperatures, seeds, comparisons, order of runs.

Nothing here depends on results, except the temperatures, which are chosen on validation images by runs of their own
seeds (:func:`plan`). The page docs/experiment.md says the same in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import cos, pi
from statistics import fmean
from typing import NamedTuple

LONG_TAILED, BALANCED = "long-tailed", "balanced"
KINDS = (LONG_TAILED, BALANCED)
TUNE, FINAL, BASELINE = "tune", "final", "baseline"
UNTRAINED, PIXELS = "untrained encoder", "pixels"


@dataclass(frozen=True)
class Setting:
    """One experiment: everything but the images. Runs of different settings are never mixed."""

    name: str
    steps: int = 200
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    widths: tuple[int, ...] = (16, 32, 64, 128)  # channels of the small encoder, one convolution each
    encoder: str = "small"
    embedding_dim: int = 64
    ratio: float = 100.0  # images of the most frequent class over those of the rarest
    views: tuple[int, ...] = (2, 4)
    grid: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)  # temperatures T; tau_neg = 1 / (2 T)
    extensions: int = 3  # how often the grid may grow on a side
    tuning_seeds: tuple[int, ...] = (1001, 1002, 1003)
    seeds: tuple[int, ...] = tuple(range(8))
    neighbours: int = 5
    minutes: float | None = None  # of one call; what is not done then is done by the next one


MNIST = Setting("mnist", minutes=25.0)
QUICK = Setting(
    "digits", steps=12, batch=48, widths=(8, 16), embedding_dim=16, grid=(0.2, 0.4), extensions=1,
    tuning_seeds=(1001,), seeds=(0, 1),
)  # fmt: skip
FOLDER = Setting("folder")
PHOTOS = Setting("photos", steps=4000, batch=256, learning_rate=1e-3, widths=(32, 64, 128, 256), embedding_dim=128)


@dataclass(frozen=True)
class Arm:
    """A way to train. ``tuned_as``: the arm whose temperature it takes, its own if it is that arm, none without one."""

    name: str
    loss: str
    views: tuple[int, ...]
    tuned_as: str | None
    tau_pos: float = 1.0


SCHEDULE = "CACR, tau_neg varied"
ARMS = (
    Arm("NT-Xent", "nt_xent", (2, 4), "NT-Xent"),
    Arm("CACR", "cacr", (2, 4), "CACR"),
    Arm("CACR, tau_pos = 0", "cacr", (4,), "CACR", tau_pos=0.0),  # with two views tau_pos has no effect
    Arm("CACR, tau_neg = 0", "cacr", (2, 4), None),
    Arm(SCHEDULE, "cacr", (2, 4), "CACR"),
    Arm("SupCon", "supcon", (2,), "SupCon"),
    Arm("supervised CACR", "supervised_cacr", (2,), "supervised CACR"),
)
ARM = {arm.name: arm for arm in ARMS}
SCHEDULE_FACTOR, SCHEDULE_PERIODS = 2.0, 5  # tau_neg goes from half the chosen value to twice it and back, so often


class Contrast(NamedTuple):
    """A comparison of two arms that differ in one thing, ``first`` minus ``second``."""

    first: str
    second: str
    views: int


PRIMARY = Contrast("CACR", "NT-Xent", 4)  # both of CACR's softmaxes are at work: with two views one weight is 1
CONTRASTS = (
    PRIMARY,
    Contrast("CACR", "NT-Xent", 2),
    Contrast("CACR, tau_pos = 0", "CACR", 4),
    Contrast("CACR, tau_neg = 0", "CACR", 4),
    Contrast("CACR, tau_neg = 0", "CACR", 2),
    Contrast(SCHEDULE, "CACR", 4),
    Contrast(SCHEDULE, "CACR", 2),
    Contrast("supervised CACR", "SupCon", 2),
)
EXTREME = 3  # so many of the rarest classes are the tail, of the most frequent the head


class Run(NamedTuple):
    """One training with its scores; everything of it follows from this, the setting and the images."""

    stage: str
    arm: str
    kind: str = ""
    views: int = 0
    temperature: float | None = None
    seed: int = 0


Done = Mapping[Run, Mapping[str, object]]


def tau_neg(temperature: float | None) -> float:
    """The inverse temperature that gives the same softmax of negatives; none means uniform weights, 0."""
    return 0.0 if temperature is None else 1.0 / (2.0 * temperature)


def next_temperatures(scores: Mapping[float, float], grid: tuple[float, ...], extensions: int) -> list[float]:
    """What to try next: the grid first, then beyond an edge while that edge is the best; none when settled."""
    missing = [t for t in grid if t not in scores]
    if missing:
        return missing
    best = choose(scores)
    low, high = min(scores), max(scores)
    factor = grid[1] / grid[0] if len(grid) > 1 else 2.0
    if best == low and sum(t < grid[0] for t in scores) < extensions:
        return [round(low / factor, 10)]
    if best == high and sum(t > grid[-1] for t in scores) < extensions:
        return [round(high * factor, 10)]
    return []


def choose(scores: Mapping[float, float]) -> float:
    """The temperature with the best score, of equals the larger one."""
    return max(scores, key=lambda t: (scores[t], t))


def validation_scores(done: Done, setting: Setting, arm: str, kind: str, views: int) -> dict[float, float]:
    """By temperature the mean validation accuracy, where all tuning seeds are done."""
    by_temperature: dict[float, list[float]] = {}
    for run, record in done.items():
        if run[:4] == (TUNE, arm, kind, views) and run.temperature is not None and run.seed in setting.tuning_seeds:
            by_temperature.setdefault(run.temperature, []).append(float(record["validation"]))  # type: ignore[arg-type]
    return {t: fmean(values) for t, values in by_temperature.items() if len(values) == len(setting.tuning_seeds)}


def groups(setting: Setting) -> Iterator[tuple[Arm, str, int]]:
    """Every arm on both kinds of training parts with every number of views."""
    for views in setting.views:
        for kind in KINDS:
            yield from ((arm, kind, views) for arm in ARMS if views in arm.views)


def plan(setting: Setting, done: Done) -> list[Run]:
    """The runs that can start now, in their order; empty when all is done.

    Temperatures come first. The final runs go seed by seed, so that an interrupted experiment holds whole seeds.
    """
    runs = []
    for arm, kind, views in groups(setting):
        if arm.tuned_as == arm.name:
            scores = validation_scores(done, setting, arm.name, kind, views)
            for temperature in next_temperatures(scores, setting.grid, setting.extensions):
                runs += [Run(TUNE, arm.name, kind, views, temperature, seed) for seed in setting.tuning_seeds]
    if not runs:
        runs = final_runs(setting, done)
    return [run for run in runs if run not in done]


def final_runs(setting: Setting, done: Done) -> list[Run]:
    """All final runs and baselines with the chosen temperatures."""
    chosen = chosen_temperatures(setting, done)
    runs = [Run(BASELINE, PIXELS)]
    for seed in setting.seeds:
        runs.append(Run(BASELINE, UNTRAINED, seed=seed))
        for arm, kind, views in groups(setting):
            runs.append(Run(FINAL, arm.name, kind, views, temperature_of(chosen, arm, kind, views), seed))
    return runs


def chosen_temperatures(setting: Setting, done: Done) -> dict[tuple[str, str, int], float]:
    """By tuned arm, kind and views the temperature that won; those that are not settled are left out."""
    chosen = {}
    for arm, kind, views in groups(setting):
        if arm.tuned_as == arm.name:
            scores = validation_scores(done, setting, arm.name, kind, views)
            if scores and not next_temperatures(scores, setting.grid, setting.extensions):
                chosen[arm.name, kind, views] = choose(scores)
    return chosen


def temperature_of(chosen: Mapping[tuple[str, str, int], float], arm: Arm, kind: str, views: int) -> float | None:
    """The temperature of an arm's final runs."""
    return None if arm.tuned_as is None else chosen[arm.tuned_as, kind, views]


def expected_runs(setting: Setting) -> int:
    """How many runs there are if no grid has to grow."""
    tuned = sum(arm.tuned_as == arm.name for arm, _, _ in groups(setting))
    per_seed = sum(1 for _ in groups(setting)) + 1
    return tuned * len(setting.grid) * len(setting.tuning_seeds) + per_seed * len(setting.seeds) + 1


def schedule(setting: Setting, middle: float) -> Callable[[int], float]:
    """``tau_neg`` by step: a cosine, as temperature schedules for long tails have it, even on a scale of factors."""

    def value(step: int) -> float:
        return middle * SCHEDULE_FACTOR ** -cos(2.0 * pi * SCHEDULE_PERIODS * step / setting.steps)

    return value
