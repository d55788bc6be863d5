"""``cacr_triton``: cacr_loss with its gradients, everything on the device. Arguments and results: its schema.

Launches: attraction, statistics of the repulsion and their merge, what their rows receive, one sweep for the gradient
of all views as queries and as keys, the gradient of the attraction on top of it, the loss. Under rbf one more, as the
log of a mean has to be known before the gradient. With ``normalize`` two more: the factors that make unit rows come
first, and gradients of the raw rows last.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import view_pairs
from ...types import OTHER, PAIRINGS, arithmetic_dtype
from .contrast import (
    Incoming,
    Statistics,
    Wanted,
    readable,
    row_coefficients,
    statistics,
    sweeps,
    unit_gradient,
    units,
)
from .kernels.aligned import aligned_gradient_kernel, aligned_kernel
from .kernels.loss import incoming_kernel, log_total_kernel, loss_kernel, numbers_kernel
from .launch import cdiv, on_device_of_first, start, width_of
from .pairs import SHARED_SET, SetPairs, view_table


class Numbers(NamedTuple):
    """Numbers of the loss that Python knows, in the order of the kernels."""

    tau_pos: float
    tau_neg: float
    alpha: float
    beta: float
    rbf_scale: float


class Views(NamedTuple):
    """The views as the kernels take them."""

    z: Tensor  # [V, B, D]
    norm: Tensor  # [V, B] squared lengths; those of raw rows are still to be written
    unit: Tensor | None  # [V, B] factors that make unit rows, where that is asked for


class Attraction(NamedTuple):
    """What ``aligned_kernel`` writes, in the order of its arguments."""

    cost: Tensor  # [V, V, B]
    norm: Tensor  # [V, B] squared lengths
    ids: Tensor  # [V, B] int32: the instance
    tau: Tensor  # [2] signed temperatures of the repulsion
    value: Tensor  # [V, B] float64
    entropy: Tensor
    variance: Tensor
    row_state: Tensor  # [3, V, B] float64: what the weights of a row are made of


class Repulsion(NamedTuple):
    """Statistics of the rows of the repulsion and their gradient; where there is nothing, arrays that are not read."""

    found: Statistics
    log_total: Tensor  # [P] float64 (rbf)
    moment: Tensor  # [splits, S, P, N]
    coefficients: Tensor  # [5, S, P, N]
    grads: Tensor  # [splits, V, B, D]


@on_device_of_first
def cacr(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts, gradient of the views and of the numbers."""
    views, numbers, *known_numbers, pairing, rbf, rbf_scale, normalize, want_grad, want_grad_numbers = arguments
    views = known_views(readable(views), normalize)
    z = views.z
    known = Numbers._make((*known_numbers, rbf_scale))
    given = (on_device(known, z.device) if numbers is None else numbers).contiguous()
    want_tau = want_grad_numbers and numbers is not None
    positive = attract(views, given, rbf)
    pairs = repelling_pairs(views, positive, pairing, rbf)
    negative = repel(pairs, given, want_grad, want_tau) if z.shape[1] > 1 else repel_nothing(pairs, positive)
    grad = pairs.empty(*(z.shape if want_grad else (0,)))
    if want_grad:
        add_attraction(views, given, positive, negative.grads, grad)
        if normalize:
            unit_gradient(z, grad[None], grad)
    loss, parts, grad_numbers = pairs.empty(), pairs.empty(4), pairs.empty(0)
    if numbers is not None:
        grad_numbers = torch.empty_like(given) if want_tau else torch.zeros_like(given)
    start(
        loss_kernel, (1,), positive.value, positive.entropy, positive.variance, *negative.found, negative.log_total,
        negative.moment, negative.coefficients, given, loss, parts, grad_numbers, z.shape[0] * z.shape[1],
        pairs.P, pairs.N, negative.moment.shape[0],
        REPELS=z.shape[1] > 1, RBF=rbf, WANT_TAU=want_tau, BLOCK=512, num_warps=8,
    )  # fmt: skip
    return loss, parts, grad, grad_numbers


