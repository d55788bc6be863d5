"""Sums over what other kernels wrote in splits, in a fixed order, and the gradient of the temperatures.

grad_tau = sum_i gF_i Var_i(c) + glse_i F_i        (``cacr_kernels/reference.py``, Gradients)
"""

import triton
import triton.language as tl

from .coefficients import B
from .tile import COUNTS, LN2


@triton.jit(do_not_specialize=COUNTS)
def add_splits_kernel(partial, out, size, SPLITS, BLOCK: tl.constexpr):
    """Sum of ``partial`` [SPLITS, size] to ``out`` [size]; grid: blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(partial + at, mask=at < size, other=0.0)
    for i in range(1, SPLITS):
        total += tl.load(partial + tl.cast(i, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total, mask=at < size)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["sum_e"])
def grad_tau_kernel(
    # inputs
    moment,  # [SPLITS, softmaxes, rows], of gradient_kernel
    coefficients,  # [5, softmaxes, rows], of coefficients_kernel
    value,  # [softmaxes, rows] float64, as are the next two
    sum_e,  # 0 for an empty set
    grad_lse,
    # result
    grad_tau,  # [softmaxes] float64
    # sizes
    rows,  # of one softmax: P N
    SPLITS,
    BLOCK: tl.constexpr,
):
    """Grid: softmaxes. With u = v / slope, Var(c) = 4 Var(u); ``moment`` is sum e (u - mean u)^2."""
    s, stride = tl.program_id(0), tl.num_programs(0) * tl.cast(rows, tl.int64)
    acc = tl.zeros((BLOCK,), tl.float64)
    for i0 in range(0, rows, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at = s * tl.cast(rows, tl.int64) + i
        inside = i < rows
        nonempty = tl.load(sum_e + at, mask=inside, other=0.0) != 0
        weight = tl.load(coefficients + B * stride + at, mask=inside, other=0.0).to(tl.float64) / LN2
        variance = tl.zeros((BLOCK,), tl.float64)
        for j in range(SPLITS):
            variance += tl.load(moment + j * stride + at, mask=inside, other=0.0).to(tl.float64)
        mean = tl.load(value + at, mask=inside, other=0.0)
        g_lse = tl.load(grad_lse + at, mask=inside, other=0.0)
        acc += tl.where(nonempty, 4.0 * weight * variance + g_lse * mean, 0.0)
    tl.store(grad_tau + s, tl.sum(acc, 0))
