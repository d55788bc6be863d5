"""How many threads to train with: what PyTorch picks, as long as that is faster than one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch


class Threads:
    """Compares the first epoch, on one thread, with every later one, on many, and stays with one if that is faster.

    Where others use the machine, threads that wait for each other take ten times as long as one that waits for nobody.
    """

    def __init__(self, many: int) -> None:
        self.many = many
        self.alone: float | None = None  # seconds of a step on one thread
        if many > 1:
            torch.set_num_threads(1)

    def after_epoch(self, steps: Sequence[float]) -> bool:
        """Takes the seconds of the epoch's steps; whether the machine just turned out to be busy."""
        if self.many == 1:
            return False
        if self.alone is None:
            self.alone = median(steps)
            torch.set_num_threads(self.many)
            return False
        if median(steps) <= self.alone:
            return False
        self.many = 1
        torch.set_num_threads(1)
        return True
