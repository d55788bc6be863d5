"""Number formats: bits to values and back, and every rounding that occurs.

A register holds unsigned bits. ``decode`` gives the values that an instruction of a type sees, ``encode`` the bits of a
result. bf16 values are float32 arrays, packed types have a last axis of 2 (low half first).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .syntax import WIDTHS

Array = NDArray[np.generic]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "f16x2": np.float16}
BFLOATS = ("bf16", "bf16x2")
FLOAT_TYPES = (*FLOATS, *BFLOATS)


def bits_type(kind: str) -> type[np.generic]:
    """The unsigned type that holds the bits."""
    return UNSIGNED[WIDTHS[kind]]


def value_type(kind: str) -> type[np.generic]:
    """The numpy type of decoded values."""
    if kind in FLOATS:
        return FLOATS[kind]
    if kind in BFLOATS:
        return np.float32
    return SIGNED[WIDTHS[kind]] if kind[0] == "s" else bits_type(kind)


def decode(bits: Array, kind: str) -> Array:
    """Values of bits; a view where numpy has the format."""
    if kind == "pred":
        return bits
    if kind in BFLOATS:
        wide = np.atleast_1d(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)
        values = wide.view(np.float32)
    else:
        values = bits.view(value_type(kind))
    return values.reshape(*bits.shape, 2) if kind.endswith("x2") else values


def encode(values: Array, kind: str, rounding: str = "rn") -> Array:
    """Bits of values, rounded to the format where it is narrower."""
    if kind == "pred":
        return values.astype(np.bool_)
    if kind in BFLOATS:
        found = bfloat16_bits(values, rounding)
    elif kind in FLOATS:
        found = round_float(values, FLOATS[kind], rounding).view(UNSIGNED[np.dtype(FLOATS[kind]).itemsize * 8])
    else:
        found = values.astype(value_type(kind), copy=False).view(bits_type(kind))
    return np.ascontiguousarray(found).view(np.uint32)[..., 0] if kind.endswith("x2") else found


def round_float(values: Array, to: type[np.floating], rounding: str = "rn") -> Array:
    """Floats in a narrower or equal format; ``rn`` nearest even, ``rz``, ``rm``, ``rp`` towards zero, down, up."""
    near = values.astype(to, copy=False)
    if rounding == "rn" or values.dtype == near.dtype:
        return near
    wide = near.astype(np.float64)
    exact = values.astype(np.float64)
    down, up = to(-np.inf), to(np.inf)
    if rounding == "rm":
        return np.where(wide > exact, np.nextafter(near, down), near)
    if rounding == "rp":
        return np.where(wide < exact, np.nextafter(near, up), near)
    return np.where(np.abs(wide) > np.abs(exact), np.nextafter(near, to(0)), near)


def bfloat16_bits(values: Array, rounding: str = "rn") -> Array:
    """The upper half of float32, as ``uint16``; from float64 without rounding twice."""
    if values.dtype == np.float64:
        values = _round_to_odd(values)
    values = values.astype(np.float32, copy=False)
    bits = np.atleast_1d(values).view(np.uint32)
    if rounding == "rn":
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    found = (bits >> np.uint32(16)).astype(np.uint16).reshape(values.shape)
    return np.where(np.isnan(values), np.uint16(0x7FFF), found)


def _round_to_odd(values: Array) -> Array:
    """float64 to float32 with the last bit set if anything was lost, so that the next rounding is right."""
    cut = round_float(values, np.float32, "rz")
    bits = np.atleast_1d(cut).view(np.uint32) | np.atleast_1d(cut.astype(np.float64) != values).astype(np.uint32)
    return np.where(np.isfinite(values), bits.view(np.float32).reshape(values.shape), cut)


def tf32_round(values: Array) -> Array:
    """``cvt.rna.tf32``: float32 to 10 mantissa bits, ties away from zero."""
    bits = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(values), values, bits.view(np.float32))


def tf32_operand(values: Array) -> Array:
    """What ``mma`` sees of a float32 register: the lower 13 bits are not read."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def flush(values: Array) -> Array:
    """``.ftz``: subnormal float32 numbers become zeros of the same sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def saturate(values: Array) -> Array:
    """``.sat`` of floats: into [0, 1], NaN becomes 0."""
    return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))


def to_integer(values: Array, kind: str, source: str) -> Array:
    """Integral floats to an integer type: out of range gives the nearest end, NaN what the PTX ISA says."""
    limits = np.iinfo(value_type(kind))
    wide = values.astype(np.float64)
    low, high = float(limits.min), float(limits.max)
    inside = np.where((wide > low) & (wide < high), wide, 0).astype(value_type(kind))
    found = np.where(wide >= high, limits.max, np.where(wide <= low, limits.min, inside)).astype(value_type(kind))
    pattern = 0 if source != "f64" and WIDTHS[kind] < 64 else 1 << (WIDTHS[kind] - 1)
    not_a_number = np.array(pattern, bits_type(kind)).view(value_type(kind))
    return np.where(np.isnan(wide), not_a_number, found)
