"""Gradient of a block of embeddings x, recomputing similarities tile by tile.

With g_ij = dL/dc_ij (coefficients.py), c = |q - k|^2 (``cacr_kernels/reference.py``, Gradients):

    dL/dq_i = 2 (q_i sum_j g_ij - sum_j g_ij k_j),   dL/dk_j = 2 (k_j sum_i g_ij - sum_i g_ij q_i)

The two are the same with the roles exchanged. So a program holds BLOCK_M rows of x, one side, and walks over the other
side y, for every pair of sets that its view takes part in. Coefficients belong to queries: they stand along the rows of
a tile if x are the queries, else along its columns. No atomics: every gradient is written by one program, or in splits
that total.py adds in order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .coefficients import BASE, MEAN_U, RATIO, A, B
from .tile import (
    ALL,
    COUNTS,
    NO_SET,
    SHARED_SET,
    Matrix,
    along,
    as_multiplied,
    counting,
    key_bias,
    load_block,
    load_tile,
    load_vector,
    logits,
    multiply,
    of_unit_queries,
    positive_cost,
    show_copies,
    similarity,
    slope_of,
    softmaxes_of,
    start_of_tile,
    uses_cost,
)
from .unit import inverse_power, largest_unit


class Sums(NamedTuple):
    """What a program adds up over the tiles of y."""

    gy: tl.tensor  # [BLOCK_M, BLOCK_OUT]: sum_j g_ij y_j
    g: tl.tensor  # [BLOCK_M]: sum_j g_ij
    lost: tl.tensor  # [BLOCK_M]: what rounding took from that sum
    moment0: tl.tensor  # [BLOCK_M]: sum_j e_ij (u_ij - mean u)^2 of the first softmax, u = v / slope
    moment1: tl.tensor  # [BLOCK_M]


class OtherSide(NamedTuple):
    """What a program walks over in one pair of sets: rows [begin, end) of y."""

    matrix: Matrix
    begin: tl.tensor
    end: tl.tensor
    d_out: tl.tensor  # first of the features that the program writes
    unit_scale: tl.tensor  # float16, with NORMALIZE: takes the factors of its rows, and dL/dc, into its range


class RowCoefficients(NamedTuple):
    """The coefficients of the queries of one pair of sets."""

    base: tl.tensor  # pointer to [5, softmaxes, P, queries] at the pair of the first softmax
    softmax_stride: tl.tensor
    stride: tl.tensor  # of quantities
    scale: tl.tensor  # takes dL/dc into the range of float16


class Options(NamedTuple):
    """Constants of a sweep, which stay constants only as an argument: never assign it to a name in a kernel."""

    AS_QUERY: tl.constexpr  # x are the queries
    FIRST_SET: tl.constexpr
    SECOND_SET: tl.constexpr
    CANCELLING: tl.constexpr
    INNER_PRODUCT: tl.constexpr
    NORMALIZE: tl.constexpr
    WANT_TAU: tl.constexpr
    PRECISION: tl.constexpr
    CHUNKS: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_OUT: tl.constexpr
    GIVEN_SELF: tl.constexpr
    WHOLE: tl.constexpr


@triton.jit
def range_scale(bound, BOUNDS, acc_type: tl.constexpr):
    """A power of two that takes the largest dL/dc to about 2^12, in the upper half of the range of float16."""
    most = tl.zeros((128,), dtype=acc_type)
    for b in range(0, BOUNDS, 128):
        most = tl.maximum(most, load_vector(bound, b, BOUNDS, 128, 0.0))
    largest = tl.max(most, 0)
    power = 12.0 - tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0)))
    return tl.exp2(tl.minimum(tl.maximum(power, -96.0), 96.0))


@triton.jit
def coefficient(pointer, queries, AS_QUERY: tl.constexpr, WHOLE: tl.constexpr, other=0.0):
    """One coefficient of a block of queries, along the rows of a tile or along its columns; ``other`` outside."""
    SIZE: tl.constexpr = queries.index.shape[0]
    WHOLE_COLUMNS: tl.constexpr = WHOLE and not AS_QUERY
    return along(load_vector(pointer, queries.first, queries.matrix.count, SIZE, other, WHOLE_COLUMNS), AS_QUERY)


@triton.jit
def base_of_queries(pointer, softmax, queries, AS_QUERY: tl.constexpr, WHOLE: tl.constexpr):
    """The base of a block of queries; where none counts it is so large that there is no weight."""
    base = coefficient(pointer, queries, AS_QUERY, WHOLE, 2.0 * softmax.mask_bias)
    if WHOLE and not AS_QUERY:
        return tl.where(along(counting(queries, WHOLE), AS_QUERY), base, 2.0 * softmax.mask_bias)
    else:
        return base


@triton.jit
def tile_logits(
    S, c, softmax, x, y,
    AS_QUERY: tl.constexpr, SET: tl.constexpr, INNER_PRODUCT: tl.constexpr, NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """V of a tile. Keys that do not count are masked where they are columns; as rows they are not written."""
    bias = key_bias(y.norm if AS_QUERY else x.norm, softmax.slope, SET, INNER_PRODUCT)
    if AS_QUERY:
        bias = tl.where(counting(y, WHOLE), bias, softmax.mask_bias)
    slope = slope_of(softmax.slope, y if AS_QUERY else x, not AS_QUERY, NORMALIZE)
    return logits(S, c, slope, along(bias, not AS_QUERY), softmax, x, y, SET, INNER_PRODUCT)


@triton.jit
def add_exactly(total, lost, x):
    """Kahan's sum: the equal terms of uniform weights are all rounded the same way."""
    y = x - lost
    new = total + y
    return new, (new - total) - y


