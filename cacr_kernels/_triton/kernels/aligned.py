"""cacr_loss, attraction: softmax over the other views of the same instance, with costs by form differences."""

import triton
import triton.language as tl

from .tile import load_rows

TAU_POS, TAU_NEG, ALPHA, BETA, RBF_SCALE = (tl.constexpr(i) for i in range(5))  # places in ``numbers``


@triton.jit
def aligned_kernel(
    z,  # [V, B, D]
    numbers,  # [5] float64: tau_pos, tau_neg, alpha, beta, rbf_scale
    cost,  # [V, V, B] between views of an instance
    norm,  # [V, B] squared lengths
    ids,  # [V, B] int32: the instance
    tau,  # [2] float64: the signed temperatures of the repulsion
    value,  # [V, B] float64, as are the next two
    lse,
    variance,  # of the costs
    V,
    B,
    D,
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
    at = tl.cast(v, tl.int64) * B + rows
    tl.store(norm + at, length, mask=inside)
    tl.store(ids + at, rows, mask=inside)
    tau_pos = tl.load(numbers + TAU_POS)
    top = tl.full((BLOCK,), -float("inf"), tl.float64)
    total, total_c = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for u in range(V):
        c = tl.zeros((BLOCK,), dtype=acc_type)
        for d0 in range(0, D, BLOCK_D):
            x = load_rows(z + v * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
            y = load_rows(z + u * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
            c += tl.sum((x - y) * (x - y), 1)
        tl.store(cost + u * tl.cast(B, tl.int64) + tl.cast(v, tl.int64) * V * B + rows, c, mask=inside)
        if u != v:
            logit = tau_pos * c.to(tl.float64)
            new_top = tl.maximum(top, logit)
            shrink, e = tl.exp(top - new_top), tl.exp(logit - new_top)
            total = total * shrink + e
            total_c = total_c * shrink + e * c.to(tl.float64)
            top = new_top
    F = total_c / total
    tl.debug_barrier()  # costs are read by other threads than those that wrote them
    moment = tl.zeros((BLOCK,), tl.float64)
    for u in range(V):
        if u != v:
            where = cost + u * tl.cast(B, tl.int64) + tl.cast(v, tl.int64) * V * B + rows
            c = tl.load(where, mask=inside, other=0.0).to(tl.float64)
            moment += tl.exp(tau_pos * c - top) / total * (c - F) * (c - F)
    tl.store(value + at, F, mask=inside)
    tl.store(lse + at, tl.log(total) + top + F * 0.0, mask=inside)
    tl.store(variance + at, moment, mask=inside)
    if (tl.program_id(0) == 0) & (v == 0):
        tau_neg = tl.load(numbers + TAU_NEG)
        tl.store(tau, -tau_neg)
        tl.store(tau + 1, -(tau_neg + tl.load(numbers + RBF_SCALE)))


@triton.jit
def aligned_gradient_kernel(
    z,  # [V, B, D]
    numbers,  # [5] float64
    cost,  # [V, V, B], of aligned_kernel
    value,  # [V, B] float64
    lse,
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
    own_lse = tl.load(lse + v * wide + rows, mask=inside, other=0.0)
    own_value = tl.load(value + v * wide + rows, mask=inside, other=0.0)
    x = load_rows(z + v * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
    total = tl.zeros((BLOCK, BLOCK_D), dtype=acc_type)
    for u in range(V):
        if u != v:
            c = tl.load(cost + (v * V + u) * wide + rows, mask=inside, other=0.0).to(tl.float64)
            other_lse = tl.load(lse + u * wide + rows, mask=inside, other=0.0)
            other_value = tl.load(value + u * wide + rows, mask=inside, other=0.0)
            g = tl.exp(tau * c - own_lse) * (1.0 + tau * (c - own_value))
            g += tl.exp(tau * c - other_lse) * (1.0 + tau * (c - other_value))
            y = load_rows(z + u * view, b0, B, D, d0, BLOCK, BLOCK_D).to(acc_type)
            total += (2.0 * scale * g).to(acc_type)[:, None] * (x - y)
    d = d0 + tl.arange(0, BLOCK_D)
    at = (v * wide + rows)[:, None] * D + d[None, :]
    features = inside[:, None] & (d[None, :] < D)
    for i in range(SHARES):
        total += tl.load(shares + i * V * view + at, mask=features, other=0.0)
    tl.store(grad + at, total, mask=features)
