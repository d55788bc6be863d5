"""``cvt`` and ``cvta`` against Python, every rounding that occurs."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from .errors import PtxError
from .snippet import execute, values
from .test_arithmetic import edges, nearest, unpack_bfloat

pytestmark = pytest.mark.exhaustive

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
DTYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64} | {kind: values(kind, 0).dtype for kind in INTEGERS}
ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize(("source", "to"), [*product(INTEGERS, INTEGERS)])
def test_between_integers(source: str, to: str) -> None:
    """Cut or extended as the source's sign says; ``.sat`` takes the nearest value there is."""
    a = values(source, *edges(source))
    np.testing.assert_array_equal(execute(f"cvt.{to}.{source} %d, %a;", DTYPES[to], a=a), values(to, *edges(source)))
    ends = np.iinfo(DTYPES[to])
    nearest_there = values(to, *(min(max(x, int(ends.min)), int(ends.max)) for x in edges(source)))
    np.testing.assert_array_equal(execute(f"cvt.sat.{to}.{source} %d, %a;", DTYPES[to], a=a), nearest_there)


def test_bytes() -> None:
    """Only the lowest byte of the register is looked at; a result of eight bits fills its register."""
    a = np.uint32([0x1FF, 0x7F, 0x80])
    assert execute("cvt.s32.s8 %d, %a;", np.int32, a=a).tolist() == [-1, 127, -128]
    assert execute("cvt.u32.u8 %d, %a;", a=a).tolist() == [255, 127, 128]
    assert execute("cvt.u8.u32 %d, %a;", a=a).tolist() == [255, 127, 128]
    assert execute("cvt.s8.s32 %d, %a;", np.int32, a=a).tolist() == [-1, 127, -128]


@pytest.mark.parametrize(("source", "to"), [*product(("f32", "f64"), INTEGERS)])
def test_floats_to_integers(source: str, to: str) -> None:
    numbers = [0.5, -0.5, 1.5, 2.5, -2.5, 7.25, -7.75, 1e4, -1e4]
    outside = [1e30, -1e30, math.inf, -math.inf]
    a = np.array(numbers + outside, DTYPES[source])
    ends = np.iinfo(DTYPES[to])
    for mode, function in ROUNDINGS.items():
        inside = [min(max(function(x), int(ends.min)), int(ends.max)) for x in numbers]
        expected = values(to, *inside, ends.max, ends.min, ends.max, ends.min)
        found = execute(f"cvt.{mode}.{to}.{source} %d, %a;", DTYPES[to], a=a)
        np.testing.assert_array_equal(found, expected, err_msg=mode)


def test_nan_to_integers() -> None:
    """Zero between 32-bit types, else the topmost bit."""
    assert execute("cvt.rzi.s32.f32 %d, %a;", np.int32, a=np.float32([np.nan])).tolist() == [0]
    assert execute("cvt.rzi.s32.f64 %d, %a;", np.int32, a=[np.nan]).tolist() == [-(2**31)]
    assert execute("cvt.rzi.u64.f32 %d, %a;", np.uint64, a=np.float32([np.nan])).tolist() == [2**63]


def directed(exact: Fraction, mode: str) -> float:
    """float32 in a direction, from the nearest one and its neighbours."""
    near = np.float32(nearest(exact, "f32"))
    below = near if Fraction(float(near)) <= exact else np.nextafter(near, np.float32(-np.inf))
    above = near if Fraction(float(near)) >= exact else np.nextafter(near, np.float32(np.inf))
    return {"rn": near, "rm": below, "rp": above, "rz": below if exact > 0 else above}[mode]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_to_floats(kind: str) -> None:
    a = values(kind, *edges(kind))
    found = execute(f"cvt.rn.f64.{kind} %d, %a;", np.float64, a=a)
    assert found.tolist() == [float(x) for x in edges(kind)]
    for mode in ("rn",) if kind.endswith("64") else ("rn", "rz", "rm", "rp"):
        found = execute(f"cvt.{mode}.f32.{kind} %d, %a;", np.float32, a=a)
        assert found.tolist() == [directed(Fraction(x), mode) for x in edges(kind)], mode


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_float64_to_float32(mode: str) -> None:
    a = np.random.default_rng(0).normal(size=50)
    found = execute(f"cvt.{mode}.f32.f64 %d, %a;", np.float32, a=a)
    assert found.tolist() == [directed(Fraction(float(x)), mode) for x in a]


def test_between_floats() -> None:
    a = np.float16([1.5, -0.0, 6e-8, np.inf, 65504])
    np.testing.assert_array_equal(execute("cvt.f32.f16 %d, %a;", np.float32, a=a), a.astype(np.float32))
    wide = np.float32([1.0, 3e38, -1e-45])
    np.testing.assert_array_equal(execute("cvt.f64.f32 %d, %a;", np.float64, a=wide), wide.astype(np.float64))
    ties = np.float32([1 + 2**-11, 1 + 3 * 2**-11, 70000, 1e-9])
    assert execute("cvt.rn.f16.f32 %d, %a;", np.float16, a=ties).tolist() == [1, 1 + 2**-9, math.inf, 0]
    assert execute("cvt.rz.f16.f32 %d, %a;", np.float16, a=ties)[1] == 1 + 2**-10
    assert execute("cvt.f32.bf16 %d, %a;", np.float32, a=np.uint16([0x3FC0, 0xFF80])).tolist() == [1.5, -math.inf]


