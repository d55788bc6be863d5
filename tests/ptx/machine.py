"""The threads of some blocks, in lanes side by side: registers, program counters, and the loop that runs them.

Lane ``block * padded + thread``; the lanes that pad the last warp of a block have exited from the start. Every thread
has its own program counter. The schedule chooses threads; those of them at the lowest counter go on together until they
part, wait, or their turn ends, so threads that parted meet again where their ways join.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import specials
from .arguments import Argument, offsets, pack
from .convergence import Convergence
from .copies import Copies
from .errors import AccessError, DeadlockError, PtxError
from .formats import UNSIGNED, Array, bits_type, decode
from .memory import Banked, Generic, Global, Space
from .proxies import Proxies
from .schedule import WARP, Lockstep
from .site import Action, Mask, Site, Source
from .syntax import WIDTHS, Function, Instruction, Module, Variable
from .table import TABLE, Rule
from .warpgroup import Warpgroups, fragments

SHARED_BASE = 1024  # not 0: that shared memory starts there is nothing to rely on
PATIENCE = 8  # turns after which a thread that never has the lowest counter goes on all the same
WORKSPACE_BYTES = 64  # of cooperative groups, which find it by a special register


@dataclass(frozen=True)
class Shape:
    """What a machine is built for; grid and arguments may change from launch to launch."""

    block: tuple[int, int, int]
    blocks: int
    shared_bytes: int
    cooperative: bool


@dataclass
class Step:
    """One instruction ready to run."""

    instruction: Instruction
    function: Function
    rule: Rule
    action: Action
    guard: Source | None
    members: Source | None
    target: int


class Machine:
    """The resident blocks of a kernel, ready to be launched any number of times."""

    def __init__(self, module: Module, kernel: Function, shape: Shape):
        self.module, self.kernel, self.shape = module, kernel, shape
        self.blocks, self.cooperative = shape.blocks, shape.cooperative
        self.grid = (1, 1, 1)
        self.schedule = Lockstep()
        self.threads = int(np.prod(shape.block))
        self.padded = -(-self.threads // WARP) * WARP
        self.size = self.blocks * self.padded
        self.block_of = np.repeat(np.arange(self.blocks), self.padded)
        self.thread_of = np.tile(np.arange(self.padded), self.blocks)
        self.block_number = np.zeros(self.blocks, np.int64)
        self._constants: dict[tuple[int, str], Array] = {}
        self._symbols: dict[tuple[str, str], tuple[str, int]] = {}
        self.functions = self._reachable(kernel)
        self.registers = {
            (function.name, name): np.empty(self.size, UNSIGNED[WIDTHS[kind]])
            for function in self.functions
            for name, kind in function.registers.items()
        }
        self._lay_out()
        self.proxies: Proxies | None = None
        names = fragments(self.functions)
        self.warpgroups = Warpgroups(self, names)
        if names:
            self.proxies = self.shared.proxies = Proxies(self.shared, self.blocks, self.padded)
            self.registers |= dict(zip(names, self.warpgroups.bits, strict=True))
        self.copies = Copies(self)
        self.convergence = Convergence(self)
        self.pc = np.zeros(self.size, np.int64)
        self.age = np.zeros(self.size, np.int64)
        self.runnable = np.zeros(self.size, np.bool_)
        self.exited = np.zeros(self.size, np.bool_)
        self.executed, self.limit = 0, 0
        self.current: Step | None = None
        self._link()

    def begin(self, grid: tuple[int, int, int], args: Sequence[Argument], schedule: Lockstep, limit: int) -> None:
        """A launch: from here on ``run`` is for blocks of this grid, with these arguments."""
        self.grid, self.schedule, self.limit = grid, schedule, limit
        self.executed = 0
        self.memory.reset()
        params = pack(self.kernel, args, self.memory)
        self.kernel_params.data[: len(params)] = np.frombuffer(params, np.uint8)

    # ---- building ----
    def _reachable(self, kernel: Function) -> list[Function]:
        """The kernel and what it calls, directly or not. One return address per function: nothing may call itself."""
        found = [kernel]

        def visit(function: Function, path: tuple[str, ...]) -> None:
            for instruction in function.code:
                names = [getattr(o, "name", "") for o in instruction.operands] if instruction.opcode == "call" else []
                for callee in (self.module.functions[name] for name in names if name in self.module.functions):
                    if callee.name in path:
                        raise PtxError("not modelled: recursion", instruction.place)
                    if callee not in found:
                        found.append(callee)
                    visit(callee, (*path, callee.name))

        visit(kernel, (kernel.name,))
        return found

    def _lay_out(self) -> None:
        """Gives every variable of the module its address."""
        shared, local, param = SHARED_BASE, 0, 0
        self.memory = Global()
        workspace = np.zeros(WORKSPACE_BYTES, np.uint8)
        self.workspace = self.memory.add("the workspace of the grid", workspace) if self.cooperative else 0
        dynamic: list[tuple[str, Variable]] = []
        scopes = [("", v) for v in self.module.variables]
        scopes += [(f.name, v) for f in self.functions for v in f.variables]
        scopes += [(f.name, v) for f in self.functions if not f.entry for v in (*f.params, *f.returns)]
        for scope, variable in scopes:
            if variable.space == "shared" and variable.size is None:
                dynamic.append((scope, variable))
            elif variable.space == "shared":
                shared = self._place(scope, variable, shared)
            elif variable.space == "local":
                local = self._place(scope, variable, local)
            elif variable.space == "param":
                param = self._place(scope, variable, param)
            else:
                content = np.frombuffer(variable.content.ljust(variable.size or 0, b"\0"), np.uint8).copy()
                self._symbols[scope, variable.name] = "global", self.memory.add(variable.name, content)
        if dynamic:  # all names of the dynamic memory mean the same bytes
            align = max(variable.align for _, variable in dynamic)
            shared = -(-shared // align) * align
            self._symbols |= {(scope, variable.name): ("shared", shared) for scope, variable in dynamic}
        self.memory.keep()
        each_lane = np.arange(self.size)
        size = shared - SHARED_BASE + self.shape.shared_bytes
        self.shared = Banked("shared", self.blocks, size, self.block_of, SHARED_BASE)
        self.local = Banked("local", self.size, local, each_lane)
        self.call_params = Banked("parameter", self.size, param, each_lane)
        starts, end = offsets(self.kernel)
        self.kernel_params = Banked("kernel parameter", 1, end, np.zeros_like(each_lane))
        for variable, offset in zip(self.kernel.params, starts, strict=True):
            self._symbols[self.kernel.name, variable.name] = "param", offset
        self.spaces: dict[str, Space] = {
            "global": self.memory,
            "const": self.memory,
            "shared": self.shared,
            "local": self.local,
        }
        self.spaces |= {"param": self.kernel_params, "call": self.call_params}
        self.spaces["generic"] = Generic(self.spaces)

    def _place(self, scope: str, variable: Variable, start: int) -> int:
        """Give a variable an address; returns the end of it."""
        at = -(-start // variable.align) * variable.align
        space = "call" if variable.space == "param" else variable.space
        self._symbols[scope, variable.name] = space, at
        return at + (variable.size or 0)

    def _link(self) -> None:
        starts = np.cumsum([0] + [len(f.code) + 1 for f in self.functions])
        self.entry = {f.name: int(start) for f, start in zip(self.functions, starts, strict=False)}
        self.return_to = {f.name: np.zeros(self.size, np.int64) for f in self.functions}
        self.on_return: dict[tuple[str, int], list[Callable[[Array], None]]] = {}
        self.code: list[Step] = []
        for function in self.functions:
            last = Instruction(function.place, None, "ret", (), ())
            self.code += [self._bind(function, instruction) for instruction in (*function.code, last)]
        self.joins = {self.label(f, name) for f in self.functions for name in f.labels}

    def label(self, function: Function, name: str) -> int:
        return self.entry[function.name] + function.labels[name]

    def _bind(self, function: Function, instruction: Instruction) -> Step:
        longer = ".".join((instruction.opcode, *instruction.modifiers[:1]))
        rule = TABLE.get(longer) or TABLE.get(instruction.opcode)
        if rule is None:
            raise PtxError(f"unknown instruction {instruction.opcode}", instruction.place)
        rule.check(instruction)
        site = Site(self, function, instruction)
        guard = None if instruction.guard is None else site.source(instruction.guard, "pred")
        target = -1
        if instruction.opcode == "bra":
            name = getattr(instruction.operands[0], "name", None)
            if name not in function.labels:
                raise site.error(f"unknown label {name}")
            target = self.label(function, name)
        members = rule.members(site) if rule.members else None
        action = rule.bind(site)
        if instruction.opcode != "wgmma":
            action = self.warpgroups.watched(function, instruction, action)
        return Step(instruction, function, rule, action, guard, members, target)

    # ---- what sites ask for ----
    def constant(self, bits: int, kind: str) -> Array:
        """The same value in all lanes."""
        key = bits, kind
        if key not in self._constants:
            full = np.full(self.size, bits, bits_type(kind))
            self._constants[key] = np.ascontiguousarray(decode(full, kind))
        return self._constants[key]

    def special(self, name: str, kind: str) -> Source | None:
        return specials.read(self, name, kind)

    def _variable(self, site: Site, name: str) -> tuple[str, int]:
        for scope in (site.function.name, ""):
            if (scope, name) in self._symbols:
                return self._symbols[scope, name]
        raise site.error(f"unknown name {name}")

    def symbol(self, site: Site, name: str) -> int:
        """Address of a variable inside its space."""
        return self._variable(site, name)[1]

    def parameter(self, function: str, name: str) -> int:
        """Address of a parameter or result of a function that is called."""
        return self._symbols[function, name][1]

    def space_of(self, site: Site, name: str) -> str:
        return self._variable(site, name)[0]

    # ---- running ----
    def run(self, numbers: Sequence[int]) -> None:
        """Run the blocks with these numbers in the grid to their end; there may be fewer than ``blocks``."""
        self._start(numbers)
        with np.errstate(all="ignore"):
            while True:
                if not self.runnable.any():
                    if self.exited.all():
                        self.warpgroups.finish()
                        return
                    raise self._deadlock("all living threads wait")
                if self.executed > self.limit:
                    raise self._deadlock(f"no end after {self.limit} instructions")
                self._turn()

    def _start(self, numbers: Sequence[int]) -> None:
        count = len(numbers)
        self.block_number[:count] = numbers
        for bits in self.registers.values():
            bits.view(np.uint8).fill(1 if bits.dtype == np.bool_ else 0xFF)
        for space in (self.shared, self.local, self.call_params):
            space.reset()
        if self.proxies is not None:
            self.proxies.reset()
        self.warpgroups.reset()
        self.copies.reset()
        self.convergence.reset()
        self.exited[:] = (self.thread_of >= self.threads) | (self.block_of >= count)
        self.runnable[:] = ~self.exited
        self.pc[:] = 0
        self.age[:] = 0
        self.turns = 0

    def _turn(self) -> None:
        """Let the chosen threads at the lowest counter go on."""
        chosen, budget = self.schedule.choose(self)
        counters = np.where(chosen, self.pc, len(self.code))
        lowest = int(counters.min())
        self.turns += 1
        if self.turns % PATIENCE == 0:  # whoever spins at low counters must not keep the others from going on
            lowest = int(self.pc[np.where(chosen, self.age, self.turns).argmin()])
        group = counters == lowest
        self.age[group] = self.turns
        mask: Mask = True if group.all() else group
        alone = mask is True or int(group.sum()) == int(chosen.sum())
        try:
            self._go(mask, group, lowest, budget, alone)
        except AccessError as error:
            assert self.current is not None
            raise PtxError(f"{error} ({self.thread_name(error.lane)})", self.current.instruction.place) from None

    def _go(self, mask: Mask, group: NDArray[np.bool_], pc: int, budget: int, alone: bool) -> None:
        """Run from ``pc`` until the group parts, waits, meets others or has had its turn."""
        for turn in range(budget):
            if turn and not alone and pc in self.joins:
                break
            step = self.current = self.code[pc]
            self.executed += 1
            active = mask
            if step.guard is not None:
                active = step.guard() & mask
                if not active.any():
                    pc += 1
                    continue
            if step.rule.plain:
                step.action(active)
                pc += 1
            elif step.target >= 0:
                if active is mask or bool(active[group].all()):
                    pc = step.target
                    continue
                self.pc[group] = pc + 1
                self.pc[active] = step.target
                return
            elif self._go_together(step, active, group, pc):
                pc += 1
            else:
                return
        self.pc[group] = pc

    def _go_together(self, step: Step, active: Mask, group: NDArray[np.bool_], pc: int) -> bool:
        """An instruction that threads wait at or leave by; whether the whole group goes on behind it."""
        lanes = group if active is True else active
        if step.members is not None and self.convergence.whole(lanes):
            step.action(active)
            return True
        self.pc[group] = pc + 1
        if step.members is not None:
            return self.convergence.collective(step, pc, lanes)
        step.action(lanes)
        return False

    def exit(self, lanes: NDArray[np.bool_]) -> None:
        """Threads that are done; who waited for them goes on without."""
        self.exited |= lanes
        self.runnable &= ~lanes
        self.convergence.left(lanes)

    # ---- messages ----
    def thread_name(self, lane: int) -> str:
        return f"thread {int(self.thread_of[lane])} of block {int(self.block_number[self.block_of[lane]])}"

    def _deadlock(self, why: str) -> DeadlockError:
        waiting = np.flatnonzero(~self.exited)
        places = []
        for pc in np.unique(self.pc[waiting]):
            here = waiting[self.pc[waiting] == pc]
            step = self.code[self.convergence.waits_at(int(here[0]), int(pc))]
            places.append(f"{here.size} at {step.instruction.place}, {self.thread_name(int(here[0]))} first")
        return DeadlockError(f"{why}: " + "; ".join(places))
