"""One entry of the table of instructions: how it is written, and the function that gives its meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from .errors import PtxError
from .site import Action, Site, Source
from .syntax import WIDTHS, Instruction

Bind: TypeAlias = Callable[[Site], Action]


@dataclass(frozen=True)
class Rule:
    """``count``: the numbers of operands it may have. ``plain``: all threads that execute it go on with the next one.

    ``members``: of an instruction that threads of a warp do together, the mask of those that have to come.
    """

    bind: Bind
    count: range
    types: frozenset[str]
    modifiers: frozenset[str]
    plain: bool = True
    members: Callable[[Site], Source | None] | None = None

    def check(self, instruction: Instruction) -> None:
        """Refuse a spelling that is not in the table."""
        for word in instruction.modifiers:
            if word in WIDTHS and word not in self.types and word not in self.modifiers:
                raise PtxError(f"type .{word} of {instruction.opcode} is not modelled", instruction.place)
            if word not in self.types and word not in self.modifiers:
                raise PtxError(f"unknown modifier .{word} of {instruction.opcode}", instruction.place)
        if self.types and not any(word in self.types for word in instruction.modifiers):
            raise PtxError(f"{instruction.opcode} needs a type", instruction.place)
        if len(instruction.operands) not in self.count:
            raise PtxError(f"{instruction.opcode} with {len(instruction.operands)} operands", instruction.place)


def rule(
    bind: Bind,
    count: int | tuple[int, int],
    types: str = "",
    modifiers: str = "",
    plain: bool = True,
    members: Callable[[Site], Source | None] | None = None,
) -> Rule:
    """An entry; words separated by spaces."""
    low, high = (count, count) if isinstance(count, int) else count
    words = frozenset(types.split()), frozenset(modifiers.split())
    return Rule(bind, range(low, high + 1), *words, plain and members is None, members)
