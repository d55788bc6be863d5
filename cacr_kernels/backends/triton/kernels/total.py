"""Sums over what other kernels wrote in shares, in a fixed order."""

import triton
import triton.language as tl

from .coefficients import B
from .tile import LN2


@triton.jit
def add_shares_kernel(shares, out, size, SHARES, BLOCK: tl.constexpr):
    """Sum of shares [SHARES, size] -> out [size]; grid: blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(shares + at, mask=at < size, other=0.0)
    for i in range(1, SHARES):
        total += tl.load(shares + tl.cast(i, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total, mask=at < size)


@triton.jit
def grad_tau_kernel(
    moment,  # [SHARES, softmaxes, rows] of gradient_kernel
    coefficients,  # [5, softmaxes, rows]
    value,  # [softmaxes, rows] float64, as are the next three
    total,
    grad_lse,
    grad_tau,  # [softmaxes]
    rows,
    SHARES,
    BLOCK: tl.constexpr,
):
    """Derivative of tau: sum_i gF_i Var_i(c) + glse_i F_i; grid: softmaxes. Var(c) = 4 Var(v / slope)."""
    s, stride = tl.program_id(0), tl.num_programs(0) * tl.cast(rows, tl.int64)
    acc = tl.zeros((BLOCK,), tl.float64)
    for i0 in range(0, rows, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at = s * tl.cast(rows, tl.int64) + i
        inside = i < rows
        nonempty = tl.load(total + at, mask=inside, other=0.0) != 0
        weight = tl.load(coefficients + B * stride + at, mask=inside, other=0.0).to(tl.float64) / LN2
        variance = tl.zeros((BLOCK,), tl.float64)
        for j in range(SHARES):
            variance += tl.load(moment + j * stride + at, mask=inside, other=0.0).to(tl.float64)
        mean = tl.load(value + at, mask=inside, other=0.0)
        g_lse = tl.load(grad_lse + at, mask=inside, other=0.0)
        acc += tl.where(nonempty, 4.0 * weight * variance + g_lse * mean, 0.0)
    tl.store(grad_tau + s, tl.sum(acc, 0))
