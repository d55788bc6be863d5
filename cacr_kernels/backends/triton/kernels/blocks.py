"""Gradients of many features: a block of coefficients g_ij is stored, and then multiplied with rows of all features.

    dL/dq_i = 2 (q_i sum_j g_ij - sum_j g_ij k_j),   dL/dk_j = 2 (k_j sum_i g_ij - sum_i g_ij q_i)

gradient.py keeps g in registers, and has room there for the sums of BLOCK_OUT features: with more of them it forms each
similarity again for every BLOCK_OUT. Here ``block_kernel`` forms it once, for the queries and the keys, and rounds g
once to the type of the embeddings; ``product_kernel`` is a matrix product.

With NORMALIZE the block holds g_ij r_i r_j, which serves both sides: sum_j g_ij r_j k_j is 1 / r_i times the product
of a row with k_j, and likewise for a column.

A block is padded with zeros to whole tiles. So its loads need no masks, which would have to be known to be aligned.

With BOTH_ROLES the queries are the keys, and a block holds g_ij + g_ji: what row i receives as a query and as a key.
In a block on the diagonal no tile is formed below it. Those that lie right of it are written at their transposed place,
too, and their column sums are parts of the sums of the rows there. Rows that do not exist are no keys there: the keys
and queries that they meet in tiles right of the diagonal do not exist either, and they are written nowhere.
"""

import triton
import triton.language as tl

from .gradient import Options, RowCoefficients, cost_gradients, range_scale
from .tile import (
    ALL,
    COUNTS,
    NO_SET,
    Block,
    Matrix,
    first_row_and_pair,
    load_block,
    load_rows,
    load_tile,
    load_vector,
    multiply,
    show_copies,
    similarity,
    softmaxes_of,
)
from .unit import inverse_power, largest_unit


