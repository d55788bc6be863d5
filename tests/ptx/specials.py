"""Special registers: where a thread is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .formats import Array, value_type
from .schedule import WARP

if TYPE_CHECKING:
    from .machine import Machine

AXES = {"x": 0, "y": 1, "z": 2}


def _coordinate(number: Array, extent: tuple[int, ...], axis: int) -> Array:
    before = int(np.prod(extent[:axis]))
    return number // before % extent[axis]


def _lane(machine: Machine) -> Array:
    return machine.thread_of % WARP


def _clock(machine: Machine) -> Array:
    return np.full(machine.size, machine.executed)


def _position(name: str) -> Callable[[Machine], Array]:
    kind, axis = name[1:].split(".")
    i = AXES[axis]
    return {
        "tid": lambda m: _coordinate(m.thread_of, m.shape.block, i),
        "ntid": lambda m: np.full(m.size, m.shape.block[i]),
        "ctaid": lambda m: _coordinate(m.block_number, m.grid, i)[m.block_of],
        "nctaid": lambda m: np.full(m.size, m.grid[i]),
    }[kind]


SPECIALS: dict[str, Callable[[Machine], Array]] = {
    f"%{kind}.{axis}": _position(f"%{kind}.{axis}") for kind in ("tid", "ntid", "ctaid", "nctaid") for axis in AXES
} | {
    "%laneid": _lane,
    "%warpid": lambda m: m.thread_of // WARP,
    "%lanemask_eq": lambda m: 1 << _lane(m),
    "%lanemask_lt": lambda m: (1 << _lane(m)) - 1,
    "%lanemask_le": lambda m: (2 << _lane(m)) - 1,
    "%lanemask_gt": lambda m: (1 << WARP) - (2 << _lane(m)),
    "%lanemask_ge": lambda m: (1 << WARP) - (1 << _lane(m)),
    "%clock": _clock,
    "%clock64": _clock,
    "%globaltimer": _clock,
    "%smid": lambda m: m.block_of,
    "%nsmid": lambda m: np.full(m.size, m.blocks),
    "%dynamic_smem_size": lambda m: np.full(m.size, m.shape.shared_bytes),
    # the workspace of cooperative groups: two halves of an address
    "%envreg1": lambda m: np.full(m.size, m.workspace >> 32),
    "%envreg2": lambda m: np.full(m.size, m.workspace % (1 << 32)),
}


def read(machine: Machine, name: str, kind: str) -> Callable[[], Array] | None:
    """Reads a special register as values of a type; ``None`` if the name is not one."""
    find = SPECIALS.get(name)
    if find is None:
        return None
    to = value_type(kind)
    return lambda: find(machine).astype(to)
