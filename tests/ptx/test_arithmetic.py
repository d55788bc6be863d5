"""Arithmetic against Python's integers and fractions, and against float64."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from .errors import PtxError
from .snippet import execute, values

pytestmark = pytest.mark.exhaustive

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
SIZES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
EDGES = (0.0, -0.0, 1.0, -1.5, 3.0e-5, -65504.0, 1e-40, 0.1, math.inf, -math.inf, math.nan)


def edges(kind: str) -> list[int]:
    width, signed = int(kind[1:]), kind[0] == "s"
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    return sorted({low, low + 1, low // 3, 0, 1, 2, 7, 100, high // 5, high // 2, high - 1, high, -1 if signed else 1})


def pairs(kind: str) -> tuple[list[int], list[int]]:
    both = list(product(edges(kind), edges(kind)))
    return [a for a, _ in both], [b for _, b in both]


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_OPERATIONS = {
    "add": lambda a, b, w: a + b,
    "sub": lambda a, b, w: a - b,
    "mul.lo": lambda a, b, w: a * b,
    "mul.hi": lambda a, b, w: a * b >> w,
    "min": lambda a, b, w: min(a, b),
    "max": lambda a, b, w: max(a, b),
    "div": lambda a, b, w: quotient(a, b),
    "rem": lambda a, b, w: a if b == 0 else a - b * quotient(a, b),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", INTEGER_OPERATIONS)
def test_integers(name: str, kind: str) -> None:
    a, b = pairs(kind)
    found = execute(f"{name}.{kind} %d, %a, %b;", SIZE[kind], a=values(kind, *a), b=values(kind, *b))
    width = int(kind[1:])
    expected = values(kind, *(INTEGER_OPERATIONS[name](x, y, width) for x, y in zip(a, b, strict=True)))
    np.testing.assert_array_equal(found, expected)


SIZE = {kind: values(kind, 0).dtype for kind in INTEGERS}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind: str) -> None:
    """``mul.wide`` and ``mad.wide`` have results of twice the width."""
    a, b = pairs(kind)
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    c = values(wide, *(3 * x for x in a))
    inputs = {"a": values(kind, *a), "b": values(kind, *b), "c": c}
    exact = [x * y for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(execute(f"mul.wide.{kind} %d, %a, %b;", c.dtype, **inputs), values(wide, *exact))
    sums = values(wide, *(p + 3 * x for p, x in zip(exact, a, strict=True)))
    np.testing.assert_array_equal(execute(f"mad.wide.{kind} %d, %a, %b, %c;", c.dtype, **inputs), sums)


@pytest.mark.parametrize("kind", INTEGERS)
def test_mad(kind: str) -> None:
    a, b = pairs(kind)
    inputs = {"a": values(kind, *a), "b": values(kind, *b), "c": values(kind, *b)}
    low = values(kind, *(x * y + y for x, y in zip(a, b, strict=True)))
    high = values(kind, *((x * y >> int(kind[1:])) + y for x, y in zip(a, b, strict=True)))
    np.testing.assert_array_equal(execute(f"mad.lo.{kind} %d, %a, %b, %c;", low.dtype, **inputs), low)
    np.testing.assert_array_equal(execute(f"mad.hi.{kind} %d, %a, %b, %c;", low.dtype, **inputs), high)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_neg_and_abs_of_integers(kind: str) -> None:
    a = values(kind, *edges(kind))
    np.testing.assert_array_equal(
        execute(f"neg.{kind} %d, %a;", a.dtype, a=a), values(kind, *(-x for x in edges(kind)))
    )
    np.testing.assert_array_equal(
        execute(f"abs.{kind} %d, %a;", a.dtype, a=a), values(kind, *(abs(x) for x in edges(kind)))
    )


# ---- floats ----------------------------------------------------------------------------------------------------------
def random_floats(kind: str, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=count) * 2.0 ** rng.integers(-6, 6, count)
    return np.concatenate([np.array(EDGES, SIZES[kind]), numbers.astype(SIZES[kind])])


def nearest(exact: Fraction, kind: str) -> float:
    """A rational number rounded once, by Python; only for numbers in the range of normal numbers of the type."""
    if exact == 0:
        return 0.0
    digits = {"f16": 11, "f32": 24, "f64": 53, "bf16": 8}[kind]
    exponent = math.floor(math.log2(abs(exact)))
    while abs(exact) >= 2 ** Fraction(exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - digits + 1)
    return float(round(exact / unit) * unit)


FLOAT_OPERATIONS = {
    "add.rn": lambda a, b: a + b,
    "sub.rn": lambda a, b: a - b,
    "mul.rn": lambda a, b: a * b,
    "div.rn": lambda a, b: a / b,
}


@pytest.mark.parametrize(
    ("name", "kind"), [pair for pair in product(FLOAT_OPERATIONS, SIZES) if pair != ("div.rn", "f16")]
)
def test_floats_are_rounded_once(name: str, kind: str) -> None:
    a, b = random_floats(kind, 60)[len(EDGES) :], random_floats(kind, 60, 1)[len(EDGES) :]
    found = execute(f"{name}.{kind} %d, %a, %b;", SIZES[kind], a=a, b=b)
    exact = [FLOAT_OPERATIONS[name](Fraction(float(x)), Fraction(float(y))) for x, y in zip(a, b, strict=True)]
    expected = [nearest(value, kind) if abs(value) > 2**-14 else float(SIZES[kind](float(value))) for value in exact]
    np.testing.assert_array_equal(found, np.array(expected, SIZES[kind]))


@pytest.mark.parametrize("kind", SIZES)
def test_special_floats(kind: str) -> None:
    a, b = (np.array(x, SIZES[kind]) for x in zip(*product(EDGES, EDGES), strict=True))
    with np.errstate(all="ignore"):
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            found = execute(f"{name}.{kind} %d, %a, %b;", SIZES[kind], a=a, b=b)
            np.testing.assert_array_equal(
                found, function(a.astype(np.float64), b.astype(np.float64)).astype(SIZES[kind])
            )


@pytest.mark.parametrize("kind", [*SIZES, "bf16"])
def test_fma_rounds_once(kind: str) -> None:
    """The product is not rounded: ``(1 + e)(1 - e) - 1`` is ``-e^2``."""
    digits = {"f16": 11, "f32": 24, "f64": 53, "bf16": 8}[kind]
    e = 2.0 ** (1 - digits)
    dtype = SIZES.get(kind, np.float32)
    a = random_floats(kind, 40)[len(EDGES) :] if kind in SIZES else bfloat(random_floats("f32", 40)[len(EDGES) :])
    a = np.concatenate([np.array([1 + e], dtype), a])
    b, c = np.roll(a, 7), np.roll(a, 3)
    b[0], c[0] = 1 - e, -1
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    if kind == "bf16":
        found = unpack_bfloat(execute("fma.rn.bf16 %d, %a, %b, %c;", np.uint16, a=pack(a), b=pack(b), c=pack(c)))
    else:
        found = execute(f"fma.rn.{kind} %d, %a, %b, %c;", dtype, a=a, b=b, c=c)
    normal = [i for i, value in enumerate(exact) if abs(value) > 2**-13 or kind != "f16"]
    np.testing.assert_array_equal(found[normal], np.array([nearest(exact[i], kind) for i in normal], dtype))
    assert found[0] == -(e**2)


def pack(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def unpack_bfloat(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat(numbers: np.ndarray) -> np.ndarray:
    """Numbers truncated to bfloat16, as float32."""
    return unpack_bfloat(pack(numbers))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_arithmetic(kind: str) -> None:
    """Both halves on their own, the result nearest to the exact one."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(3, 33, 2))
    numbers = bfloat(numbers) if kind == "bf16x2" else numbers.astype(np.float16)
    bits = [(pack(x) if kind == "bf16x2" else x.view(np.uint16)).reshape(-1).view(np.uint32) for x in numbers]
    inputs = dict(zip("abc", bits, strict=True))
    a, b, c = ([Fraction(float(x)) for x in y.ravel()] for y in numbers)
    narrow = "bf16" if kind == "bf16x2" else "f16"
    for line, exact in (
        (f"fma.rn.{kind} %d, %a, %b, %c;", [x * y + z for x, y, z in zip(a, b, c, strict=True)]),
        (f"mul.{kind} %d, %a, %b;", [x * y for x, y in zip(a, b, strict=True)]),
        (f"add.{kind} %d, %a, %b;", [x + y for x, y in zip(a, b, strict=True)]),
        (f"max.{kind} %d, %a, %b;", [max(x, y) for x, y in zip(a, b, strict=True)]),
        (f"neg.{kind} %d, %a;", [-x for x in a]),
        (f"abs.{kind} %d, %a;", [abs(x) for x in a]),
    ):
        found = execute(line, np.uint32, **inputs).view(np.uint16)
        found = unpack_bfloat(found) if kind == "bf16x2" else found.view(np.float16).astype(np.float32)
        expected = np.array([nearest(x, narrow) for x in exact])
        wrong = (found != expected) & (np.abs(expected) > 2**-13)
        assert not wrong.any(), line