def on_device(numbers: Numbers, device: torch.device) -> Tensor:
    """The numbers as a float64 tensor."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    out = torch.empty(len(numbers), dtype=torch.float64, device=device)
    start(numbers_kernel, (1,), out, *(half for number in numbers for half in halves(number)))
    return out


def halves(number: float) -> tuple[int, int]:
    """The bits of a float64 as two int32."""
    low, high = struct.unpack("<ii", struct.pack("<d", number))
    return high, low


def known_views(z: Tensor, normalize: bool) -> Views:
    """With factors and squared lengths of unit rows, or without factors."""
    if not normalize:
        return Views(z, z.new_empty(z.shape[:2], dtype=arithmetic_dtype(z)), None)
    norm, _, unit, _ = units(z, z)
    return Views(z, norm, unit)


# ---- attraction ------------------------------------------------------------------------------------------------------
def attract(views: Views, numbers: Tensor, rbf: bool) -> Attraction:
    """Costs and statistics of the attraction, and what the repulsion needs of every row."""
    z, norm, unit = views
    V, B, D = z.shape
    cost = norm.new_empty((V, V, B))
    value = z.new_empty((V, B), dtype=torch.float64)
    others = norm, z.new_empty((V, B), dtype=torch.int32), value.new_empty(2)
    out = Attraction(cost, *others, value, torch.empty_like(value), torch.empty_like(value), value.new_empty((3, V, B)))
    block, width = 16, 32 if unit is not None and z.dtype == torch.float32 else 64  # tiles that spill no registers
    sizes = {"RBF": rbf, "NORMALIZE": unit is not None, "BLOCK_M": block, "BLOCK_D": width_of(D, width)}
    start(aligned_kernel, (cdiv(B, block), V), z, unit, numbers, *out, V, B, D, **sizes)
    return out


def add_attraction(views: Views, numbers: Tensor, positive: Attraction, grads: Tensor, grad: Tensor) -> None:
    """Gradient of the attraction and the splits ``grads`` [splits, V, B, D] of that of the repulsion."""
    z, _, unit = views
    V, B, D = z.shape
    block, width = 16, width_of(D, 64)
    grid = cdiv(B, block), V, cdiv(D, width)
    arrays = z, unit, numbers, positive.cost, positive.row_state, grads, grad
    sizes = {"NORMALIZE": unit is not None, "BLOCK_M": block, "BLOCK_D": width}
    start(aligned_gradient_kernel, grid, *arrays, V, B, D, grads.shape[0], **sizes)


# ---- repulsion -------------------------------------------------------------------------------------------------------
def repelling_pairs(views: Views, positive: Attraction, pairing: int, rbf: bool) -> SetPairs:
    """The views that repel each other; pooled: all of them are one, which meets itself."""
    z, norm, unit = views
    V, B, D = z.shape
    pooled = PAIRINGS[pairing] == "pooled"
    pairs = [(0, 0)] if pooled else view_pairs(V, PAIRINGS[pairing])
    q_view, k_view = (view_table(tuple(index), z.device) for index in zip(*pairs, strict=True))
    z = z.view(1, V * B, D) if pooled else z
    same = z, z, norm, norm, unit, unit, positive.ids, positive.ids, positive.tau
    kinds = (OTHER, SHARED_SET) if rbf else (OTHER,)
    return SetPairs(*same, q_view, k_view, kinds, inner_product=False, keys_are_queries=True)


def repel_nothing(pairs: SetPairs, positive: Attraction) -> Repulsion:
    """With one instance there are no negatives."""
    unread = positive.value
    grads = pairs.empty(0, *pairs.q.shape)
    return Repulsion(Statistics(unread, unread, unread), unread, pairs.empty(1, 1), pairs.empty(1), grads)


def repel(pairs: SetPairs, numbers: Tensor, want_grad: bool, want_tau: bool) -> Repulsion:
    """Statistics of the repulsion, and its gradient where it is wanted."""
    rbf = pairs.S == 2
    found = statistics(pairs)
    value, lse, row_state = found
    log_total, coefficients, moment, grads = value, pairs.empty(1), pairs.empty(1, 1), pairs.empty(0, *pairs.q.shape)
    if rbf:
        log_total = value.new_empty(pairs.P)
        start(log_total_kernel, (pairs.P,), lse, log_total, pairs.P, pairs.N, BLOCK=1024)
    if want_grad or (want_tau and not rbf):
        incoming, block = Incoming(torch.empty_like(value), torch.empty_like(value)), 1024
        grid, sizes = (cdiv(pairs.P * pairs.N, block),), (pairs.P, pairs.N)
        start(incoming_kernel, grid, lse, log_total, numbers, *incoming, *sizes, RBF=rbf, BLOCK=block)
        rows = row_coefficients(pairs, value, row_state, incoming, False)
        coefficients = rows.rows
        grads, _, moment = sweeps(pairs, rows, Wanted(want_grad, False, want_tau and not rbf))
    return Repulsion(found, log_total, moment, coefficients, grads)