@triton.jit
def squares(z, e, base, mean, inverse):
    """Sums over the columns of e (u - mean u)^2, u = (z + base) / slope; what belongs to a row comes together first."""
    d = z * inverse + (base * inverse - mean)
    return tl.sum(e * d * d, 1)


@triton.jit
def cost_gradients(S, x, y, rows, first, second, options):
    """The scaled g of a tile, and what its e add to both moments of its rows.

    S, c, v, z, e and g are tiles [BLOCK_M, BLOCK_N].
    """
    AS_QUERY: tl.constexpr = options.AS_QUERY
    FIRST_SET: tl.constexpr = options.FIRST_SET
    SECOND_SET: tl.constexpr = options.SECOND_SET
    INNER_PRODUCT: tl.constexpr = options.INNER_PRODUCT
    NORMALIZE: tl.constexpr = options.NORMALIZE
    WHOLE: tl.constexpr = options.WHOLE
    MOMENTS: tl.constexpr = options.WANT_TAU and AS_QUERY
    queries = x if AS_QUERY else y
    row0, row1, stride = rows.base, rows.base + rows.softmax_stride, rows.stride
    moment0 = tl.zeros((S.shape[0],), dtype=S.dtype)
    moment1 = moment0
    S = of_unit_queries(S, queries, AS_QUERY, NORMALIZE)
    if uses_cost(FIRST_SET, INNER_PRODUCT) or uses_cost(SECOND_SET, INNER_PRODUCT):
        c = positive_cost(x, y, S, not AS_QUERY, NORMALIZE)
    else:
        c = S  # not read
    v = tile_logits(S, c, first, x, y, AS_QUERY, FIRST_SET, INNER_PRODUCT, NORMALIZE, WHOLE)
    base = base_of_queries(row0 + BASE * stride, first, queries, AS_QUERY, WHOLE)
    z = v - base
    e = tl.exp2(z)
    a = coefficient(row0 + A * stride, queries, AS_QUERY, WHOLE) * rows.scale
    b = coefficient(row0 + B * stride, queries, AS_QUERY, WHOLE) * rows.scale
    g = e * (b * z + a)
    if MOMENTS:
        mean = coefficient(row0 + MEAN_U * stride, queries, AS_QUERY, WHOLE)
        moment0 = squares(z, e, base, mean, 1.0 / first.slope)
    if SECOND_SET != NO_SET:
        if SECOND_SET == SHARED_SET:
            z = second.slope * z
            base, inverse = base * second.slope, 1.0 / (first.slope * second.slope)
        else:
            v = tile_logits(S, c, second, x, y, AS_QUERY, SECOND_SET, INNER_PRODUCT, NORMALIZE, WHOLE)
            base = base_of_queries(row1 + BASE * stride, second, queries, AS_QUERY, WHOLE)
            z, inverse = v - base, 1.0 / second.slope
        e1 = tl.exp2(z)
        a = coefficient(row1 + A * stride, queries, AS_QUERY, WHOLE) * rows.scale
        b = coefficient(row1 + B * stride, queries, AS_QUERY, WHOLE) * rows.scale
        if options.CANCELLING:
            ratio = coefficient(row1 + RATIO * stride, queries, AS_QUERY, WHOLE)
            g += a * (e1 - ratio * e) + b * (e1 * z)
        else:
            g += e1 * (b * z + a)
        if MOMENTS:
            mean = coefficient(row1 + MEAN_U * stride, queries, AS_QUERY, WHOLE)
            moment1 = squares(z, e1, base, mean, inverse)
    return g, moment0, moment1


