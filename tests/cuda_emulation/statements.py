"""What each kernel of primitives.cuh has to give, stated on whole matrices with the layouts of warps.py.

A statement takes the platform as a function (kernel, input words, number of output words) -> output words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from . import warps
from .warps import Words

Run = Callable[[str, Words, int], Words]


def numbers() -> np.random.Generator:
    return np.random.default_rng(5)


# ---- ldmatrix --------------------------------------------------------------------------------------------------------
def ldmatrix(run: Run, transposed: bool) -> None:
    rng = numbers()
    tile = rng.integers(0, 1 << 16, 512, dtype=np.uint16)
    offsets = rng.permutation(64)[:32].astype(np.uint32) * 16  # rows anywhere
    words = np.concatenate([tile.view(np.uint32).reshape(32, 8), offsets[:, None]], axis=1)
    out = run("ldmatrix_x4" + "_trans" * transposed, words, 128)
    rows = np.stack([tile[start // 2 : start // 2 + 8] for start in offsets])
    expected = warps.ldmatrix(rows.reshape(4, 8, 8), transposed)
    assert (out.reshape(32, 4) == expected).all()


# ---- mma -------------------------------------------------------------------------------------------------------------
def check_product(out: Words, a: NDArray[np.float64], b: NDArray[np.float64], d: NDArray[np.float64]) -> None:
    """Sums of at most 17 exact products in float32, in any order: each rounds to half an ulp of the partial sums."""
    result = out.view(np.float32).reshape(32, 4)
    got = np.empty((16, 8))
    for i in range(4):
        got[warps.element_16x8(i)] = result[:, i]
    tolerance = 17 * 2.0**-24 * (np.abs(d) + np.abs(a) @ np.abs(b))
    assert (np.abs(got - (d + a @ b)) <= tolerance).all()


def mma_of_half_types(run: Run, name: str) -> None:
    rng = numbers()
    decode = {"bf16": warps.bf16, "f16": warps.f16}[name]
    exponent_and_fraction = {"bf16": (0x3F00, 0x40FF), "f16": (0x3400, 0x43FF)}[name]
    signs = rng.integers(0, 2, (16, 24), dtype=np.uint16) << 15
    bits = rng.integers(*exponent_and_fraction, (16, 24), dtype=np.uint16) | signs
    a, b = np.ascontiguousarray(bits[:, :16]), np.ascontiguousarray(bits[:, 16:])
    d = rng.standard_normal((16, 8)).astype(np.float32)
    words = np.concatenate(
        [
            warps.fragments(a, warps.a_16x16, 8).view(np.uint32),
            warps.fragments(b, warps.b_16x8, 4).view(np.uint32),
            warps.fragments(d, warps.element_16x8, 4).view(np.uint32),
        ],
        axis=1,
    )
    check_product(run(f"mma_{name}", words, 128), decode(a), decode(b), d.astype(np.float64))


def mma_tf32(run: Run) -> None:
    rng = numbers()
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
    check_product(run("mma_tf32", words, 128), a, b, d.astype(np.float64))


# ---- cp.async --------------------------------------------------------------------------------------------------------
def cp_async(run: Run) -> None:
    rng = numbers()
    source = rng.integers(0, 256, 512, dtype=np.uint8)
    targets, starts = rng.permutation(64)[:32] * 16, rng.integers(0, 32, 32) * 16
    orders = np.stack([targets, starts, rng.integers(0, 17, 32)], axis=1).astype(np.uint32)
    assert set(orders[:, 2]) >= {0, 16}
    out = run("cp_async_16", np.concatenate([source.view(np.uint32), orders.ravel()]), 256)
    tile = np.full(512, 0x1234, np.uint16).view(np.uint8)
    assert (out.view(np.uint8) == warps.cp_async(tile, source, orders)).all()


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def around_middles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values, and what lies around the middles between neighbours in each format, where rounding decides."""
    bits = values.view(np.uint32)
    middles = np.concatenate([bits + (1 << shift) for shift in (11, 12, 15)])
    return np.concatenate([bits, middles - 1, middles, middles + 1]).astype(np.uint32).view(np.float32)


