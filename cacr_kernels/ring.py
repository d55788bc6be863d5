"""The rows that ``CACRQueueLoss`` keeps: key number t, counted from 0, lies in row t mod K until key t + K takes it.

``count`` says how many keys ever entered, ``waiting`` how many of ``keys`` [K, D], oldest first, enter next. Both are
clamped when read: an average of buffers makes them what no training would.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filled_rows(count: Tensor, size: int) -> Tensor:
    """How many rows hold a key: the first ones."""
    return count.clamp(0, size)


def enter(ring: Tensor, count: Tensor, keys: Tensor, waiting: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and count after the waiting keys entered, as new tensors; the host reads no number of the device."""
    size = ring.shape[0]
    count, waiting = count.clamp(min=0), waiting.clamp(0, size)
    place = (
        torch.arange(size, dtype=torch.int64, device=ring.device) - count
    ) % size  # which of the keys would enter a row
    return torch.where((place < waiting)[:, None], keys[place], ring), count + waiting


def enter_(ring: Tensor, count: Tensor, keys: Tensor, waiting: int) -> None:
    """The same in place, where the host knows the numbers."""
    size, start = ring.shape[0], int(count.clamp_(min=0)) % ring.shape[0]
    before_end = min(waiting, size - start)
    ring[start : start + before_end] = keys[:before_end]
    ring[: waiting - before_end] = keys[before_end:waiting]
    count += waiting