@triton.jit
def sweep(sums, x, x_tile, other, rows, first, second, options):
    """``sums`` with those over the rows of the other side added, for one pair of sets."""
    acc_type: tl.constexpr = x.norm.dtype
    NORMALIZE: tl.constexpr = options.NORMALIZE
    IDS: tl.constexpr = options.FIRST_SET != ALL or options.SECOND_SET > ALL
    WHOLE: tl.constexpr = options.WHOLE
    for j0 in range(other.begin, other.end, options.BLOCK_N):
        first_row = start_of_tile(j0, other.matrix.count, options.BLOCK_N, WHOLE)
        columns = first_row + tl.arange(0, options.BLOCK_N)
        y_tile = load_tile(other.matrix, first_row, other.d_out, options.BLOCK_N, options.BLOCK_OUT, WHOLE)
        GIVEN: tl.constexpr = options.GIVEN_SELF and not options.AS_QUERY
        y = load_block(other.matrix, first_row, columns, IDS, GIVEN, NORMALIZE, j0, WHOLE)
        S = similarity(x, x_tile, y, y_tile, options.BLOCK_D, options.CHUNKS, options.PRECISION, acc_type)
        g, moment0, moment1 = cost_gradients(S, x, y, rows, first, second, options)
        if NORMALIZE:
            total, lost = sums.g, sums.lost  # x sum g points along x, of which nothing stays
            g *= (y.unit * other.unit_scale)[None, :]  # not in a and b, for which it may be too large
        else:
            g = as_multiplied(g, y_tile)  # x sum g - sum g y: of near rows hardly anything stays
            total, lost = add_exactly(sums.g, sums.lost, tl.sum(g, 1))
        if options.CHUNKS > 1:  # else the similarities were made of the same tile
            show_copies(y_tile.dtype, options.PRECISION)
        gy = multiply(g, y_tile, sums.gy, options.PRECISION)
        sums = Sums(gy, total, lost, sums.moment0 + moment0, sums.moment1 + moment1)
    return sums


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    # embeddings, and what is known of them
    x,  # [views of x, N, D]: whose gradient is computed
    y,  # [views of y, M, D]: the other side
    x_norm,  # [views of x, N] squared lengths, in the type of the arithmetic
    y_norm,  # [views of y, M]
    x_unit,  # [views of x, N] factors that make unit rows, with NORMALIZE; else None
    y_unit,  # [views of y, M]
    x_id,  # [N] int32; not read where both sets are ALL
    y_id,  # [M]
    tau,  # [softmaxes] float64, signed
    x_view,  # [P] int32: the view that x is in a pair of sets
    y_view,  # [P]
    # what their rows receive
    coefficients,  # [5, softmaxes, P, queries], of coefficients_kernel
    bound,  # [BOUNDS], of coefficients_kernel
    # results, in the type of the arithmetic
    grad,  # [SPLITS, views of x, N, D]
    moment,  # [SPLITS, softmaxes, P, N], where wanted: sum e (u - mean u)^2, u = v / slope
    # sizes
    N,  # rows of x
    M,  # rows of y
    D,  # features
    P,  # pairs of a query set and a key set
    BOUNDS,
    split_size,  # rows of y for a program, a multiple of BLOCK_N
    SPLITS,
    # what is computed, and how
    QUERY: tl.constexpr,  # x are the queries, else the keys
    FIRST_SET: tl.constexpr,
    SECOND_SET: tl.constexpr,
    CANCELLING: tl.constexpr,  # two softmaxes over one set
    INNER_PRODUCT: tl.constexpr,
    WANT_TAU: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_D features; 1: a tile holds them all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,  # features of the gradient that a program writes; BLOCK_D if that is all of them
    NORMALIZE: tl.constexpr = False,  # rows are made unit rows; a part of grad along x is left out: unit.py
    GIVEN_SELF: tl.constexpr = False,  # the ids of the queries are [2, queries]: and which keys they are themselves
    WHOLE: tl.constexpr = False,  # D = BLOCK_D and M >= BLOCK_N: tiles of y need no masks
):
    """Grid: blocks of x, views of x times splits of y, blocks of features."""
    acc_type: tl.constexpr = x_norm.dtype.element_ty
    i0, d_out = tl.program_id(0) * BLOCK_M, tl.program_id(2) * BLOCK_OUT
    view, split = (tl.program_id(1) // SPLITS).to(tl.int64), tl.program_id(1) % SPLITS
    begin = split * split_size
    end = min(begin + split_size, M)
    rows = i0 + tl.arange(0, BLOCK_M)
    x_factors = x_unit + view * N if NORMALIZE else x_norm
    own = Matrix(x + view * N * D, x_norm + view * N, x_factors, x_id, N, D)
    block = load_block(own, i0, rows, FIRST_SET != ALL or SECOND_SET > ALL, GIVEN_SELF and QUERY, NORMALIZE)
    x_tile = load_tile(own, i0, 0, BLOCK_M, BLOCK_D) if CHUNKS == 1 else i0  # [BLOCK_M, BLOCK_D]
    first, second = softmaxes_of(tau, SECOND_SET, acc_type)
    scale = range_scale(bound, BOUNDS, acc_type) if x.dtype.element_ty == tl.float16 else 1.0
    if NORMALIZE and x.dtype.element_ty == tl.float16:
        most = tl.zeros((1024,), dtype=acc_type)
        for p in range(P):
            last = tl.where(tl.load(x_view + p) == view, end, begin)
            most = largest_unit(y_unit + tl.load(y_view + p).to(tl.int64) * M, begin, last, M, most)
        unit_scale = scale * inverse_power(most)
    else:
        unit_scale = 1.0
    SOFTMAXES: tl.constexpr = 1 if SECOND_SET == NO_SET else 2
    queries = tl.cast(N if QUERY else M, tl.int64)
    one = P * queries  # rows of one softmax
    stride = SOFTMAXES * one  # rows of one quantity
    nothing = tl.zeros((BLOCK_M,), dtype=acc_type)
    gy, g, lost = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=acc_type), nothing, nothing
    for p in range(P):
        here, there = tl.load(x_view + p).to(tl.int64), tl.load(y_view + p).to(tl.int64)
        coefficients_of_pair = RowCoefficients(coefficients + p * queries, one, stride, 1.0 if NORMALIZE else scale)
        y_factors = y_unit + there * M if NORMALIZE else y_norm
        other = Matrix(y + there * M * D, y_norm + there * M, y_factors, y_id, M, D)
        # A view walks over nothing in a pair of sets that it takes no part in.
        sums = sweep(
            Sums(gy, g, lost, nothing, nothing),
            block,
            x_tile,
            OtherSide(other, begin, tl.where(here == view, end, begin), d_out, unit_scale),
            coefficients_of_pair,
            first,
            second,
            Options(
                QUERY, FIRST_SET, SECOND_SET, CANCELLING, INNER_PRODUCT, NORMALIZE, WANT_TAU, PRECISION, CHUNKS,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_OUT, GIVEN_SELF, WHOLE,
            ),
        )  # fmt: skip
        gy, g, lost = sums.gy, sums.g, sums.lost
        if QUERY and WANT_TAU:
            out = moment + split * stride + p * queries + rows
            inside = rows < tl.where(here == view, N, 0)
            tl.store(out, sums.moment0, mask=inside)
            if SECOND_SET != NO_SET:
                tl.store(out + one, sums.moment1, mask=inside)
    d = d_out + tl.arange(0, BLOCK_OUT)
    if INNER_PRODUCT or NORMALIZE:
        total = -2.0 * gy
    else:
        tile = load_tile(own, i0, d_out, BLOCK_M, BLOCK_OUT).to(acc_type)
        total = 2.0 * (tile * g[:, None] - gy)
    if x.dtype.element_ty == tl.float16:
        total = total / (unit_scale if NORMALIZE else scale)
    out = grad + ((split * (tl.num_programs(1) // SPLITS) + view) * N + i0) * D
    r = tl.arange(0, BLOCK_M)
    tl.store(out + r[:, None] * D + d[None, :], total, mask=(r[:, None] < N - i0) & (d[None, :] < D))
