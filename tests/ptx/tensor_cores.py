"""How tensor cores add up: products are exact, sums are cut off.

The model is that of ``tests/cuda_emulation/tensor_cores.h`` (M. Fasi, N. Higham, M. Mikaitis, S. Pranesh, "Numerical
behavior of NVIDIA tensor cores", PeerJ Comput. Sci. 7:e330, 2021). A group of products and the sum so far are aligned
to the largest of them, cut off below its 24 bits and one more, and added; the result is cut off to 24 bits. A group is
8 products of half types or 4 of TF32, as on the A100; later devices have longer ones and keep more bits.
"""

from __future__ import annotations

import numpy as np

from .formats import Array

GROUP = {"f16": 8, "bf16": 8, "tf32": 4}
EXPONENT = np.uint64(0x7FF0000000000000)
KEPT = 2.0**-24  # the last bit that is kept, in units of the power of two of the largest


def multiply_add(a: Array, b: Array, c: Array, kind: str, to: str) -> Array:
    """``a b + c`` of float64 matrices ``[..., row, k]``, ``[..., k, column]``, to be stored as ``to``.

    Sums in float64 and in float16 are exact to double precision; storing them rounds once.
    """
    if to != "f32":
        return a @ b + c
    for first in range(0, a.shape[-1], GROUP[kind]):
        group = slice(first, first + GROUP[kind])
        c = truncated_sum(c, a[..., group, None] * b[..., None, group, :])
    return c


def truncated_sum(start: Array, products: Array) -> Array:
    """``start [..., row, column]`` plus the products ``[..., row, k, column]`` of one group."""
    largest = np.maximum(np.abs(products).max(-2), np.abs(start))
    power = (np.ascontiguousarray(largest).view(np.uint64) & EXPONENT).view(np.float64)  # not larger than it
    unit = np.where(power > 0, power, 1) * KEPT
    units = np.trunc(products / unit[..., None, :]).sum(-2) + np.trunc(start / unit)
    exact = start + products.sum(-2)
    return np.where(np.isfinite(exact), cut(units * unit), cut(exact))


def cut(values: Array) -> Array:
    """float64 numbers without what float32 cannot hold; beyond its largest they become infinite."""
    near = values.astype(np.float32)
    beyond = np.isfinite(near) & (np.abs(near.astype(np.float64)) > np.abs(values))
    return np.where(beyond, np.nextafter(near, np.float32(0)), near).astype(np.float64)
