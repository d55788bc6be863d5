"""scikit-learn's digits: an imbalanced training part, a balanced held-out part, and augmented views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

CLASSES = 10
HELD_OUT_PER_CLASS = 40
VALIDATION_SHARE = 0.25
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images to learn from and images to score on; ``*_index`` are rows of ``load_digits()``."""

    train_images: Tensor  # [N, 1, 8, 8] float32 in [0, 1]
    train_labels: Tensor  # [N] int64
    train_index: Tensor  # [N] int64
    test_images: Tensor  # [M, 1, 8, 8]
    test_labels: Tensor  # [M]
    test_index: Tensor  # [M]

    @property
    def train_counts(self) -> list[int]:
        return torch.bincount(self.train_labels, minlength=CLASSES).tolist()

    @property
    def test_counts(self) -> list[int]:
        return torch.bincount(self.test_labels, minlength=CLASSES).tolist()


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training part and of the held-out part.

    The held-out rows are drawn first, the same number per class. Of what is left, class ``i`` keeps the fraction
    ``(i + 1) / 10``, the published imbalance: the digit 0 becomes rare, the digit 9 stays whole.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    train, held_out = [], []
    for digit in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        held_out.append(rows[:HELD_OUT_PER_CLASS])
        rest = rows[HELD_OUT_PER_CLASS:]
        train.append(rest[: len(rest) * (digit + 1) // CLASSES])
    return np.concatenate(train), np.concatenate(held_out)


def validation_indices(train: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the training part again, a quarter of every class for validation (at least one image)."""
    rng = np.random.default_rng(SPLIT_SEED + 1)
    fit, validation = [], []
    for digit in range(CLASSES):
        rows = rng.permutation(train[labels[train] == digit])
        count = max(1, round(VALIDATION_SHARE * len(rows)))
        validation.append(rows[:count])
        fit.append(rows[count:])
    return np.concatenate(fit), np.concatenate(validation)


def load_split(validate: bool = False) -> Split:
    """Load the digits; under ``validate`` score on a part of the training part and leave the held-out part alone."""
    digits = load_digits()
    labels = digits.target
    train, test = split_indices(labels)
    if validate:
        train, test = validation_indices(train, labels)
    images = torch.from_numpy(digits.images / 16.0).float().unsqueeze(1)
    targets = torch.from_numpy(labels.astype(np.int64))
    rows, scored = torch.from_numpy(train), torch.from_numpy(test)
    return Split(images[rows], targets[rows], rows, images[scored], targets[scored], scored)


def augment(images: Tensor, views: int, generator: torch.Generator) -> Tensor:
    """Draw augmented views ``[views, N, 1, H, W]`` of images ``[N, 1, H, W]`` in [0, 1].

    Rotation (20 degrees), scale (20 %), shear, shift (1.2 pixels), contrast, noise and, for half of the views, an
    erased rectangle. No mirror images: they change what a digit says.
    """
    n = views * len(images)
    height, width = images.shape[-2:]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, dtype=images.dtype) * (high - low) + low

    angle, shear = uniform(-0.35, 0.35), uniform(-0.2, 0.2)
    scale = uniform(-0.2, 0.2).exp()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = uniform(-2.4 / width, 2.4 / width, 2)  # in units of half the image
    theta = torch.stack((cos, shear - sin, shift[:, 0], sin, cos, shift[:, 1]), dim=1).view(n, 2, 3)
    batch = images.expand(views, *images.shape).reshape(n, *images.shape[1:])
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    batch = F.grid_sample(batch, grid, align_corners=False)

    batch = batch * uniform(0.7, 1.3, 1, 1, 1)
    noise = torch.randn(batch.shape, generator=generator, dtype=batch.dtype)
    batch = (batch + 0.08 * noise).clamp_(0.0, 1.0)
    return batch.mul_(_keep_mask(uniform, height, width)).view(views, *images.shape)


def _keep_mask(uniform: Callable[..., Tensor], height: int, width: int) -> Tensor:
    """0 inside a random rectangle of a quarter to half the side (for half of the images), 1 elsewhere: [n, 1, H, W]."""
    inside = []
    for size in (height, width):
        length = uniform(0.25 * size, 0.5 * size, 1).round()
        start = (uniform(0.0, 1.0, 1) * (size - length)).round()
        position = torch.arange(size)
        inside.append((position >= start) & (position < start + length))
    erased = inside[0].unsqueeze(2) & inside[1].unsqueeze(1) & (uniform(0.0, 1.0, 1, 1) < 0.5)
    return (~erased).unsqueeze(1)
