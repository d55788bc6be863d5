"""Where threads wait for each other: barriers of a block, and instructions that some threads of a warp do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import PtxError
from .formats import Array
from .schedule import WARP

if TYPE_CHECKING:
    from .machine import Machine, Step

Flags = NDArray[np.bool_]
NOWHERE = -1


class Convergence:
    """Threads that wait, and for what."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.collective_at = np.full(
            machine.size, NOWHERE
        )  # counter of the instruction a thread waits to do with others
        self.barrier = np.full(machine.size, NOWHERE)  # number of the barrier a thread waits at
        self.barrier_at = np.zeros(machine.size, np.int64)
        self.barrier_count = np.zeros(machine.size, np.int64)
        self.reductions: dict[int, Callable[[Flags], None]] = {}
        self._checked: tuple[Flags | None, bool] = (None, False)

    def reset(self) -> None:
        self.collective_at.fill(NOWHERE)
        self.barrier.fill(NOWHERE)
        self._checked = None, False

    # ---- warps ----
    def whole(self, lanes: Flags) -> bool:
        """Whether of each warp all living threads are among these lanes, or none."""
        if self._checked[0] is not lanes:
            here = lanes.reshape(-1, WARP)
            gone = self.machine.exited.reshape(-1, WARP)
            self._checked = lanes, bool(((here | gone).all(1) | ~here.any(1)).all())
        return self._checked[1]

    def collective(self, step: Step, pc: int, lanes: Flags) -> bool:
        """Do an instruction for those whose partners are there; whether these are exactly ``lanes``."""
        machine = self.machine
        present = lanes | (self.collective_at == pc)
        assert step.members is not None
        ready = present & self._partners_present(present, step.members())
        wait = lanes & ~ready
        machine.pc[wait] = pc
        machine.runnable[wait] = False
        self.collective_at[wait] = pc
        if ready.any():
            step.action(ready)
            machine.pc[ready] = pc + 1
            machine.runnable[ready] = True
            self.collective_at[ready] = NOWHERE
        return not wait.any() and bool((ready == lanes).all())

    def _partners_present(self, present: Flags, members: Array) -> Flags:
        missing = ~(present | self.machine.exited).reshape(-1, WARP)
        bits = (missing * (np.uint32(1) << np.arange(WARP, dtype=np.uint32))).sum(1, dtype=np.uint32)
        return (members & np.repeat(bits, WARP)) == 0

    # ---- blocks ----
    def arrive(self, lanes: Flags, number: Array, count: Array | None, finish: Callable[[Flags], None] | None) -> None:
        """Threads come to a barrier; ``finish`` is called with those that leave it together."""
        machine = self.machine
        self.barrier[lanes] = number[lanes]
        self.barrier_count[lanes] = 0 if count is None else count[lanes]
        self.barrier_at[lanes] = machine.pc[lanes] - 1
        machine.runnable[lanes] = False
        if finish is not None:
            self.reductions[int(self.barrier_at[lanes][0])] = finish
        self._release()

    def _release(self) -> None:
        """Let go whoever waits at a barrier that is complete."""
        machine = self.machine
        for number in np.unique(self.barrier[self.barrier != NOWHERE]):
            waits = self.barrier == number
            by_block = waits.reshape(machine.blocks, -1)
            # a warp counts with its exited threads, whichever barrier it waits at
            warps = waits.reshape(-1, WARP).any(1).repeat(WARP)
            here = (waits | (machine.exited & warps)).reshape(machine.blocks, -1)
            wanted = np.where(by_block, self.barrier_count.reshape(machine.blocks, -1), 0).max(1)
            everyone = (by_block | machine.exited.reshape(machine.blocks, -1)).all(1)
            complete = np.where(wanted > 0, here.sum(1) >= wanted, everyone) & by_block.any(1)
            if complete.any():
                self._let_go(waits & complete.repeat(machine.padded))

    def _let_go(self, lanes: Flags) -> None:
        machine = self.machine
        at = np.where(lanes, self.barrier_at, NOWHERE).reshape(-1, WARP)
        lowest = np.where(at == NOWHERE, np.iinfo(np.int64).max, at).min(1)
        parted = np.flatnonzero((at.max(1) != lowest) & (at.max(1) != NOWHERE))
        if parted.size:
            first = machine.code[int(lowest[parted[0]])]
            if "barrier" not in first.instruction.opcode:
                other = machine.code[int(at.max(1)[parted[0]])].instruction.place
                raise PtxError(
                    f"threads of one warp wait at different barriers, also at {other}", first.instruction.place
                )
        machine.runnable[lanes] = True
        self.barrier[lanes] = NOWHERE
        if machine.proxies is not None:
            machine.proxies.meet(lanes)
        for pc, finish in self.reductions.items():
            leaving = lanes & (self.barrier_at == pc)
            if leaving.any():
                finish(leaving)

    # ---- both ----
    def left(self, lanes: Flags) -> None:
        """Threads have exited: their partners look again."""
        machine = self.machine
        warps = lanes.reshape(-1, WARP).any(1).repeat(WARP)
        waiting = (self.collective_at != NOWHERE) & warps & ~machine.exited
        machine.runnable[waiting] = True
        self.collective_at[waiting] = NOWHERE
        self._checked = None, False
        if (self.barrier != NOWHERE).any():
            self._release()

    def waits_at(self, lane: int, pc: int) -> int:
        """The counter of the instruction a thread waits at."""
        return int(self.barrier_at[lane]) if self.barrier[lane] != NOWHERE else pc
