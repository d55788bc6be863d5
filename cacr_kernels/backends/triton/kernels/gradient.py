"""Gradient of a block of embeddings x, recomputing similarities tile by tile.

With g_ij = dL/dc_ij, c = |q - k|^2: dL/dq_i = 2 (q_i sum_j g_ij - sum_j g_ij k_j), and dL/dk_j is the same with the
roles exchanged. So a program holds BLOCK_M rows of x and walks over the other side y, for every problem that its view
takes part in. Coefficients belong to queries: they stand along the rows of a tile if x are the queries, else along its
columns. No atomics: every gradient is written by one program, or as shares that total.py adds in order.
"""

import triton
import triton.language as tl

from .coefficients import BASE, MEAN_U, RATIO, A, B
from .tile import (  # fmt: skip
    AGAIN,
    ALL,
    NONE,
    by_cost,
    half_norm,
    level,
    load_rows,
    load_vector,
    multiply,
    positive_cost,
    similarity,
    slopes_of,
)


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
def coefficient(rows, which: tl.constexpr, stride, first, count, SIZE: tl.constexpr, AS_QUERY: tl.constexpr, none=0.0):
    """One row coefficient of SIZE queries, shaped to go along the rows of a tile or along its columns."""
    x = load_vector(rows + which * stride, first, count, SIZE, none)
    return x[:, None] if AS_QUERY else x[None, :]


@triton.jit
def along(x, ROWS: tl.constexpr):
    """A vector along the rows of a tile, or along its columns."""
    return x[:, None] if ROWS else x[None, :]


@triton.jit
def add_exactly(total, lost, x):
    """Kahan's sum: the equal terms of uniform weights are all rounded the same way."""
    y = x - lost
    new = total + y
    return new, (new - total) - y


