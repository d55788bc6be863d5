"""Squared lengths |x_i|^2 of queries and keys, of which costs are made (``cacr_kernels/reference.py``).

They are NaN for rows that are too long for the temperatures (``norm_in_range`` in ``tile.py``).
"""

import triton
import triton.language as tl

from .tile import COUNTS, load_rows, norm_in_range


@triton.jit
def squared_lengths(x, i0, rows, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, acc_type: tl.constexpr):
    """Those of rows [i0, i0 + BLOCK_M) of ``x`` [rows, D]."""
    total = tl.zeros((BLOCK_M,), dtype=acc_type)
    for d0 in range(0, D, BLOCK_D):
        tile = load_rows(x, i0, rows, D, d0, BLOCK_M, BLOCK_D).to(acc_type)  # [BLOCK_M, BLOCK_D]
        total += tl.sum(tile * tile, 1)
    return total


@triton.jit
def store_norms(norm, total, i0, rows, tau, SOFTMAXES: tl.constexpr):
    """Write ``total`` to ``norm`` [rows] from i0 on, NaN where a row is too long for one of the temperatures."""
    for s in tl.static_range(SOFTMAXES):
        total = norm_in_range(total, tl.load(tau + s), total.dtype)
    r = tl.arange(0, total.shape[0])
    tl.store(norm + i0 + r, total, mask=r < rows - i0)


@triton.jit(do_not_specialize=COUNTS)
def norms_kernel(
    # inputs
    q,  # [q_rows, D]
    k,  # [k_rows, D]
    # results, in the type of the arithmetic
    q_norm,  # [q_rows]
    k_norm,  # [k_rows]
    # input
    tau,  # [SOFTMAXES] float64
    # sizes
    q_rows,
    k_rows,
    D,
    # how it is computed
    SOFTMAXES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows of q, then of k (none where the queries are the keys)."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    block, q_blocks = tl.program_id(0), tl.cdiv(q_rows, BLOCK_M)
    if block < q_blocks:
        i0 = tl.cast(block, tl.int64) * BLOCK_M
        total = squared_lengths(q, i0, q_rows, D, BLOCK_M, BLOCK_D, acc_type)
        store_norms(q_norm, total, i0, q_rows, tau, SOFTMAXES)
    else:
        i0 = tl.cast(block - q_blocks, tl.int64) * BLOCK_M
        total = squared_lengths(k, i0, k_rows, D, BLOCK_M, BLOCK_D, acc_type)
        store_norms(k_norm, total, i0, k_rows, tau, SOFTMAXES)
