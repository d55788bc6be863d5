"""Intervals of paired differences over seeds and test images."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval, and the value of every seed."""

    mean: float
    low: float
    high: float
    seeds: list[float]

    @property
    def tie(self) -> bool:
        """Whether 0 lies in the interval."""
        return self.low <= 0.0 <= self.high


def measure_weights(labels: np.ndarray, classes: list[list[int]]) -> np.ndarray:
    """What each image counts in the mean recall of some classes, by seed: [S, N], rows of sum 1."""
    weights = np.zeros((len(classes), len(labels)))
    for row, chosen in zip(weights, classes, strict=True):
        for c in chosen:
            of_class = labels == c
            row[of_class] = 1.0 / (len(chosen) * of_class.sum())
    return weights


def interval(parts: np.ndarray, labels: np.ndarray) -> Interval:
    """The mean over S seeds of the sums of ``parts`` [S, N], with the interval for other seeds and other images.

    ``parts[s, i]`` is what image i adds to the difference of seed s. Seeds and images are both samples, and every seed
    is scored on the same images, so with S seeds and images drawn class by class::

        var = var_seeds(sum_i parts) / S  +  sum_i var_images(mean_s parts)  -  sum_i var_images(parts) / S^2

    The last term is in both of the others. Student's t takes the freedom of the seeds' share by Satterthwaite. At
    least the larger of both shares is kept, since an estimated variance may be too small or even negative.
    """
    seeds = len(parts)
    if seeds < 2:
        raise ValueError(f"an interval over seeds needs at least two, got {seeds}")
    values = parts.sum(axis=1)
    of_seeds = float(values.var(ddof=1)) / seeds
    of_images = _over_images(parts.mean(axis=0), labels)
    of_both = sum(_over_images(row, labels) for row in parts) / seeds**2
    variance = max(of_seeds + of_images - of_both, of_seeds, of_images)
    freedom = (seeds - 1) * (variance / of_seeds) ** 2 if of_seeds > 0.0 else math.inf
    half = float(stats.t.ppf(0.5 + LEVEL / 2.0, min(freedom, 1e9))) * math.sqrt(variance)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half, values.tolist())


def _over_images(parts: np.ndarray, labels: np.ndarray) -> float:
    """The variance of a sum over images of which every class has a fixed number."""
    total = 0.0
    for c in np.unique(labels):
        some = parts[labels == c]
        if len(some) > 1:
            total += len(some) * float(some.var(ddof=1))
    return total
