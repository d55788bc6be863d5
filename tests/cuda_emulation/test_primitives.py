"""Every wrapper of ptx.cuh and every warp operation against its statement in warps.py, on each platform.

"emulation" is what the kernels are tested with, "ptx" what nvcc makes of the same source: an operand in the wrong place
of an asm text would be seen there only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from . import warps
from .building import by_nvcc, disassembly, emulated_library
from .warps import Words

Run = Callable[[str, Words, int], Words]  # kernel, input words, number of output words
SEEDS = range(6)


def run_emulated(kernel: str, words: Words, outputs: int) -> Words:
    """The same whatever the schedule."""
    library = ctypes.CDLL(str(emulated_library("primitives.cpp")))
    words, out, message = np.ascontiguousarray(words), np.empty((len(SEEDS), outputs), np.uint32), bytes(1000)
    for seed in SEEDS:
        pointers = ctypes.c_void_p(words.ctypes.data), ctypes.c_void_p(out[seed].ctypes.data)
        library.run(kernel.encode(), *pointers, ctypes.c_uint64(seed), message, ctypes.c_size_t(len(message)))
        assert message.rstrip(b"\0") == b""
    assert (out == out[0]).all()
    return out[0]


@pytest.fixture(params=["emulation"])
def run() -> Run:
    return run_emulated


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


# ---- ldmatrix --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(run: Run, rng: np.random.Generator, matrices: int, transposed: bool) -> None:
    tile = rng.integers(0, 1 << 16, 512, dtype=np.uint16)
    offsets = rng.permutation(64)[:32].astype(np.uint32) * 16  # rows anywhere; x2 does not look at lanes 16 to 31
    words = np.concatenate([tile.view(np.uint32).reshape(32, 8), offsets[:, None]], axis=1)
    out = run(f"ldmatrix_x{matrices}" + "_trans" * transposed, words, 32 * matrices)
    rows = np.stack([tile[start // 2 : start // 2 + 8] for start in offsets[: 8 * matrices]])
    expected = warps.ldmatrix(rows.reshape(matrices, 8, 8), transposed)
    assert (out.reshape(32, matrices) == expected).all()


# ---- mma -------------------------------------------------------------------------------------------------------------
def check_mma(out: Words, a: NDArray, b: NDArray, d: NDArray) -> None:
    """Sums of at most 17 exact products in float32, in any order: each rounds to half an ulp of the partial sums."""
    result = out.view(np.float32).reshape(32, 4)
    got = np.empty((16, 8))
    for i in range(4):
        got[warps.element_16x8(i)] = result[:, i]
    tolerance = 17 * 2.0**-24 * (np.abs(d) + np.abs(a) @ np.abs(b))
    assert (np.abs(got - (d + a @ b)) <= tolerance).all()


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_mma_of_half_types(run: Run, rng: np.random.Generator, name: str) -> None:
    decode = {"bf16": warps.bf16, "f16": warps.f16}[name]
    sign_and_exponent = {"bf16": (0x3F00, 0x40FF), "f16": (0x3400, 0x43FF)}[name]
    signs = rng.integers(0, 2, (16, 24), dtype=np.uint16) << 15
    bits = rng.integers(*sign_and_exponent, (16, 24), dtype=np.uint16) | signs
    a, b, d = bits[:, :16], np.ascontiguousarray(bits[:, 16:]), rng.standard_normal((16, 8)).astype(np.float32)
    words = np.concatenate(
        [
            warps.fragments(a, warps.a_16x16, 8).view(np.uint32),
            warps.fragments(b, warps.b_16x8, 4).view(np.uint32),
            warps.fragments(d, warps.element_16x8, 4).view(np.uint32),
        ],
        axis=1,
    )
    check_mma(run(f"mma_{name}", words, 128), decode(a.copy()), decode(b), d.astype(np.float64))


def test_mma_tf32(run: Run, rng: np.random.Generator) -> None:
    a, b, d = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    words = np.concatenate(
        [
            warps.fragments(a, warps.a_16x8, 4).view(np.uint32),
            warps.fragments(b, warps.b_8x8, 2).view(np.uint32),
            warps.fragments(d, warps.element_16x8, 4).view(np.uint32),
        ],
        axis=1,
    )
    a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b))  # low bits ignored
    check_mma(run("mma_tf32", words, 128), a, b, d.astype(np.float64))


def test_mma_f64(run: Run, rng: np.random.Generator) -> None:
    a, b, d = rng.standard_normal((8, 4)), rng.standard_normal((4, 8)), rng.standard_normal((8, 8))
    group, quad = warps.GROUP, warps.QUAD
    words = np.stack([a[group, quad], b[quad, group], d[group, 2 * quad], d[group, 2 * quad + 1]], axis=1)
    out = run("mma_f64", words.view(np.uint32), 128).view(np.float64).reshape(32, 2)
    got = np.empty((8, 8))
    got[group, 2 * quad], got[group, 2 * quad + 1] = out[:, 0], out[:, 1]
    np.testing.assert_allclose(got, d + a @ b, rtol=0, atol=5 * 2.0**-53 * (np.abs(d) + np.abs(a) @ np.abs(b)).max())


# ---- cp.async --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 8, 4])
def test_cp_async(run: Run, rng: np.random.Generator, size: int) -> None:
    source = rng.integers(0, 256, 512, dtype=np.uint8)
    orders = np.stack(
        [
            rng.permutation(1024 // size)[:32] * size,
            rng.integers(0, 512 // size, 32) * size,
            rng.integers(0, size + 1, 32),
        ],
        axis=1,
    ).astype(np.uint32)
    assert set(orders[:, 2]) >= {0, size}
    out = run(f"cp_async_{size}", np.concatenate([source.view(np.uint32), orders.ravel()]), 256)
    tile = np.full(512, 0x1234, np.uint16).view(np.uint8)
    assert (out.view(np.uint8) == warps.cp_async(tile, source, orders, size)).all()


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def halfway(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values and what lies around the middles between neighbours, where rounding decides."""
    bits = values.view(np.uint32)
    middles = np.concatenate([bits + (1 << shift) for shift in (11, 12, 15)])
    return np.concatenate([bits, middles - 1, middles, middles + 1]).astype(np.uint32).view(np.float32)


