"""Row statistics of one or two softmaxes over a share of the keys.

A program holds BLOCK_M queries of one problem and walks over its share of the keys in tiles. Per softmax and row it
keeps (top, sum, sum_z): the largest v, and sum e and sum e z relative to it.
"""

import triton
import triton.language as tl

from .tile import (
    AGAIN,
    ALL,
    NONE,
    by_cost,
    half_norm,
    level,
    load_rows,
    load_vector,
    positive_cost,
    row_and_problem,
    similarity,
    slopes_of,
)


@triton.jit
def raised(top, v, huge):
    """The largest v of each row with one more tile, and by how much that moves the z of all keys before."""
    new_top = tl.maximum(top, tl.max(v, 1))
    return new_top, tl.where(top == -huge, 0.0, top - new_top)


@triton.jit
def base_of(top, huge):
    """What z is relative to; 0 before there is a key."""
    return tl.where(top == -huge, 0.0, top)


@triton.jit
def add_tile(z, moved, total, total_z):
    """Sums of a row with one more tile, all keys before which moved by ``moved``."""
    e = tl.exp2(z)
    shrink = tl.exp2(moved)
    total_z = (total_z + moved * total) * shrink + tl.sum(e * z, 1)
    total = total * shrink + tl.sum(e, 1)
    return total, total_z


@triton.jit
def statistics_kernel(
    q,  # [views of q, N, D]
    k,  # [views of k, M, D]
    q_norm,  # [views of q, N]
    k_norm,  # [views of k, M]
    q_id,  # [N] int32; not read where both kinds are ALL
    k_id,  # [M]
    tau,  # [softmaxes] float64, signed
    q_view,  # [P] int32: view of the queries of each problem
    k_view,  # [P]
    state,  # [shares, 3, softmaxes, P, N]
    N,
    M,
    D,
    P,
    share,  # keys of a program, a multiple of BLOCK_N
    KIND0: tl.constexpr,
    KIND1: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_D features; 1: a tile holds them all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of queries of every problem, shares of the keys."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    i0, p = row_and_problem(N, BLOCK_M)
    begin = tl.program_id(1) * share
    x, y = tl.load(q_view + p).to(tl.int64), tl.load(k_view + p).to(tl.int64)
    q_base, k_base = q + x * N * D, k + y * M * D
    rows = i0 + tl.arange(0, BLOCK_M)
    x_norm = load_vector(q_norm + x * N, i0, N, BLOCK_M, 0.0)
    x_id = load_vector(q_id, i0, N, BLOCK_M, 0) if KIND0 != ALL or KIND1 > ALL else rows
    x_tile = load_rows(q_base, i0, N, D, 0, BLOCK_M, BLOCK_D) if CHUNKS == 1 else rows
    slope0, huge0, slope1, huge1 = slopes_of(tau, KIND1, acc_type)
    sum0 = tl.zeros((BLOCK_M,), dtype=acc_type)
    top0, sum_z0, top1, sum1, sum_z1 = sum0 - huge0, sum0, sum0 - huge1, sum0, sum0
    for j0 in range(begin, min(begin + share, M), BLOCK_N):
        columns = j0 + tl.arange(0, BLOCK_N)
        y_tile = load_rows(k_base, j0, M, D, 0, BLOCK_N, BLOCK_D) if CHUNKS == 1 else columns
        y_norm = load_vector(k_norm + y * M, j0, M, BLOCK_N, 0.0)
        y_id = load_vector(k_id, j0, M, BLOCK_N, 0) if KIND0 != ALL or KIND1 > ALL else columns
        S = similarity(
            x_tile, q_base, i0, N, y_tile, k_base, j0, M, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKS, PRECISION, acc_type
        )  # fmt: skip
        if by_cost(KIND0, INNER) or by_cost(KIND1, INNER):
            c = positive_cost(q_base, x_norm, x_id, i0, N, k_base, y_norm, y_id, j0, M, D, S)
        else:
            c = S
        bias = tl.where(columns < M, half_norm(y_norm, slope0, KIND0, INNER), huge0)
        v = level(S, c, bias[None, :], slope0, huge0, KIND0, INNER, x_id, y_id, rows, columns)
        top0, moved = raised(top0, v, huge0)
        z = v - base_of(top0, huge0)[:, None]
        sum0, sum_z0 = add_tile(z, moved, sum0, sum_z0)
        if KIND1 == AGAIN:
            top1 = top0
            sum1, sum_z1 = add_tile(slope1 * z, slope1 * moved, sum1, sum_z1)
        elif KIND1 != NONE:
            bias = tl.where(columns < M, half_norm(y_norm, slope1, KIND1, INNER), huge1)
            v = level(S, c, bias[None, :], slope1, huge1, KIND1, INNER, x_id, y_id, rows, columns)
            top1, moved = raised(top1, v, huge1)
            sum1, sum_z1 = add_tile(v - base_of(top1, huge1)[:, None], moved, sum1, sum_z1)
    one = tl.cast(P, tl.int64) * N  # entries of one softmax
    stride = one if KIND1 == NONE else 2 * one  # of one quantity
    out = state + tl.program_id(1) * 3 * stride + tl.cast(p, tl.int64) * N + rows
    tl.store(out, top0, mask=rows < N)
    tl.store(out + stride, sum0, mask=rows < N)
    tl.store(out + 2 * stride, sum_z0, mask=rows < N)
    if KIND1 != NONE:
        tl.store(out + one, top1, mask=rows < N)
        tl.store(out + one + stride, sum1, mask=rows < N)
        tl.store(out + one + 2 * stride, sum_z1, mask=rows < N)
