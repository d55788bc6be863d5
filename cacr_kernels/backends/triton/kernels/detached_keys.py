"""One softmax over keys that carry no gradient, in one sweep: statistics, and the means that dL/dq is made of.

    mean_i   = sum_j w_ij k_j
    spread_i = sum_j w_ij (c_ij - F_i) k_j            where weights and value carry a gradient

dL/dq_i is a combination of q_i and the two (``cacr_kernels/reference.py``, Gradients, with a_i and b_i). A program
keeps sums relative to the largest v as statistics.py does, and the sums of keys beside them, which are rescaled with
them. Splits of the keys are merged by ``detached_keys_merge_kernel``. With NORMALIZE k_j are unit rows here, too.
"""

import triton
import triton.language as tl

from .statistics import base_of, update_max
from .tile import (
    ALL,
    COUNTS,
    LN2,
    Matrix,
    key_bias,
    load_block,
    load_tile,
    logits,
    multiply,
    multiply_in_pieces,
    of_unit_queries,
    show_copies,
    similarity,
    slope_of,
    softmax_of,
)
from .unit import inverse_power, largest_unit

RANGE = tl.constexpr(4096.0)  # takes weights of at most 1 into the middle of the range of float16


@triton.jit(do_not_specialize=COUNTS)
def detached_keys_kernel(
    # embeddings, and what is known of them
    q,  # [views of q, N, D]
    k,  # [views of k, M, D]
    q_norm,  # [views of q, N] squared lengths, in the type of the arithmetic
    k_norm,  # [views of k, M]
    q_unit,  # [views of q, N] factors that make unit rows, with NORMALIZE; else None
    k_unit,  # [views of k, M]
    q_id,  # [N] int32; not read where the set is ALL
    k_id,  # [M]
    tau,  # [1] float64, signed
    q_view,  # [P] int32: the view that the queries of a pair of sets are
    k_view,  # [P]
    # results, in the type of the arithmetic
    partial_state,  # [splits, 4, P, N]: row_max, sum e, sum e z, sum e d^2 with d = z / slope
    partial_sums,  # [splits, 1 or 2, P, N, D]: sum e k, sum e z k
    # sizes
    N,  # queries of a set
    M,  # keys of a set
    D,  # features
    P,  # pairs of a query set and a key set
    split_size,  # keys of a program, a multiple of BLOCK_N
    FEATURE_BLOCKS,
    # what is computed, and how
    WANT_MEAN: tl.constexpr,
    MOMENTS: tl.constexpr,  # the fourth row of partial_state, and the second of partial_sums
    FIRST_SET: tl.constexpr,
    SECOND_SET: tl.constexpr,
    INNER_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_D features; 1: a tile holds them all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,  # features of the sums that a program writes; BLOCK_D if that is all of them
    NORMALIZE: tl.constexpr = False,  # rows of q and k are made unit rows
):
    """Grid: blocks of queries, pairs of sets, splits of the keys times blocks of features."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    IN_RANGE: tl.constexpr = RANGE if q.dtype.element_ty == tl.float16 else 1.0
    i0, p = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    split, d_out = tl.program_id(2) // FEATURE_BLOCKS, tl.program_id(2) % FEATURE_BLOCKS * BLOCK_OUT
    begin = split * split_size
    x, y = tl.load(q_view + p).to(tl.int64), tl.load(k_view + p).to(tl.int64)
    q_base, k_base = q + x * N * D, k + y * M * D
    rows = i0 + tl.arange(0, BLOCK_M)
    q_factors = q_unit + x * N if NORMALIZE else q_norm
    all_queries = Matrix(q_base, q_norm + x * N, q_factors, q_id, N, D)
    queries = load_block(all_queries, i0, rows, FIRST_SET != ALL, False, NORMALIZE)
    q_tile = load_tile(all_queries, i0, 0, BLOCK_M, BLOCK_D) if CHUNKS == 1 else i0  # [BLOCK_M, BLOCK_D]
    softmax = softmax_of(tl.load(tau), acc_type)
    mask_bias, inverse = softmax.mask_bias, 1.0 / softmax.slope
    sum_e = tl.zeros((BLOCK_M,), dtype=acc_type)
    row_max, sum_ez, sum_edd = sum_e - mask_bias, sum_e, sum_e
    mean = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=acc_type)  # sum e k; below: sum e z k
    spread = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=acc_type) if MOMENTS else row_max
    all_keys = Matrix(k_base, k_norm + y * M, k_unit + y * M if NORMALIZE else k_norm, k_id, M, D)
    end = min(begin + split_size, M)
    if NORMALIZE and IN_RANGE != 1.0:
        most = largest_unit(k_unit + y * M, begin, end, M, tl.zeros((1024,), dtype=acc_type))
        scale = IN_RANGE * inverse_power(most)
    else:
        scale = IN_RANGE
    for j0 in range(begin, end, BLOCK_N):
        columns = j0 + tl.arange(0, BLOCK_N)
        k_tile = load_tile(all_keys, j0, d_out, BLOCK_N, BLOCK_OUT)  # [BLOCK_N, BLOCK_OUT]
        keys = load_block(all_keys, j0, columns, FIRST_SET != ALL, False, NORMALIZE)
        S = similarity(queries, q_tile, keys, k_tile, BLOCK_D, CHUNKS, PRECISION, acc_type)  # [BLOCK_M, BLOCK_N]
        S = of_unit_queries(S, queries, True, NORMALIZE)
        bias = tl.where(columns < M, key_bias(keys.norm, softmax.slope, FIRST_SET, INNER_PRODUCT), mask_bias)
        slope = slope_of(softmax.slope, keys, False, NORMALIZE)
        v = logits(S, S, slope, bias[None, :], softmax, queries, keys, FIRST_SET, INNER_PRODUCT)
        row_max, shift = update_max(row_max, v, mask_bias)
        z = v - base_of(row_max, mask_bias)[:, None]
        e = tl.exp2(z)
        ez = e * z
        rescale = tl.exp2(shift)
        if MOMENTS:
            shift_d = shift * inverse
            sum_edd = (sum_edd + shift_d * (2.0 * sum_ez * inverse + shift_d * sum_e)) * rescale
            sum_edd += tl.sum(ez * inverse * (z * inverse), 1)
        sum_ez = (sum_ez + shift * sum_e) * rescale + tl.sum(ez, 1)
        sum_e = sum_e * rescale + tl.sum(e, 1)
        if WANT_MEAN:
            if CHUNKS > 1:  # else the similarities were made of the same tile
                show_copies(k_tile.dtype, PRECISION)
            factor = (keys.unit * scale)[None, :] if NORMALIZE else scale
            if MOMENTS:  # the two sums nearly cancel in the gradient
                spread = (spread + shift[:, None] * mean) * rescale[:, None]
                spread = multiply_in_pieces(ez * factor, k_tile, spread, PRECISION)
                mean = multiply_in_pieces(e * factor, k_tile, mean * rescale[:, None], PRECISION)
            else:
                mean = multiply(e * factor, k_tile, mean * rescale[:, None], PRECISION)
    one = tl.cast(P, tl.int64) * N  # rows of one quantity
    out = partial_state + split * 4 * one + tl.cast(p, tl.int64) * N + rows
    inside = rows < tl.where(d_out == 0, N, 0)  # the first block of features writes the state
    tl.store(out, row_max, mask=inside)
    tl.store(out + one, sum_e, mask=inside)
    tl.store(out + 2 * one, sum_ez, mask=inside)
    if MOMENTS:
        tl.store(out + 3 * one, sum_edd, mask=inside)
    if WANT_MEAN:
        r, d = tl.arange(0, BLOCK_M), d_out + tl.arange(0, BLOCK_OUT)
        features = (r[:, None] < N - i0) & (d[None, :] < D)
        ARRAYS: tl.constexpr = 2 if MOMENTS else 1
        first = partial_sums + (split * ARRAYS * one + tl.cast(p, tl.int64) * N + i0) * D
        out = first + r[:, None] * D + d[None, :]
        tl.store(out, mean * (1.0 / scale), mask=features)
        if MOMENTS:
            tl.store(out + one * D, spread * (1.0 / scale), mask=features)


@triton.jit(do_not_specialize=COUNTS)
def detached_keys_merge_kernel(
    # inputs
    partial_state,  # [SPLITS, 4, P, N], of detached_keys_kernel, as is the next one
    partial_sums,  # [SPLITS, 1 or 2, P, N, D]
    q_norm,  # [views of q, N]
    tau,  # [1] float64
    q_view,  # [P]
    # results
    value,  # [P, N] float64, as are the next two
    lse,
    variance,
    means,  # [1 or 2, P, N, D]: mean, spread
    # sizes
    N,
    D,
    P,
    SPLITS,
    # what is computed, and how
    WANT_MEAN: tl.constexpr,
    MOMENTS: tl.constexpr,
    INNER_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of queries, pairs of sets, blocks of features. Value and lse are those of merge.py."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    i0, p, d0 = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_D
    rows = i0 + tl.arange(0, BLOCK_M)
    inside = rows < N
    one = tl.cast(P, tl.int64) * N  # rows of one quantity
    at = tl.cast(p, tl.int64) * N + rows
    temperature = tl.load(tau)
    softmax = softmax_of(temperature, acc_type)
    mask_bias = softmax.mask_bias
    row_max = tl.load(partial_state + at, mask=inside, other=0.0)
    for i in range(1, SPLITS):
        row_max = tl.maximum(row_max, tl.load(partial_state + i * 4 * one + at, mask=inside, other=0.0))
    base = base_of(row_max, mask_bias).to(tl.float64)
    slope = softmax.slope.to(tl.float64)
    nothing = tl.zeros((BLOCK_M,), tl.float64)
    sum_e, sum_ez, sum_edd = nothing, nothing, nothing
    d = d0 + tl.arange(0, BLOCK_D)
    features = inside[:, None] & (d[None, :] < D)
    tile = partial_sums + at[:, None] * D + d[None, :]  # [BLOCK_M, BLOCK_D]
    mean, spread = tl.zeros((BLOCK_M, BLOCK_D), tl.float64), tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
    ARRAYS: tl.constexpr = 2 if MOMENTS else 1
    for i in range(SPLITS):
        split = partial_state + i * 4 * one + at
        split_max = tl.load(split, mask=inside, other=0.0)
        shift = tl.where(split_max == -mask_bias, 0.0, split_max.to(tl.float64) - base)
        split_e = tl.load(split + one, mask=inside, other=0.0).to(tl.float64)
        split_ez = tl.load(split + 2 * one, mask=inside, other=0.0).to(tl.float64)
        rescale = tl.exp2(shift)
        sum_e += split_e * rescale
        sum_ez += (split_ez + shift * split_e) * rescale
        if MOMENTS:
            shift_d = shift / slope
            split_edd = tl.load(split + 3 * one, mask=inside, other=0.0).to(tl.float64)
            sum_edd += (split_edd + shift_d * (2.0 * split_ez / slope + shift_d * split_e)) * rescale
        if WANT_MEAN:
            split_mean = tl.load(tile + i * ARRAYS * one * D, mask=features, other=0.0).to(tl.float64)
            mean += split_mean * rescale[:, None]
            if MOMENTS:
                split_spread = tl.load(tile + (i * ARRAYS + 1) * one * D, mask=features, other=0.0).to(tl.float64)
                spread += (split_spread + shift[:, None] * split_mean) * rescale[:, None]
    sum_ez += temperature * 0.0  # Inf and NaN leave no trace in 2^z where there is no key
    empty = (sum_e == 0) & (sum_ez == 0) & (row_max == -mask_bias)
    sum_e = tl.where(empty, 1.0, sum_e)
    mean_z = sum_ez / sum_e
    norm = tl.load(q_norm + tl.load(q_view + p).to(tl.int64) * N + rows, mask=inside, other=0.0).to(tl.float64)
    norm = norm * 0.0 if INNER_PRODUCT else norm
    F = tl.where(empty, 0.0, norm - 2.0 * (base + mean_z) / slope)
    logit = temperature * (norm - 2.0 * base / slope)
    log_sum = tl.where(empty, -float("inf"), tl.log2(sum_e) * LN2 + logit)
    first = rows < tl.where(d0 == 0, N, 0)  # the first block of features writes what rows have
    tl.store(value + at, F, mask=first)
    tl.store(lse + at, tl.where(F == F, log_sum, F), mask=first)
    if MOMENTS:
        second_moment = sum_edd / sum_e - (mean_z / slope) * (mean_z / slope)
        tl.store(variance + at, tl.where(empty, 0.0, 4.0 * second_moment), mask=first)
    if WANT_MEAN:
        mean = mean / sum_e[:, None] + F[:, None] * 0.0
        out = means + at[:, None] * D + d[None, :]
        tl.store(out, mean.to(acc_type), mask=features)
        if MOMENTS:
            spread = -2.0 / slope * (spread / sum_e[:, None] - mean_z[:, None] * mean)
            tl.store(out + one * D, spread.to(acc_type), mask=features)
