"""Accuracies of frozen features: nearest neighbours and a linear probe."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .config import LOSSES
from .data import CLASSES, Split
from .training import Encoder

NEIGHBOURS = 5
TAIL = 3  # the rarest training classes: digits 0, 1 and 2
PROBES = ("kNN", "linear")
MEASURES = ("overall", "balanced", "tail", "worst_class")
PIXELS, UNTRAINED = "raw pixels", "untrained encoder"
REPRESENTATIONS = (PIXELS, UNTRAINED, *LOSSES)


class Score(NamedTuple):
    """Accuracies in [0, 1] of one representation under one probe."""

    overall: float
    balanced: float
    tail: float
    worst_class: float
    per_class: list[float]


def evaluate(split: Split, encoder: Encoder | None) -> dict[str, Score]:
    """Fit both probes on the (imbalanced) training part and score them; ``None`` means raw pixels."""

    def features(images: Tensor) -> np.ndarray:
        return (images.flatten(1) if encoder is None else encoder.features(images)).numpy()

    x_train, x_test = features(split.train_images), features(split.test_images)
    y_train, y_test = split.train_labels.numpy(), split.test_labels.numpy()
    probes = {
        "kNN": KNeighborsClassifier(NEIGHBOURS, metric="cosine"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    return {name: score(probe.fit(x_train, y_train).predict(x_test), y_test) for name, probe in probes.items()}


def score(predicted: np.ndarray, truth: np.ndarray) -> Score:
    """Overall accuracy, mean, tail and worst recall. Classes are ordered from the rarest to the most frequent."""
    recall = recall_score(truth, predicted, labels=range(CLASSES), average=None, zero_division=0.0)
    per_class = [float(value) for value in recall]
    return Score(
        overall=float((predicted == truth).mean()),
        balanced=fmean(per_class),
        tail=fmean(per_class[:TAIL]),
        worst_class=min(per_class),
        per_class=per_class,
    )


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds (none for a single value), with the values."""

    mean: float
    std: float | None
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, values)

    def percent(self, signed: bool = False) -> str:
        """The mean in percent, plus or minus the deviation."""
        text = f"{round(100 * self.mean, 6):{'+' if signed else ''}.1f}"  # equal figures print alike
        return text if self.std is None else f"{text} ± {100 * self.std:.1f}"


Scores = dict[str, list[dict[str, Score]]]  # representation -> seed -> probe -> score


def spread(scores: Scores, representation: str, probe: str, measure: str) -> Spread:
    """One figure of the result table."""
    return Spread.of([getattr(per_probe[probe], measure) for per_probe in scores[representation]])


def paired_difference(scores: Scores, probe: str, measure: str) -> Spread:
    """CACR minus NT-Xent, seed by seed: both start from the same weights and see the same views."""
    first, second = (spread(scores, name, probe, measure).values for name in LOSSES)
    return Spread.of([a - b for a, b in zip(first, second, strict=True)])


def interval(difference: Spread) -> float | None:
    """Half the 95 % interval of a mean difference over seeds (Student's t); none for one seed."""
    if difference.std is None:
        return None
    seeds = len(difference.values)
    return float(stats.t.ppf(0.975, seeds - 1)) * difference.std / math.sqrt(seeds)


def verdict(scores: Scores, probe: str) -> str:
    """What the balanced accuracies of a probe allow to say, a tie included."""
    difference = paired_difference(scores, probe, "balanced")
    half = interval(difference)
    text = f"{100 * difference.mean:+.1f}"
    if half is None:
        return f"{text} points on one seed, which says nothing"
    better = LOSSES[0] if difference.mean > 0 else LOSSES[1]
    word = "a tie" if abs(difference.mean) <= half else f"{better} is better"
    return f"{word} ({text} ± {100 * half:.1f} points)"


def summary(scores: Scores) -> dict[str, Any]:
    """Everything above as plain dictionaries."""
    table: dict[str, Any] = {
        name: {probe: {m: spread(scores, name, probe, m)._asdict() for m in MEASURES} for probe in PROBES}
        for name in REPRESENTATIONS
    }
    table["CACR minus NT-Xent"] = {
        probe: {m: paired_difference(scores, probe, m)._asdict() for m in MEASURES} for probe in PROBES
    }
    return table


def sampling_error(accuracy: float, images: int) -> float:
    """Binomial standard error of an accuracy measured on so many images."""
    return math.sqrt(max(accuracy * (1.0 - accuracy), 0.0) / images)