def test_directed_roundings() -> None:
    one, tiny = np.float32(1), np.float32(2**-30)
    up, down = np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0))
    for mode, plus, minus in (("rn", one, one), ("rz", one, down), ("rm", one, down), ("rp", up, one)):
        found = execute(f"add.{mode}.f32 %d, %a, %b;", np.float32, a=[one, one, -one], b=[tiny, -tiny, tiny])
        np.testing.assert_array_equal(found[:2], [plus, minus])
        assert found[2] == {"rn": -one, "rz": -down, "rm": -one, "rp": -down}[mode]
        fused = execute(f"fma.{mode}.f32 %d, %a, %a, %b;", np.float32, a=[one], b=[tiny])
        assert fused[0] == plus
    a = np.float32(1 + 2**-23)
    assert execute("mul.rz.f32 %d, %a, %a;", np.float32, a=[a])[0] == np.float32(1 + 2**-22)
    assert execute("mul.rp.f32 %d, %a, %a;", np.float32, a=[a])[0] == np.float32(1 + 3 * 2**-23)


def test_flush_and_saturate() -> None:
    small = np.float32(1e-40)
    assert execute("add.f32 %d, %a, %b;", np.float32, a=[small], b=[np.float32(0)])[0] == small
    for line in (
        "add.ftz.f32 %d, %a, %b;",
        "max.ftz.f32 %d, %a, %a;",
        "mul.ftz.f32 %d, %a, %a;",
        "fma.rn.ftz.f32 %d, %a, %b, %b;",
    ):
        found = execute(line, np.float32, a=[-small], b=[np.float32(0)])
        assert found[0] == 0
    assert np.signbit(execute("neg.ftz.f32 %d, %a;", np.float32, a=[small])[0])
    found = execute("mul.ftz.f32 %d, %a, %b;", np.float32, a=np.float32([2e-38]), b=np.float32([0.25]))
    assert found[0] == 0, "the result is flushed too"
    found = execute("fma.rn.sat.f32 %d, %a, %a, %a;", np.float32, a=np.float32([0.25, 3, -0.5, np.nan, np.inf]))
    np.testing.assert_array_equal(found, np.float32([0.3125, 1, 0, 0, 1]))


