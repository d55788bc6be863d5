"""Schedules: which threads go on next, and how far. A race shows under some and hides under others.

``Lockstep`` is the fastest and the kindest: all warps go together. ``Random`` lets a random half of the warps go on for
a random number of instructions, some of them split: the threads of a warp need not go together either. ``Priority``
starves: in each block the warp of the highest priority goes on until it waits, so warps run as far ahead of each other
as barriers let them.

Each schedule carries its random numbers, also those that decide when what is asynchronous is done: ``eager`` is the
share that is done at once, all else is done as late as allowed. With 0 and 1 there is nothing random in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .machine import Machine

WARP = 32
Chosen = tuple[NDArray[np.bool_], int]


class Lockstep:
    """All threads that can go on do; what is asynchronous is done at once or as late as allowed, by chance."""

    def __init__(self, seed: int = 0, eager: float = 0.5):
        self.rng, self.eager = np.random.default_rng(seed), eager

    def __repr__(self) -> str:
        return type(self).__name__

    def is_eager(self) -> bool:
        """Whether the next asynchronous instruction is done at once."""
        return bool(self.rng.random() < self.eager)

    def choose(self, machine: Machine) -> Chosen:
        """Lanes that may go on (at least one, all of them runnable), and for how many instructions at most."""
        return machine.runnable, 10_000


class Random(Lockstep):
    """A random half of the warps for a random number of instructions."""

    def __init__(self, seed: int = 0, mean: int = 24, split: float = 0.1, eager: float = 0.5):
        super().__init__(seed, eager)
        self.seed, self.mean, self.split = seed, mean, split

    def __repr__(self) -> str:
        return f"Random({self.seed})"

    def choose(self, machine: Machine) -> Chosen:
        able = machine.runnable
        warps = self.rng.random(able.size // WARP) < 0.5
        chosen = able & np.repeat(warps, WARP)
        if self.rng.random() < self.split:
            chosen &= self.rng.random(able.size) < 0.5
        if not chosen.any():
            first = int(self.rng.choice(np.flatnonzero(able))) // WARP * WARP
            chosen = np.zeros_like(able)
            chosen[first : first + WARP] = able[first : first + WARP]
        return chosen, int(self.rng.geometric(1 / self.mean))


class Priority(Lockstep):
    """In each block the runnable warp of the highest priority; a warp that runs for long falls behind."""

    def __init__(self, seed: int = 0, patience: int = 3000, eager: float = 0.5):
        super().__init__(seed, eager)
        self.seed, self.patience = seed, patience
        self.order = np.zeros(0)
        self.ran = np.zeros(0, np.int64)
        self.favoured = 1.0  # share of the blocks that go on, where blocks may wait for each other

    def __repr__(self) -> str:
        return f"Priority({self.seed})"

    def choose(self, machine: Machine) -> Chosen:
        able = machine.runnable
        warps = able.reshape(-1, WARP).any(1)
        if self.order.size != warps.size:
            self.order, self.ran = self.rng.random(warps.size), np.zeros(warps.size, np.int64)
            self.favoured = self.rng.random()
        if self.rng.random() < 0.02:
            self.order[self.rng.integers(warps.size)] = self.rng.random()
            self.favoured = self.rng.random()
        rank = np.where(warps, self.order, -np.inf).reshape(machine.blocks, -1)
        first = rank.argmax(1) + np.arange(machine.blocks) * rank.shape[1]
        first = first[warps[first]]
        if machine.cooperative:
            count = max(1, int(self.favoured * first.size))
            first = first[np.argsort(self.order[first])[-count:]]
        budget = 100
        self.ran[first] += budget
        late = first[self.ran[first] > self.patience]
        self.order[late] = -self.rng.random(late.size)
        self.ran[late] = 0
        chosen = np.zeros(warps.size, np.bool_)
        chosen[first] = True
        return able & np.repeat(chosen, WARP), budget
