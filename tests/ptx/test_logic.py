"""Bits, comparisons and choices against Python's integers."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from .errors import PtxError
from .snippet import execute, values

pytestmark = pytest.mark.exhaustive

UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
WORDS = (0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF, 0x00010000, 0x7FFFFFFF)


def words(width: int) -> list[int]:
    return [(w * 0x100000001) % (1 << width) for w in WORDS] if width == 64 else [w % (1 << width) for w in WORDS]


def as_signed(value: int, width: int) -> int:
    value %= 1 << width
    return value - (1 << width) if value >> width - 1 else value


BITWISE = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}


@pytest.mark.parametrize("width", UNSIGNED)
@pytest.mark.parametrize("name", BITWISE)
def test_bitwise(name: str, width: int) -> None:
    a, b = zip(*product(words(width), words(width)), strict=True)
    found = execute(
        f"{name}.b{width} %d, %a, %b;", UNSIGNED[width], a=values(f"u{width}", *a), b=values(f"u{width}", *b)
    )
    assert found.tolist() == [BITWISE[name](x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("width", UNSIGNED)
def test_not(width: int) -> None:
    found = execute(f"not.b{width} %d, %a;", UNSIGNED[width], a=values(f"u{width}", *words(width)))
    assert found.tolist() == [(1 << width) - 1 - x for x in words(width)]


def test_predicates() -> None:
    """All sixteen cases of two predicates; ``selp`` makes them visible."""
    a, b = np.uint32([0, 0, 1, 1]), np.uint32([0, 1, 0, 1])
    head = "setp.ne.u32 %p1, %a, 0; setp.ne.u32 %p2, %b, 0; "
    tail = " selp.u32 %d, 1, 0, %p3;"
    for line, expected in (
        ("and.pred %p3, %p1, %p2;", [0, 0, 0, 1]),
        ("or.pred %p3, %p1, %p2;", [0, 1, 1, 1]),
        ("xor.pred %p3, %p1, %p2;", [0, 1, 1, 0]),
        ("not.pred %p3, %p1;", [1, 1, 0, 0]),
        ("mov.pred %p3, %p2;", [0, 1, 0, 1]),
        ("and.pred %p3, %p1, !%p2;", [0, 0, 1, 0]),
    ):
        assert execute(head + line + tail, a=a, b=b).tolist() == expected, line


@pytest.mark.parametrize("width", UNSIGNED)
def test_shifts(width: int) -> None:
    """Counts of the width or more shift everything out."""
    counts = (0, 1, width // 2, width - 1, width, width + 1, 200, 2**32 - 1)
    a, b = zip(*product(words(width), counts), strict=True)
    inputs = {"a": values(f"u{width}", *a), "b": values("u32", *b)}
    dtype = UNSIGNED[width]
    left = [(x << y) % (1 << width) if y < width else 0 for x, y in zip(a, b, strict=True)]
    right = [x >> y if y < width else 0 for x, y in zip(a, b, strict=True)]
    arithmetic = [(as_signed(x, width) >> min(y, width)) % (1 << width) for x, y in zip(a, b, strict=True)]
    assert execute(f"shl.b{width} %d, %a, %b;", dtype, **inputs).tolist() == left
    assert execute(f"shr.u{width} %d, %a, %b;", dtype, **inputs).tolist() == right
    assert execute(f"shr.b{width} %d, %a, %b;", dtype, **inputs).tolist() == right
    assert execute(f"shr.s{width} %d, %a, %b;", dtype, **inputs).tolist() == arithmetic


def test_funnel_shifts() -> None:
    a, b, c = (values("u32", *x) for x in zip(*product(words(32), (0xABCD1234, 3), (0, 1, 31, 32, 40)), strict=True))
    for line in ("shf.l.wrap", "shf.l.clamp", "shf.r.wrap", "shf.r.clamp"):
        expected = []
        for low, high, count in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
            by = count % 32 if "wrap" in line else min(count, 32)
            both = high << 32 | low
            expected.append(((both << by) >> 32 if ".l." in line else both >> by) % (1 << 32))
        assert execute(f"{line}.b32 %d, %a, %b, %c;", a=a, b=b, c=c).tolist() == expected, line


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfe(kind: str) -> None:
    """Bit by bit as the ISA writes it down: bits above the register repeat its topmost one for signed types."""
    width = int(kind[1:])
    cases = list(product(words(width), (0, 3, 24, width - 1, width, 255), (0, 1, 8, 32, width, 255)))
    expected = []
    for a, position, length in cases:
        msb = width - 1
        sign = 0 if kind[0] == "u" or length == 0 else a >> min(position + length - 1, msb) & 1
        bits = [a >> position + i & 1 if i < length and position + i <= msb else sign for i in range(width)]
        expected.append(sum(bit << i for i, bit in enumerate(bits)))
    a, b, c = zip(*cases, strict=True)
    found = execute(
        f"bfe.{kind} %d, %a, %b, %c;",
        UNSIGNED[width],
        a=values(f"u{width}", *a),
        b=values("u32", *b),
        c=values("u32", *c),
    )
    assert found.tolist() == expected


@pytest.mark.parametrize("width", [32, 64])
def test_bfi(width: int) -> None:
    cases = list(product(words(width)[:6], words(width)[3:], (0, 3, 24, width - 1, 255), (0, 1, 8, width, 255)))
    expected = []
    for a, b, position, length in cases:
        bits = [a >> i - position & 1 if position <= i < position + length else b >> i & 1 for i in range(width)]
        expected.append(sum(bit << i for i, bit in enumerate(bits)))
    a, b, c, e = zip(*cases, strict=True)
    kind = f"u{width}"
    found = execute(
        f"bfi.b{width} %d, %a, %b, %c, %e;",
        UNSIGNED[width],
        a=values(kind, *a),
        b=values(kind, *b),
        c=values("u32", *c),
        e=values("u32", *e),
    )
    assert found.tolist() == expected


@pytest.mark.parametrize("width", [32, 64])
def test_counting_bits(width: int) -> None:
    numbers = words(width)
    a = values(f"u{width}", *numbers)
    assert execute(f"popc.b{width} %d, %a;", a=a).tolist() == [bin(x).count("1") for x in numbers]
    assert execute(f"clz.b{width} %d, %a;", a=a).tolist() == [width - x.bit_length() for x in numbers]
    found = execute(f"brev.b{width} %d, %a;", UNSIGNED[width], a=a).tolist()
    assert found == [int(f"{x:0{width}b}"[::-1], 2) for x in numbers]
    highest = [x.bit_length() - 1 for x in numbers]
    none = (1 << 32) - 1
    assert execute(f"bfind.u{width} %d, %a;", a=a).tolist() == [none if x < 0 else x for x in highest]
    shift = [none if x < 0 else width - 1 - x for x in highest]
    assert execute(f"bfind.shiftamt.u{width} %d, %a;", a=a).tolist() == shift
    signed = [as_signed(x, width) for x in numbers]
    highest = [(x if x >= 0 else ~x).bit_length() - 1 for x in signed]
    assert execute(f"bfind.s{width} %d, %a;", a=a).tolist() == [none if x < 0 else x for x in highest]


def test_prmt() -> None:
    a, b = 0x83020180, 0x87060584
    selectors = (0x3210, 0x7654, 0x0246, 0x8F80, 0xB89F, 0x5555)
    expected = []
    for selector in selectors:
        both = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        found = [(0xFF if both[c & 7] & 0x80 else 0) if c & 8 else both[c] for c in chosen]
        expected.append(sum(byte << 8 * i for i, byte in enumerate(found)))
    count = len(selectors)
    inputs = {"a": values("u32", *[a] * count), "b": values("u32", *[b] * count), "c": values("u32", *selectors)}
    assert execute("prmt.b32 %d, %a, %b, %c;", **inputs).tolist() == expected


def test_lop3() -> None:
    """The table is the function applied to 0xF0, 0xCC, 0xAA."""
    a, b, c = (values("u32", *np.random.default_rng(i).integers(0, 1 << 32, 9)) for i in range(3))
    for function in (lambda x, y, z: x & y | z, lambda x, y, z: x ^ y ^ z, lambda x, y, z: (x & ~y) | (~x & z)):
        table = function(0xF0, 0xCC, 0xAA) & 0xFF
        found = execute(f"lop3.b32 %d, %a, %b, %c, {table:#x};", a=a, b=b, c=c)
        np.testing.assert_array_equal(found, function(a, b, c))


# ---- comparisons and choices -----------------------------------------------------------------------------------------
ORDER = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64", "b32", "f16", "f32", "f64"])
def test_setp(kind: str) -> None:
    if kind[0] == "f":
        numbers = [-math.inf, -1.5, -0.0, 0.0, 2.0, math.inf]
    else:
        numbers = [-(2**15), -1, 0, 1, 2**15 - 1] if kind[0] == "s" else [0, 1, 2**15, 2**16 - 1]
    a, b = zip(*product(numbers, numbers), strict=True)
    stored = kind.replace("b", "u")
    inputs = {"a": values(stored, *a), "b": values(stored, *b)}
    names = ("eq", "ne") if kind[0] == "b" else ORDER
    for name in names:
        expected = [int(ORDER[name](x, y)) for x, y in zip(a, b, strict=True)]
        body = f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %d, 1, 0, %p1;"
        assert execute(body, **inputs).tolist() == expected, name
    if kind[0] == "u":
        for name, same in UNSIGNED_NAMES.items():
            expected = [int(ORDER[same](x, y)) for x, y in zip(a, b, strict=True)]
            assert execute(f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %d, 1, 0, %p1;", **inputs).tolist() == expected


def test_setp_with_nan() -> None:
    """Ordered comparisons with NaN are false, ``ne`` included; the unordered forms are true."""
    a, b = np.float32([np.nan, 1, np.nan]), np.float32([1, np.nan, np.nan])
    for name in ORDER:
        assert execute(f"setp.{name}.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;", a=a, b=b).tolist() == [0, 0, 0], name
        assert execute(f"setp.{name}u.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;", a=a, b=b).tolist() == [1, 1, 1], name
    a, b = np.float32([np.nan, 1, 2]), np.float32([1, np.nan, 3])
    assert execute("setp.num.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;", a=a, b=b).tolist() == [0, 0, 1]
    assert execute("setp.nan.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;", a=a, b=b).tolist() == [1, 1, 0]


def test_setp_combined() -> None:
    """``p = (a < b) op c`` and ``q = !(a < b) op c``."""
    cases = list(product((0, 1), (0, 1)))
    a, c = (values("u32", *x) for x in zip(*cases, strict=True))
    for name, function in (("and", min), ("or", max), ("xor", lambda x, y: x ^ y)):
        body = (
            f"setp.ne.u32 %p3, %c, 0; setp.lt.{name}.u32 %p1|%p2, %a, 1, %p3;"
            "selp.u32 %r10, 2, 0, %p1; selp.u32 %r11, 1, 0, %p2; or.b32 %d, %r10, %r11;"
        )
        expected = [2 * function(1 - x, y) + function(x, y) for x, y in cases]
        assert execute(body, a=a, c=c).tolist() == expected, name
    assert execute("setp.lt.ftz.f32 %p1, %a, 0f00000000; selp.u32 %d, 1, 0, %p1;", a=np.float32([-1e-40])).tolist() == [
        0
    ]


def test_choices() -> None:
    a, b = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    condition = "setp.eq.f32 %p1, %a, 0f40000000;"
    assert execute(f"{condition} selp.f32 %d, %a, %b, %p1;", np.float32, a=a, b=b).tolist() == [4, 2, 6]
    assert execute(f"{condition} selp.f32 %d, %a, %b, !%p1;", np.float32, a=a, b=b).tolist() == [1, 5, 3]
    c = np.int32([-1, 0, 7])
    assert execute("slct.f32.s32 %d, %a, %b, %c;", np.float32, a=a, b=b, c=c).tolist() == [4, 2, 3]
    wide = np.uint64([1, 2, 3])
    assert execute("setp.eq.u64 %p1, %a, 2; selp.b64 %d, 7, %a, %p1;", np.uint64, a=wide).tolist() == [1, 7, 3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("finite", [1, 0, 0]), ("infinite", [0, 1, 0]), ("number", [1, 1, 0]), ("notanumber", [0, 0, 1])],
)
def test_testp(name: str, expected: list[int]) -> None:
    a = np.float32([1, np.inf, np.nan])
    assert execute(f"testp.{name}.f32 %p1, %a; selp.u32 %d, 1, 0, %p1;", a=a).tolist() == expected


def test_mistakes() -> None:
    a = np.uint32([1])
    with pytest.raises(PtxError, match="third operand"):
        execute("setp.lt.and.u32 %p1, %a, %a; mov.u32 %d, 0;", a=a)
    with pytest.raises(PtxError, match="without a comparison"):
        execute("setp.u32 %p1, %a, %a; mov.u32 %d, 0;", a=a)
    with pytest.raises(PtxError, match=r"cannot be read as \.pred"):
        execute("and.pred %p1, %a, %p1; mov.u32 %d, 0;", a=a)
    with pytest.raises(PtxError, match=r"cannot be read as \.b64"):
        execute("and.b64 %rd1, %a, 1; mov.u32 %d, 0;", a=a)
    with pytest.raises(PtxError, match="unknown register %zz"):
        execute("mov.u32 %d, %zz;", a=a)