def test_min_and_max_of_nan() -> None:
    a, b = np.float32([np.nan, 1, np.nan, -3]), np.float32([2, np.nan, np.nan, 5])
    np.testing.assert_array_equal(execute("max.f32 %d, %a, %b;", np.float32, a=a, b=b), np.float32([2, 1, np.nan, 5]))
    np.testing.assert_array_equal(execute("min.f32 %d, %a, %b;", np.float32, a=a, b=b), np.float32([2, 1, np.nan, -3]))
    loud = np.float32([np.nan, np.nan, np.nan, 5])
    np.testing.assert_array_equal(execute("max.NaN.f32 %d, %a, %b;", np.float32, a=a, b=b), loud)


def test_copysign() -> None:
    found = execute("copysign.f32 %d, %a, %b;", np.float32, a=np.float32([-1, 1, -0.0]), b=np.float32([2, -3, 4]))
    np.testing.assert_array_equal(found, np.float32([-2, 3, -4]))


FUNCTIONS = {
    "ex2.approx.ftz.f32": lambda x: 2.0**x,
    "ex2.approx.f32": lambda x: 2.0**x,
    "lg2.approx.f32": math.log2,
    "rcp.approx.ftz.f32": lambda x: 1 / x,
    "rcp.rn.f32": lambda x: 1 / x,
    "sqrt.rn.f32": math.sqrt,
    "sqrt.approx.ftz.f32": math.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / math.sqrt(x),
    "sin.approx.f32": math.sin,
    "cos.approx.f32": math.cos,
    "tanh.approx.f32": math.tanh,
    "sqrt.rn.f64": math.sqrt,
    "rsqrt.approx.f64": lambda x: 1 / math.sqrt(x),
    "rcp.rn.f64": lambda x: 1 / x,
}


