"""What the kernels do with one tile of inner products S = q k' [BLOCK_M, BLOCK_N]: logits, weights, products.

With c_ij = |q_i|^2 + |k_j|^2 - 2 S_ij and slope = -2 log2(e) tau, the softmax of tau c over the keys of a query
(``cacr_kernels/reference.py``) is computed from

    v = slope S - slope |k|^2 / 2        the logit in powers of two, one FMA; tau c = ln 2 v + tau |q|^2
    z = v - base                         relative to a base of the query, which is a v: exact where e is not small
    e = 2^z                              one ex2

For inner products (c = -2 S) the norms are left out. Among positives, whose costs may be differences, v = -slope c / 2
and |q|^2 is not added. Means of c are taken from means of z: sum e z is accumulated, and divided by the slope once per
row.

**Keys for the second time.** With WHOLE the last tile begins in the one before, whose keys have the bias mask_bias
there. Other than beyond the last key S is not 0, so v is not quite -mask_bias. But where such a key is in the set, it
was there in the tile before, of this program or of that of the split before, with a v that is larger by far.

**Masked keys.** A key outside the set has v = -mask_bias, with a mask_bias so large that e is exactly 0 whatever else
the key holds, and yet so small that e z, b z and v / slope stay finite. No other v may come that close to it: lengths
that could are made NaN (``norm_in_range``), and |slope| stays within the bounds of ``softmax_of``. Two things change
by those bounds: tau = 0 becomes weights that are uniform for |v / slope| up to 2^50, and a |slope| beyond the largest
one tells costs apart down to its inverse, where all of the weight is on one key anyway. There the last bit of S counts:
e stays below 1 only if the gradient rounds S as the statistics did. A chain of products over the features does,
whichever operand comes first and whatever the chunks; three TF32 products do not if the operands change places.

**Two softmaxes over one set** (rbf, SHARED_SET). The second has z_1 = ratio z, ratio = slope_1 / slope: its lse, of
which that of the first is subtracted, is relative to the very same base.

**The size of mask_bias.** In float32, whose numbers end at 2^128, it is 2^100 min(|slope|, 1), so that
mask_bias / |slope| and b z with b < 2^26 are finite, also of rows that do not count, whose z goes down to -3 mask_bias.
v ends at a quarter of it, which leaves lengths of up to 2^7 to the largest slope. In float64 there is room.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .... import types
from ..launch import release

# The key set of a softmax: one of the kinds of cacr_kernels::contrast, or a set that only these kernels know.
ALL, SAME, OTHER, SAME_NOT_SELF, OTHER_NOT_SELF = (
    tl.constexpr(kind) for kind in (types.ALL, types.SAME, types.OTHER, types.SAME_NOT_SELF, types.OTHER_NOT_SELF)
)
SHARED_SET = tl.constexpr(5)  # of a second softmax: the set of the first, with a temperature of the same sign
NO_SET = tl.constexpr(-1)  # there is no second softmax
LOG2E = tl.constexpr(1.4426950408889634074)
LN2 = tl.constexpr(0.69314718055994530942)
NEAR = tl.constexpr(0.125)  # positives closer than this part of |q|^2 + |k|^2 are recomputed as differences

# Triton before 3.7.1 forgets a fence (``show_copies``). Its interpreter needs none, and knows no PTX.
FENCE_MISSING = tl.constexpr(release(triton.__version__) < (3, 7, 1) and not triton.knobs.runtime.interpret)

# Arguments that change with the batch, or with the number of views. Triton compiles a kernel anew where such a number
# is 1 or is no multiple of 16 any more; an odd last batch must not, nor one view more. (One with fewer rows than a tile
# does where larger ones are WHOLE.) What wide loads depend on, D and pointers, is not among them.
COUNTS = ["N", "M", "B", "V", "P", "ROWS", "rows", "q_rows", "k_rows", "BOUNDS", "SPLITS", "FEATURE_BLOCKS"]
COUNTS += ["PAIRS", "PARTS", "i_first", "j_first", "p_first"]


# ---- values that travel together -------------------------------------------------------------------------------------
# Fields are tensors of Triton. Constants do not belong in here: an assignment would make tensors of them.
class Matrix(NamedTuple):
    """The queries or the keys of one pair of sets, in memory."""

    base: tl.tensor  # pointer to [count, D]
    norm: tl.tensor  # pointer to [count]: squared lengths
    unit: tl.tensor  # pointer to [count]: factors that make unit rows, with NORMALIZE; else not read
    id: tl.tensor  # pointer to [count] int32; of queries with GIVEN_SELF [2, count], the second what they are as keys
    count: tl.tensor
    D: tl.tensor


class Block(NamedTuple):
    """Rows [first, first + SIZE) of a matrix, as a program holds them."""

    matrix: Matrix
    first: tl.tensor
    index: tl.tensor  # [SIZE] int32: positions in the matrix
    norm: tl.tensor  # [SIZE]
    unit: tl.tensor  # [SIZE]
    id: tl.tensor  # [SIZE] int32
    key: tl.tensor  # [SIZE] int32: positions among the keys; of a query that is none of them -1
    new_from: tl.tensor  # with WHOLE: rows before this one were in the tile before


class Softmax(NamedTuple):
    """How one softmax makes v, in the type of the arithmetic."""

    slope: tl.tensor  # of SHARED_SET: its ratio to the slope of the first softmax
    mask_bias: tl.tensor


# ---- blocks of rows --------------------------------------------------------------------------------------------------
@triton.jit
def first_row_and_pair(rows, SIZE: tl.constexpr):
    """First row of a program, and its pair of sets.

    Axis 0 of the grid has the blocks of every pair, because the other axes end at 65535.
    """
    blocks = tl.cdiv(rows, SIZE)
    return tl.program_id(0) % blocks * SIZE, tl.program_id(0) // blocks


@triton.jit
def start_of_tile(j0, count, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """First row of the tile that has row ``j0``. With WHOLE the last tile ends with the rows: no load is masked."""
    return min(j0, count - BLOCK_N) if WHOLE else j0


@triton.jit
def load_rows(base, first, count, D, d0, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Features [d0, d0 + BLOCK_D) of rows [first, first + ROWS) of ``base`` [count, D]; zeros outside.

    With WHOLE nothing is outside, and D is BLOCK_D, so that places in a tile are constants of the code.
    """
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    if WHOLE:
        return tl.load(base + tl.cast(first, tl.int64) * BLOCK_D + (r[:, None] * BLOCK_D + d[None, :]))
    else:
        tile = base + tl.cast(first, tl.int64) * D + d0
        inside = (r[:, None] < count - first) & (d[None, :] < D - d0)
        return tl.load(tile + r[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_vector(base, first, count, SIZE: tl.constexpr, other, WHOLE: tl.constexpr = False):
    """Entries [first, first + SIZE) of ``base`` [count]; ``other`` outside, where with WHOLE nothing is."""
    i = tl.arange(0, SIZE)
    if WHOLE:
        return tl.load(base + tl.cast(first, tl.int64) + i)
    else:
        return tl.load(base + tl.cast(first, tl.int64) + i, mask=i < count - first, other=other)


@triton.jit
def load_tile(matrix, first, d0, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Features [d0, d0 + BLOCK_D) of rows [first, first + ROWS) of a matrix; zeros outside."""
    return load_rows(matrix.base, first, matrix.count, matrix.D, d0, ROWS, BLOCK_D, WHOLE)


@triton.jit
def load_block(
    matrix, first, index, IDS: tl.constexpr, GIVEN_SELF: tl.constexpr = False, NORMALIZE: tl.constexpr = False,
    j0=0, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """The rows ``index`` [SIZE], from ``first`` on, without their features; the ids hold anything unless IDS.

    Rows are the keys at their positions, queries with GIVEN_SELF those that are given. With WHOLE those before ``j0``
    were in the tile before.
    """
    SIZE: tl.constexpr = index.shape[0]
    norm = load_vector(matrix.norm, first, matrix.count, SIZE, 0.0, WHOLE)
    unit = load_vector(matrix.unit, first, matrix.count, SIZE, 0.0, WHOLE) if NORMALIZE else norm
    ids = load_vector(matrix.id, first, matrix.count, SIZE, 0, WHOLE) if IDS else index
    key = load_vector(matrix.id + matrix.count, first, matrix.count, SIZE, -1, WHOLE) if GIVEN_SELF else index
    new_from = j0 if WHOLE else first
    return Block(matrix=matrix, first=first, index=index, norm=norm, unit=unit, id=ids, key=key, new_from=new_from)


@triton.jit
def counting(block, WHOLE: tl.constexpr):
    """Which rows of a tile there are, and were not in the tile before."""
    return block.index >= block.new_from if WHOLE else block.index < block.matrix.count


# ---- inner products and costs ----------------------------------------------------------------------------------------
@triton.jit
def factor(x, PRECISION: tl.constexpr):
    """An operand as TF32 tensor cores take it: they cut the last 13 bits off, which are rounded away here."""
    if PRECISION == "tf32":
        rounded = (x.to(tl.int32, bitcast=True) + 4096).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # rounding up would overflow the bits of a NaN
    else:
        return x


@triton.jit
def show_copies(dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Lets the products that follow see the tiles that a loop has copied to shared memory.

    Those of sm_90 and sm_100 read it by a way of their own, the async proxy, and what ``cp.async`` wrote is sure to be
    seen there only behind a fence: https://github.com/triton-lang/triton/pull/9610. Products of other processors, of
    float64 and without tensor cores take the ordinary way. The GPU of the active driver is asked, not one that is
    compiled for ahead of time.
    """
    if FENCE_MISSING:
        on_cores: tl.constexpr = dtype != tl.float64 and (dtype != tl.float32 or PRECISION != "ieee")
        if on_cores and tl.target_info.cuda_capability_geq(9) and not tl.target_info.cuda_capability_geq(12):
            fence: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, 0;"
            tl.inline_asm_elementwise(fence, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def similarity(
    x, x_tile, y, y_tile, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, acc_type: tl.constexpr
):
    """S of two blocks, from their tiles if CHUNKS is 1 (they hold all features), else in chunks from memory."""
    if CHUNKS == 1:
        x_part, y_part = factor(x_tile, PRECISION), factor(y_tile, PRECISION)
        show_copies(y_part.dtype, PRECISION)
        S = tl.dot(x_part, tl.trans(y_part), input_precision=PRECISION, out_dtype=acc_type)
    else:
        ROWS: tl.constexpr = x.index.shape[0]
        COLUMNS: tl.constexpr = y.index.shape[0]
        S = tl.zeros((ROWS, COLUMNS), dtype=acc_type)
        for d0 in range(0, x.matrix.D, BLOCK_D):
            x_part = factor(load_tile(x.matrix, x.first, d0, ROWS, BLOCK_D), PRECISION)
            y_part = factor(load_tile(y.matrix, y.first, d0, COLUMNS, BLOCK_D), PRECISION)
            show_copies(y_part.dtype, PRECISION)
            S = tl.dot(x_part, tl.trans(y_part), S, input_precision=PRECISION, out_dtype=acc_type)
    return S


@triton.jit
def along(x, ROWS: tl.constexpr):
    """A vector along the rows of a tile, or along its columns."""
    return x[:, None] if ROWS else x[None, :]


@triton.jit
def of_unit_queries(S, queries, AS_ROWS: tl.constexpr, NORMALIZE: tl.constexpr):
    """S times the factors of the queries; those of the keys follow with the slope, which is no work for a tile."""
    if NORMALIZE:
        return S * along(queries.unit, AS_ROWS)
    else:
        return S


@triton.jit
def slope_of(slope, keys, AS_ROWS: tl.constexpr, NORMALIZE: tl.constexpr):
    """What S is multiplied with: the slope, with NORMALIZE times the factor of each key."""
    if NORMALIZE:
        return along(slope * keys.unit, AS_ROWS)
    else:
        return slope


@triton.jit
def unit_difference(x, x_unit, y, y_unit):
    """x_unit x - y_unit y by Kahan, to the precision of a near difference: what rounds the product cancels.

    The product is only ever added to one that an FMA makes, so no compiler can fuse it with a sum. Exchanged it is
    rounded otherwise: whoever needs the same cost twice has to keep the order.
    """
    x, y = tl.broadcast(x, y)
    x_unit, y_unit = tl.broadcast_to(x_unit, x.shape), tl.broadcast_to(y_unit, x.shape)
    product = y_unit * y
    return tl.fma(x_unit, x, -product) + tl.fma(-y_unit, y, product)


@triton.jit
def difference_cost(x, y, S, KEYS_AS_ROWS: tl.constexpr, NORMALIZE: tl.constexpr):
    """|x - y|^2 in the shape and type of S, feature by feature."""
    c = tl.zeros_like(S)
    for d in range(x.matrix.D):
        x_d = load_tile(x.matrix, x.first, d, S.shape[0], 1).to(S.dtype)  # [ROWS, 1]
        y_d = load_tile(y.matrix, y.first, d, S.shape[1], 1).to(S.dtype)  # [COLUMNS, 1]
        if NORMALIZE:
            if KEYS_AS_ROWS:
                difference = unit_difference(tl.trans(y_d), y.unit[None, :], x_d, x.unit[:, None])
            else:
                difference = unit_difference(x_d, x.unit[:, None], tl.trans(y_d), y.unit[None, :])
            c += difference * difference
        else:
            c += (x_d - tl.trans(y_d)) * (x_d - tl.trans(y_d))
    return c


@triton.jit
def positive_cost(x, y, S, KEYS_AS_ROWS: tl.constexpr, NORMALIZE: tl.constexpr):
    """Costs of all pairs of a tile; those of near pairs with equal ids are differences, which do not cancel."""
    if NORMALIZE:
        S = S * along(x.unit if KEYS_AS_ROWS else y.unit, KEYS_AS_ROWS)
    norms = x.norm[:, None] + y.norm[None, :]
    c = norms - 2.0 * S
    near = (x.id[:, None] == y.id[None, :]) & (c <= norms * NEAR) & (norms > 0)
    if tl.max(near.to(tl.int32)) > 0:
        c = tl.where(near, difference_cost(x, y, S, KEYS_AS_ROWS, NORMALIZE), c)
    return c


# ---- logits ----------------------------------------------------------------------------------------------------------
@triton.jit
def uses_cost(SET: tl.constexpr, INNER_PRODUCT: tl.constexpr):
    """Whether v of this softmax is made of costs, as it is among positives."""
    return (SET == SAME or SET == SAME_NOT_SELF) and not INNER_PRODUCT


@triton.jit
def key_bias(norm, slope, SET: tl.constexpr, INNER_PRODUCT: tl.constexpr):
    """What is subtracted in v for each key: slope |k|^2 / 2.

    Where v does not depend on |k|^2 it is 0, but NaN for a NaN, which has to show. Costs hold |k|^2 already.
    """
    if INNER_PRODUCT:
        return 0.0 * norm
    elif SET == SAME or SET == SAME_NOT_SELF:
        return tl.zeros_like(norm)
    else:
        return 0.5 * slope * norm


@triton.jit
def logits(S, c, slope, bias, softmax, x, y, SET: tl.constexpr, INNER_PRODUCT: tl.constexpr):
    """V of one softmax for blocks x and y, one of which are the queries.

    ``slope`` is ``slope_of``, ``bias`` is the ``key_bias``, or ``mask_bias`` where there is no key; both broadcast to
    the shape of S.
    """
    if SET == ALL or SET == OTHER or SET == OTHER_NOT_SELF or INNER_PRODUCT:
        v = slope * S - bias
    else:
        v = -0.5 * softmax.slope * c - bias
    if SET == OTHER:
        v = tl.where(x.id[:, None] != y.id[None, :], v, -softmax.mask_bias)
    if SET == SAME:
        v = tl.where(x.id[:, None] == y.id[None, :], v, -softmax.mask_bias)
    if SET == SAME_NOT_SELF:
        same = x.id[:, None] == y.id[None, :]
        v = tl.where(same & (x.key[:, None] != y.key[None, :]), v, -softmax.mask_bias)
    if SET == OTHER_NOT_SELF:
        other = (x.id[:, None] != y.id[None, :]) & (x.id[:, None] >= 0) & (y.id[None, :] >= 0)
        v = tl.where(other & (x.key[:, None] != y.key[None, :]), v, -softmax.mask_bias)
    return v


@triton.jit
def smallest_slope(acc_type: tl.constexpr):
    """Smallest |slope|, and the inverse of the largest ratio of two."""
    return 2.0**-300 if acc_type == tl.float64 else 2.0**-76


@triton.jit
def largest_mask_bias(acc_type: tl.constexpr):
    """mask_bias for |slope| >= 1: times a coefficient b of up to 2^26 (float64: 2^400) it is finite."""
    return tl.full((), 2.0**600 if acc_type == tl.float64 else 2.0**100, acc_type)


@triton.jit
def softmax_of(tau, acc_type: tl.constexpr):
    """Slope -2 log2(e) tau (float64, a NaN stays) with a size within bounds, and its mask_bias."""
    smallest = smallest_slope(acc_type)
    largest: tl.constexpr = 2.0**580 if acc_type == tl.float64 else 2.0**84
    size = tl.abs(tau) * (2.0 * LOG2E)
    size = tl.where(size < smallest, smallest, tl.where(size > largest, largest, size)).to(acc_type)
    mask_bias = largest_mask_bias(acc_type)
    if acc_type != tl.float64:  # whose range holds mask_bias / smallest
        mask_bias *= tl.minimum(size, 1.0)
    return Softmax(tl.where(tau > 0, -size, size), mask_bias)


@triton.jit
def softmaxes_of(tau, SECOND_SET: tl.constexpr, acc_type: tl.constexpr):
    """The first and the second softmax; without a second one, the first twice."""
    first = softmax_of(tl.load(tau), acc_type)
    second = softmax_of(tl.load(tau + (SECOND_SET != NO_SET)), acc_type)
    if SECOND_SET == SHARED_SET:
        # A ratio that is too large: the first slope grows as far as its weights stay uniform, then the second is cut.
        slope0, slope1 = first.slope, second.slope
        size1 = tl.abs(slope1)
        enough = tl.minimum(size1 * smallest_slope(acc_type), 2.0**-60 if acc_type == tl.float64 else 2.0**-40)
        slope0 = tl.where(tl.abs(slope0) < enough, tl.where(slope1 < 0, -enough, enough), slope0)
        most = tl.abs(slope0) / smallest_slope(acc_type)
        ratio = tl.where(size1 > most, tl.where(slope1 < 0, -most, most), slope1) / slope0
        ratio = tl.where(ratio < 0, float("nan"), ratio)  # the largest z_1 is not where the largest z is
        mask_bias = first.mask_bias
        if acc_type != tl.float64:
            mask_bias = largest_mask_bias(acc_type) * tl.minimum(tl.minimum(tl.abs(slope0), 1.0), 1.0 / ratio)
        return Softmax(slope0, mask_bias), Softmax(ratio, second.mask_bias)
    else:
        return first, second


@triton.jit
def norm_in_range(norm, tau, acc_type: tl.constexpr):
    """Squared lengths as they are, but NaN where v could come near mask_bias and be taken for a masked key.

    And where the smallest slope, which stands for tau = 0, would tell costs apart.
    """
    size = tl.abs(softmax_of(tau, acc_type).slope)
    most = 0.25 * largest_mask_bias(acc_type) / tl.maximum(size, 1.0)
    most = tl.where(size > smallest_slope(acc_type), most, 2.0**-14 / smallest_slope(acc_type))
    return tl.where(norm > most, float("nan"), norm)


# ---- products with coefficients --------------------------------------------------------------------------------------
@triton.jit
def multiply(H, y, acc, PRECISION: tl.constexpr):
    """Add H y to ``acc``; where y is of a half type, H is rounded to it once and has to be scaled into its range."""
    if y.dtype == tl.bfloat16 or y.dtype == tl.float16:
        return tl.dot(H.to(y.dtype), y, acc, out_dtype=acc.dtype)
    else:
        return tl.dot(factor(H, PRECISION), factor(y, PRECISION), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def as_multiplied(H, y):
    """H as ``multiply`` takes it, for sums that it has to cancel with."""
    if y.dtype == tl.bfloat16 or y.dtype == tl.float16:
        return H.to(y.dtype).to(H.dtype)
    else:
        return H


@triton.jit
def multiply_in_pieces(H, y, acc, PRECISION: tl.constexpr):
    """The same, but of a half type H has two pieces: for sums that nearly cancel later."""
    if y.dtype == tl.bfloat16 or y.dtype == tl.float16:
        high = H.to(y.dtype)
        acc = multiply(H - high.to(acc.dtype), y, acc, PRECISION)
        return multiply(high, y, acc, PRECISION)
    else:
        return multiply(H, y, acc, PRECISION)