@triton.jit
def sweep(
    acc, acc_sum, lost, moment0, moment1,
    x_tile, x_base, x_norm, x_id, i0, N,
    y_base, y_norm_base, y_id_base, begin, end, M,
    rows_base, stride, one, slope0, huge0, slope1, huge1, scale, d_out, D,
    AS_QUERY: tl.constexpr, KIND0: tl.constexpr, KIND1: tl.constexpr, CANCELLING: tl.constexpr, INNER: tl.constexpr,
    WANT_TAU: tl.constexpr, PRECISION: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Adds sum_j g_ij y_j and sum_j g_ij of y in [begin, end); ``rows_base``: coefficients of the problem's queries."""
    acc_type: tl.constexpr = x_norm.dtype
    QUERIES: tl.constexpr = BLOCK_M if AS_QUERY else BLOCK_N
    rows = i0 + tl.arange(0, BLOCK_M)
    none0, none1 = (0.0, 0.0) if AS_QUERY else (2.0 * huge0, 2.0 * huge1)  # where there is no query: no weight
    inverse0 = 1.0 / slope0
    inverse1 = inverse0 if KIND1 == AGAIN else 1.0 / slope1
    for j0 in range(begin, end, BLOCK_N):
        columns = j0 + tl.arange(0, BLOCK_N)
        y_out = load_rows(y_base, j0, M, D, d_out, BLOCK_N, BLOCK_OUT)
        y_norm = load_vector(y_norm_base, j0, M, BLOCK_N, 0.0)
        y_id = load_vector(y_id_base, j0, M, BLOCK_N, 0) if KIND0 != ALL or KIND1 > ALL else columns
        S = similarity(
            x_tile, x_base, i0, N, y_out, y_base, j0, M, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNKS, PRECISION, acc_type
        )  # fmt: skip
        if by_cost(KIND0, INNER) or by_cost(KIND1, INNER):
            c = positive_cost(x_base, x_norm, x_id, i0, N, y_base, y_norm, y_id, j0, M, D, S)
        else:
            c = S
        q0 = i0 if AS_QUERY else j0
        count = N if AS_QUERY else M
        key_norm = y_norm if AS_QUERY else x_norm
        bias = half_norm(key_norm, slope0, KIND0, INNER)
        if AS_QUERY:
            bias = tl.where(columns < M, bias, huge0)
        v = level(S, c, along(bias, not AS_QUERY), slope0, huge0, KIND0, INNER, x_id, y_id, rows, columns)
        z = v - coefficient(rows_base, BASE, stride, q0, count, QUERIES, AS_QUERY, none0)
        e = tl.exp2(z)
        a = coefficient(rows_base, A, stride, q0, count, QUERIES, AS_QUERY) * scale
        b = coefficient(rows_base, B, stride, q0, count, QUERIES, AS_QUERY) * scale
        g = e * (b * z + a)
        if WANT_TAU and AS_QUERY:
            d = v * inverse0 - coefficient(rows_base, MEAN_U, stride, q0, count, QUERIES, AS_QUERY)
            moment0 += tl.sum(e * d * d, 1)
        if KIND1 != NONE:
            second = rows_base + one
            if KIND1 == AGAIN:
                z = slope1 * z
            else:
                bias = half_norm(key_norm, slope1, KIND1, INNER)
                if AS_QUERY:
                    bias = tl.where(columns < M, bias, huge1)
                v = level(S, c, along(bias, not AS_QUERY), slope1, huge1, KIND1, INNER, x_id, y_id, rows, columns)
                z = v - coefficient(second, BASE, stride, q0, count, QUERIES, AS_QUERY, none1)
            e1 = tl.exp2(z)
            a = coefficient(second, A, stride, q0, count, QUERIES, AS_QUERY) * scale
            b = coefficient(second, B, stride, q0, count, QUERIES, AS_QUERY) * scale
            if CANCELLING:
                ratio = coefficient(second, RATIO, stride, q0, count, QUERIES, AS_QUERY)
                g += a * (e1 - ratio * e) + b * (e1 * z)
            else:
                g += e1 * (b * z + a)
            if WANT_TAU and AS_QUERY:
                d = v * inverse1 - coefficient(second, MEAN_U, stride, q0, count, QUERIES, AS_QUERY)
                moment1 += tl.sum(e1 * d * d, 1)
        acc_sum, lost = add_exactly(acc_sum, lost, tl.sum(g, 1))
        acc = multiply(g, y_out, acc, PRECISION)
    return acc, acc_sum, lost, moment0, moment1


@triton.jit
def gradient_kernel(
    x,  # [views of x, N, D]
    y,  # [views of y, M, D]
    x_norm,  # [views of x, N]
    y_norm,  # [views of y, M]
    x_id,  # [N] int32; not read where both kinds are ALL
    y_id,  # [M]
    tau,  # [softmaxes] float64, signed
    x_view,  # [P] int32: view of x in each problem
    y_view,  # [P]
    coefficients,  # [5, softmaxes, P, queries], of coefficients_kernel
    bound,  # [BOUNDS]
    grad,  # [shares, views of x, N, D], in the type of the arithmetic
    moment,  # [shares, softmaxes, P, N], where wanted: sum e (u - mean u)^2, u = v / slope
    N,
    M,
    D,
    P,
    BOUNDS,
    share,  # rows of y for a program, a multiple of BLOCK_N
    SHARES,
    QUERY: tl.constexpr,  # x are the queries, else the keys
    KIND0: tl.constexpr,
    KIND1: tl.constexpr,
    CANCELLING: tl.constexpr,
    INNER: tl.constexpr,
    WANT_TAU: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,  # features of the gradient that a program writes; BLOCK_D if that is all of them
):
    """Grid: blocks of x, views of x times shares of y, blocks of features."""
    acc_type: tl.constexpr = x_norm.dtype.element_ty
    i0, d_out = tl.program_id(0) * BLOCK_M, tl.program_id(2) * BLOCK_OUT
    view, part = (tl.program_id(1) // SHARES).to(tl.int64), tl.program_id(1) % SHARES
    begin = part * share
    last = min(begin + share, M)
    rows = i0 + tl.arange(0, BLOCK_M)
    x_base = x + view * N * D
    norm = load_vector(x_norm + view * N, i0, N, BLOCK_M, 0.0)
    ids = load_vector(x_id, i0, N, BLOCK_M, 0) if KIND0 != ALL or KIND1 > ALL else rows
    x_tile = load_rows(x_base, i0, N, D, 0, BLOCK_M, BLOCK_D) if CHUNKS == 1 else rows
    slope0, huge0, slope1, huge1 = slopes_of(tau, KIND1, acc_type)
    scale = range_scale(bound, BOUNDS, acc_type) if x.dtype.element_ty == tl.float16 else 1.0
    SOFTMAXES: tl.constexpr = 1 if KIND1 == NONE else 2
    queries = tl.cast(N if QUERY else M, tl.int64)
    one = P * queries
    stride = SOFTMAXES * one
    acc = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=acc_type)
    acc_sum, lost = tl.zeros((BLOCK_M,), dtype=acc_type), tl.zeros((BLOCK_M,), dtype=acc_type)
    for p in range(P):
        here, there = tl.load(x_view + p).to(tl.int64), tl.load(y_view + p).to(tl.int64)
        moment0, moment1 = tl.zeros((BLOCK_M,), dtype=acc_type), tl.zeros((BLOCK_M,), dtype=acc_type)
        rows_base = coefficients + p * queries
        acc, acc_sum, lost, moment0, moment1 = sweep(
            acc, acc_sum, lost, moment0, moment1, x_tile, x_base, norm, ids, i0, N,
            y + there * M * D, y_norm + there * M, y_id, begin, tl.where(here == view, last, begin), M,
            rows_base, stride, one, slope0, huge0, slope1, huge1, scale, d_out, D,
            QUERY, KIND0, KIND1, CANCELLING, INNER, WANT_TAU, PRECISION, CHUNKS,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_OUT,
        )  # fmt: skip
        if QUERY and WANT_TAU:
            out = moment + part * stride + p * queries + rows
            mine = rows < tl.where(here == view, N, 0)
            tl.store(out, moment0, mask=mine)
            if KIND1 != NONE:
                tl.store(out + one, moment1, mask=mine)
    d = d_out + tl.arange(0, BLOCK_OUT)
    if INNER:
        acc = -2.0 * acc
    else:
        tile = load_rows(x_base, i0, N, D, d_out, BLOCK_M, BLOCK_OUT).to(acc_type)
        acc = 2.0 * (tile * acc_sum[:, None] - acc)
    if x.dtype.element_ty == tl.float16:
        acc = acc / scale
    out = grad + ((part * (tl.num_programs(1) // SHARES) + view) * N + i0) * D
    r = tl.arange(0, BLOCK_M)
    tl.store(out + r[:, None] * D + d[None, :], acc, mask=(r[:, None] < N - i0) & (d[None, :] < D))