@pytest.mark.parametrize("line", FUNCTIONS)
def test_functions(line: str) -> None:
    dtype = np.float64 if line.endswith("f64") else np.float32
    a = np.array([0.3, 1.0, 2.5, 17.0, 1e-3], dtype)
    expected = np.array([FUNCTIONS[line](float(x)) for x in a])
    np.testing.assert_allclose(execute(f"{line} %d, %a;", dtype, a=a), expected, rtol=np.finfo(dtype).eps)


def test_functions_at_the_edges() -> None:
    found = execute("ex2.approx.ftz.f32 %d, %a;", np.float32, a=np.float32([-np.inf, np.inf, np.nan, -140, 0]))
    np.testing.assert_array_equal(found, np.float32([0, np.inf, np.nan, 0, 1]))
    assert execute("ex2.approx.f32 %d, %a;", np.float32, a=np.float32([-140]))[0] == np.float32(2.0**-140)
    found = execute("lg2.approx.f32 %d, %a;", np.float32, a=np.float32([0, -1, np.inf]))
    np.testing.assert_array_equal(found, np.float32([-np.inf, np.nan, np.inf]))
    half = execute("ex2.approx.f16 %d, %a;", np.float16, a=np.float16([3, -2.5]))
    np.testing.assert_array_equal(half, np.exp2(np.array([3, -2.5])).astype(np.float16))


def test_approximations_of_float64_give_the_upper_word() -> None:
    for line, exact in (("rcp.approx.ftz.f64", 1 / 3), ("rsqrt.approx.ftz.f64", 3**-0.5)):
        found = execute(f"{line} %d, %a;", np.float64, a=[3.0])
        assert found.view(np.uint64)[0] & 0xFFFFFFFF == 0
        assert found[0] == pytest.approx(exact, rel=2**-19)


@pytest.mark.parametrize("line", ["div.full.f32", "div.approx.f32", "div.rn.ftz.f32"])
def test_divisions(line: str) -> None:
    a, b = np.float32([1, -7, 0, 3, np.inf]), np.float32([3, 0.3, 0, 0, 2])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(execute(f"{line} %d, %a, %b;", np.float32, a=a, b=b), a / b)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("add.sat.s32 %d, %a, %a;", "not modelled: .sat of .s32"),
        ("add.cc.s32 %d, %a, %a;", "unknown modifier .cc of add"),
        ("fma.rz.f64 %d, %a, %a, %a;", "not modelled: .rz of .f64"),
        ("add.rn.ftz.f16 %d, %a, %a;", "not modelled: .ftz of .f16"),
        ("mul.s32 %d, %a, %a;", "without .lo, .hi or .wide"),
        ("sub.b32 %d, %a, %a;", "type .b32 of sub is not modelled"),
        ("add.s32 %d, %a;", "add with 2 operands"),
        ("add %d, %a, %a;", "add needs a type"),
        ("addc.s32 %d, %a, %a;", "unknown instruction addc"),
    ],
)
def test_what_is_not_modelled_is_refused(line: str, reason: str) -> None:
    dtype = {"f64": np.float64, "f16": np.float16}.get(line.split()[0][-3:], np.int32)
    with pytest.raises(PtxError, match=reason) as error:
        execute(line, dtype, a=np.zeros(3, dtype))
    assert f"`{line.rstrip(';')}`" in str(error.value)
    assert "snippet:" in str(error.value)
