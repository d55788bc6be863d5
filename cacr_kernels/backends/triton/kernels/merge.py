"""Value and lse of each row from the row statistics of all splits, in float64 (``cacr_kernels/reference.py``, Merge).

With base the largest row_max of all splits, and the sums e and e z of all splits made relative to it:

    F_i   = |q_i|^2 - 2 (base + sum e z / sum e) / slope        the mean cost
    lse_i = ln sum e + tau (|q_i|^2 - 2 base / slope)

For inner products and among positives, whose v is made of costs, |q_i|^2 is left out (``tile.py``).
"""

import triton
import triton.language as tl

from .statistics import base_of
from .tile import COUNTS, LN2, SHARED_SET, first_row_and_pair, softmax_of, softmaxes_of


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(
    # inputs
    partial_state,  # [SPLITS, 3, softmaxes, P, N], of statistics_kernel
    q_norm,  # [views of q, N]
    tau,  # [softmaxes] float64
    q_view,  # [P]
    # results, float64
    value,  # [softmaxes, P, N]
    lse,  # [softmaxes, P, N]
    row_state,  # [3, softmaxes, P, N]: base, sum e, mean z; sum 0 for an empty set
    # sizes
    N,
    P,
    SPLITS,
    # what is computed, and how
    SECOND_SET: tl.constexpr,
    USES_COST0: tl.constexpr,  # v of the first softmax is made of costs
    USES_COST1: tl.constexpr,
    INNER_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid: blocks of queries of every pair of sets, softmaxes."""
    acc_type: tl.constexpr = q_norm.dtype.element_ty
    i0, p = first_row_and_pair(N, BLOCK_M)
    s = tl.program_id(1)
    rows = i0 + tl.arange(0, BLOCK_M)
    inside = rows < N
    one = tl.cast(P, tl.int64) * N  # rows of one softmax
    stride = one * tl.num_programs(1)  # rows of one quantity
    at = s * one + p.to(tl.int64) * N + rows
    temperature = tl.load(tau + s)
    if SECOND_SET == SHARED_SET:  # its state is in units of the first
        first, second = softmaxes_of(tau, SECOND_SET, acc_type)
        slope, mask_bias = first.slope, first.mask_bias
        ratio = tl.where(s == 0, 1.0, second.slope).to(tl.float64)
    else:
        softmax = softmax_of(temperature, acc_type)
        slope, mask_bias = softmax.slope, softmax.mask_bias
        ratio = 1.0
    row_max = tl.load(partial_state + at, mask=inside, other=0.0)
    for i in range(1, SPLITS):
        row_max = tl.maximum(row_max, tl.load(partial_state + i * 3 * stride + at, mask=inside, other=0.0))
    base = base_of(row_max, mask_bias).to(tl.float64)
    sum_e, sum_ez = tl.zeros((BLOCK_M,), tl.float64), tl.zeros((BLOCK_M,), tl.float64)
    for i in range(SPLITS):
        split = partial_state + i * 3 * stride + at
        split_max = tl.load(split, mask=inside, other=0.0)
        shift = tl.where(split_max == -mask_bias, 0.0, split_max.to(tl.float64) - base) * ratio
        split_e = tl.load(split + stride, mask=inside, other=0.0).to(tl.float64)
        split_ez = tl.load(split + 2 * stride, mask=inside, other=0.0).to(tl.float64)
        rescale = tl.exp2(shift)
        sum_e += split_e * rescale
        sum_ez += (split_ez + shift * split_e) * rescale
    sum_ez += temperature * 0.0  # Inf and NaN leave no trace in 2^z where there is no key
    empty = (sum_e == 0) & (sum_ez == 0) & (row_max == -mask_bias)
    sum_e = tl.where(empty, 1.0, sum_e)
    mean_z = sum_ez / sum_e
    norm = tl.load(q_norm + tl.load(q_view + p).to(tl.int64) * N + rows, mask=inside, other=0.0)
    if INNER_PRODUCT:
        norm *= 0.0
    elif USES_COST0 or USES_COST1:
        norm = tl.where((s == 0) & USES_COST0 | (s != 0) & USES_COST1, 0.0, norm)
    norm = norm.to(tl.float64)
    base, slope = base * ratio, slope.to(tl.float64) * ratio
    F = tl.where(empty, 0.0, norm - 2.0 * (base + mean_z) / slope)
    logit = temperature * (norm - 2.0 * base / slope)
    log_sum = tl.where(empty, -float("inf"), tl.log2(sum_e) * LN2 + logit)
    tl.store(value + at, F, mask=inside)
    tl.store(lse + at, tl.where(F == F, log_sum, F), mask=inside)
    tl.store(row_state + at, base, mask=inside)
    tl.store(row_state + stride + at, tl.where(empty, 0.0, sum_e + F * 0.0), mask=inside)
    tl.store(row_state + 2 * stride + at, mean_z, mask=inside)
