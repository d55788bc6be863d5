"""Row statistics of all shares of the keys together (``reference.py``, Merge), in float64."""

import triton
import triton.language as tl

from .statistics import base_of
from .tile import AGAIN, LN2, row_and_problem, slope_of, slopes_of


@triton.jit
def merge_kernel(
    state,  # [shares, 3, softmaxes, P, N] of statistics_kernel
    q_norm,  # [views of q, N]
    tau,  # [softmaxes] float64
    q_view,  # [P]
    value,  # [softmaxes, P, N] float64, as are the next two
    lse,
    weights,  # [3, softmaxes, P, N]: base, sum e, mean z; sum 0 for an empty set
    N,
    P,
    SHARES,
    KIND1: tl.constexpr,
    BY_COST0: tl.constexpr,
    BY_COST1: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of queries of every problem, softmaxes."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    i0, p = row_and_problem(N, BLOCK)
    s = tl.program_id(1)
    rows = i0 + tl.arange(0, BLOCK)
    inside = rows < N
    one = tl.cast(P, tl.int64) * N  # of one softmax
    stride = one * tl.num_programs(1)
    at = s * one + p.to(tl.int64) * N + rows
    temperature = tl.load(tau + s)
    if KIND1 == AGAIN:  # in units of the first
        slope, huge, ratio, _ = slopes_of(tau, KIND1, acc_type)
        ratio = tl.where(s == 0, 1.0, ratio).to(tl.float64)
    else:
        slope, huge = slope_of(temperature, acc_type)
        ratio = 1.0
    top = tl.load(state + at, mask=inside, other=0.0)
    for i in range(1, SHARES):
        top = tl.maximum(top, tl.load(state + i * 3 * stride + at, mask=inside, other=0.0))
    base = base_of(top, huge).to(tl.float64)
    total, total_z = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for i in range(SHARES):
        from_state = state + i * 3 * stride + at
        part = tl.load(from_state, mask=inside, other=0.0)
        moved = tl.where(part == -huge, 0.0, part.to(tl.float64) - base) * ratio
        part_sum = tl.load(from_state + stride, mask=inside, other=0.0).to(tl.float64)
        part_z = tl.load(from_state + 2 * stride, mask=inside, other=0.0).to(tl.float64)
        shrink = tl.exp2(moved)
        total += part_sum * shrink
        total_z += (part_z + moved * part_sum) * shrink
    total_z += temperature * 0.0  # Inf and NaN leave no trace in 2^z where there is no key
    empty = (total == 0) & (total_z == 0) & (top == -huge)
    total = tl.where(empty, 1.0, total)
    mean_z = total_z / total
    norm = tl.load(q_norm + tl.load(q_view + p).to(tl.int64) * N + rows, mask=inside, other=0.0)
    if INNER:
        norm *= 0.0
    elif BY_COST0 or BY_COST1:
        norm = tl.where((s == 0) & BY_COST0 | (s != 0) & BY_COST1, 0.0, norm)
    norm = norm.to(tl.float64)
    base, slope = base * ratio, slope.to(tl.float64) * ratio
    mean = tl.where(empty, 0.0, norm - 2.0 * (base + mean_z) / slope)
    logit = temperature * (norm - 2.0 * base / slope)
    log_sum = tl.where(empty, -float("inf"), tl.log2(total) * LN2 + logit)
    tl.store(value + at, mean, mask=inside)
    tl.store(lse + at, tl.where(mean == mean, log_sum, mean), mask=inside)
    tl.store(weights + at, base, mask=inside)
    tl.store(weights + stride + at, tl.where(empty, 0.0, total + mean * 0.0), mask=inside)
    tl.store(weights + 2 * stride + at, mean_z, mask=inside)
