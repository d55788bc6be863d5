"""Launching a kernel on arrays: the grid as waves of resident blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arguments import Argument
from .errors import PtxError
from .machine import Machine, Shape
from .schedule import Lockstep
from .syntax import Function, Module, parse

LANES_AT_ONCE = 2048  # more lanes side by side do not make numpy faster


def load(text: str, source: str = "ptx") -> Kernels:
    """Read a PTX text; ``source`` is its name in messages."""
    return Kernels(parse(text, source))


class Kernels:
    """The kernels of one PTX text."""

    def __init__(self, module: Module):
        self.module = module
        self._machines: dict[tuple[str, Shape], Machine] = {}

    @property
    def names(self) -> list[str]:
        return [name for name, function in self.module.functions.items() if function.entry]

    def find(self, name: str) -> Function:
        """The kernel of this name, or the only one whose (mangled) name contains it."""
        found = [name] if name in self.names else [full for full in self.names if name in full]
        if len(found) != 1:
            raise PtxError(f"{len(found)} kernels of {self.module.source} match {name!r}: {self.names}")
        return self.module.functions[found[0]]

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        shared_bytes: int = 0,
        schedule: Lockstep | None = None,
        cooperative: bool = False,
        resident: int | None = None,
        limit: int = 50_000_000,
    ) -> int:
        """Run a kernel on arrays, which are read and written in place; returns how many instructions were executed.

        Args:
            name: the kernel, or a part of its name that only it has.
            grid, block: up to three numbers each.
            args: one per parameter. An array is passed as its address, every other array is out of bounds.
            shared_bytes: dynamic shared memory.
            schedule: ``Lockstep()`` unless given.
            cooperative: all blocks are resident, and a workspace for cooperative groups is there.
            resident: how many blocks run side by side, interleaved; by default as many as make 2048 threads.
            limit: executed instructions after which a launch that does not end is given up.
        """
        kernel, extent, schedule = self.find(name), _triple(grid), schedule or Lockstep()
        total, threads = int(np.prod(extent)), int(np.prod(block))
        if total == 0 or threads == 0:
            raise PtxError("an empty grid or block", kernel.place)
        at_once = total if cooperative else min(total, resident or max(1, LANES_AT_ONCE // threads))
        shape = Shape(_triple(block), at_once, shared_bytes, cooperative)
        machine = self._machines.get((kernel.name, shape))
        if machine is None:
            machine = self._machines[kernel.name, shape] = Machine(self.module, kernel, shape)
        machine.begin(extent, args, schedule, limit)
        numbers = list(range(total))
        if type(schedule) is not Lockstep:
            schedule.rng.shuffle(numbers)
        for start in range(0, total, at_once):
            machine.run(numbers[start : start + at_once])
        return machine.executed


def _triple(extent: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(n) for n in extent), 1, 1, 1)[:3]
    return x, y, z
