"""cacr_loss, attraction: softmax over the other views of the same instance, with costs by form differences."""

import triton
import triton.language as tl

from .tile import in_range, load_rows

TAU_POS, TAU_NEG, ALPHA, BETA, RBF_SCALE = (tl.constexpr(i) for i in range(5))  # places in ``numbers``


@triton.jit
def aligned_kernel(
    z,  # [V, B, D]
    numbers,  # [5] float64: tau_pos, tau_neg, alpha, beta, rbf_scale
    cost,  # [V, V, B] between views of an instance
    norm,  # [V, B] squared lengths, NaN out of range
    ids,  # [V, B] int32: the instance
    tau,  # [2] float64: the signed temperatures of the repulsion
    value,  # [V, B] float64, as are the next two
    entropy,
    variance,  # of the costs
    weights,  # [3, V, B] float64: the cost with the largest weight, sum e relative to it, mean cost minus it
    V,
    B,
    D,
    RBF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of instances, views."""
    acc_type: tl.constexpr = norm.dtype.element_ty
    b0, v = tl.program_id(0) * BLOCK, tl.program_id(1)
    view = tl.cast(B, tl.int64) * D
    rows = b0 + tl.arange(0, BLOCK)
    inside = rows < B
    length = tl.zeros((BLOCK,), dtype=acc_type)
    for d0 in range(0, D, BLOCK_D):
        x = load_rows(z + v * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
        length += tl.sum(x * x, 1)
    tau_neg = tl.load(numbers + TAU_NEG)
    tau_rbf = tau_neg + tl.load(numbers + RBF_SCALE)
    at = tl.cast(v, tl.int64) * B + rows
    length = in_range(length, tau_neg, acc_type)
    length = in_range(length, tau_rbf, acc_type) if RBF else length
    tl.store(norm + at, length, mask=inside)
    tl.store(ids + at, rows, mask=inside)
    tau_pos = tl.load(numbers + TAU_POS)
    nothing = tl.zeros((BLOCK,), tl.float64)
    top, total, total_d = nothing, nothing, nothing
    for u in range(V):
        c = tl.zeros((BLOCK,), dtype=acc_type)
        for d0 in range(0, D, BLOCK_D):
            x = load_rows(z + v * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
            y = load_rows(z + u * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
            c += tl.sum((x - y) * (x - y), 1)
        tl.store(cost + u * tl.cast(B, tl.int64) + tl.cast(v, tl.int64) * V * B + rows, c, mask=inside)
        if u != v:
            wide = c.to(tl.float64)
            new_top = tl.where((total == 0) | (tau_pos * (wide - top) > 0), wide, top)
            moved = tl.where(total == 0, 0.0, top - new_top)
            shrink, e = tl.exp(tau_pos * moved), tl.exp(tau_pos * (wide - new_top))
            total_d = (total_d + moved * total) * shrink + e * (wide - new_top)
            total = total * shrink + e
            top = new_top
    mean_d = total_d / total
    F = top + mean_d
    tl.debug_barrier()  # costs are read by other threads than those that wrote them
    moment = tl.zeros((BLOCK,), tl.float64)
    for u in range(V):
        if u != v:
            where = cost + u * tl.cast(B, tl.int64) + tl.cast(v, tl.int64) * V * B + rows
            c = tl.load(where, mask=inside, other=0.0).to(tl.float64)
            moment += tl.exp(tau_pos * (c - top)) / total * (c - F) * (c - F)
    tl.store(value + at, F, mask=inside)
    tl.store(entropy + at, tl.log(total) - tau_pos * mean_d, mask=inside)
    tl.store(variance + at, moment, mask=inside)
    one = tl.cast(V, tl.int64) * B
    tl.store(weights + at, top, mask=inside)
    tl.store(weights + one + at, total, mask=inside)
    tl.store(weights + 2 * one + at, mean_d, mask=inside)
    if (tl.program_id(0) == 0) & (v == 0):
        tl.store(tau, -tau_neg)
        tl.store(tau + 1, -tau_rbf)


@triton.jit
def aligned_coefficient(c, tau, weights, one, inside):
    """Derivatives w (1 + tau (c - F)) of the rows that ``weights`` points to."""
    d = c - tl.load(weights, mask=inside, other=0.0)
    w = tl.exp(tau * d) / tl.load(weights + one, mask=inside, other=1.0)
    return w * (1.0 + tau * (d - tl.load(weights + 2 * one, mask=inside, other=0.0)))


@triton.jit
def aligned_gradient_kernel(
    z,  # [V, B, D]
    numbers,  # [5] float64
    cost,  # [V, V, B], of aligned_kernel
    weights,  # [3, V, B] float64
    shares,  # [SHARES, V, B, D]: gradient of the repulsion
    grad,  # [V, B, D]: gradient of the loss
    V,
    B,
    D,
    SHARES,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of instances, views, blocks of features. dz_v = sum_u 2 (g_vu + g_uv) (z_v - z_u)."""
    acc_type: tl.constexpr = cost.dtype.element_ty
    b0, v, d0 = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2) * BLOCK_D
    wide = tl.cast(B, tl.int64)
    view = wide * D
    rows = b0 + tl.arange(0, BLOCK)
    inside = rows < B
    tau = tl.load(numbers + TAU_POS)
    scale = tl.load(numbers + ALPHA) / (V * wide).to(tl.float64)
    x = load_rows(z + v * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
    total = tl.zeros((BLOCK, BLOCK_D), dtype=acc_type)
    for u in range(V):
        if u != v:
            c = tl.load(cost + (v * V + u) * wide + rows, mask=inside, other=0.0).to(tl.float64)
            g = aligned_coefficient(c, tau, weights + v * wide + rows, V * wide, inside)
            g += aligned_coefficient(c, tau, weights + u * wide + rows, V * wide, inside)
            y = load_rows(z + u * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
            total += (2.0 * scale * g).to(acc_type)[:, None] * (x - y)
    d = d0 + tl.arange(0, BLOCK_D)
    at = (v * wide + rows)[:, None] * D + d[None, :]
    features = inside[:, None] & (d[None, :] < D)
    for i in range(SHARES):
        total += tl.load(shares + i * V * view + at, mask=features, other=0.0)
    tl.store(grad + at, total, mask=features)
