"""Matrix descriptors of ``wgmma``: 64 bits that say where the elements of a matrix are in shared memory.

The layouts are the *canonical layouts* of the PTX ISA. Memory is made of rows of 16 bytes. A pattern is 8 rows deep and
as wide as the swizzling mode; two strides lead from one pattern to the next.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNIT = 16  # bytes of a row, and of a step of all fields
WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a pattern by the mode in bits 62 and 63


class Fields(NamedTuple):
    """A descriptor taken apart; ``start``, ``leading``, ``stride`` in bytes."""

    start: int
    leading: int
    stride: int
    base: int
    width: int


def fields(descriptor: int) -> Fields:
    start, leading, stride = ((descriptor >> at & 0x3FFF) * UNIT for at in (0, 16, 32))
    return Fields(start, leading, stride, descriptor >> 49 & 7, WIDTHS[descriptor >> 62])


@functools.lru_cache(maxsize=256)
def addresses(descriptor: int, lines: int, depth: int, size: int, transposed: bool) -> NDArray[np.uint64]:
    """``[lines, depth]``: the address of each element of ``size`` bytes.

    A line is a row of A or a column of B. Neighbours in memory are neighbours of a line, with ``transposed`` those of
    different lines.
    """
    start, leading, stride, _, width = fields(descriptor)
    line, k = np.arange(lines)[:, None], np.arange(depth)[None]
    per_row = UNIT // size
    if not transposed:
        step = leading if width == UNIT else UNIT  # with a pattern the offset of the next row is not read
        offset = line % 8 * width + line // 8 * stride + k % per_row * size + k // per_row * step
    elif width == UNIT:
        offset = line % per_row * size + line // per_row * stride + k % 8 * UNIT + k // 8 * leading
    else:
        rows = width // UNIT
        offset = line % per_row * size + line // per_row % rows * UNIT + line // (per_row * rows) * leading
        offset = offset + k % 8 * width + k // 8 * stride
    return _swizzled((start + offset).astype(np.uint64), width)


def _swizzled(address: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
    """The place of a row in its pattern, bits 4 to 6, is changed by the bits 7 to 9: as many as the width asks for."""
    changed = np.uint64(width // UNIT - 1)
    return address ^ (address >> np.uint64(7) & changed) << np.uint64(4)
