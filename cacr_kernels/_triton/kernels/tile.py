"""What the kernels do with a tile of similarities S = x.y [ROWS, COLS].

With slope = -2 log2(e) tau, a softmax sees in it

    v = sign(slope) (S - |k|^2 / 2)      so that c = |q|^2 - 2 sign v   (inner cost: no norms)
    z = |slope| v - base                 the logit in powers of two, relative to a base of the query: one FMA
    e = 2^z                              one ex2

where v of a key outside the set is -HUGE, so that e is exactly 0 whatever else the key holds. |slope| is no smaller
than TINY, which keeps that true for tau = 0, and lets means of c be taken from means of z: sum e z is accumulated, and
divided by |slope| once per row. For positives v = -sign c / 2, and |q|^2 is not added.
"""

import triton
import triton.language as tl

ALL = tl.constexpr(0)  # kinds of key sets: csrc/common/problem.h
SAME = tl.constexpr(1)
OTHER = tl.constexpr(2)
SAME_NOT_SELF = tl.constexpr(3)
NONE = tl.constexpr(-1)  # no second softmax
HUGE = tl.constexpr(2.0**100)
TINY = tl.constexpr(2.0**-88)
LOG2E = tl.constexpr(1.4426950408889634074)
LN2 = tl.constexpr(0.69314718055994530942)
NEAR = tl.constexpr(0.125)  # positives closer than this share of |q|^2 + |k|^2 are recomputed as differences


@triton.jit
def load_rows(base, first, count, D, d0, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features [d0, d0 + BLOCK_D) of rows [first, first + ROWS) of ``base`` [count, D]; zeros outside."""
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    tile = base + tl.cast(first, tl.int64) * D + d0
    inside = (r[:, None] < count - first) & (d[None, :] < D - d0)
    return tl.load(tile + r[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_vector(base, first, count, SIZE: tl.constexpr, other):
    """Entries [first, first + SIZE) of ``base`` [count]; ``other`` outside."""
    i = tl.arange(0, SIZE)
    return tl.load(base + tl.cast(first, tl.int64) + i, mask=i < count - first, other=other)


@triton.jit
def factor(x, PRECISION: tl.constexpr):
    """What TF32 tensor cores are given: they cut the last 13 bits off, which here are rounded away first."""
    if PRECISION == "tf32":
        rounded = (x.to(tl.int32, bitcast=True) + 4096).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # a NaN may not run over
    else:
        return x


@triton.jit
def similarity(
    x_tile, x_base, i0, N, y_tile, y_base, j0, M, D, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, acc_type: tl.constexpr,
):  # fmt: skip
    """S, from the tiles if they hold all features, else in chunks of features from memory."""
    if CHUNKS == 1:
        x, y = factor(x_tile, PRECISION), factor(y_tile, PRECISION)
        S = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=acc_type)
    else:
        S = tl.zeros((ROWS, COLS), dtype=acc_type)
        for d0 in range(0, D, BLOCK_D):
            x = factor(load_rows(x_base, i0, N, D, d0, ROWS, BLOCK_D), PRECISION)
            y = factor(load_rows(y_base, j0, M, D, d0, COLS, BLOCK_D), PRECISION)
            S = tl.dot(x, tl.trans(y), S, input_precision=PRECISION, out_dtype=acc_type)
    return S


@triton.jit
def difference_cost(x_base, i0, N, y_base, j0, M, D, S):
    """|x - y|^2 in the shape and type of S, feature by feature."""
    c = tl.zeros_like(S)
    for d in range(D):
        x = load_rows(x_base, i0, N, D, d, S.shape[0], 1).to(S.dtype)  # [ROWS, 1]
        y = load_rows(y_base, j0, M, D, d, S.shape[1], 1).to(S.dtype)  # [COLS, 1]
        c += (x - tl.trans(y)) * (x - tl.trans(y))
    return c


@triton.jit
def positive_cost(x_base, x_norm, x_id, i0, N, y_base, y_norm, y_id, j0, M, D, S):
    """Costs of all pairs of a tile; those of near pairs with equal ids are differences, which do not cancel."""
    norms = x_norm[:, None] + y_norm[None, :]
    c = norms - 2.0 * S
    near = (x_id[:, None] == y_id[None, :]) & (c <= norms * NEAR) & (norms > 0)
    if tl.max(near.to(tl.int32)) > 0:
        c = tl.where(near, difference_cost(x_base, i0, N, y_base, j0, M, D, S), c)
    return c


@triton.jit
def by_cost(kind: tl.constexpr, INNER: tl.constexpr):
    """Whether v of this softmax is made of costs: those of positives."""
    return (kind == SAME or kind == SAME_NOT_SELF) and not INNER


@triton.jit
def half_norm(key_norm, sign, kind: tl.constexpr, INNER: tl.constexpr):
    """What is subtracted in v."""
    if INNER or kind == SAME or kind == SAME_NOT_SELF:
        return tl.zeros_like(key_norm)
    else:
        return 0.5 * sign * key_norm


@triton.jit
def level(S, c, bias, sign, kind: tl.constexpr, INNER: tl.constexpr, x_id, y_id, x_row, y_row):
    """Make v of one softmax; ``bias`` is half_norm of the keys, HUGE where there is no key, in two dimensions."""
    if kind == ALL or kind == OTHER or INNER:
        v = sign * S - bias
    else:
        v = -0.5 * sign * c - bias
    if kind == OTHER:
        v = tl.where(x_id[:, None] != y_id[None, :], v, -HUGE)
    if kind == SAME:
        v = tl.where(x_id[:, None] == y_id[None, :], v, -HUGE)
    if kind == SAME_NOT_SELF:
        v = tl.where((x_id[:, None] == y_id[None, :]) & (x_row[:, None] != y_row[None, :]), v, -HUGE)
    return v


@triton.jit
def slope_of(tau, acc_type: tl.constexpr):
    """Sign and size of -2 log2(e) tau, float64; the size is at least TINY, NaN and Inf stay."""
    slope = (tau * (-2.0 * LOG2E)).to(acc_type)
    size = tl.abs(slope)
    return tl.where(slope < 0, -1.0, 1.0).to(acc_type), tl.where(size < TINY, TINY, size).to(acc_type)


@triton.jit
def multiply(H, y, acc, PRECISION: tl.constexpr):
    """Add H y to acc; where y is of a half type, H is multiplied in pieces that are exact in that type.

    bfloat16: three pieces of 8 bits are all of a float32. float16: two of 11 bits; H has to be scaled into its range.
    """
    if y.dtype == tl.bfloat16:
        high = top_bits(H)
        middle = top_bits(H - high)
        low = H - high - middle
        acc = tl.dot(low.to(tl.bfloat16), y, acc, out_dtype=acc.dtype)
        acc = tl.dot(middle.to(tl.bfloat16), y, acc, out_dtype=acc.dtype)
        return tl.dot(high.to(tl.bfloat16), y, acc, out_dtype=acc.dtype)
    elif y.dtype == tl.float16:
        high = H.to(tl.float16)
        low = (H - high.to(tl.float32)).to(tl.float16)
        acc = tl.dot(low, y, acc, out_dtype=acc.dtype)
        return tl.dot(high, y, acc, out_dtype=acc.dtype)
    else:
        return tl.dot(factor(H, PRECISION), factor(y, PRECISION), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def top_bits(x):
    """The leading 8 bits of each number, which is what a bfloat16 holds."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
