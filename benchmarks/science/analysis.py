"""From runs to figures: accuracies, paired differences, and what can be said of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .design import (
    ARMS,
    BALANCED,
    BASELINE,
    CONTRASTS,
    EXTREME,
    FINAL,
    KINDS,
    LONG_TAILED,
    PIXELS,
    PRIMARY,
    UNTRAINED,
    Contrast,
    Run,
    Setting,
    chosen_temperatures,
    groups,
)
from .probes import LINEAR, NEAREST
from .runs import Results, unpack
from .statistics import Interval, interval, measure_weights

BALANCED_ACCURACY, KNN, TAIL, HEAD = "linear probe", "nearest neighbours", "linear, rare", "linear, frequent"
MEASURES = {BALANCED_ACCURACY: LINEAR, KNN: NEAREST, TAIL: LINEAR, HEAD: LINEAR}
INTERACTION = "difference of both"


class Difference(NamedTuple):
    """A contrast on a kind of training part (or the difference of both kinds) by one measure."""

    contrast: Contrast
    kind: str
    measure: str
    interval: Interval


class Analysis:
    """The figures of a file of results: those of the seeds of which all runs are done."""

    def __init__(self, results: Results) -> None:
        self.header = results.header
        self.setting = _setting(results.header["setting"])
        self.results = results
        self.labels = np.array(results.header["data"]["test_labels"])
        self.chosen = chosen_temperatures(self.setting, results.done)
        by_arm = {
            (run.arm, run.kind, run.views, run.seed): record
            for run, record in results.done.items()
            if run.stage in (FINAL, BASELINE)
        }
        wanted = [(arm.name, kind, views) for arm, kind, views in groups(self.setting)]
        self.by_arm = by_arm
        self.seeds = [
            seed for seed in self.setting.seeds
            if all((*key, seed) in by_arm for key in [*wanted, (UNTRAINED, "", 0)]) and (PIXELS, "", 0, 0) in by_arm
        ]  # fmt: skip

    @property
    def complete(self) -> bool:
        """Whether every seed is there."""
        return len(self.seeds) == len(self.setting.seeds)

    def counts(self, seed: int) -> list[int]:
        """How many long-tailed images each class has."""
        found: list[int] = self.by_arm[ARMS[0].name, LONG_TAILED, self.setting.views[0], seed]["counts"]
        return found

    def weights(self, measure: str) -> np.ndarray:
        """What images count by a measure [S, N]: classes are rare or frequent by the long-tailed part of the seed."""
        chosen = []
        for seed in self.seeds:
            counts = self.counts(seed)
            order = sorted(range(len(counts)), key=lambda c: counts[c])
            extreme = min(EXTREME, len(order) // 2)
            chosen.append({TAIL: order[:extreme], HEAD: order[-extreme:]}.get(measure, order))
        return measure_weights(self.labels, chosen)

    def correct(self, arm: str, kind: str, views: int, probe: str) -> np.ndarray:
        """Which test images a probe gets right [S, N]."""
        seeds = [0] * len(self.seeds) if arm == PIXELS else self.seeds
        rows = [unpack(self.by_arm[arm, kind, views, seed][probe], len(self.labels)) for seed in seeds]
        return np.stack(rows).astype(float)

    def difference(self, contrast: Contrast, kind: str, measure: str) -> Difference:
        """``first`` minus ``second``, seed by seed and image by image; ``INTERACTION``: long-tailed minus balanced."""

        def of(some: str) -> np.ndarray:
            first, second = (self.correct(a, some, contrast.views, MEASURES[measure]) for a in contrast[:2])
            return first - second

        parts = of(LONG_TAILED) - of(BALANCED) if kind == INTERACTION else of(kind)
        return Difference(contrast, kind, measure, interval(parts * self.weights(measure), self.labels))

    def differences(self, measure: str = BALANCED_ACCURACY) -> list[Difference]:
        """All contrasts by one measure."""
        contrasts = [c for c in CONTRASTS if c.views in self.setting.views]
        return [self.difference(c, kind, measure) for c in contrasts for kind in (*KINDS, INTERACTION)]

    def accuracies(self) -> list[tuple[str, str, int, dict[str, float]]]:
        """Of every arm (and baseline) the mean of each measure."""
        rows = [(PIXELS, "", 0), (UNTRAINED, "", 0)]
        rows += [(arm.name, kind, views) for arm, kind, views in groups(self.setting)]
        weights = {measure: self.weights(measure) for measure in MEASURES}

        def mean(row: tuple[str, str, int], measure: str) -> float:
            return float((self.correct(*row, MEASURES[measure]) * weights[measure]).sum(axis=1).mean())

        return [(*row, {measure: mean(row, measure) for measure in MEASURES}) for row in rows]

    def recalls(self, arm: str, views: int) -> list[np.ndarray]:
        """Of every seed the recall by class of the linear probe after the long-tailed training part."""
        correct = self.correct(arm, LONG_TAILED, views, LINEAR)
        classes = range(len(self.header["data"]["classes"]))
        return [np.array([row[self.labels == c].mean() for c in classes]) for row in correct]

    def example(self) -> tuple[Run, dict[str, Any]] | None:
        """The run whose query the picture shows, and its weights."""
        return next(
            ((run, record["example"]) for run, record in self.results.done.items() if "example" in record), None
        )


def _setting(stored: dict[str, Any]) -> Setting:
    return Setting(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})


def points(value: float) -> str:
    """A signed difference in percentage points."""
    return f"{100 * value:+.2f}".replace("+0.00", "0.00").replace("-0.00", "0.00").replace("-", "−")


def verdict(difference: Difference) -> str:
    """What one interval allows to say."""
    found = difference.interval
    if found.tie:
        return "a tie"
    return "better" if found.mean > 0 else "worse"


def headline(analysis: Analysis) -> str:
    """What was found by the primary measure, in a sentence: null results are said as such."""
    tail, control, both = (
        analysis.difference(PRIMARY, kind, BALANCED_ACCURACY) for kind in (LONG_TAILED, BALANCED, INTERACTION)
    )
    words = {"a tie": "tie", "better": "CACR is better", "worse": "NT-Xent is better"}
    said = f"On long-tailed images: {words[verdict(tail)]}; on balanced ones: {words[verdict(control)]}. "
    if both.interval.tie:
        return said + "No effect of imbalance itself was found."
    return said + f"Imbalance is {'kinder to CACR' if both.interval.mean > 0 else 'harder on CACR'} than to NT-Xent."
