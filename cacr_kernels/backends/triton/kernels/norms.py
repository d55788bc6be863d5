"""Squared lengths of embeddings; NaN for those that are too long for the temperatures (``in_range``)."""

import triton
import triton.language as tl

from .tile import in_range, load_rows


@triton.jit
def norms_of_block(x, norm, tau, block, rows, D, SOFTMAXES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of rows [block * BLOCK_R, ...)."""
    i0 = tl.cast(block, tl.int64) * BLOCK_R
    total = tl.zeros((BLOCK_R,), dtype=norm.dtype.element_ty)
    for d0 in range(0, D, BLOCK_D):
        tile = load_rows(x, i0, rows, D, d0, BLOCK_R, BLOCK_D).to(total.dtype)  # [BLOCK_R, BLOCK_D]
        total += tl.sum(tile * tile, 1)
    for s in tl.static_range(SOFTMAXES):
        total = in_range(total, tl.load(tau + s), total.dtype)
    r = tl.arange(0, BLOCK_R)
    tl.store(norm + i0 + r, total, mask=r < rows - i0)


@triton.jit
def norms_kernel(
    q,  # [q_rows, D]
    k,  # [k_rows, D]
    q_norm,  # [q_rows] in the type of the arithmetic
    k_norm,  # [k_rows]
    tau,  # [SOFTMAXES] float64
    q_rows,
    k_rows,
    D,
    SOFTMAXES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows of q, then of k (none where the queries are the keys)."""
    block, q_blocks = tl.program_id(0), tl.cdiv(q_rows, BLOCK_R)
    if block < q_blocks:
        norms_of_block(q, q_norm, tau, block, q_rows, D, SOFTMAXES, BLOCK_R, BLOCK_D)
    else:
        norms_of_block(k, k_norm, tau, block - q_blocks, k_rows, D, SOFTMAXES, BLOCK_R, BLOCK_D)
