"""Arithmetic: one result per thread from values of the same thread.

float32 is rounded once from float64 where numpy's float32 operation would not do, ``fma`` included: it differs from the
hardware only where rounding twice does, about once in 2^29. The approximate instructions give the exact value, rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import FLOAT_TYPES, Array, flush, saturate, value_type
from .site import Action, Mask, Site
from .syntax import WIDTHS

Function = Callable[..., Array]
HIGH_WORD = np.uint64(0xFFFFFFFF00000000)


def elementwise(function: Function) -> Callable[[Site], Action]:
    """An instruction that is a function of its operands, all of one type."""

    def bind(site: Site) -> Action:
        kind = site.type
        rounding = site.one_of("rz", "rm", "rp", default="rn")
        plain = rounding == "rn" and not site.has("ftz", "sat")
        operands = range(1, len(site.operands))
        arrays = [site.array(i, kind) for i in operands]
        out = site.direct(0, kind)
        if plain and isinstance(function, np.ufunc) and out is not None and all(a is not None for a in arrays):
            ufunc, packed = function, out.ndim == 2
            return lambda mask: ufunc(*arrays, out=out, where=_spread(mask, packed))
        return _general(site, function, kind, rounding)

    return bind


def _spread(mask: Mask, packed: bool) -> Mask:
    return mask[:, None] if packed and mask is not True else mask


def _general(site: Site, function: Function, kind: str, rounding: str) -> Action:
    floating, flushes, saturates = kind in FLOAT_TYPES, site.has("ftz"), site.has("sat")
    site.refuse(flushes and kind not in ("f32", "f64"), f".ftz of .{kind}")
    site.refuse(rounding != "rn" and kind != "f32", f".{rounding} of .{kind}")
    site.refuse(saturates and not floating, f".sat of .{kind}")
    flushes = flushes and kind == "f32"
    sources = [site.source(i, kind) for i in range(1, len(site.operands))]
    target = site.target(0, kind, rounding)
    wide = rounding != "rn"

    def action(mask: Mask) -> None:
        values = [source() for source in sources]
        if flushes:
            values = [flush(value) for value in values]
        found = function(*(value.astype(np.float64) if wide else value for value in values))
        if flushes:
            found = flush(found)
        target(saturate(found) if saturates else found, mask)

    return action


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a b + c``: exact to float64 for the narrower formats, in double-double for float64."""
    if a.dtype != np.float64:
        return np.multiply(a, b, dtype=np.float64) + c
    product = a * b
    total = product + c
    error = _product_error(a, b, product) + _sum_error(product, c, total)
    return np.where(np.isfinite(error), total + error, total)


def _product_error(a: Array, b: Array, product: Array) -> Array:
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def _sum_error(a: Array, b: Array, total: Array) -> Array:
    seen = total - a
    return (a - (total - seen)) + (b - seen)


def _integer_divide(a: Array, b: Array) -> Array:
    """Towards zero; a division by zero gives all ones, as the hardware does."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~b.dtype.type(0), (a - np.fmod(a, safe)) // safe)


def div(site: Site) -> Action:
    return elementwise(np.divide if site.type in FLOAT_TYPES else _integer_divide)(site)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


rem = elementwise(_remainder)


def _ordered(quiet: np.ufunc, loud: np.ufunc) -> Callable[[Site], Action]:
    """``min`` and ``max``: of a number and NaN the number, with ``.NaN`` NaN."""

    def bind(site: Site) -> Action:
        floating = site.type in FLOAT_TYPES
        return elementwise(quiet if floating and not site.has("NaN") else loud)(site)

    return bind


minimum = _ordered(np.fmin, np.minimum)
maximum = _ordered(np.fmax, np.maximum)


def _double(function: Function) -> Function:
    """Of narrower values by way of float64; the ``.ftz.f64`` forms deliver the upper half of the bits only."""

    def rounded(a: Array) -> Array:
        found = function(a.astype(np.float64))
        if a.dtype == np.float64:
            return (found.view(np.uint64) & HIGH_WORD).view(np.float64)
        return found.astype(a.dtype)

    return rounded


def rcp(site: Site) -> Action:
    """``.rn`` is exact in float64 too, ``.approx`` gives the upper half of the bits."""
    return elementwise(np.reciprocal if site.has("rn") else _double(np.reciprocal))(site)


sqrt = elementwise(np.sqrt)


def rsqrt(site: Site) -> Action:
    """``.approx.f64`` is nearly exact, ``.approx.ftz.f64`` gives the upper half of the bits."""

    def exact(a: Array) -> Array:
        return 1 / np.sqrt(a)

    return elementwise(exact if site.type == "f64" and not site.has("ftz") else _double(exact))(site)


ex2 = elementwise(_double(np.exp2))
lg2 = elementwise(_double(np.log2))
sin = elementwise(_double(np.sin))
cos = elementwise(_double(np.cos))
tanh = elementwise(_double(np.tanh))


def copysign(site: Site) -> Action:
    """``copysign d, a, b``: the sign of ``a`` on the magnitude of ``b``."""
    return elementwise(lambda a, b: np.copysign(b, a))(site)


# ---- products of integers --------------------------------------------------------------------------------------------
def doubled(kind: str) -> str:
    return f"{kind[0]}{2 * WIDTHS[kind]}"


def _high(a: Array, b: Array) -> Array:
    """Upper half of the product of two integers."""
    width = a.dtype.itemsize * 8
    if width < 64:
        wide = a.astype(f"{a.dtype.kind}{width // 4}") * b
        return (wide >> wide.dtype.type(width)).astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    cross = a1 * b0 + (a0 * b0 >> half)
    middle = a0 * b1 + (cross & low)
    found = a1 * b1 + (cross >> half) + (middle >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        found = found - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)
    return found.view(a.dtype)


def mul(site: Site) -> Action:
    if site.type in FLOAT_TYPES:
        return elementwise(np.multiply)(site)
    return _integer_product(site, None)


def mad(site: Site) -> Action:
    if site.type in FLOAT_TYPES:
        return elementwise(fma)(site)
    return _integer_product(site, 3)


def _integer_product(site: Site, addend: int | None) -> Action:
    kind = site.type
    mode = site.one_of("lo", "hi", "wide", default="")
    site.refuse(not mode, "a product of integers without .lo, .hi or .wide")
    result = doubled(kind) if mode == "wide" else kind
    a, b = site.source(1, kind), site.source(2, kind)
    c = None if addend is None else site.source(addend, result)
    target = site.target(0, result)
    to = value_type(result)

    def action(mask: Mask) -> None:
        product = _high(a(), b()) if mode == "hi" else a().astype(to, copy=False) * b().astype(to, copy=False)
        target(product if c is None else product + c(), mask)

    return action
