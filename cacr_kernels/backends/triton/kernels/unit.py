"""Unit rows x r of raw rows x, r = 1 / max(|x|, 1e-12), and gradients of x from those of x r.

The other kernels read raw rows and multiply similarities with r of both, so half types stay half in products. With the
gradient g w.r.t. x r, that of x is r (g - (g.u) u), u = x / |x|: a part of g along x comes to nothing, and is left out
where that saves work. For rows shorter than 1e-12 it is 0 (``cacr_kernels/reference.py``, unit_rows).
"""

import triton
import triton.language as tl

from .tile import COUNTS, load_rows, load_vector

SHORTEST = tl.constexpr(1e-12)  # rows at least this long become unit vectors; that of cacr_kernels/reference.py


@triton.jit
def lengths(x, i0, rows, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, acc_type: tl.constexpr):
    """Those of rows [i0, i0 + BLOCK_M) of ``x`` [rows, D], float64.

    So r is rounded once: of nearly equal rows its error counts as a distance. And no square leaves the range.
    """
    total = tl.zeros((BLOCK_M,), tl.float64)
    for d0 in range(0, D, BLOCK_D):
        tile = load_rows(x, i0, rows, D, d0, BLOCK_M, BLOCK_D).to(acc_type).to(tl.float64)  # [BLOCK_M, BLOCK_D]
        total += tl.sum(tile * tile, 1)
    return tl.sqrt(total)


@triton.jit
def unit_factor(length):
    """The factors r, float64; 0 for a row of zeros, so that nothing large meets them. A NaN stays."""
    r = 1.0 / tl.where(is_short(length), shortest(), length)
    return tl.where(length == 0, 0.0, r)


@triton.jit
def is_short(length):
    """Whether rows are shorter than those that become unit vectors."""
    return length < shortest()


@triton.jit
def shortest():
    """A number alone would be rounded to float32."""
    return tl.full((), SHORTEST, tl.float64)


@triton.jit
def store_units(x, norm, unit, i0, rows, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Factors and squared lengths of rows [i0, i0 + BLOCK_M) of ``x`` [rows, D]; the latter with the rounded factor."""
    acc_type: tl.constexpr = norm.dtype.element_ty
    length = lengths(x, i0, rows, D, BLOCK_M, BLOCK_D, acc_type)
    r = unit_factor(length).to(acc_type)
    length *= r.to(tl.float64)
    i = tl.arange(0, BLOCK_M)
    tl.store(unit + i0 + i, r, mask=i < rows - i0)
    tl.store(norm + i0 + i, (length * length).to(acc_type), mask=i < rows - i0)


@triton.jit(do_not_specialize=COUNTS)
def unit_kernel(
    # inputs
    q,  # [q_rows, D]
    k,  # [k_rows, D]
    # results, in the type of the arithmetic
    q_norm,  # [q_rows] squared lengths of the unit rows: about 1, less for rows shorter than SHORTEST
    k_norm,  # [k_rows]
    q_unit,  # [q_rows] factors r
    k_unit,  # [k_rows]
    # sizes
    q_rows,
    k_rows,
    D,
    # how it is computed
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows of q, then of k (none where the queries are the keys)."""
    block, q_blocks = tl.program_id(0), tl.cdiv(q_rows, BLOCK_M)
    if block < q_blocks:
        store_units(q, q_norm, q_unit, tl.cast(block, tl.int64) * BLOCK_M, q_rows, D, BLOCK_M, BLOCK_D)
    else:
        store_units(k, k_norm, k_unit, tl.cast(block - q_blocks, tl.int64) * BLOCK_M, k_rows, D, BLOCK_M, BLOCK_D)


@triton.jit
def largest_unit(unit, begin, end, count, most):
    """The largest of ``most`` [SIZE] and the factors [begin, end) of ``unit`` [count]."""
    for j0 in range(begin, end, most.shape[0]):
        most = tl.maximum(most, load_vector(unit, j0, count, most.shape[0], 0.0))
    return most


@triton.jit
def inverse_power(most):
    """A power of two about 1 / max ``most``, to keep what is multiplied with factors in the range of float16."""
    top = tl.max(most, 0)
    return tl.exp2(-tl.ceil(tl.log2(tl.where(top > 0, top, 1.0))))


@triton.jit(do_not_specialize=COUNTS)
def unit_gradient_kernel(
    # inputs
    x,  # [rows, D]
    partial,  # [SPLITS, rows, D]: gradient w.r.t. the unit rows; [rows, D] may be the result
    # result, in the type of the arithmetic
    out,  # [rows, D]: gradient w.r.t. x
    # sizes
    rows,
    D,
    SPLITS,
    # how it is computed
    CHUNKS: tl.constexpr,  # of BLOCK_D features; 1: a tile holds them all
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows. The sum of the splits, in order, waits in ``out`` where a tile does not hold a row."""
    acc_type: tl.constexpr = out.dtype.element_ty
    i0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    first = i0 * D + i[:, None] * D + d[None, :]
    one = tl.cast(rows, tl.int64) * D
    length = lengths(x, i0, rows, D, BLOCK_M, BLOCK_D, acc_type)
    short = is_short(length)
    r = unit_factor(length).to(acc_type)[:, None]
    dot = tl.zeros((BLOCK_M,), acc_type)
    for d0 in range(0, D, BLOCK_D):
        features = (i[:, None] < rows - i0) & (d[None, :] < D - d0)
        g = tl.load(partial + first + d0, mask=features, other=0.0)
        for s in range(1, SPLITS):
            g += tl.load(partial + s * one + first + d0, mask=features, other=0.0)
        u = load_rows(x, i0, rows, D, d0, BLOCK_M, BLOCK_D).to(acc_type) * r
        dot += tl.sum(g * u, 1)
        if CHUNKS == 1:
            g = r * (g - dot[:, None] * u)
            g = tl.where(short[:, None], 0.0, g)
        tl.store(out + first + d0, g, mask=features)
    if CHUNKS > 1:
        tl.debug_barrier()  # what is read here was written by other threads
        for d0 in range(0, D, BLOCK_D):
            features = (i[:, None] < rows - i0) & (d[None, :] < D - d0)
            u = load_rows(x, i0, rows, D, d0, BLOCK_M, BLOCK_D).to(acc_type) * r
            g = tl.load(out + first + d0, mask=features, other=0.0)
            g = tl.where(short[:, None], 0.0, r * (g - dot[:, None] * u))
            tl.store(out + first + d0, g, mask=features)
