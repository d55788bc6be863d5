"""One softmax over keys that carry no gradient, in one sweep: statistics, and the means that dL/dq is made of.

    mean   = sum_j w_j k_j
    spread = sum_j w_j (c_j - F) k_j            where weights and value carry a gradient

A program keeps sums relative to the largest v as statistics.py does, and the sums of keys beside them, which
shrink with them. Shares of the keys are merged by ``frozen_merge_kernel``.
"""

import triton
import triton.language as tl

from .statistics import base_of, raised
from .tile import ALL, LN2, half_norm, level, load_rows, load_vector, multiply, similarity, slope_of

RANGE = tl.constexpr(4096.0)  # takes weights of at most 1 into the middle of the range of float16


@triton.jit
def frozen_kernel(
    q,  # [views of q, N, D]
    k,  # [views of k, M, D]
    q_norm,  # [views of q, N]
    k_norm,  # [views of k, M]
    q_id,  # [N] int32; not read where the kind is ALL
    k_id,  # [M]
    tau,  # [1] float64, signed
    q_view,  # [P] int32
    k_view,  # [P]
    state,  # [shares, 4, P, N]: top, sum e, sum e z, sum e (z / slope)^2
    sums,  # [shares, 1 or 2, P, N, D]: sum e k, sum e z k
    N,
    M,
    D,
    P,
    share,  # keys of a program, a multiple of BLOCK_N
    FEATURES,  # blocks of features
    WANT_MEAN: tl.constexpr,
    MOMENTS: tl.constexpr,  # the fourth row of state, and the second of sums
    KIND0: tl.constexpr,
    KIND1: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid: blocks of queries, problems, shares of the keys times blocks of features."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    scale: tl.constexpr = RANGE if q.dtype.element_ty == tl.float16 else 1.0
    i0, p = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    part, d_out = tl.program_id(2) // FEATURES, tl.program_id(2) % FEATURES * BLOCK_OUT
    begin = part * share
    x, y = tl.load(q_view + p).to(tl.int64), tl.load(k_view + p).to(tl.int64)
    q_base, k_base = q + x * N * D, k + y * M * D
    rows = i0 + tl.arange(0, BLOCK_M)
    x_id = load_vector(q_id, i0, N, BLOCK_M, 0) if KIND0 != ALL else rows
    x_tile = load_rows(q_base, i0, N, D, 0, BLOCK_M, BLOCK_D) if CHUNKS == 1 else rows
    slope, huge = slope_of(tl.load(tau), acc_type)
    inverse = 1.0 / slope
    total = tl.zeros((BLOCK_M,), dtype=acc_type)
    top, total_z, total_dd = total - huge, total, total
    mean = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=acc_type)
    spread = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=acc_type) if MOMENTS else top
    for j0 in range(begin, min(begin + share, M), BLOCK_N):
        columns = j0 + tl.arange(0, BLOCK_N)
        y_out = load_rows(k_base, j0, M, D, d_out, BLOCK_N, BLOCK_OUT)
        y_norm = load_vector(k_norm + y * M, j0, M, BLOCK_N, 0.0)
        y_id = load_vector(k_id, j0, M, BLOCK_N, 0) if KIND0 != ALL else columns
        S = similarity(
            x_tile, q_base, i0, N, y_out, k_base, j0, M, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKS, PRECISION, acc_type
        )  # fmt: skip
        bias = tl.where(columns < M, half_norm(y_norm, slope, KIND0, INNER), huge)
        v = level(S, S, bias[None, :], slope, huge, KIND0, INNER, x_id, y_id, rows, columns)
        top, moved = raised(top, v, huge)
        z = v - base_of(top, huge)[:, None]
        e = tl.exp2(z)
        ez = e * z
        shrink = tl.exp2(moved)
        if MOMENTS:
            shift = moved * inverse
            total_dd = (total_dd + shift * (2.0 * total_z * inverse + shift * total)) * shrink
            total_dd += tl.sum(ez * inverse * (z * inverse), 1)
        total_z = (total_z + moved * total) * shrink + tl.sum(ez, 1)
        total = total * shrink + tl.sum(e, 1)
        if WANT_MEAN:
            if MOMENTS:
                spread = (spread + moved[:, None] * mean) * shrink[:, None]
                spread = multiply(ez * scale, y_out, spread, PRECISION)
            mean = multiply(e * scale, y_out, mean * shrink[:, None], PRECISION)
    one = tl.cast(P, tl.int64) * N
    out = state + part * 4 * one + tl.cast(p, tl.int64) * N + rows
    first = rows < tl.where(d_out == 0, N, 0)
    tl.store(out, top, mask=first)
    tl.store(out + one, total, mask=first)
    tl.store(out + 2 * one, total_z, mask=first)
    if MOMENTS:
        tl.store(out + 3 * one, total_dd, mask=first)
    if WANT_MEAN:
        r, d = tl.arange(0, BLOCK_M), d_out + tl.arange(0, BLOCK_OUT)
        inside = (r[:, None] < N - i0) & (d[None, :] < D)
        kinds = 2 if MOMENTS else 1
        out = sums + (part * kinds * one + tl.cast(p, tl.int64) * N + i0) * D + r[:, None] * D + d[None, :]
        tl.store(out, mean * (1.0 / scale), mask=inside)
        if MOMENTS:
            tl.store(out + one * D, spread * (1.0 / scale), mask=inside)


