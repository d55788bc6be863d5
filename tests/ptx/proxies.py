"""What the async proxy sees of shared memory: ``wgmma`` reads through it, all other instructions use the generic one.

A write is seen by a ``wgmma`` of a warp if a ``fence.proxy.async`` lies on a way from one to the other: by the writer
before a barrier, or by the reader behind it. What is not seen reads as NaN. Every warp has a clock that ticks at each
barrier and fence; it knows up to which tick it is behind the other warps of its block, and up to which of them a fence
lies between. Every word remembers the warp and the tick of the last write. ``cp.async`` uses the generic proxy, too,
and writes when it is waited for: a fence before that wait is none.

Warps are the smallest unit: a fence of some threads counts for their warp. Only barriers of the block order warps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .memory import Banked, Lanes
from .schedule import WARP

Flags = NDArray[np.bool_]
WORD = 4  # bytes
UNSEEN = np.iinfo(np.int64).max  # the tick of a write that is not over


class Proxies:
    """The clocks of the warps ``[block, warp, warp]`` and the last writes of all words of shared memory."""

    def __init__(self, shared: Banked, blocks: int, padded: int):
        self.shared, self.blocks, self.warps = shared, blocks, padded // WARP
        self.behind = np.zeros((blocks, self.warps, self.warps), np.int64)
        self.fenced = np.zeros_like(self.behind)
        self.writer = np.zeros(shared.data.size // WORD, np.int64)
        self.tick = np.zeros(shared.data.size // WORD, np.int64)

    def reset(self) -> None:
        for table in (self.behind, self.fenced, self.writer, self.tick):
            table.fill(0)
        self._own(self.behind)[:] = 1

    def _own(self, table: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[block, warp]``, a view: of each warp the entry about itself."""
        return np.einsum("bii->bi", table)

    # ---- what orders ----
    def fence(self, lanes: Flags) -> None:
        """``fence.proxy.async``: all that these warps are behind is seen from now on."""
        warps = lanes.reshape(self.blocks, self.warps, WARP).any(2)
        self.fenced[warps] = np.maximum(self.fenced[warps], self.behind[warps])
        self._own(self.behind)[:] += warps

    def meet(self, lanes: Flags) -> None:
        """A barrier: who leaves it is behind all that those who came have done, fences included."""
        warps = lanes.reshape(self.blocks, self.warps, WARP).any(2)
        for table in (self.behind, self.fenced):
            known = np.where(warps[..., None], table, 0).max(1, keepdims=True)
            np.copyto(table, known, where=warps[..., None])
        self._own(self.behind)[:] += warps

    # ---- memory ----
    def words(self, index: NDArray[np.uint64], size: int) -> NDArray[np.intp]:
        """Words that hold ``size`` bytes from each of these places in the data; one row for each of them."""
        first = (index // np.uint64(WORD)).astype(np.intp)
        return first + np.arange(max(1, size // WORD))[:, None]

    def written(self, words: NDArray[np.intp], lanes: Lanes) -> None:
        """A write of these threads through the generic proxy."""
        warp = np.arange(self.blocks * self.warps * WARP)[lanes] // WARP
        self.writer[words] = warp % self.warps
        self.tick[words] = self._own(self.behind).reshape(-1)[warp]

    def open(self, words: NDArray[np.intp]) -> None:
        """A write that somebody has to wait for."""
        self.tick[words] = UNSEEN

    def seen(self, words: NDArray[np.intp], known: NDArray[np.int64]) -> Flags:
        """Which of the words ``[i, ...]`` are seen by who has ``known[i]``, a row of ``fenced``."""
        each = np.arange(len(words)).reshape(-1, *[1] * (words.ndim - 1))
        return self.tick[words] <= known[each, self.writer[words]]
