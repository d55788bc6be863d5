"""``cp.async``: copies from global to shared memory that arrive some time before they are waited for.

Each execution of the instruction is, by a coin of the schedule, *eager* (the data is there at once) or *late*: the
target is poisoned with NaN until the thread waits for the group. So using the data too early is seen, and so is writing
over a buffer that is still read. For the async proxy the write is over when the thread has waited, in both cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .formats import Array
from .memory import Addresses

if TYPE_CHECKING:
    from .machine import Machine

WORD = np.dtype(np.uint32)


@dataclass
class Late:
    """Copies on their way: for each one the thread, the number of its group, from where, to where, how many bytes."""

    lanes: NDArray[np.intp]
    group: NDArray[np.int64]
    target: Addresses
    source: Addresses
    bytes: NDArray[np.int64]
    size: int
    arrived: bool = False

    def part(self, which: NDArray[np.bool_]) -> Late:
        fields = (self.lanes, self.group, self.target, self.source, self.bytes)
        return Late(*(field[which] for field in fields), self.size, self.arrived)


class Copies:
    """The copies of all threads of a machine."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.group = np.zeros(machine.size, np.int64)  # of each thread: the number of the group that is open
        self.late: list[Late] = []

    def reset(self) -> None:
        self.group.fill(0)
        self.late.clear()

    def issue(self, lanes: NDArray[np.intp], target: Addresses, source: Addresses, bytes_: Array, size: int) -> None:
        copy = Late(lanes, self.group[lanes], target, source, bytes_.astype(np.int64), size)
        words = self._words(copy)  # also checks the addresses
        proxies = self.machine.proxies
        copy.arrived = self.machine.schedule.is_eager()
        self.machine.shared.write(target, lanes, words if copy.arrived else np.full_like(words, 0xFFFFFFFF))
        if proxies is not None:
            proxies.open(self._target_words(copy))
        if proxies is not None or not copy.arrived:
            self.late.append(copy)

    def commit(self, mask: NDArray[np.bool_]) -> None:
        self.group[mask] += 1

    def wait(self, mask: NDArray[np.bool_], allowed: int | None) -> None:
        """Until at most ``allowed`` of the latest groups are on their way; ``None``: all, the open one too."""
        last = self.group + 1 if allowed is None else self.group - allowed
        remaining = []
        for copy in self.late:
            done = mask[copy.lanes] & (copy.group < last[copy.lanes])
            if done.any():
                self._finish(copy.part(done))
            if not done.all():
                remaining.append(copy.part(~done))
        self.late = remaining

    def _finish(self, copy: Late) -> None:
        if not copy.arrived:
            self.machine.shared.write(copy.target, copy.lanes, self._words(copy))
        elif self.machine.proxies is not None:
            self.machine.proxies.written(self._target_words(copy), copy.lanes)

    def _target_words(self, copy: Late) -> NDArray[np.intp]:
        assert self.machine.proxies is not None
        index = self.machine.shared.index(copy.target, copy.lanes, np.dtype(np.uint8), 1)
        return self.machine.proxies.words(index, copy.size)

    def _words(self, copy: Late) -> Array:
        """The data, zeros behind ``bytes``."""
        words = np.zeros((copy.size // WORD.itemsize, copy.lanes.size), WORD)
        reads = np.flatnonzero(copy.bytes > 0)
        if (copy.bytes[reads] == copy.size).all():
            parts = [(reads, copy.size)]
        else:
            parts = [(reads[copy.bytes[reads] == n], int(n)) for n in np.unique(copy.bytes[reads])]
        for positions, count in parts:
            if not positions.size:
                continue
            raw = np.zeros((copy.size, positions.size), np.uint8)
            if count == copy.size:
                read = self.machine.memory.read(copy.source[positions], copy.lanes[positions], WORD, len(words))
                words[:, positions] = read
                continue
            for i in range(count):
                source = copy.source[positions] + np.uint64(i)
                raw[i] = self.machine.memory.read(source, copy.lanes[positions], np.dtype(np.uint8))[0]
            words[:, positions] = np.ascontiguousarray(raw.T).view(WORD).T
        return words
