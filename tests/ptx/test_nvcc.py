"""Small kernels compiled by nvcc: what its PTX looks like is its own business, what it computes is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import Lockstep, Priority, PtxError, Random, Struct
from .launch import Kernels
from .nvcc_ptx import compiled

pytestmark = pytest.mark.exhaustive

SCHEDULES = [Lockstep(), Random(1), Priority(2)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
FLOAT = np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compiled(Path(__file__).parent / "nvcc" / "features.cu")


@each_schedule
def test_struct_parameter(kernels: Kernels, schedule: Lockstep) -> None:
    x, y, table = np.linspace(-1, 1, 133, dtype=np.float32), np.full(133, np.nan), [3, 1, 4, 1, 5]
    fields = [("u64", x), ("u64", y), ("s64", 133), ("f32", 0.5), *(("s32", n) for n in table)]
    kernels.launch("struct_parameter", (3,), (64,), [Struct(fields)], schedule=schedule)
    exact = x.astype(np.float64) * 0.5 + np.array(table)[np.arange(133) % 5]
    np.testing.assert_array_equal(y, exact.astype(np.float32))
    fields[2] = ("s64", 134)
    with pytest.raises(PtxError, match=r"offset 532 of argument 0\.0, which has 532 bytes"):
        kernels.launch("struct_parameter", (3,), (64,), [Struct(fields)], schedule=schedule)


def test_elementary_functions(kernels: Kernels) -> None:
    x = np.concatenate([np.linspace(-4, 4, 40), [1e-3, -1e-5, 20.0, -30.0]]).astype(np.float32)
    y = np.full((8, x.size), np.nan, np.float32)
    kernels.launch("elementary", (1,), (64,), [x, y, x.size])
    a = x.astype(np.float64)
    size = np.abs(a)
    expected = [
        np.exp(a),
        np.log(size),
        np.exp2(a) + np.log2(size),
        np.sqrt(size) / (a * a + 1),
        np.log1p(a * a) + np.expm1(a),
        1 / np.sqrt(size) + np.rint((np.float32(10) * x).astype(np.float64)) + np.trunc(a),
        np.sin(a),
        1 / a + np.exp(a),
    ]
    np.testing.assert_allclose(y, np.array(expected), rtol=40 * FLOAT, atol=4 * FLOAT)


def test_elementary_functions_of_doubles(kernels: Kernels) -> None:
    x = np.concatenate([np.linspace(-4, 4, 40), [1e-3, -1e-5, 20.0, -30.0]])
    y = np.full((5, x.size), np.nan)
    kernels.launch("elementary_double", (1,), (64,), [x, y, x.size])
    size = np.abs(x)
    expected = [
        np.exp(x),
        np.log(size),
        np.exp2(x) + np.log1p(x * x),
        np.sqrt(size) / (x * x + 1),
        np.maximum(x, 0.5) + np.minimum(x, -0.5) + 1 / np.sqrt(size),
    ]
    np.testing.assert_allclose(y, np.array(expected), rtol=4 * np.finfo(float).eps, atol=1e-15)


def test_integers(kernels: Kernels) -> None:
    a = [0, 1, -1, 7, -1000003, 2**40 + 12345, -(2**62) - 1, 2**63 - 1, -(2**63), 123456789]
    b = [3, -1, 7, 2, 1000, -(2**20) - 3, 12345, 2**40, -17, 987654321]
    x, d, y = np.array(a), np.array(b), np.zeros((6, len(a)), np.int64)
    kernels.launch("integers", (1,), (32,), [x, d, y, len(a)])

    def quotient(p: int, q: int) -> int:
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    def signed(n: int, width: int = 64) -> int:
        n %= 1 << width
        return n - (1 << width) if n >> width - 1 else n

    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        u, v, w = p % 2**64, q % 2**64, signed(p, 32)
        assert y[0, i] == quotient(p, q)
        assert y[1, i] == p - q * quotient(p, q)
        assert y[2, i] == signed(u // v)
        assert y[3, i] == p * q >> 64
        assert y[4, i] == signed(quotient(w, 7) + w - 11 * quotient(w, 11), 32)
        bits = f"{u:064b}"
        reverse = signed(int(bits[32:][::-1], 2), 32)
        assert y[5, i] == signed(bits.count("1") + 64 - u.bit_length() + (u & -u).bit_length() + reverse, 32)


@each_schedule
def test_local_memory_choices_and_calls(kernels: Kernels, schedule: Lockstep) -> None:
    threads = np.arange(70)
    index = np.concatenate([threads % 24, threads * 5 % 24]).astype(np.int32)
    y = np.zeros(70, np.int32)
    kernels.launch("local_array", (1,), (70,), [index, y], schedule=schedule)
    other = threads * 5 % 24
    assert y.tolist() == np.where(other == threads % 24, -1, other * other + threads).tolist()

    x = (threads * 7 % 8 - 1).astype(np.int32)
    kernels.launch("choice", (1,), (70,), [x, y], schedule=schedule)
    results = {0: lambda t: 7, 1: lambda t: t, 2: lambda t: 97, 3: lambda t: 100, 4: lambda t: t * t, 5: lambda t: 55}
    assert y.tolist() == [results.get(n, lambda t: 1)(t) for n, t in zip(x.tolist(), range(70), strict=True)]

    x, z = np.linspace(0, 1, 70, dtype=np.float32), np.zeros(70, np.float32)
    kernels.launch("call", (1,), (70,), [x, z], schedule=schedule)
    sums = np.where(threads % 3 > 0, threads * (threads - 1) / 2, 1)
    np.testing.assert_allclose(z, x * sums, rtol=20 * FLOAT)


def test_half_types(kernels: Kernels) -> None:
    numbers = np.random.default_rng(0).normal(size=50).astype(np.float32)
    h, b = numbers.astype(np.float16), (numbers.view(np.uint32) >> 16).astype(np.uint16)
    cut = (b.astype(np.uint32) << 16).view(np.float32)
    y = np.zeros((4, 50), np.float32)
    kernels.launch("half_types", (1,), (50,), [h, b, y, 50])
    wide = h.astype(np.float32)
    scaled = wide * np.float32(1.001)
    np.testing.assert_array_equal(y[0], wide + cut)
    np.testing.assert_array_equal(y[1], (h.astype(np.float64) ** 2 + h).astype(np.float16))
    np.testing.assert_array_equal(y[2], scaled.astype(np.float16))
    np.testing.assert_allclose(y[3], scaled, rtol=2**-8)
    assert not (y[3].view(np.uint32) & 0xFFFF).any()


@each_schedule
def test_warps(kernels: Kernels, schedule: Lockstep) -> None:
    x = np.random.default_rng(0).integers(-50, 50, 96).astype(np.float32)
    y, votes = np.zeros(96, np.float32), np.zeros(96, np.int32)
    kernels.launch("warps", (1,), (96,), [x, y, votes], schedule=schedule)
    by_warp = x.reshape(3, 32)
    assert y.tolist() == np.repeat(by_warp.sum(1), 32).tolist()
    ballots = ((by_warp > 0) * (1 << np.arange(32))).sum(1) + (x > 0).sum()
    assert votes.tolist() == np.repeat(ballots.astype(np.uint32).view(np.int32), 32).tolist()


@each_schedule
def test_cooperative_grid(kernels: Kernels, schedule: Lockstep) -> None:
    """``this_grid().sync()`` of cooperative groups; without a cooperative launch its workspace is not there."""
    x, total = np.arange(1, 181, dtype=np.float32), np.zeros(1)
    reverse = ("grid_reverse", (3,), (64,), [x, total, 180])
    kernels.launch(*reverse, shared_bytes=256, schedule=schedule, cooperative=True)
    assert x.tolist() == list(range(180, 0, -1))
    assert total[0] == 180 * 181 / 2
    with pytest.raises(PtxError, match="the kernel traps here"):
        kernels.launch(*reverse, shared_bytes=256, schedule=schedule)
    with pytest.raises(PtxError, match="offset 252 of shared memory, which has 252 bytes"):
        kernels.launch(*reverse, shared_bytes=252, schedule=schedule, cooperative=True)
