"""What the gradient of a row is made of: dL/dc_ij = w_ij (gF (1 + tau (c_ij - F_i)) + glse tau)  (``reference.py``).

tau (c - F) = ln 2 (z - mean z). With a base moved by about mean z, in which z' = z - moved is small where the weights
are large, dL/dc_ij = e'_ij (A_i + B_i z'_ij): one FMA, which does not cancel.

Two softmaxes over one set (rbf) nearly cancel: a w_0 + b w_1 = (a + b) w_0 + b (w_1 - w_0), of which the kernels make
A_0 e_0 + A_1 (e_1 - ratio e_0).

There (AGAIN) the base stays where it is: z_1 = ratio z, and where the ratio is next to 1 all rounds alike.
"""

import triton
import triton.language as tl

from .tile import AGAIN, LN2, row_and_problem, slopes_of

BASE = tl.constexpr(0)  # rows of the array of coefficients; not read of AGAIN
A = tl.constexpr(1)
B = tl.constexpr(2)
MEAN_U = tl.constexpr(3)  # of v / slope
RATIO = tl.constexpr(4)


@triton.jit
def row_of(
    weights, grad_value, grad_lse, tau, at, stride, inside, none,
    acc_type: tl.constexpr, DETACH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """New base, and in float64: the constant part and gF, both for weights of sum 1; the sum of the new e; a bound.

    The base is ``none`` for an empty set, and stays where it is to KEEP it.
    The bound is of |dL/dc|: |constant| + |gF| ln 2 (1 + |mean z|) times the largest weight, as 2^z |z| < 1 for z < 0.
    """
    base = tl.load(weights + at, mask=inside, other=0.0)
    total = tl.load(weights + stride + at, mask=inside, other=0.0)
    mean_z = tl.load(weights + 2 * stride + at, mask=inside, other=0.0)
    empty = total == 0
    g_value = tl.where(empty, 0.0, tl.load(grad_value + at, mask=inside, other=0.0))
    g_lse = tl.where(empty, 0.0, tl.load(grad_lse + at, mask=inside, other=0.0))
    new_base = (base if KEEP else base + mean_z).to(acc_type)
    moved = tl.zeros_like(base) if KEEP else new_base.to(tl.float64) - base
    largest = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    total = tl.where(empty, 1.0, total) * tl.exp2(-moved)
    constant = g_value
    if not DETACH:
        constant += g_value * (moved - mean_z) * LN2 + g_lse * tau
    bound = largest * (tl.abs(constant) + tl.abs(g_value) * LN2 * (1.0 + tl.abs(mean_z)))
    return tl.where(empty, none, new_base), constant, g_value, total, bound


@triton.jit
def coefficients_kernel(
    weights,  # [3, softmaxes, P, N] float64, of merge_kernel
    value,  # [softmaxes, P, N] float64, as are the next two
    grad_value,
    grad_lse,
    tau,  # [softmaxes] float64
    q_norm,  # [views of q, N]
    q_view,  # [P]
    out,  # [5, softmaxes, P, N] in the type of the arithmetic
    bound,  # [programs] no dL/dc of these rows is larger
    N,
    P,
    SOFTMAXES: tl.constexpr,
    KIND1: tl.constexpr,
    CANCELLING: tl.constexpr,
    DETACH: tl.constexpr,
    BY_COST0: tl.constexpr,  # v of this softmax is made of costs
    BY_COST1: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of queries of every problem."""
    acc_type: tl.constexpr = out.dtype.element_ty
    i0, p = row_and_problem(N, BLOCK)
    rows = i0 + tl.arange(0, BLOCK)
    inside = rows < N
    one = tl.cast(P, tl.int64) * N
    stride = SOFTMAXES * one
    at = tl.cast(p, tl.int64) * N + rows
    norm = tl.load(q_norm + tl.load(q_view + p).to(tl.int64) * N + rows, mask=inside, other=0.0).to(tl.float64)
    size = tl.zeros((BLOCK,), tl.float64)
    first, first_total = tl.zeros((BLOCK,), tl.float64), tl.full((BLOCK,), 1.0, tl.float64)
    _, huge0, _, huge1 = slopes_of(tau, KIND1, acc_type)
    for s in tl.static_range(SOFTMAXES):
        base, a, g_value, total, most = row_of(
            weights, grad_value, grad_lse, tl.load(tau + s), at + s * one, stride, inside,
            2.0 * (huge0 if s == 0 else huge1), acc_type, DETACH, KIND1 == AGAIN,
        )  # fmt: skip
        b = tl.zeros_like(a) if DETACH else g_value * LN2
        size += 2.0 * most
        here = out + s * one + at
        mean = tl.load(value + at + s * one, mask=inside, other=0.0)
        own = tl.zeros_like(norm) if INNER or (BY_COST0 if s == 0 else BY_COST1) else norm
        tl.store(here + BASE * stride, base, mask=inside)
        tl.store(here + A * stride, (a / total).to(acc_type), mask=inside)
        tl.store(here + B * stride, (b / total).to(acc_type), mask=inside)
        tl.store(here + MEAN_U * stride, (0.5 * (own - mean)).to(acc_type), mask=inside)
        if CANCELLING and s == 0:
            first, first_total = a, total
        if CANCELLING and s == 1:
            tl.store(out + A * stride + at, ((first + a) / first_total).to(acc_type), mask=inside)
            tl.store(here + RATIO * stride, (total / first_total).to(acc_type), mask=inside)
    tl.store(bound + tl.program_id(0), tl.max(size, 0).to(acc_type))
