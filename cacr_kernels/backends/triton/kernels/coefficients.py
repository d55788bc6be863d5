"""Row coefficients: what the gradient of a row multiplies its weights with (``cacr_kernels/reference.py``, Gradients).

    dL/dc_ij = w_ij (gF_i (1 + tau (c_ij - F_i)) + glse_i tau) = e_ij (A_i + B_i z_ij)

as tau (c - F) = ln 2 (z - mean z). The base of z is moved by about mean z, so that z is small where the weights are
large: one FMA, which does not cancel.

Two softmaxes over one set (rbf) nearly cancel: a w_0 + b w_1 = (a + b) w_0 + b (w_1 - w_0), of which the kernels make
A_0 e_0 + A_1 (e_1 - ratio e_0). There (SHARED_SET) the base stays where it is: z_1 = slope_1 / slope_0 z, and where
that is next to 1 all rounds alike.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import COUNTS, LN2, SHARED_SET, first_row_and_pair, softmaxes_of

# The quantities in the array of coefficients.
BASE = tl.constexpr(0)  # of z; not read of a SHARED_SET
A = tl.constexpr(1)
B = tl.constexpr(2)
MEAN_U = tl.constexpr(3)  # mean of u = v / slope
RATIO = tl.constexpr(4)  # of the sums of e of two softmaxes that nearly cancel; of the second only


class Row(NamedTuple):
    """The state of rows, and what they receive, of one softmax; each [BLOCK_M] float64."""

    base: tl.tensor
    sum_e: tl.tensor  # 0 for an empty set
    mean_z: tl.tensor
    grad_value: tl.tensor
    grad_lse: tl.tensor


class Scaled(NamedTuple):
    """Coefficients of rows for weights of sum 1; each [BLOCK_M], and float64 but for the base."""

    base: tl.tensor
    constant: tl.tensor
    grad_value: tl.tensor
    sum_e: tl.tensor  # relative to the new base
    bound: tl.tensor  # of |dL/dc|


@triton.jit
def load_row(row_state, stride, grad_value, grad_lse, at, inside):
    """Rows ``at``; an empty set receives nothing."""
    base = tl.load(row_state + at, mask=inside, other=0.0)
    sum_e = tl.load(row_state + stride + at, mask=inside, other=0.0)
    mean_z = tl.load(row_state + 2 * stride + at, mask=inside, other=0.0)
    g_value = tl.where(sum_e == 0, 0.0, tl.load(grad_value + at, mask=inside, other=0.0))
    g_lse = tl.where(sum_e == 0, 0.0, tl.load(grad_lse + at, mask=inside, other=0.0))
    return Row(base, sum_e, mean_z, g_value, g_lse)


@triton.jit
def scaled_coefficients(row, tau, empty_base, acc_type: tl.constexpr, DETACH: tl.constexpr, KEEP: tl.constexpr):
    """The base is moved by mean z, unless KEEP; that of an empty set is ``empty_base``, where all e are 0.

    The bound is |constant| + |gF| ln 2 (1 + |mean z|) times the largest weight, as 2^z |z| < 1 for z < 0.
    """
    empty = row.sum_e == 0
    new_base = (row.base if KEEP else row.base + row.mean_z).to(acc_type)
    shift = tl.zeros_like(row.base) if KEEP else new_base.to(tl.float64) - row.base
    largest = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row.sum_e))
    sum_e = tl.where(empty, 1.0, row.sum_e) * tl.exp2(-shift)
    constant = row.grad_value
    if not DETACH:
        constant += row.grad_value * (shift - row.mean_z) * LN2 + row.grad_lse * tau
    bound = largest * (tl.abs(constant) + tl.abs(row.grad_value) * LN2 * (1.0 + tl.abs(row.mean_z)))
    return Scaled(tl.where(empty, empty_base, new_base), constant, row.grad_value, sum_e, bound)


@triton.jit(do_not_specialize=COUNTS)
def coefficients_kernel(
    # inputs
    row_state,  # [3, softmaxes, P, N] float64, of merge_kernel
    value,  # [softmaxes, P, N] float64, as are the next two
    grad_value,
    grad_lse,
    tau,  # [softmaxes] float64
    q_norm,  # [views of q, N]
    q_view,  # [P]
    # results, in the type of the arithmetic
    coefficients,  # [5, softmaxes, P, N]
    bound,  # [programs] no |dL/dc| of these rows is larger
    # sizes
    N,
    P,
    # what is computed, and how
    SOFTMAXES: tl.constexpr,
    SECOND_SET: tl.constexpr,
    CANCELLING: tl.constexpr,  # two softmaxes over one set
    DETACH: tl.constexpr,  # the weights carry no gradient
    USES_COST0: tl.constexpr,  # v of the first softmax is made of costs
    USES_COST1: tl.constexpr,
    INNER_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid: blocks of queries of every pair of sets."""
    acc_type: tl.constexpr = coefficients.dtype.element_ty
    i0, p = first_row_and_pair(N, BLOCK_M)
    rows = i0 + tl.arange(0, BLOCK_M)
    inside = rows < N
    one = tl.cast(P, tl.int64) * N  # rows of one softmax
    stride = SOFTMAXES * one  # rows of one quantity
    at = tl.cast(p, tl.int64) * N + rows
    norm = tl.load(q_norm + tl.load(q_view + p).to(tl.int64) * N + rows, mask=inside, other=0.0).to(tl.float64)
    size = tl.zeros((BLOCK_M,), tl.float64)
    constant0, sum_e0 = tl.zeros((BLOCK_M,), tl.float64), tl.full((BLOCK_M,), 1.0, tl.float64)
    first, second = softmaxes_of(tau, SECOND_SET, acc_type)
    for s in tl.static_range(SOFTMAXES):
        temperature = tl.load(tau + s)
        here = at + s * one
        empty_base = 2.0 * (first.mask_bias if s == 0 else second.mask_bias)
        row = load_row(row_state, stride, grad_value, grad_lse, here, inside)
        scaled = scaled_coefficients(row, temperature, empty_base, acc_type, DETACH, SECOND_SET == SHARED_SET)
        a, sum_e = scaled.constant, scaled.sum_e
        b = tl.zeros_like(a) if DETACH else scaled.grad_value * LN2
        size += 2.0 * scaled.bound
        out = coefficients + s * one + at
        mean = tl.load(value + at + s * one, mask=inside, other=0.0)
        q_part = tl.zeros_like(norm) if INNER_PRODUCT or (USES_COST0 if s == 0 else USES_COST1) else norm
        tl.store(out + BASE * stride, scaled.base, mask=inside)
        tl.store(out + A * stride, (a / sum_e).to(acc_type), mask=inside)
        tl.store(out + B * stride, (b / sum_e).to(acc_type), mask=inside)
        tl.store(out + MEAN_U * stride, (0.5 * (q_part - mean)).to(acc_type), mask=inside)
        if CANCELLING and s == 0:
            constant0, sum_e0 = a, sum_e
        if CANCELLING and s == 1:
            tl.store(coefficients + A * stride + at, ((constant0 + a) / sum_e0).to(acc_type), mask=inside)
            tl.store(out + RATIO * stride, (sum_e / sum_e0).to(acc_type), mask=inside)
    tl.store(bound + tl.program_id(0), tl.max(size, 0).to(acc_type))