def interesting_floats() -> Words:
    exponents = np.concatenate([np.arange(-30, 17), [-149, -127, -126, 127]])
    whole = np.ldexp(np.float32(1), exponents).astype(np.float32)
    values = np.concatenate([halfway(whole), halfway(np.float32(1.75) * whole), [0, 65504, 65519.996, 65520, np.inf]])
    values = np.concatenate([values, np.random.default_rng(3).standard_normal(300)]).astype(np.float32)
    values = np.concatenate([values, -values, [np.nan]]).astype(np.float32)
    return np.resize(values, -(-len(values) // 32) * 32).view(np.uint32)


def same_floats(got: NDArray, expected: NDArray) -> bool:
    """Equal, zeros with their sign, any NaN for a NaN."""
    return bool(np.all(np.isnan(got) == np.isnan(expected))) and bool(
        np.all(np.isnan(expected) | ((got == expected) & (np.signbit(got) == np.signbit(expected))))
    )


@pytest.fixture
def computed(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64], Words]:
    """x, y and the six results for each pair."""
    x = interesting_floats()
    y = np.roll(x, 7)
    pairs = np.stack([x, y], axis=1).reshape(-1, 32, 2)
    out = np.concatenate([run("arithmetic", block, 192).reshape(32, 6) for block in pairs])
    return x.view(np.float32).astype(np.float64), y.view(np.float32).astype(np.float64), out


def test_arithmetic(computed: tuple[NDArray[np.float64], NDArray[np.float64], Words]) -> None:
    x, y, out = computed
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        power = np.exp2(np.where(np.abs(x) < 2.0**-126, 0, x))
        power = np.where(power < 2.0**-126, 0, power).astype(np.float32)
        np.testing.assert_allclose(out[:, 0].view(np.float32), power, rtol=2.0**-22)
        tf32 = np.where(np.isfinite(x), warps.nearest(x, 10, -126, away=True), x)
        kept = (out[:, 1] & 0xFFFFE000).view(np.float32)  # what mma sees
        assert same_floats(kept[np.abs(x) >= 2.0**-126], tf32.astype(np.float32)[np.abs(x) >= 2.0**-126])
        for column, decode, fraction, least, largest in (
            (2, warps.bf16, 7, -126, 2.0**128),
            (3, warps.f16, 10, -14, 65520),
        ):
            low, high = warps.halves(out[:, column]).T
            for bits, value in ((low, x), (high, y)):
                rounded = np.where(np.isfinite(value), warps.nearest(value, fraction, least, away=False), value)
                rounded = np.where(np.abs(rounded) >= largest, np.copysign(np.inf, rounded), rounded)
                assert same_floats(decode(np.ascontiguousarray(bits)), np.where(np.isnan(value), np.nan, rounded))
        low = np.ascontiguousarray(warps.halves(x.astype(np.float32).view(np.uint32))[:, 0])
        assert same_floats(out[:, 4].view(np.float32), warps.bf16(low).astype(np.float32))
        assert same_floats(out[:, 5].view(np.float32), warps.f16(low).astype(np.float32))


# ---- shuffles and votes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("votes", ["some", "none", "all"])
def test_shuffles_and_votes(run: Run, rng: np.random.Generator, votes: str) -> None:
    low, high = {"some": (0, 32), "none": (0, 16), "all": (16, 32)}[votes]
    x, y = rng.integers(0, 1 << 32, 32, dtype=np.uint32), rng.integers(low, high, 32)
    lanes = warps.LANES
    ballot = sum(1 << int(lane) for lane in lanes[y > 15])
    sources = [
        (y, 32),
        (lanes // 8 * 8 + y % 8, 8),
        (lanes ^ 5, 32),
        (lanes ^ 12, 8),
        (lanes - 3, 32),
        (np.where(lanes % 16 < 3, lanes, lanes - 3), 16),
        (lanes + 2, 32),
        (lanes + 2, 4),
    ]
    columns = [warps.shuffled(x, source, width) for source, width in sources]
    columns += [np.full(32, v) for v in (ballot, ballot != 0, ballot == (1 << 32) - 1)]
    out = run("shuffles", np.stack([x, y.astype(np.uint32)], axis=1), 352).reshape(32, 11)
    assert (out == np.stack(columns, axis=1).astype(np.uint32)).all()


# ---- machine code ----------------------------------------------------------------------------------------------------
INSTRUCTIONS = {
    "ldmatrix_x4": ["LDSM.16.M88.4"],
    "ldmatrix_x2": ["LDSM.16.M88.2"],
    "ldmatrix_x4_trans": ["LDSM.16.MT88.4"],
    "ldmatrix_x2_trans": ["LDSM.16.MT88.2"],
    "mma_bf16": ["HMMA.16816.F32.BF16"],
    "mma_f16": ["HMMA.16816.F32 "],
    "mma_tf32": ["HMMA.1688.F32.TF32"],
    "mma_f64": ["DMMA.884"],
    "cp_async_16": ["LDGSTS.E.BYPASS.128.ZFILL", "LDGDEPBAR", "DEPBAR.LE"],
    "cp_async_8": ["LDGSTS.E.64.ZFILL"],
    "cp_async_4": ["LDGSTS.E.ZFILL"],
    "arithmetic": ["MUFU.EX2", "F2FP.BF16.PACK_AB", "F2FP.PACK_AB"],
    "shuffles": ["SHFL.IDX", "SHFL.BFLY", "SHFL.UP", "SHFL.DOWN", "VOTE.ANY", "VOTE.ALL"],
}


def test_every_wrapper_becomes_its_instruction() -> None:
    code = disassembly(by_nvcc("primitives.cu", "cubin"))
    assert code.keys() == INSTRUCTIONS.keys()
    missing = {k: i for k, wanted in INSTRUCTIONS.items() for i in wanted if i not in code[k]}
    assert not missing
