"""What the kernels do with a tile of similarities S = x.y [ROWS, COLS].

With slope = -2 log2(e) tau, a softmax sees in it

    v = slope S - slope |k|^2 / 2        the logit in powers of two, one FMA: c = |q|^2 - 2 v / slope (inner: no norms)
    z = v - base                         relative to a base of the query, which is a v: exact where e is not small
    e = 2^z                              one ex2

For positives v = -slope c / 2, and |q|^2 is not added. Means of c are taken from means of z: sum e z is accumulated,
and divided by the slope once per row.

A key outside the set has v = -huge: e is exactly 0 whatever else the key holds, and e z, b z and v / slope stay finite.
So nothing else may be that far from 0 (``in_range``), and |slope| stays within [least, most] of ``slope_of``. What that
changes: tau = 0 becomes weights that are uniform for |v / slope| up to 2^50, and a |slope| beyond the most tells costs
apart down to its inverse, where all of the weight is on one key anyway. There the last bit of S counts: e stays below 1
if the gradient rounds S as the statistics did. A chain of products over the features does, whichever operand comes
first and whatever the chunks; three TF32 products do not if the operands change places.

A second softmax over the same set (rbf, AGAIN) has z_1 = ratio z, ratio = slope_1 / slope: its lse, of which that of
the first is subtracted, is relative to the very same base.

In float32, whose numbers end at 2^128, huge = 2^100 min(|slope|, 1), so that huge / |slope| and b z with b < 2^26 are
finite; v ends at a quarter of huge, which leaves lengths of up to 2^7 to the largest slope. In float64 there is room.
"""

import triton
import triton.language as tl

ALL = tl.constexpr(0)  # kinds of key sets: csrc/common/problem.h, but for AGAIN
SAME = tl.constexpr(1)
OTHER = tl.constexpr(2)
SAME_NOT_SELF = tl.constexpr(3)
AGAIN = tl.constexpr(4)  # second softmax: the set of the first, and a temperature of the same sign
NONE = tl.constexpr(-1)  # no second softmax
LOG2E = tl.constexpr(1.4426950408889634074)
LN2 = tl.constexpr(0.69314718055994530942)
NEAR = tl.constexpr(0.125)  # positives closer than this share of |q|^2 + |k|^2 are recomputed as differences


@triton.jit
def row_and_problem(rows, SIZE: tl.constexpr):
    """First row and problem of a program. Axis 0 of the grid has the blocks of every problem: others end at 65535."""
    blocks = tl.cdiv(rows, SIZE)
    return tl.program_id(0) % blocks * SIZE, tl.program_id(0) // blocks


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
def half_norm(key_norm, slope, kind: tl.constexpr, INNER: tl.constexpr):
    """What is subtracted in v. A length that is NaN shows (where v is made of costs, in those)."""
    if INNER:
        return 0.0 * key_norm
    elif kind == SAME or kind == SAME_NOT_SELF:
        return tl.zeros_like(key_norm)
    else:
        return 0.5 * slope * key_norm


@triton.jit
def level(S, c, bias, slope, huge, kind: tl.constexpr, INNER: tl.constexpr, x_id, y_id, x_row, y_row):
    """Make v of one softmax; ``bias`` is half_norm of the keys, huge where there is no key, in two dimensions."""
    if kind == ALL or kind == OTHER or INNER:
        v = slope * S - bias
    else:
        v = -0.5 * slope * c - bias
    if kind == OTHER:
        v = tl.where(x_id[:, None] != y_id[None, :], v, -huge)
    if kind == SAME:
        v = tl.where(x_id[:, None] == y_id[None, :], v, -huge)
    if kind == SAME_NOT_SELF:
        v = tl.where((x_id[:, None] == y_id[None, :]) & (x_row[:, None] != y_row[None, :]), v, -huge)
    return v


@triton.jit
def least(acc_type: tl.constexpr):
    """Smallest |slope|, and the inverse of the largest ratio of two."""
    return 2.0**-300 if acc_type == tl.float64 else 2.0**-76


@triton.jit
def slope_of(tau, acc_type: tl.constexpr):
    """-2 log2(e) tau (float64, NaN stays) with a size within [least, most], and huge for it."""
    smallest = least(acc_type)
    most: tl.constexpr = 2.0**580 if acc_type == tl.float64 else 2.0**84
    size = tl.abs(tau) * (2.0 * LOG2E)
    size = tl.where(size < smallest, smallest, tl.where(size > most, most, size)).to(acc_type)
    huge = limit(acc_type)
    if acc_type != tl.float64:  # whose range holds huge / least
        huge *= tl.minimum(size, 1.0)
    return tl.where(tau > 0, -size, size), huge


@triton.jit
def slopes_of(tau, KIND1: tl.constexpr, acc_type: tl.constexpr):
    """Slope and huge of the first and of the second softmax; of AGAIN its ratio to the first, which then has both."""
    slope0, huge0 = slope_of(tl.load(tau), acc_type)
    slope1, huge1 = slope_of(tl.load(tau + (KIND1 != NONE)), acc_type)
    if KIND1 == AGAIN:
        # A ratio that is too large: the first slope grows as far as its weights stay uniform, then the second is cut
        size1 = tl.abs(slope1)
        enough = tl.minimum(size1 * least(acc_type), 2.0**-60 if acc_type == tl.float64 else 2.0**-40)
        slope0 = tl.where(tl.abs(slope0) < enough, tl.where(slope1 < 0, -enough, enough), slope0)
        most = tl.abs(slope0) / least(acc_type)
        slope1 = tl.where(size1 > most, tl.where(slope1 < 0, -most, most), slope1) / slope0
        slope1 = tl.where(slope1 < 0, float("nan"), slope1)  # the largest z_1 is not where the largest z is
        if acc_type != tl.float64:
            huge0 = limit(acc_type) * tl.minimum(tl.minimum(tl.abs(slope0), 1.0), 1.0 / slope1)
    return slope0, huge0, slope1, huge1


@triton.jit
def limit(acc_type: tl.constexpr):
    """What huge is for a size of at least 1: a coefficient b of up to 2^26 (float64: 2^400) times it is finite."""
    return tl.full((), 2.0**600 if acc_type == tl.float64 else 2.0**100, acc_type)


@triton.jit
def in_range(norm, tau, acc_type: tl.constexpr):
    """Squared lengths as they are, but NaN where v could come near huge: it must be seen, not taken for no key.

    And where the smallest slope, which stands for tau = 0, would tell costs apart.
    """
    slope, _ = slope_of(tau, acc_type)
    size = tl.abs(slope)
    most = 0.25 * limit(acc_type) / tl.maximum(size, 1.0)
    most = tl.where(size > least(acc_type), most, 2.0**-14 / least(acc_type))
    return tl.where(norm > most, float("nan"), norm)


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