@triton.jit
def frozen_merge_kernel(
    state,  # of frozen_kernel, as is
    sums,
    q_norm,  # [views of q, N]
    tau,  # [1] float64
    q_view,  # [P]
    value,  # [P, N] float64, as are the next two
    lse,
    variance,
    means,  # [1 or 2, P, N, D]
    N,
    D,
    P,
    SHARES,
    WANT_MEAN: tl.constexpr,
    MOMENTS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of queries, problems, blocks of features."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    i0, p, d0 = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2) * BLOCK_D
    rows = i0 + tl.arange(0, BLOCK)
    inside = rows < N
    one = tl.cast(P, tl.int64) * N
    at = tl.cast(p, tl.int64) * N + rows
    temperature = tl.load(tau)
    slope, huge = slope_of(temperature, acc_type)
    top = tl.load(state + at, mask=inside, other=0.0)
    for i in range(1, SHARES):
        top = tl.maximum(top, tl.load(state + i * 4 * one + at, mask=inside, other=0.0))
    base = base_of(top, huge).to(tl.float64)
    slope = slope.to(tl.float64)
    nothing = tl.zeros((BLOCK,), tl.float64)
    total, total_z, total_dd = nothing, nothing, nothing
    d = d0 + tl.arange(0, BLOCK_D)
    features = inside[:, None] & (d[None, :] < D)
    tile = sums + at[:, None] * D + d[None, :]
    mean, spread = tl.zeros((BLOCK, BLOCK_D), tl.float64), tl.zeros((BLOCK, BLOCK_D), tl.float64)
    kinds = 2 if MOMENTS else 1
    for i in range(SHARES):
        part = state + i * 4 * one + at
        part_top = tl.load(part, mask=inside, other=0.0)
        moved = tl.where(part_top == -huge, 0.0, part_top.to(tl.float64) - base)
        e = tl.load(part + one, mask=inside, other=0.0).to(tl.float64)
        ez = tl.load(part + 2 * one, mask=inside, other=0.0).to(tl.float64)
        shrink = tl.exp2(moved)
        total += e * shrink
        total_z += (ez + moved * e) * shrink
        if MOMENTS:
            shift = moved / slope
            edd = tl.load(part + 3 * one, mask=inside, other=0.0).to(tl.float64)
            total_dd += (edd + shift * (2.0 * ez / slope + shift * e)) * shrink
        if WANT_MEAN:
            part_mean = tl.load(tile + i * kinds * one * D, mask=features, other=0.0).to(tl.float64)
            mean += part_mean * shrink[:, None]
            if MOMENTS:
                part_spread = tl.load(tile + (i * kinds + 1) * one * D, mask=features, other=0.0).to(tl.float64)
                spread += (part_spread + moved[:, None] * part_mean) * shrink[:, None]
    total_z += temperature * 0.0  # Inf and NaN leave no trace in 2^z where there is no key
    empty = (total == 0) & (total_z == 0) & (top == -huge)
    total = tl.where(empty, 1.0, total)
    mean_z = total_z / total
    norm = tl.load(q_norm + tl.load(q_view + p).to(tl.int64) * N + rows, mask=inside, other=0.0).to(tl.float64)
    norm = norm * 0.0 if INNER else norm
    F = tl.where(empty, 0.0, norm - 2.0 * (base + mean_z) / slope)
    logit = temperature * (norm - 2.0 * base / slope)
    log_sum = tl.where(empty, -float("inf"), tl.log2(total) * LN2 + logit)
    first = rows < tl.where(d0 == 0, N, 0)
    tl.store(value + at, F, mask=first)
    tl.store(lse + at, tl.where(F == F, log_sum, F), mask=first)
    if MOMENTS:
        second = total_dd / total - (mean_z / slope) * (mean_z / slope)
        tl.store(variance + at, tl.where(empty, 0.0, 4.0 * second), mask=first)
    if WANT_MEAN:
        mean = mean / total[:, None] + F[:, None] * 0.0
        out = means + at[:, None] * D + d[None, :]
        tl.store(out, mean.to(acc_type), mask=features)
        if MOMENTS:
            spread = -2.0 / slope * (spread / total[:, None] - mean_z[:, None] * mean)
            tl.store(out + one * D, spread.to(acc_type), mask=features)
