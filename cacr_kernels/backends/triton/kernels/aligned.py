"""cacr_loss, attraction: softmax over the other views of the same instance (``cacr_kernels/reference.py``, cacr).

    F+_vb = sum_{u != v} w_uv c_uv,   w_uv = softmax_u(tau_pos c_uv),   c_uv = |z_vb - z_ub|^2
    dL/dz_vb = sum_u 2 (g_vu + g_uv) (z_vb - z_ub),   g_vu = alpha / (V B) w_uv (1 + tau_pos (c_uv - F+_vb))

Costs are made of differences, because views of an instance are close to each other. With NORMALIZE z are unit rows of
raw ones, and so are the differences (``unit_difference`` in ``tile.py``).
"""

import triton
import triton.language as tl

from .norms import squared_lengths
from .tile import COUNTS, load_rows, load_vector, norm_in_range, unit_difference

TAU_POS, TAU_NEG, ALPHA, BETA, RBF_SCALE = (tl.constexpr(i) for i in range(5))  # places in ``numbers``


@triton.jit(do_not_specialize=COUNTS)
def aligned_kernel(
    # inputs
    z,  # [V, B, D]
    unit,  # [V, B] factors that make unit rows, with NORMALIZE; else None
    numbers,  # [5] float64: tau_pos, tau_neg, alpha, beta, rbf_scale
    # results: for the gradient, then for the repulsion, then statistics
    cost,  # [V, V, B] between views of an instance, in the type of the arithmetic
    norm,  # [V, B] squared lengths, NaN out of range; with NORMALIZE not written
    ids,  # [V, B] int32: the instance
    tau,  # [2] float64: the signed temperatures of the repulsion
    value,  # [V, B] float64, as are the next two
    entropy,
    variance,  # of the costs
    row_state,  # [3, V, B] float64: cost with the largest weight, sum e relative to it, mean cost minus it
    # sizes
    V,  # views
    B,  # instances
    D,  # features
    # what is computed, and how
    RBF: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of instances, views."""
    acc_type: tl.constexpr = norm.dtype.element_ty
    b0, v = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    view = tl.cast(B, tl.int64) * D
    rows = b0 + tl.arange(0, BLOCK_M)
    inside = rows < B
    if not NORMALIZE:
        length = squared_lengths(z + v * view, b0, B, D, BLOCK_M, BLOCK_D, acc_type)
    tau_neg = tl.load(numbers + TAU_NEG)
    tau_rbf = tau_neg + tl.load(numbers + RBF_SCALE)
    at = tl.cast(v, tl.int64) * B + rows
    if not NORMALIZE:  # else unit_kernel has written them
        length = norm_in_range(length, tau_neg, acc_type)
        length = norm_in_range(length, tau_rbf, acc_type) if RBF else length
        tl.store(norm + at, length, mask=inside)
    tl.store(ids + at, rows, mask=inside)
    tau_pos = tl.load(numbers + TAU_POS)
    nothing = tl.zeros((BLOCK_M,), tl.float64)
    top, sum_e, sum_ed = nothing, nothing, nothing  # of the costs c - top, where top has the largest weight
    x_unit = load_units(unit, v, b0, B, BLOCK_M, NORMALIZE)
    for u in range(V):
        y_unit = load_units(unit, u, b0, B, BLOCK_M, NORMALIZE)
        c = tl.zeros((BLOCK_M,), dtype=acc_type)
        for d0 in range(0, D, BLOCK_D):
            x = load_rows(z + v * view, b0, B, D, d0, BLOCK_M, BLOCK_D).to(acc_type)  # [BLOCK_M, BLOCK_D]
            y = load_rows(z + u * view, b0, B, D, d0, BLOCK_M, BLOCK_D).to(acc_type)
            d = difference(x, x_unit, y, y_unit, v < u, NORMALIZE)
            c += tl.sum(d * d, 1)
        tl.store(cost + u * tl.cast(B, tl.int64) + tl.cast(v, tl.int64) * V * B + rows, c, mask=inside)
        if u != v:
            wide = c.to(tl.float64)
            new_top = tl.where((sum_e == 0) | (tau_pos * (wide - top) > 0), wide, top)
            shift = tl.where(sum_e == 0, 0.0, top - new_top)
            rescale, e = tl.exp(tau_pos * shift), tl.exp(tau_pos * (wide - new_top))
            sum_ed = (sum_ed + shift * sum_e) * rescale + e * (wide - new_top)
            sum_e = sum_e * rescale + e
            top = new_top
    mean_d = sum_ed / sum_e
    F = top + mean_d
    tl.debug_barrier()  # costs are read by other threads than those that wrote them
    moment = tl.zeros((BLOCK_M,), tl.float64)
    for u in range(V):
        if u != v:
            where = cost + u * tl.cast(B, tl.int64) + tl.cast(v, tl.int64) * V * B + rows
            c = tl.load(where, mask=inside, other=0.0).to(tl.float64)
            moment += tl.exp(tau_pos * (c - top)) / sum_e * (c - F) * (c - F)
    tl.store(value + at, F, mask=inside)
    tl.store(entropy + at, tl.log(sum_e) - tau_pos * mean_d, mask=inside)
    tl.store(variance + at, moment, mask=inside)
    one = tl.cast(V, tl.int64) * B  # rows of one quantity
    tl.store(row_state + at, top, mask=inside)
    tl.store(row_state + one + at, sum_e, mask=inside)
    tl.store(row_state + 2 * one + at, mean_d, mask=inside)
    if (tl.program_id(0) == 0) & (v == 0):
        tl.store(tau, -tau_neg)
        tl.store(tau + 1, -tau_rbf)


@triton.jit
def load_units(unit, v, b0, B, SIZE: tl.constexpr, NORMALIZE: tl.constexpr):
    """Factors of view v from row b0 on [SIZE, 1]; without NORMALIZE anything."""
    return load_vector(unit + v * tl.cast(B, tl.int64), b0, B, SIZE, 0.0)[:, None] if NORMALIZE else b0


@triton.jit
def difference(x, x_unit, y, y_unit, x_first, NORMALIZE: tl.constexpr):
    """``x`` - ``y`` [BLOCK_M, BLOCK_D], of their unit rows; ``x_first`` gives the order, which is to stay the same."""
    if NORMALIZE:
        first, second = tl.where(x_first, x, y), tl.where(x_first, y, x)
        found = unit_difference(first, tl.where(x_first, x_unit, y_unit), second, tl.where(x_first, y_unit, x_unit))
        return tl.where(x_first, found, -found)
    else:
        return x - y


@triton.jit
def aligned_coefficient(c, tau, row_state, one, inside):
    """Derivatives w (1 + tau (c - F)) of the rows that ``row_state`` points to; ``one``: rows of one quantity."""
    d = c - tl.load(row_state, mask=inside, other=0.0)
    w = tl.exp(tau * d) / tl.load(row_state + one, mask=inside, other=1.0)
    return w * (1.0 + tau * (d - tl.load(row_state + 2 * one, mask=inside, other=0.0)))


@triton.jit(do_not_specialize=COUNTS)
def aligned_gradient_kernel(
    # inputs
    z,  # [V, B, D]
    unit,  # [V, B] factors that make unit rows, with NORMALIZE; else None
    numbers,  # [5] float64
    cost,  # [V, V, B], of aligned_kernel
    row_state,  # [3, V, B] float64, of aligned_kernel
    partial,  # [SPLITS, V, B, D]: gradient of the repulsion
    # result
    grad,  # [V, B, D]: gradient of the loss; with NORMALIZE w.r.t. the unit rows, but for a part along them
    # sizes
    V,
    B,
    D,
    SPLITS,
    # what is computed, and how
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of instances, views, blocks of features."""
    acc_type: tl.constexpr = cost.dtype.element_ty
    b0, v, d0 = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_D
    wide = tl.cast(B, tl.int64)  # products of it do not overflow
    view = wide * D
    rows = b0 + tl.arange(0, BLOCK_M)
    inside = rows < B
    tau = tl.load(numbers + TAU_POS)
    scale = tl.load(numbers + ALPHA) / (V * wide).to(tl.float64)
    x = load_rows(z + v * view, b0, B, D, d0, BLOCK_M, BLOCK_D).to(acc_type)
    x_unit = load_units(unit, v, b0, B, BLOCK_M, NORMALIZE)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=acc_type)
    for u in range(V):
        if u != v:
            c = tl.load(cost + (v * V + u) * wide + rows, mask=inside, other=0.0).to(tl.float64)
            g = aligned_coefficient(c, tau, row_state + v * wide + rows, V * wide, inside)
            g += aligned_coefficient(c, tau, row_state + u * wide + rows, V * wide, inside)
            y = load_rows(z + u * view, b0, B, D, d0, BLOCK_M, BLOCK_D).to(acc_type)
            y_unit = load_units(unit, u, b0, B, BLOCK_M, NORMALIZE)
            total += (2.0 * scale * g).to(acc_type)[:, None] * difference(x, x_unit, y, y_unit, v < u, NORMALIZE)
    d = d0 + tl.arange(0, BLOCK_D)
    at = (v * wide + rows)[:, None] * D + d[None, :]
    features = inside[:, None] & (d[None, :] < D)
    for i in range(SPLITS):
        total += tl.load(partial + i * V * view + at, mask=features, other=0.0)
    tl.store(grad + at, total, mask=features)
