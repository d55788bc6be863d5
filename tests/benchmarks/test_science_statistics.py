"""Intervals of the experiment, on made-up numbers and on many made-up experiments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from benchmarks.science.probes import balanced_accuracy, linear_probe, nearest
from benchmarks.science.statistics import interval, measure_weights

LABELS = np.repeat([0, 1], 4)


def test_without_differences_between_images_it_is_the_t_interval_of_seeds() -> None:
    values = np.array([0.1, 0.3, 0.2, 0.6])
    parts = np.repeat(values[:, None] / 8, 8, axis=1)
    found = interval(parts, LABELS)
    assert found.mean == pytest.approx(0.3)
    assert found.seeds == pytest.approx(values)
    half = 3.182446 * values.std(ddof=1) / 2.0  # t of 3 degrees of freedom at 97.5 %
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half))
    assert found.tie == (found.low <= 0.0)


def test_without_differences_between_seeds_it_is_the_normal_interval_of_images() -> None:
    row = np.array([1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 1.0, 1.0]) / 8
    found = interval(np.tile(row, (5, 1)), LABELS)
    variance = 4 * row[:4].var(ddof=1) + 4 * row[4:].var(ddof=1)
    variance -= variance / 5  # what both shares hold
    variance = max(variance, 4 * row[:4].var(ddof=1) + 4 * row[4:].var(ddof=1))
    assert found.mean == pytest.approx(row.sum())
    assert found.high - found.mean == pytest.approx(1.959964 * variance**0.5)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two, got 1"):
        interval(np.zeros((1, 8)), LABELS)


def test_all_the_same_is_a_tie_without_width() -> None:
    found = interval(np.zeros((3, 8)), LABELS)
    assert (found.mean, found.low, found.high, found.tie) == (0.0, 0.0, 0.0, True)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Seeds and images both vary: an interval over one of them alone would hold it far less often."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 15)
    held = 0
    for _ in range(400):
        seeds, pictures = rng.normal(0.0, 0.1, (8, 1)), rng.normal(0.0, 0.8, (1, 60))
        parts = (0.2 + seeds + pictures + rng.normal(0.0, 0.5, (8, 60))) / 60
        found = interval(parts, labels)
        held += found.low <= 0.2 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_weights_make_mean_recalls() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    weights = measure_weights(labels, [[0, 1, 2], [2]])
    correct = np.array([1, 1, 0, 1, 0, 1])
    assert weights.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert weights @ correct == pytest.approx([(2 / 3 + 1 + 1 / 2) / 3, 1 / 2])


def test_probes_find_separable_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 6.0 * torch.eye(3, 5)
    truth = torch.arange(90) % 3
    x = centres[truth] + torch.randn(90, 5, generator=generator)
    on = centres[truth] + torch.randn(90, 5, generator=generator)
    for predicted in (linear_probe(x, truth, on, 3), nearest(x, truth, on, 3, 5)):
        assert balanced_accuracy(predicted, truth, 3) > 0.95
    assert balanced_accuracy(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1]), 2) == 1.0
    assert balanced_accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]), 2) == 0.5


def test_linear_probe_is_that_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(120) % 4
    x, on = (torch.randn(120, 6, generator=generator) + 0.8 * torch.eye(4, 6)[truth] for _ in range(2))
    mean, std = x.mean(0), x.std(0)
    fitted = linear.LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(((x - mean) / std).numpy(), truth.numpy())
    wanted = fitted.predict(((on - mean) / std).numpy())
    assert (linear_probe(x, truth, on, 4).numpy() == wanted).mean() >= 0.99


def test_nearest_neighbours_break_ties_by_distance() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    y = torch.tensor([0, 1, 1, 0])
    assert nearest(x, y, torch.tensor([[1.0, 0.01]]), 2, 2).tolist() == [0]
    assert nearest(x, y, torch.tensor([[0.01, 1.0]]), 2, 2).tolist() == [1]
