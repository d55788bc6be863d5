"""What the operations of a warp compute, stated on whole matrices; the layouts are those of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
LANES = np.arange(32)
GROUP, QUAD = LANES // 4, LANES % 4  # "groupID" and "threadID_in_group" of the PTX ISA


# ---- 16-bit and tf32 numbers -----------------------------------------------------------------------------------------
def bf16(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def f16(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float64)


def nearest(x: NDArray[np.float64], fraction_bits: int, least_exponent: int, away: bool) -> NDArray[np.float64]:
    """``x`` rounded to a binary format without bounds above: ties to even, or away from zero."""
    exponent = np.maximum(np.frexp(x)[1] - 1, least_exponent)
    unit = np.exp2(exponent.astype(np.float64) - fraction_bits)
    return np.copysign(np.floor(np.abs(x) / unit + 0.5) if away else np.rint(np.abs(x) / unit), x) * unit


# ---- matrices to fragments -------------------------------------------------------------------------------------------
def halves(words: Words) -> NDArray[np.uint16]:
    """[…, n] registers to [..., n, 2] 16-bit values, lower index first."""
    return np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)


def element_16x8(i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of element i of the accumulator (PTX ISA, "accumulator fragments of m16n8k16")."""
    return (GROUP if i < 2 else GROUP + 8), QUAD * 2 + (i & 1)


def a_16x16(i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of element i = 0 … 7 of A for 16-bit types."""
    row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
    return row, QUAD * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_16x8(i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of element i = 0 … 3 of B for 16-bit types."""
    return QUAD * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP


def a_16x8(i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of element i = 0 … 3 of A for tf32."""
    return (GROUP if i in (0, 2) else GROUP + 8), (QUAD if i < 2 else QUAD + 4)


def b_8x8(i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of element i = 0, 1 of B for tf32."""
    return (QUAD if i == 0 else QUAD + 4), GROUP


def fragments(matrix: NDArray, place: Callable, elements: int) -> NDArray:
    """[32, elements]: what every lane holds of ``matrix``."""
    return np.stack([matrix[place(i)] for i in range(elements)], axis=1)


# ---- operations ------------------------------------------------------------------------------------------------------
def ldmatrix(rows: NDArray[np.uint16], transposed: bool) -> Words:
    """[matrices, 8, 8] to [32, matrices]: matrices spread over the lanes two elements each, row by row."""
    spread = np.swapaxes(rows, 1, 2) if transposed else rows
    return np.ascontiguousarray(spread).view(np.uint32).reshape(len(rows), 32).T


def cp_async(tile: NDArray[np.uint8], source: NDArray[np.uint8], orders: Words) -> NDArray[np.uint8]:
    """``tile`` after copies of 16 bytes (target, source, valid bytes)."""
    for target, start, valid in orders.astype(int):
        tile[target : target + 16] = 0
        tile[target : target + valid] = source[start : start + valid]
    return tile


def shuffled(x: Words, source: NDArray[np.int64], width: int) -> Words:
    """``x`` of lane ``source``; a lane keeps its own where the source is not one that its segment may read."""
    last = LANES | (width - 1)
    return x[np.where((source >= 0) & (source <= last), source, LANES)]
