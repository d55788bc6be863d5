"""An instruction tied to the registers and memories of a machine: what the functions of the table work with.

A function of the table receives a ``Site`` once, looks its operands up, and returns an *action* that is called each
time the instruction is executed, with the mask of the threads that take part (``True`` for all).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import PtxError
from .formats import Array, bits_type, decode, encode, value_type
from .memory import Addresses, Lanes, window
from .syntax import WIDTHS, Address, Function, Immediate, Instruction, Negated, Operand, Pair, Register, Symbol, Vector

if TYPE_CHECKING:
    from .machine import Machine

Mask: TypeAlias = "bool | NDArray[np.bool_]"
Action: TypeAlias = Callable[[Mask], None]
Source: TypeAlias = Callable[[], Array]
Target: TypeAlias = Callable[[Array, Mask], None]


class Site:
    """Operands of one instruction. A type given to its methods is a PTX type without the dot."""

    def __init__(self, machine: Machine, function: Function, instruction: Instruction):
        self.machine = machine
        self.function = function
        self.instruction = instruction
        self.operands = instruction.operands
        self.modifiers = instruction.modifiers
        self.types = [m for m in instruction.modifiers if m in WIDTHS]

    @property
    def type(self) -> str:
        """The last type of the instruction, that of its sources."""
        return self.types[-1]

    def has(self, *modifiers: str) -> bool:
        return any(m in self.modifiers for m in modifiers)

    def one_of(self, *modifiers: str, default: str) -> str:
        return next((m for m in modifiers if m in self.modifiers), default)

    def error(self, message: str) -> PtxError:
        return PtxError(message, self.instruction.place)

    def refuse(self, condition: bool, message: str) -> None:
        if condition:
            raise self.error(f"not modelled: {message}")

    # ---- registers ----
    def register(self, name: str) -> Array:
        """The bits of a register, one per lane."""
        found = self.machine.registers.get((self.function.name, name))
        if found is None:
            raise self.error(f"unknown register {name}")
        return found

    def direct(self, operand: Operand | int, kind: str) -> Array | None:
        """A view of a register as values, where there is one."""
        operand = self.operand(operand)
        if not isinstance(operand, Register) or kind.startswith("bf16"):
            return None
        bits = self.machine.registers.get((self.function.name, operand.name))
        return None if bits is None or bits.dtype != bits_type(kind) else decode(bits, kind)

    def array(self, which: int, kind: str) -> Array | None:
        """The values of an operand that always stand in the same array: a register seen as they are, or a constant."""
        operand = self.operands[which]
        if isinstance(operand, Immediate):
            return self.machine.constant(self.immediate(operand, kind), kind)
        return self.direct(operand, kind)

    def operand(self, operand: Operand | int) -> Operand:
        return self.operands[operand] if isinstance(operand, int) else operand

    def source(self, which: Operand | int, kind: str) -> Source:
        """Reads an operand as values of a type; all lanes, those that do not take part included."""
        operand = self.operand(which)
        view = self.direct(operand, kind)
        if view is not None:
            return lambda: view
        if isinstance(operand, Negated):
            predicate = self.register(operand.register.name)
            return lambda: ~predicate
        if isinstance(operand, Register):
            special = self.machine.special(operand.name, kind)
            if special is not None:
                return special
            bits, storage = self.register(operand.name), bits_type(kind)
            if bits.dtype.itemsize * 8 < WIDTHS[kind] or (kind == "pred") != (bits.dtype == np.bool_):
                raise self.error(f"{operand.name} cannot be read as .{kind}")
            return lambda: decode(bits.astype(storage, copy=False), kind)
        constant = self.machine.constant(self.immediate(operand, kind), kind)
        return lambda: constant

    def immediate(self, operand: Operand, kind: str) -> int:
        """Bits of a constant, or the address of a variable."""
        if isinstance(operand, Symbol):
            return self.machine.symbol(self, operand.name)
        if not isinstance(operand, Immediate):
            raise self.error(f"{operand} is not a .{kind} operand")
        if operand.width and operand.width != WIDTHS[kind]:
            raise self.error(f"a constant of {operand.width} bits where .{kind} is wanted")
        return operand.value % (1 << WIDTHS[kind])

    def integer(self, which: int) -> int:
        """An operand that has to be a constant."""
        operand = self.operands[which]
        if not isinstance(operand, Immediate):
            raise self.error(f"operand {which} has to be a constant")
        return operand.value

    def target(self, which: Operand | int, kind: str, rounding: str = "rn") -> Target:
        """Writes values of a type to a register; one that is wider is extended as the type says."""
        operand = self.operand(which)
        if operand == Symbol("_"):
            return lambda values, mask: None
        if not isinstance(operand, Register):
            raise self.error(f"{operand} is no register to write to")
        bits = self.register(operand.name)
        if bits.dtype.itemsize * 8 < WIDTHS[kind] or (kind == "pred") != (bits.dtype == np.bool_):
            raise self.error(f"{operand.name} cannot hold .{kind}")
        if kind[0] == "s":
            signed = bits.view(f"i{bits.dtype.itemsize}")
            return lambda values, mask: np.copyto(signed, values.astype(value_type(kind), copy=False), where=mask)
        return lambda values, mask: np.copyto(bits, encode(values, kind, rounding), where=mask)

    def load_register(self, operand: Operand, kind: str) -> Array:
        """The bits of a register that is loaded; signed types are extended to its width."""
        if not isinstance(operand, Register):
            raise self.error(f"{operand} is no register to load")
        bits = self.register(operand.name)
        if bits.dtype == np.bool_ or bits.dtype.itemsize * 8 < WIDTHS[kind]:
            raise self.error(f"{operand.name} cannot hold .{kind}")
        return bits.view(f"i{bits.dtype.itemsize}") if kind[0] == "s" else bits

    def targets(self, which: int, kind: str) -> list[Target]:
        return [self.target(item, kind) for item in self.items(which)]

    def sources(self, which: int, kind: str) -> list[Source]:
        return [self.source(item, kind) for item in self.items(which)]

    def items(self, which: int) -> tuple[Operand, ...]:
        """The elements of a vector operand; one alone counts as a vector of one."""
        operand = self.operands[which]
        return operand.items if isinstance(operand, Vector) else (operand,)

    def pair(self, which: int) -> tuple[Operand, Operand | None]:
        """An operand written ``d|p`` as two operands; without a bar the second is ``None``."""
        operand = self.operands[which]
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    # ---- memory ----
    def address(self, which: int, space: str) -> Callable[[Lanes], Addresses]:
        """The addresses of an operand like ``[%rd1+4]`` for some lanes; one in a space is inside its window."""
        operand = self.operands[which]
        if not isinstance(operand, Address):
            raise self.error(f"operand {which} is no address")
        offset = np.uint64(operand.offset % (1 << 64))
        base = operand.base
        if isinstance(base, Register):
            bits = self.register(base.name)
            return lambda lanes: bits[lanes].astype(np.uint64) + offset
        start = self.machine.symbol(self, base.name) if isinstance(base, Symbol) else base.value
        if space == "generic" and isinstance(base, Symbol):
            start |= window(self.machine.space_of(self, base.name))
        address = self.machine.constant(start, "u64") + offset
        return lambda lanes: address[lanes]

    def lanes(self, mask: Mask) -> Lanes:
        """Positions of the lanes that take part."""
        return slice(None) if mask is True else np.flatnonzero(mask)
