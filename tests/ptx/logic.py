"""Instructions on bits, comparisons, and choices by a predicate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import elementwise
from .formats import FLOAT_TYPES, Array, bits_type, flush
from .site import Action, Mask, Site
from .syntax import WIDTHS, Negated, Register

ONE = np.uint64(1)


def invert(site: Site) -> Action:
    return elementwise(np.logical_not if site.type == "pred" else np.invert)(site)


# ---- shifts and fields -----------------------------------------------------------------------------------------------
def shl(site: Site) -> Action:
    """Shifts by the width or more give 0."""
    return _shift(site, np.left_shift)


def shr(site: Site) -> Action:
    """Signed types shift the sign in, whatever the count."""
    return _shift(site, np.right_shift)


def _shift(site: Site, function: np.ufunc) -> Action:
    kind = site.type
    value, count, target = site.source(1, kind), site.source(2, "u32"), site.target(0, kind)
    width = np.uint32(WIDTHS[kind])
    fills = kind[0] == "s" and function is np.right_shift

    def action(mask: Mask) -> None:
        by, bits = count(), value()
        short = np.minimum(by, width - 1).astype(bits.dtype)
        found = function(bits, short)
        target(found if fills else np.where(by < width, found, bits.dtype.type(0)), mask)

    return action


def shf(site: Site) -> Action:
    """Funnel shift of the 64 bits ``b:a``: the upper word of a shift to the left, the lower of one to the right."""
    low, high, count = (site.source(i, "u32") for i in (1, 2, 3))
    target, left, wraps = site.target(0, "b32"), site.has("l"), site.has("wrap")

    def action(mask: Mask) -> None:
        by = count() & np.uint32(31) if wraps else np.minimum(count(), np.uint32(32))
        by = by.astype(np.uint64)
        both = high().astype(np.uint64) << np.uint64(32) | low()
        found = both << by >> np.uint64(32) if left else both >> by
        target((found & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)

    return action


def _field_mask(length: Array) -> Array:
    """The lowest ``length`` of 64 bits set; up to 64."""
    length = np.minimum(length.astype(np.uint64), np.uint64(64))
    return np.where(length >= 64, ~np.uint64(0), (ONE << np.minimum(length, np.uint64(63))) - ONE)


def bfe(site: Site) -> Action:
    """``bfe d, a, position, length``; signed types repeat the topmost bit of the field that is inside the register."""
    kind = site.type
    width, signed = WIDTHS[kind], kind[0] == "s"
    value = site.source(1, f"u{width}")
    position, length, target = site.source(2, "u32"), site.source(3, "u32"), site.target(0, f"u{width}")

    def action(mask: Mask) -> None:
        start = (position() & np.uint32(0xFF)).astype(np.uint64)
        count = (length() & np.uint32(0xFF)).astype(np.uint64)
        bits = value().astype(np.uint64)
        field = np.where(start < width, bits >> np.minimum(start, np.uint64(63)), np.uint64(0)) & _field_mask(count)
        if signed:
            end = np.minimum(start + count, np.uint64(width))
            sign = bits >> (np.maximum(end, ONE) - ONE) & ONE
            seen = np.where(start < width, end - np.minimum(start, end), np.uint64(0))
            field = np.where((sign == 1) & (count > 0), field | ~_field_mask(seen), field)
        target(field.astype(bits_type(kind)), mask)

    return action


def bfi(site: Site) -> Action:
    """``bfi d, a, b, position, length``: the field of ``b`` replaced by the lowest bits of ``a``."""
    kind = site.type
    part, whole = site.source(1, kind), site.source(2, kind)
    position, length, target = site.source(3, "u32"), site.source(4, "u32"), site.target(0, kind)

    def action(mask: Mask) -> None:
        start = (position() & np.uint32(0xFF)).astype(np.uint64)
        field = _field_mask(length() & np.uint32(0xFF))
        shift = np.minimum(start, np.uint64(63))
        field = np.where(start < 64, field << shift, np.uint64(0))
        found = (whole().astype(np.uint64) & ~field) | (part().astype(np.uint64) << shift & field)
        target(found.astype(bits_type(kind)), mask)

    return action


def _each_bit(bits: Array) -> Array:
    """Bits of an integer along a new last axis, lowest first."""
    unsigned = bits.view(f"u{bits.dtype.itemsize}")
    return (
        unsigned[:, None] >> np.arange(unsigned.dtype.itemsize * 8, dtype=unsigned.dtype) & unsigned.dtype.type(1)
    ) > 0


def _highest(bits: Array) -> Array:
    """Position of the highest set bit, -1 if there is none."""
    each = _each_bit(bits)
    return np.where(each.any(1), each.shape[1] - 1 - each[:, ::-1].argmax(1), -1)


def _count(function: Callable[[Array], Array]) -> Callable[[Site], Action]:
    def bind(site: Site) -> Action:
        value, target = site.source(1, site.type), site.target(0, "u32")
        return lambda mask: target(function(value()).astype(np.uint32), mask)

    return bind


popc = _count(lambda bits: _each_bit(bits).sum(1))
clz = _count(lambda bits: _each_bit(bits).shape[1] - 1 - _highest(bits))


def bfind(site: Site) -> Action:
    """Highest bit, of negative numbers the highest 0; ``.shiftamt``: how far to shift it to the top."""
    kind = site.type
    value, target, shifts = site.source(1, kind), site.target(0, "u32"), site.has("shiftamt")

    def action(mask: Mask) -> None:
        bits = value()
        at = _highest(np.where(bits < 0, ~bits, bits) if kind[0] == "s" else bits)
        target(np.where(at < 0, -1, WIDTHS[kind] - 1 - at if shifts else at).astype(np.int64).astype(np.uint32), mask)

    return action


def _reversed(bits: Array) -> Array:
    places = bits.dtype.type(1) << np.arange(bits.dtype.itemsize * 8, dtype=bits.dtype)
    return (_each_bit(bits)[:, ::-1] * places).sum(1, dtype=bits.dtype)


brev = elementwise(_reversed)


def prmt(site: Site) -> Action:
    """``prmt d, a, b, selector``: four of the eight bytes of ``b:a``; bit 3 of a selector repeats the sign instead."""
    low, high, selector = (site.source(i, "u32") for i in (1, 2, 3))
    target = site.target(0, "b32")

    def action(mask: Mask) -> None:
        both = np.stack([low(), high()], 1).view(np.uint8)  # [lanes, 8]
        nibble = selector()[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        chosen = np.take_along_axis(both, (nibble & np.uint32(7)).astype(np.intp), 1)
        signs = np.where(chosen & np.uint8(0x80), np.uint8(0xFF), np.uint8(0))
        found = np.where(nibble & np.uint32(8), signs, chosen).astype(np.uint8)
        target(found.view(np.uint32)[:, 0], mask)

    return action


def lop3(site: Site) -> Action:
    """Any function of three bits, given as its eight values."""
    a, b, c = (site.source(i, "b32") for i in (1, 2, 3))
    table, target = site.integer(4), site.target(0, "b32")

    def action(mask: Mask) -> None:
        values = a(), b(), c()
        found = np.zeros_like(values[0])
        for case in range(8):
            if table >> case & 1:
                x, y, z = (v if case >> place & 1 else ~v for v, place in zip(values, (2, 1, 0), strict=True))
                found |= x & y & z
        target(found, mask)

    return action


# ---- comparisons and choices -----------------------------------------------------------------------------------------
COMPARISONS: dict[str, np.ufunc] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMBINE: dict[str, np.ufunc] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(site: Site) -> Callable[[Array, Array], Array]:
    """Ordered comparisons are false where an operand is NaN, unordered ones true."""
    name = next((m for m in site.modifiers if m in COMPARISONS or m in UNORDERED or m in ("num", "nan")), None)
    if name is None:
        raise site.error("setp without a comparison")
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    function = COMPARISONS[UNORDERED.get(name, name)]
    if site.type not in FLOAT_TYPES:
        return function
    if name in UNORDERED:
        return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: function(a, b) & ~np.isnan(a) & ~np.isnan(b)
    return function


def setp(site: Site) -> Action:
    """``setp d|q, a, b, c``: the comparison, combined with ``c``; ``q`` gets its negation, combined too."""
    compare, kind = _comparison(site), site.type
    first, second = site.pair(0)
    a, b = site.source(1, kind), site.source(2, kind)
    target = site.target(first, "pred")
    other = None if second is None else site.target(second, "pred")
    name = next((m for m in site.modifiers if m in COMBINE), None)
    if (name is None) != (len(site.operands) == 3):
        raise site.error("a third operand comes with .and, .or or .xor")
    combine = None if name is None else COMBINE[name]
    extra = None if name is None else site.source(3, "pred")
    flushes = site.has("ftz")
    site.refuse(flushes and kind != "f32", f".ftz of .{kind}")

    def action(mask: Mask) -> None:
        left, right = a(), b()
        if flushes:
            left, right = flush(left), flush(right)
        found = compare(left, right)
        both = found, ~found
        if combine is not None and extra is not None:
            condition = extra()
            both = combine(both[0], condition), combine(both[1], condition)
        target(both[0], mask)
        if other is not None:
            other(both[1], mask)

    return action


def selp(site: Site) -> Action:
    kind = f"b{WIDTHS[site.type]}"
    a, b, target = site.source(1, kind), site.source(2, kind), site.target(0, kind)
    operand = site.operands[3]
    site.refuse(not isinstance(operand, Register | Negated), "a condition that is no predicate")
    condition = site.source(3, "pred")
    return lambda mask: target(np.where(condition(), a(), b()), mask)


def slct(site: Site) -> Action:
    """``slct d, a, b, c``: ``a`` where ``c >= 0``, else ``b``."""
    kind = f"b{WIDTHS[site.types[0]]}"
    a, b, target = site.source(1, kind), site.source(2, kind), site.target(0, kind)
    sign = site.source(3, site.type)
    return lambda mask: target(np.where(sign() >= 0, a(), b()), mask)


def testp(site: Site) -> Action:
    """What kind of number it is."""
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
    }
    name = next((m for m in site.modifiers if m in tests), None)
    if name is None:
        raise site.error("testp without a question")
    value, target = site.source(1, site.type), site.target(0, "pred")
    return lambda mask: target(tests[name](value()), mask)