def interesting_floats() -> NDArray[np.float32]:
    """A multiple of 32 of them, of either sign."""
    exponents = np.concatenate([np.arange(-30, 17), [-149, -127, -126, 127]])
    powers = np.ldexp(np.float32(1), exponents).astype(np.float32)
    limits = [0, 65504, 65519.996, 65520, np.inf]
    values = [around_middles(powers), around_middles(np.float32(1.75) * powers), limits, numbers().standard_normal(300)]
    positive = np.concatenate(values).astype(np.float32)
    both = np.concatenate([positive, -positive, np.array([np.nan], np.float32)])
    return np.resize(both, -(-len(both) // 32) * 32)


def check_same(got: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
    """Equal, zeros with their sign, any NaN for a NaN."""
    assert (np.isnan(got) == np.isnan(expected)).all()
    numbers = ~np.isnan(expected)
    assert (got == expected)[numbers].all()
    assert (np.signbit(got) == np.signbit(expected))[numbers].all()


def rounded(x: NDArray[np.float64], fraction: int, least_exponent: int, limit: float) -> NDArray[np.float64]:
    """To nearest even, infinite from ``limit`` on."""
    near = np.where(np.isfinite(x), warps.nearest(x, fraction, least_exponent, away=False), x)
    return np.where(np.abs(near) >= limit, np.copysign(np.inf, near), near)


def arithmetic(run: Run) -> None:
    x32 = interesting_floats()
    y32 = np.roll(x32, 7)
    pairs = np.stack([x32, y32], axis=1).view(np.uint32).reshape(-1, 32, 2)
    out = np.concatenate([run("arithmetic", block, 192).reshape(32, 6) for block in pairs])
    x, y = x32.astype(np.float64), y32.astype(np.float64)
    normal = ~(np.abs(x) < 2.0**-126)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        power = np.exp2(np.where(normal, x, 0))
        power = np.where(power < 2.0**-126, 0, power).astype(np.float32)
        np.testing.assert_allclose(out[:, 0].view(np.float32), power, rtol=2.0**-22)
        tf32 = np.where(np.isfinite(x), warps.nearest(x, 10, -126, away=True), x).astype(np.float32)
        kept = (out[:, 1] & 0xFFFFE000).view(np.float32)  # what mma sees of it
        check_same(kept[normal], tf32[normal])
        bf16, f16 = (warps.halves(out[:, column]) for column in (2, 3))
        for i, value in enumerate((x, y)):
            check_same(warps.bf16(bf16[:, i]), rounded(value, 7, -126, 2.0**128))
            check_same(warps.f16(f16[:, i]), rounded(value, 10, -14, 65520))
        low = warps.halves(x32.view(np.uint32))[:, 0]
        check_same(out[:, 4].view(np.float32), warps.bf16(low).astype(np.float32))
        check_same(out[:, 5].view(np.float32), warps.f16(low).astype(np.float32))


# ---- shuffles and votes ----------------------------------------------------------------------------------------------
def shuffles(run: Run) -> None:
    rng, lanes = numbers(), warps.LANES
    for low, high in ((0, 32), (0, 16), (16, 32)):  # some, nobody and everybody votes yes
        x, y = rng.integers(0, 1 << 32, 32, dtype=np.uint32), rng.integers(low, high, 32)
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


STATEMENTS: dict[str, Callable[[Run], None]] = {
    "ldmatrix_x4": partial(ldmatrix, transposed=False),
    "ldmatrix_x4_trans": partial(ldmatrix, transposed=True),
    **{f"mma_{name}": partial(mma_of_half_types, name=name) for name in ("bf16", "f16")},
    "mma_tf32": mma_tf32,
    "cp_async_16": cp_async,
    "arithmetic": arithmetic,
    "shuffles": shuffles,
}