def test_float_to_integral_float() -> None:
    a = np.float32([0.5, 1.5, -0.5, -1.2, 3.7])
    for mode, function in ROUNDINGS.items():
        assert execute(f"cvt.{mode}.f32.f32 %d, %a;", np.float32, a=a).tolist() == [function(float(x)) for x in a], mode
    a = np.float64([0.5, 2.5, 1e300])
    assert execute("cvt.rni.f64.f64 %d, %a;", np.float64, a=a).tolist() == [0, 2, 1e300]


def test_flush_saturate_relu() -> None:
    a = np.float32([-2, 0.25, 7, np.nan, 1e-40])
    np.testing.assert_array_equal(
        execute("cvt.sat.f32.f32 %d, %a;", np.float32, a=a), np.float32([0, 0.25, 1, 0, 1e-40])
    )
    assert execute("cvt.ftz.f32.f32 %d, %a;", np.float32, a=a)[-1] == 0
    assert execute("cvt.rn.relu.f16.f32 %d, %a;", np.float16, a=a)[:3].tolist() == [0, 0.25, 7]


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_bfloat16(mode: str) -> None:
    """Nearest, ties to even; packed with the first source in the upper half."""
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20]
    a = np.float32([*ties, *np.random.default_rng(0).normal(size=40)])
    exact = [Fraction(float(x)) for x in a]
    step = [Fraction(2) ** (math.frexp(float(x))[1] - 8) for x in a]
    cut = [float(math.trunc(x / s) * s) for x, s in zip(exact, step, strict=True)]
    expected = np.float32([nearest(x, "bf16") for x in exact] if mode == "rn" else cut)
    found = execute(f"cvt.{mode}.bf16.f32 %d, %a;", np.uint16, a=a)
    np.testing.assert_array_equal(unpack_bfloat(found), expected)
    both = execute(f"cvt.{mode}.bf16x2.f32 %d, %a, %b;", a=a, b=-a)
    np.testing.assert_array_equal(unpack_bfloat((both >> 16).astype(np.uint16)), expected)
    np.testing.assert_array_equal(unpack_bfloat((both & 0xFFFF).astype(np.uint16)), -expected)


def test_special_bfloat16() -> None:
    a = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800000, 0x7F7FFFFF], np.uint32)
    found = unpack_bfloat(execute("cvt.rn.bf16.f32 %d, %a;", np.uint16, a=a.view(np.float32)))
    np.testing.assert_array_equal(found, np.float32([np.nan, np.nan, -np.inf, np.inf]))


def test_packed_halves() -> None:
    a, b = np.float32([1.5, 1 + 2**-11]), np.float32([-2, 70000])
    found = execute("cvt.rn.f16x2.f32 %d, %a, %b;", a=a, b=b).view(np.float16)
    assert found.tolist() == [-2, 1.5, math.inf, 1], "the first source is the upper half"


def test_tf32() -> None:
    """Ten bits, ties away from zero."""
    ulp = 2.0**-10
    a = np.float32([1 + ulp / 2, -1 - ulp / 2, 1 + ulp / 2 - 2**-23, 1 + 1.5 * ulp, np.inf, np.nan])
    found = execute("cvt.rna.tf32.f32 %d, %a;", np.float32, a=a)
    np.testing.assert_array_equal(found, np.float32([1 + ulp, -1 - ulp, 1, 1 + 2 * ulp, np.inf, np.nan]))


def test_addresses() -> None:
    """To a generic address and back; the spaces do not meet."""
    body = """
        .shared .align 4 .b8 buffer[64];
        mov.u64 %rd1, buffer;
        cvta.shared.u64 %rd2, %rd1;
        cvta.to.shared.u64 %rd3, %rd2;
        setp.eq.u64 %p1, %rd1, %rd3;
        setp.ne.and.u64 %p1, %rd1, %rd2, %p1;
        selp.u32 %d, 1, 0, %p1;
    """
    assert execute(body, a=np.uint32([0])).tolist() == [1]
    same = "cvta.to.global.u64 %rd1, %a; cvta.global.u64 %rd2, %rd1; sub.u64 %rd3, %rd2, %a; cvt.u32.u64 %d, %rd3;"
    assert execute(same, a=np.uint64([77])).tolist() == [0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("cvt.s32.f32 %d, %a;", "needs .rni"),
        ("cvt.rn.tf32.f32 %d, %a;", "other than .rna"),
        ("cvt.rn.bf16x2.f32 %d, %a;", "two sources"),
        ("cvt.rn.satfinite.e4m3x2.f32 %d, %a, %a;", "unknown modifier .satfinite"),
        ("cvt.rz.f32.s64 %d, %rd1;", "from 64-bit integers"),
        ("cvt.f32 %d, %a;", "two types"),
        ("cvta.u64 %rd1, %rd2;", "without a state space"),
    ],
)
def test_what_is_not_modelled_is_refused(line: str, reason: str) -> None:
    with pytest.raises(PtxError, match=reason):
        execute(line, np.float32, a=np.float32([1]))
