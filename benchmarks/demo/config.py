"""Options of the training demo, with the reasons for their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossName = Literal["CACR", "NT-Xent"]
LOSSES: tuple[LossName, LossName] = ("CACR", "NT-Xent")


@dataclass(frozen=True)
class Config:
    """One experiment. Nothing here was chosen by looking at the held-out images.

    ``tau_pos`` and ``tau_neg`` are the published settings for small image sets (CIFAR-100 and STL-10; CIFAR-10
    uses ``tau_neg = 0.9``), ``batch`` the published batch size, ``temperature`` the one that matches ``tau_neg``
    (1 / (2 tau_neg): the same softmax over negatives), optimiser and sizes are ordinary for a network this small. Both
    losses share everything else, and neither was tuned; ``validate`` is there for whoever wants to.
    """

    seeds: int = 3
    epochs: int = 60
    batch: int = 128
    views: int = 4
    tau_pos: float = 1.0
    tau_neg: float = 2.0
    temperature: float = 0.25
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    feature_dim: int = 128
    embedding_dim: int = 64
    validate: bool = False

    @property
    def scored_on(self) -> str:
        """Which images the accuracies are measured on."""
        return "validation split of the training part" if self.validate else "held-out part"


def matched(inverse: float) -> float:
    """The temperature that matches a ``tau_neg`` above 0, and the ``tau_neg`` that matches a temperature."""
    return 1.0 / (2.0 * inverse)


QUICK = Config(seeds=2, epochs=2, batch=64, feature_dim=32, embedding_dim=16)
