"""cacr_loss from the statistics of its rows: the loss itself, and what it passes to the rows of the repulsion.

    loss = mean_i alpha F+_i - beta mean_i F-_i                                    (``cacr_kernels/reference.py``, cacr)
    rbf:   mean_i alpha F+_i + beta mean_p (log sum_i exp(lse_1 - lse_0) - log N)  (there: rbf_log_mean)

lse_0 and lse_1 are those of the two softmaxes of rbf, p a pair of views with N queries. The derivative of a temperature
is a mean of variances (``reference.py``, Gradients), for rbf of weighted differences of the two values.
"""

import triton
import triton.language as tl

from .aligned import ALPHA, BETA, TAU_NEG, TAU_POS
from .coefficients import B as SLOPE
from .tile import COUNTS, LN2


@triton.jit
def from_halves(high, low):
    """The float64 whose bits are these."""
    bits = (tl.cast(high, tl.int64) << 32) | (tl.cast(low, tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1", "e0", "e1"])
def numbers_kernel(numbers, a0, a1, b0, b1, c0, c1, d0, d1, e0, e1):
    """Five float64 numbers, each given as two int32 of its bits: a copy from the host would wait for the device."""
    tl.store(numbers, from_halves(a0, a1))
    tl.store(numbers + 1, from_halves(b0, b1))
    tl.store(numbers + 2, from_halves(c0, c1))
    tl.store(numbers + 3, from_halves(d0, d1))
    tl.store(numbers + 4, from_halves(e0, e1))


@triton.jit(do_not_specialize=COUNTS)
def log_total_kernel(
    lse,  # [2, P, N] float64
    log_total,  # [P] float64, the result: log sum_i F_i, log F_i = lse_1 - lse_0
    P,
    N,
    BLOCK: tl.constexpr,
):
    """Grid: pairs of sets. Under rbf the log stands outside the mean over the queries of a pair of sets."""
    p = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), -float("inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at = lse + p * N + i
        first = tl.load(at, mask=i < N, other=0.0)
        log_value = tl.load(at + tl.cast(P, tl.int64) * N, mask=i < N, other=-float("inf")) - first
        new_top = tl.maximum(top, log_value)
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - anchor) + tl.exp(log_value - anchor)
        top = new_top
    largest = tl.max(top, 0)
    tl.store(log_total + p, largest + tl.log(tl.sum(total * tl.exp(top - largest), 0)))


@triton.jit(do_not_specialize=COUNTS)
def incoming_kernel(
    # inputs
    lse,  # [2, P, N] float64; not read without RBF
    log_total,  # [P] float64
    numbers,  # [5] float64: aligned.py
    # results
    grad_value,  # [softmaxes, P, N] float64
    grad_lse,
    # sizes
    P,
    N,
    # what is computed, and how
    RBF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the repulsion w.r.t. value and lse of each row; grid: blocks of rows of all pairs of sets."""
    rows = tl.cast(P, tl.int64) * N
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    beta = tl.load(numbers + BETA)
    if RBF:
        log_value = tl.load(lse + rows + at, mask=inside, other=0.0) - tl.load(lse + at, mask=inside, other=0.0)
        total = tl.load(log_total + at // N, mask=inside, other=0.0)
        g = beta / P * tl.exp(log_value - total)
        nothing = tl.zeros_like(g)
        tl.store(grad_value + at, nothing, mask=inside)
        tl.store(grad_value + rows + at, nothing, mask=inside)
        tl.store(grad_lse + at, -g, mask=inside)
        tl.store(grad_lse + rows + at, g, mask=inside)
    else:
        g = tl.zeros((BLOCK,), tl.float64) - beta / rows.to(tl.float64)
        tl.store(grad_value + at, g, mask=inside)
        tl.store(grad_lse + at, tl.zeros_like(g), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def loss_kernel(
    # attraction: results of aligned_kernel
    positive_value,  # [ROWS] float64, as are the next two
    positive_entropy,
    positive_variance,
    # repulsion: results of merge_kernel, log_total_kernel, gradient_kernel, coefficients_kernel
    value,  # [softmaxes, P, N] float64
    lse,
    row_state,  # [3, softmaxes, P, N] float64
    log_total,  # [P] float64 (rbf)
    moment,  # [SPLITS, softmaxes, P, N], where wanted
    coefficients,  # [5, softmaxes, P, N]
    numbers,  # [5] float64: aligned.py
    # results
    loss,  # []
    parts,  # [4]
    grad_numbers,  # [5] float64
    # sizes
    ROWS,  # of the attraction: views times instances
    P,
    N,
    SPLITS,
    # what is computed, and how
    REPELS: tl.constexpr,  # there are negatives
    RBF: tl.constexpr,
    WANT_TAU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: loss, parts and derivatives of the temperatures."""
    alpha, beta = tl.load(numbers + ALPHA), tl.load(numbers + BETA)
    nothing = tl.zeros((BLOCK,), tl.float64)
    total, entropy, variance = nothing, nothing, nothing
    for i0 in range(0, ROWS, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(positive_value + i, mask=i < ROWS, other=0.0)
        entropy += tl.load(positive_entropy + i, mask=i < ROWS, other=0.0)
        variance += tl.load(positive_variance + i, mask=i < ROWS, other=0.0)
    attraction = alpha * tl.sum(total, 0) / ROWS
    attraction_entropy = tl.sum(entropy, 0) / ROWS
    grad_pos = alpha * tl.sum(variance, 0) / ROWS
    repulsion, repulsion_entropy, grad_neg = attraction * 0.0, attraction * 0.0, attraction * 0.0
    if REPELS:
        rows = tl.cast(P, tl.int64) * N
        softmaxes: tl.constexpr = 2 if RBF else 1
        total, entropy, slope = nothing, nothing, nothing
        for i0 in range(0, rows, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            inside = i < rows
            F = tl.load(value + i, mask=inside, other=0.0)
            total += F
            if RBF:
                log_value = tl.load(lse + rows + i, mask=inside, other=0.0)
                log_value -= tl.load(lse + i, mask=inside, other=0.0)
                weight = tl.exp(log_value - tl.load(log_total + i // N, mask=inside, other=0.0))
                slope += tl.where(inside, weight * (F - tl.load(value + rows + i, mask=inside, other=0.0)), 0.0)
            elif WANT_TAU:
                weight = tl.load(coefficients + SLOPE * softmaxes * rows + i, mask=inside, other=0.0).to(tl.float64)
                for j in range(SPLITS):
                    part = tl.load(moment + j * softmaxes * rows + i, mask=inside, other=0.0).to(tl.float64)
                    slope += weight * part * (-4.0 / LN2)
        for i0 in range(0, rows, BLOCK):  # on its own: together they take too many registers
            i = i0 + tl.arange(0, BLOCK)
            sum_e = tl.load(row_state + softmaxes * rows + i, mask=i < rows, other=1.0)
            mean_z = tl.load(row_state + 2 * softmaxes * rows + i, mask=i < rows, other=0.0)
            entropy += (tl.log2(sum_e) - mean_z) * LN2
        repulsion = -beta * tl.sum(total, 0) / rows.to(tl.float64)
        repulsion_entropy = tl.sum(entropy, 0) / rows.to(tl.float64)
        grad_neg = tl.sum(slope, 0)
        if RBF:
            logs = tl.zeros((1,), tl.float64)
            for p in range(P):
                logs += tl.load(log_total + p)
            repulsion = repulsion * 0.0 + beta * (tl.sum(logs, 0) / P - tl.log(tl.cast(N, tl.float64)))
            grad_neg = beta * grad_neg / P
    out: tl.constexpr = loss.dtype.element_ty
    tl.store(loss, (attraction + repulsion).to(out))
    tl.store(parts, attraction.to(out))
    tl.store(parts + 1, repulsion.to(out))
    tl.store(parts + 2, attraction_entropy.to(out))
    tl.store(parts + 3, repulsion_entropy.to(out))
    if WANT_TAU:
        tl.store(grad_numbers + TAU_POS, grad_pos)
        tl.store(grad_numbers + TAU_NEG, grad_neg)
        for i in range(2, 5):
            tl.store(grad_numbers + i, grad_pos * 0.0)
