"""``cacr_triton``: cacr_loss with its gradients, everything on the device. Arguments and results: ``ops.py``.

Launches: attraction, statistics of the repulsion and their merge, what their rows receive, one sweep for the gradient
of all views as queries and as keys, the gradient of the attraction on top of it, the loss. Under rbf one more, as the
log of a mean has to be known before the gradient.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import view_pairs
from ...types import PAIRINGS
from . import tuning
from .kernels.aligned import aligned_gradient_kernel, aligned_kernel
from .kernels.loss import incoming_kernel, log_total_kernel, loss_kernel, numbers_kernel
from .launch import query_sweep, readable, row_coefficients, statistics
from .problem import AGAIN, Problem, cdiv, on_device_of_first, power_of_two, start, view_table

OTHER = 2


class Attraction(NamedTuple):
    """Results of ``aligned_kernel``."""

    cost: Tensor  # [V, V, B]
    norm: Tensor  # [V, B] squared lengths
    ids: Tensor
    tau: Tensor  # [2] signed temperatures of the repulsion
    value: Tensor  # [V, B] float64
    entropy: Tensor
    variance: Tensor
    weights: Tensor  # [3, V, B] float64: what the weights are made of


def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Five numbers as a float64 tensor."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.float64)
    out = torch.empty(5, dtype=torch.float64, device=device)
    start(numbers_kernel, (1,), out, *(half for number in numbers for half in halves(number)))
    return out


def halves(number: float) -> tuple[int, int]:
    """The bits of a float64 as two int32."""
    low, high = struct.unpack("<ii", struct.pack("<d", number))
    return high, low


@on_device_of_first
def cacr(
    views: Tensor,
    numbers: Tensor | None,
    tau_pos: float,
    tau_neg: float,
    alpha: float,
    beta: float,
    pairing: int,
    rbf: bool,
    rbf_scale: float,
    want_grad: bool,
    want_grad_numbers: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts, gradient of the views and of the numbers."""
    z = readable(views)
    given = numbers
    if given is None:
        given = on_device((tau_pos, tau_neg, alpha, beta, rbf_scale), z.device)
    given = given.contiguous()
    want_tau = want_grad_numbers and numbers is not None
    positive = attract(z, given, rbf)
    p = repulsion(z, positive, pairing, rbf)
    repels = z.shape[1] > 1
    wide = positive.value
    value = lse = weights = log_total = wide
    coefficients, moment, grads = p.empty(1), p.empty(1, 1), p.empty(0, *z.shape)
    if repels:
        value, lse, weights = statistics(p)
        if rbf:
            log_total = wide.new_empty(p.P)
            start(log_total_kernel, (p.P,), lse, log_total, p.P, p.N, BLOCK=1024)
        if want_grad or (want_tau and not rbf):
            incoming = torch.empty_like(value), torch.empty_like(value)
            flags = {"RBF": rbf, "BLOCK": 1024}
            start(incoming_kernel, (cdiv(p.P * p.N, 1024),), lse, log_total, given, *incoming, p.P, p.N, **flags)
            rows = row_coefficients(p, value, weights, *incoming, False)
            coefficients = rows[0]
            grads, moment = tuning.run(p, "gradient", query_sweep, *rows, want_tau and not rbf)
    grad = p.empty(*(z.shape if want_grad else (0,)))
    if want_grad:
        add_attraction(z, given, positive, grads, grad)
    loss, parts = p.empty(), p.empty(4)
    grad_numbers = p.empty(0) if numbers is None else torch.empty_like(given) if want_tau else torch.zeros_like(given)
    start(
        loss_kernel, (1,), positive.value, positive.entropy, positive.variance, value, lse, weights, log_total,
        moment, coefficients, given, loss, parts, grad_numbers, z.shape[0] * z.shape[1], p.P, p.N, moment.shape[0],
        REPELS=repels, RBF=rbf, WANT_TAU=want_tau, BLOCK=512, num_warps=8,
    )  # fmt: skip
    return loss, parts, grad, grad_numbers


def attract(z: Tensor, numbers: Tensor, rbf: bool) -> Attraction:
    """Costs and statistics of the attraction, and what the repulsion needs of every row."""
    V, B, D = z.shape
    cost = z.new_empty((V, V, B), dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
    value = z.new_empty((V, B), dtype=torch.float64)
    others = cost.new_empty((V, B)), z.new_empty((V, B), dtype=torch.int32), value.new_empty(2)
    out = Attraction(cost, *others, value, torch.empty_like(value), torch.empty_like(value), value.new_empty((3, V, B)))
    block = 16
    sizes = {"RBF": rbf, "BLOCK": block, "BLOCK_D": min(64, power_of_two(D))}
    start(aligned_kernel, (cdiv(B, block), V), z, numbers, *out, V, B, D, **sizes)
    return out


def add_attraction(z: Tensor, numbers: Tensor, positive: Attraction, grads: Tensor, grad: Tensor) -> None:
    """Gradient of the attraction and the shares ``grads`` [shares, V, B, D] of that of the repulsion."""
    V, B, D = z.shape
    block, width = 16, min(64, power_of_two(D))
    grid = cdiv(B, block), V, cdiv(D, width)
    arrays = z, numbers, positive.cost, positive.weights, grads, grad
    start(aligned_gradient_kernel, grid, *arrays, V, B, D, grads.shape[0], BLOCK=block, BLOCK_D=width)


def repulsion(z: Tensor, positive: Attraction, pairing: int, rbf: bool) -> Problem:
    """Its contrast problem; pooled: all views are one."""
    V, B, D = z.shape
    pooled = PAIRINGS[pairing] == "pooled"
    pairs = [(0, 0)] if pooled else view_pairs(V, PAIRINGS[pairing])
    q_view, k_view = (view_table(tuple(index), z.device) for index in zip(*pairs, strict=True))
    z = z.view(1, V * B, D) if pooled else z
    same = z, z, positive.norm, positive.norm, positive.ids, positive.ids, positive.tau
    return Problem(*same, q_view, k_view, (OTHER, AGAIN) if rbf else (OTHER,), False, True)
