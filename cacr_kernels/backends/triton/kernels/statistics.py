"""Row statistics of one or two softmaxes over a split of the keys, one sweep (``cacr_kernels/reference.py``).

    row_max = max_j v_ij,    sum_e = sum_j e_ij,    sum_ez = sum_j e_ij z_ij        z = v - row_max, e = 2^z

v stands for the logit tau c (``tile.py``). merge.py makes of it the value F_i = sum_j w_ij c_ij and lse_i.

A program holds BLOCK_M queries of one pair of sets and walks over its split of the keys in tiles of BLOCK_N.
"""

import triton
import triton.language as tl

from .tile import (
    ALL,
    COUNTS,
    NO_SET,
    SHARED_SET,
    Matrix,
    counting,
    first_row_and_pair,
    key_bias,
    load_block,
    load_tile,
    logits,
    of_unit_queries,
    positive_cost,
    similarity,
    slope_of,
    softmaxes_of,
    start_of_tile,
    uses_cost,
)


@triton.jit
def update_max(row_max, v, mask_bias):
    """The largest v of each row with one more tile, and the shift by which that moves z of all keys before."""
    new_max = tl.maximum(row_max, tl.max(v, 1))
    return new_max, tl.where(row_max == -mask_bias, 0.0, row_max - new_max)


@triton.jit
def base_of(row_max, mask_bias):
    """What z is relative to: the largest v, or 0 before there is a key."""
    return tl.where(row_max == -mask_bias, 0.0, row_max)


@triton.jit
def add_tile(z, shift, sum_e, sum_ez):
    """Both sums of a row with one more tile ``z`` [BLOCK_M, BLOCK_N], after z of all keys before moved by ``shift``."""
    e = tl.exp2(z)
    rescale = tl.exp2(shift)
    sum_ez = (sum_ez + shift * sum_e) * rescale + tl.sum(e * z, 1)
    sum_e = sum_e * rescale + tl.sum(e, 1)
    return sum_e, sum_ez


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
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
    # result
    partial_state,  # [splits, 3, softmaxes, P, N]: row_max, sum_e, sum_ez
    # sizes
    N,  # queries of a set
    M,  # keys of a set
    D,  # features
    P,  # pairs of a query set and a key set
    split_size,  # keys of a program, a multiple of BLOCK_N
    # what is computed, and how
    FIRST_SET: tl.constexpr,
    SECOND_SET: tl.constexpr,
    INNER_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_D features; 1: a tile holds them all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr = False,  # rows of q and k are made unit rows
    GIVEN_SELF: tl.constexpr = False,  # q_id is [2, N]: ids, and which keys the queries are themselves
    WHOLE: tl.constexpr = False,  # D = BLOCK_D and M >= BLOCK_N: tiles of keys need no masks
):
    """Grid: blocks of queries of every pair of sets, splits of the keys."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    IDS: tl.constexpr = FIRST_SET != ALL or SECOND_SET > ALL
    i0, p = first_row_and_pair(N, BLOCK_M)
    begin = tl.program_id(1) * split_size
    x, y = tl.load(q_view + p).to(tl.int64), tl.load(k_view + p).to(tl.int64)
    q_base, k_base = q + x * N * D, k + y * M * D
    rows = i0 + tl.arange(0, BLOCK_M)
    q_factors = q_unit + x * N if NORMALIZE else q_norm
    all_queries = Matrix(q_base, q_norm + x * N, q_factors, q_id, N, D)
    queries = load_block(all_queries, i0, rows, IDS, GIVEN_SELF, NORMALIZE)
    q_tile = load_tile(all_queries, i0, 0, BLOCK_M, BLOCK_D) if CHUNKS == 1 else i0  # [BLOCK_M, BLOCK_D]
    first, second = softmaxes_of(tau, SECOND_SET, acc_type)
    sum_e0 = tl.zeros((BLOCK_M,), dtype=acc_type)
    max0, sum_ez0, max1, sum_e1, sum_ez1 = sum_e0 - first.mask_bias, sum_e0, sum_e0 - second.mask_bias, sum_e0, sum_e0
    all_keys = Matrix(k_base, k_norm + y * M, k_unit + y * M if NORMALIZE else k_norm, k_id, M, D)
    for j0 in range(begin, min(begin + split_size, M), BLOCK_N):
        first_key = start_of_tile(j0, M, BLOCK_N, WHOLE)
        columns = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(all_keys, first_key, 0, BLOCK_N, BLOCK_D, WHOLE) if CHUNKS == 1 else j0  # [BLOCK_N, BLOCK_D]
        keys = load_block(all_keys, first_key, columns, IDS, False, NORMALIZE, j0, WHOLE)
        S = similarity(queries, q_tile, keys, k_tile, BLOCK_D, CHUNKS, PRECISION, acc_type)  # [BLOCK_M, BLOCK_N]
        S = of_unit_queries(S, queries, True, NORMALIZE)
        if uses_cost(FIRST_SET, INNER_PRODUCT) or uses_cost(SECOND_SET, INNER_PRODUCT):
            c = positive_cost(queries, keys, S, False, NORMALIZE)
        else:
            c = S  # not read
        counts = counting(keys, WHOLE)
        bias = tl.where(counts, key_bias(keys.norm, first.slope, FIRST_SET, INNER_PRODUCT), first.mask_bias)
        slope = slope_of(first.slope, keys, False, NORMALIZE)
        v = logits(S, c, slope, bias[None, :], first, queries, keys, FIRST_SET, INNER_PRODUCT)
        max0, shift = update_max(max0, v, first.mask_bias)
        z = v - base_of(max0, first.mask_bias)[:, None]
        sum_e0, sum_ez0 = add_tile(z, shift, sum_e0, sum_ez0)
        if SECOND_SET == SHARED_SET:
            max1 = max0
            sum_e1, sum_ez1 = add_tile(second.slope * z, second.slope * shift, sum_e1, sum_ez1)
        elif SECOND_SET != NO_SET:
            bias = tl.where(counts, key_bias(keys.norm, second.slope, SECOND_SET, INNER_PRODUCT), second.mask_bias)
            slope = slope_of(second.slope, keys, False, NORMALIZE)
            v = logits(S, c, slope, bias[None, :], second, queries, keys, SECOND_SET, INNER_PRODUCT)
            max1, shift = update_max(max1, v, second.mask_bias)
            sum_e1, sum_ez1 = add_tile(v - base_of(max1, second.mask_bias)[:, None], shift, sum_e1, sum_ez1)
    one = tl.cast(P, tl.int64) * N  # rows of one softmax
    stride = one if SECOND_SET == NO_SET else 2 * one  # rows of one quantity
    out = partial_state + tl.program_id(1) * 3 * stride + tl.cast(p, tl.int64) * N + rows
    tl.store(out, max0, mask=rows < N)
    tl.store(out + stride, sum_e0, mask=rows < N)
    tl.store(out + 2 * stride, sum_ez0, mask=rows < N)
    if SECOND_SET != NO_SET:
        tl.store(out + one, max1, mask=rows < N)
        tl.store(out + one + stride, sum_e1, mask=rows < N)
        tl.store(out + one + 2 * stride, sum_ez1, mask=rows < N)