@triton.jit(do_not_specialize=COUNTS)
def scale_kernel(
    # inputs
    bound,  # [BOUNDS], of coefficients_kernel
    q_unit,  # [q_rows] factors that make unit rows, with NORMALIZE; else None
    k_unit,  # [k_rows]
    # result
    scale,  # [2]: takes dL/dc into the range of float16, and with NORMALIZE the factors of unit rows to about 1
    # sizes
    BOUNDS,
    q_rows,
    k_rows,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program."""
    acc_type: tl.constexpr = scale.dtype.element_ty
    tl.store(scale, range_scale(bound, BOUNDS, acc_type))
    if NORMALIZE:
        nothing = tl.zeros((BLOCK,), dtype=acc_type)
        of_queries = inverse_power(largest_unit(q_unit, 0, q_rows, q_rows, nothing))
        tl.store(scale + 1, of_queries * inverse_power(largest_unit(k_unit, 0, k_rows, k_rows, nothing)))


@triton.jit
def sums_of_tile(column_sums, tile_row, p, HEIGHT, WIDTH, BLOCK_M: tl.constexpr):
    """Where the column sums of a tile of rows lie."""
    pairs = tl.num_programs(0) // (HEIGHT // BLOCK_M)
    return column_sums + (tl.cast(tile_row // BLOCK_M, tl.int64) * pairs + p) * WIDTH


@triton.jit(do_not_specialize=COUNTS)
def block_kernel(
    # embeddings, and what is known of them
    q,  # [views of q, N, D]
    k,  # [views of k, M, D]
    q_norm,  # [views of q, N] squared lengths, in the type of the arithmetic
    k_norm,  # [views of k, M]
    q_unit,  # [views of q, N] factors that make unit rows, with NORMALIZE; else None
    k_unit,  # [views of k, M]
    q_id,  # [N] int32; not read where both sets are ALL
    k_id,  # [M]
    tau,  # [softmaxes] float64, signed
    q_view,  # [P] int32: the view that the queries of a pair of sets are
    k_view,  # [P]
    # what their rows receive
    coefficients,  # [5, softmaxes, P, N], of coefficients_kernel
    scale,  # [2], of scale_kernel; read of float16 only
    # results
    block,  # [PAIRS, HEIGHT, WIDTH] in the type of the embeddings
    row_sums,  # [splits, PAIRS, HEIGHT] of what the block holds; with NORMALIZE or INNER_PRODUCT not written
    column_sums,  # [HEIGHT / BLOCK_M, PAIRS, WIDTH]
    moment,  # [splits, softmaxes, P, N], where wanted: sum e (u - mean u)^2 is added, u = v / slope
    # sizes
    N,  # queries of a set
    M,  # keys of a set
    D,  # features
    P,  # pairs of a query set and a key set
    i_first,  # first query of the block
    j_first,  # first key
    p_first,  # first pair
    HEIGHT,  # of the block: a multiple of BLOCK_M
    WIDTH,  # a multiple of BLOCK_N
    split_size,  # keys of a program, a multiple of BLOCK_N
    # what is computed, and how
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
    NORMALIZE: tl.constexpr = False,  # rows are made unit rows
    GIVEN_SELF: tl.constexpr = False,  # q_id is [2, N]: ids, and which keys the queries are themselves
    BOTH_ROLES: tl.constexpr = False,  # one pair of sets, whose queries are the keys
):
    """Grid: tiles of rows of every pair of sets, splits of the columns."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    IDS: tl.constexpr = FIRST_SET != ALL or SECOND_SET > ALL
    SUMS: tl.constexpr = not (NORMALIZE or INNER_PRODUCT)
    tile_row, p = first_row_and_pair(HEIGHT, BLOCK_M)
    i0, pair = i_first + tile_row, p_first + p
    x, y = tl.load(q_view + pair).to(tl.int64), tl.load(k_view + pair).to(tl.int64)
    rows = i0 + tl.arange(0, BLOCK_M)
    all_queries = Matrix(q + x * N * D, q_norm + x * N, q_unit + x * N if NORMALIZE else q_norm, q_id, N, D)
    all_keys = Matrix(k + y * M * D, k_norm + y * M, k_unit + y * M if NORMALIZE else k_norm, k_id, M, D)
    queries = load_block(all_queries, i0, rows, IDS, GIVEN_SELF, NORMALIZE)
    q_tile = load_tile(all_queries, i0, 0, BLOCK_M, BLOCK_D) if CHUNKS == 1 else i0  # [BLOCK_M, BLOCK_D]
    first, second = softmaxes_of(tau, SECOND_SET, acc_type)
    SOFTMAXES: tl.constexpr = 1 if SECOND_SET == NO_SET else 2
    one = tl.cast(P, tl.int64) * N  # rows of one softmax
    SCALED: tl.constexpr = q.dtype.element_ty == tl.float16
    factor = tl.load(scale) if SCALED and not NORMALIZE else 1.0
    q_factors = queries.unit * tl.load(scale + 1) * tl.load(scale) if SCALED and NORMALIZE else queries.unit
    of_rows = RowCoefficients(coefficients + pair * tl.cast(N, tl.int64), one, SOFTMAXES * one, factor)
    row_sum = tl.zeros((BLOCK_M,), dtype=acc_type)
    moment0, moment1 = row_sum, row_sum
    here = block + (tl.cast(p, tl.int64) * HEIGHT + tile_row) * WIDTH
    begin = tl.program_id(1) * split_size
    end = min(begin + split_size, WIDTH)
    right = WIDTH  # first column of the tiles that have a mirror image
    # Not `BOTH_ROLES and i_first == j_first`, which Triton 3.6 cannot compile where BOTH_ROLES is False.
    if BOTH_ROLES:  # noqa: SIM102
        if i_first == j_first:
            right = tile_row + BLOCK_M
            formed_from = min(tile_row // BLOCK_N * BLOCK_N, end)
            if SUMS:
                nothing = tl.zeros((BLOCK_N,), dtype=acc_type)
                for j0 in range(begin, formed_from, BLOCK_N):
                    of_tile = sums_of_tile(column_sums, tile_row, p, HEIGHT, WIDTH, BLOCK_M)
                    tl.store(of_tile + j0 + tl.arange(0, BLOCK_N), nothing)
            begin = max(begin, formed_from)
    for j0 in range(begin, end, BLOCK_N):
        columns = j_first + j0 + tl.arange(0, BLOCK_N)
        k_tile = load_tile(all_keys, j_first + j0, 0, BLOCK_N, BLOCK_D) if CHUNKS == 1 else j0
        bare = Block(all_keys, j_first + j0, columns, columns, columns, columns, columns, columns)
        S = similarity(queries, q_tile, bare, k_tile, BLOCK_D, CHUNKS, PRECISION, acc_type)  # [BLOCK_M, BLOCK_N]
        keys = load_block(all_keys, j_first + j0, columns, IDS, False, NORMALIZE)  # not before: registers
        g, more0, more1 = cost_gradients(
            S, queries, keys, of_rows, first, second,
            Options(
                True, FIRST_SET, SECOND_SET, CANCELLING, INNER_PRODUCT, NORMALIZE, WANT_TAU, PRECISION, CHUNKS,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D, GIVEN_SELF, False,
            ),
        )  # fmt: skip
        if BOTH_ROLES:
            of_keys, _, _ = cost_gradients(
                S, queries, keys, of_rows, first, second,
                Options(
                    False, FIRST_SET, SECOND_SET, CANCELLING, INNER_PRODUCT, NORMALIZE, False, PRECISION, CHUNKS,
                    BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D, False, False,
                ),
            )  # fmt: skip
            g += of_keys
        moment0, moment1 = moment0 + more0, moment1 + more1
        if NORMALIZE:
            g *= q_factors[:, None] * keys.unit[None, :]
        rounded = g.to(block.dtype.element_ty)
        i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        tl.store(here + j0 + i[:, None] * WIDTH + j[None, :], rounded)
        if BOTH_ROLES:  # noqa: SIM102
            if j0 >= right:
                image = block + tl.cast(j0, tl.int64) * WIDTH + tile_row
                tl.store(image + j[None, :] * WIDTH + i[:, None], rounded)
        if SUMS:
            wide = rounded.to(acc_type)
            row_sum += tl.sum(wide, 1)
            of_tile = sums_of_tile(column_sums, tile_row, p, HEIGHT, WIDTH, BLOCK_M)
            column_sum = tl.sum(wide, 0)
            if BOTH_ROLES:
                column_sum = tl.where((i_first != j_first) | (j0 >= right), column_sum, 0.0)
            tl.store(of_tile + j0 + j, column_sum)
    if SUMS:
        pairs = tl.num_programs(0) // (HEIGHT // BLOCK_M)
        of_split = (tl.cast(tl.program_id(1), tl.int64) * pairs + p) * HEIGHT + tile_row
        tl.store(row_sums + of_split + tl.arange(0, BLOCK_M), row_sum)
    if WANT_TAU:
        out = moment + tl.program_id(1) * SOFTMAXES * one + pair * tl.cast(N, tl.int64) + rows
        tl.store(out, tl.load(out, mask=rows < N, other=0.0) + moment0, mask=rows < N)
        if SECOND_SET != NO_SET:
            tl.store(out + one, tl.load(out + one, mask=rows < N, other=0.0) + moment1, mask=rows < N)


@triton.jit(do_not_specialize=COUNTS)
def product_kernel(
    # inputs
    x,  # [views of x, N, D]: whose gradient is computed
    y,  # [views of y, M, D]: the other side
    x_unit,  # [views of x, N] factors that make unit rows, with NORMALIZE; else None
    x_view,  # [P] int32: the view that x is in a pair of sets
    y_view,  # [P]
    block,  # [PAIRS, HEIGHT, WIDTH], of block_kernel
    sums,  # [PARTS, PAIRS, rows of x in the block], of block_kernel
    scale,  # [2]
    # result, in the type of the arithmetic
    grad,  # [views of x, N, D]: what the block gives is added
    # sizes
    N,  # rows of x
    M,  # rows of y
    D,  # features
    i_first,  # first row of x in the block
    j_first,  # first row of y
    p_first,  # first pair
    PAIRS,
    HEIGHT,  # of the block
    WIDTH,
    PARTS,
    # what is computed, and how
    QUERY: tl.constexpr,  # x are the queries, which stand along the rows of the block; else along its columns
    INNER_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OUT: tl.constexpr,  # features that a program writes
    NORMALIZE: tl.constexpr = False,
):
    """Grid: tiles of rows of x times blocks of features, views of x (one, if there is one pair)."""
    acc_type: tl.constexpr = grad.dtype.element_ty
    features = tl.cdiv(D, BLOCK_OUT)
    tile_row, d_out = tl.program_id(0) // features * BLOCK_M, tl.program_id(0) % features * BLOCK_OUT
    view = tl.where(PAIRS == 1, tl.load(x_view + p_first), tl.program_id(1)).to(tl.int64)
    length = WIDTH if QUERY else HEIGHT
    breadth = HEIGHT if QUERY else WIDTH
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=acc_type)  # sum_j g_ij y_j
    total_g = tl.zeros((BLOCK_M,), dtype=acc_type)  # sum_j g_ij
    meets = 0  # pairs that the view takes part in
    for p in range(PAIRS):
        there = tl.load(y_view + p_first + p).to(tl.int64)
        here = tl.load(x_view + p_first + p) == view
        meets += here.to(tl.int32)
        of_pair = block + tl.cast(p, tl.int64) * HEIGHT * WIDTH
        for j0 in range(0, tl.where(here, length, 0), BLOCK_N):
            y_tile = load_rows(y + there * M * D, j_first + j0, M, D, d_out, BLOCK_N, BLOCK_OUT)
            if QUERY:
                w = tl.load(of_pair + tl.cast(tile_row, tl.int64) * WIDTH + j0 + i[:, None] * WIDTH + j[None, :])
            else:
                w = tl.trans(
                    tl.load(of_pair + tl.cast(j0, tl.int64) * WIDTH + tile_row + j[:, None] * WIDTH + i[None, :])
                )
            show_copies(y_tile.dtype, PRECISION)
            acc = multiply(w, y_tile, acc, PRECISION)
        if not (NORMALIZE or INNER_PRODUCT):
            for part in range(tl.where(here, PARTS, 0)):
                total_g += tl.load(sums + (tl.cast(part, tl.int64) * PAIRS + p) * breadth + tile_row + i)
    i0 = i_first + tile_row
    if NORMALIZE:
        unit = load_vector(x_unit + view * N, i0, N, BLOCK_M, 0.0)
        total = acc * tl.where(unit == 0, 0.0, -2.0 / tl.where(unit == 0, 1.0, unit))[:, None]
    elif INNER_PRODUCT:
        total = -2.0 * acc
    else:
        tile = load_rows(x + view * N * D, i0, N, D, d_out, BLOCK_M, BLOCK_OUT).to(acc_type)
        total = 2.0 * (tile * total_g[:, None] - acc)
    if x.dtype.element_ty == tl.float16:
        total = total / tl.load(scale)
        if NORMALIZE:
            total = total / tl.load(scale + 1)
    d = d_out + tl.arange(0, BLOCK_OUT)
    inside = (i[:, None] < tl.where(meets > 0, N - i0, 0)) & (d[None, :] < D)
    out = grad + (view * N + i0) * D + i[:, None] * D + d[None, :]
    tl.store(out, tl.load(out, mask=inside, other=0.0) + total, mask=inside)
