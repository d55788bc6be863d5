"""Backend "torch": the ``contrast`` operator in plain PyTorch, in blocks of queries and keys, on any device.

A block of costs has at most ``BLOCK`` elements, so that memory stays bounded for any N and M; statistics of key blocks
merge (``reference.py``, Merge), and the backward recomputes the blocks. Statistics of rows have the dtype of the
temperatures: float64, or float32 on a device that has none (MPS).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators.contrast import members, pack
from ..operators.registry import implement
from ..operators.repulsion import in_two_sweeps
from ..reference import of_raw_rows, unit_rows
from ..types import POSITIVE_KINDS, ContrastSpec
from .entry import Backend, any_device

BLOCK = 1 << 21  # costs in a block: 8 MiB each in float32, about ten such arrays live at once
PIECE = 256  # terms of a sum that is left to BLAS
REFINE_BELOW = 0.5  # positives closer than this share of |q|^2 + |k|^2 are recomputed as differences


class Block(NamedTuple):
    """Queries [rows] and keys [keys] of the pair of views ``pair``."""

    pair: int
    rows: slice
    keys: slice


def blocks(pairs: int, n: int, m: int) -> Iterator[Block]:
    """All blocks, key blocks innermost."""
    keys = max(1, min(m, BLOCK))
    rows = max(1, min(n, BLOCK // keys))
    for pair in range(pairs):
        for i in range(0, n, rows):
            for j in range(0, m, keys):
                yield Block(pair, slice(i, min(n, i + rows)), slice(j, min(m, j + keys)))


def block_cost(q: Tensor, k: Tensor, inner_product: bool, positives: Tensor | None) -> Tensor:
    """Costs [rows, keys]; those of close ``positives`` are taken from differences, which do not cancel."""
    if inner_product:
        return -2 * (q @ k.mT)
    norms = q.square().sum(-1)[:, None] + k.square().sum(-1)
    c = norms - 2 * (q @ k.mT)
    if positives is None:
        return c
    close = positives & ~(c > REFINE_BELOW * norms)
    return (close_by_index if q.device.type == "cpu" else close_by_mask)(c, q, k, close)


def close_by_mask(c: Tensor, q: Tensor, k: Tensor, close: Tensor) -> Tensor:
    """``c`` with the ``close`` ones from differences, which are taken of all: counting would wait for a GPU."""
    return torch.where(close, torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square_(), c)


def close_by_index(c: Tensor, q: Tensor, k: Tensor, close: Tensor) -> Tensor:
    """The same, of the ``close`` alone and in place."""
    i, j = close.nonzero(as_tuple=True)
    step = max(1, BLOCK // q.shape[1])
    for s in range(0, i.numel(), step):
        ii, jj = i[s : s + step], j[s : s + step]
        c[ii, jj] = (q[ii] - k[jj]).square().sum(-1)
    return c


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with the sum in pieces: a BLAS may make it one running sum, which loses digits as it grows."""
    total = a[:, :PIECE] @ b[:PIECE]
    for i in range(PIECE, b.shape[0], PIECE):
        total += a[:, i : i + PIECE] @ b[i : i + PIECE]
    return total


def separate_softmax(spec: ContrastSpec, grad_value: Tensor, grad_lse: Tensor, tau: Tensor) -> int | None:
    """The softmax over positives whose gradient is to be taken from differences, if any.

    The product form, (sum_j g_ij) q_i - sum_j g_ij k_j, loses digits among positives that are close to each other; it
    shows where no repulsion of about the same size stands beside them. Not on a GPU, where asking would wait for it.
    """
    if spec.inner_product or tau.device.type != "cpu":
        return None
    positives = [s for s, kind in enumerate(spec.kinds) if kind in POSITIVE_KINDS]
    if len(positives) != 1 or not grad_value.numel():
        return None
    most = torch.maximum(grad_value.abs(), (grad_lse * tau[:, None, None]).abs()).amax((1, 2))
    (s,) = positives
    return s if len(most) == 1 or bool(most[1 - s] < 0.5 * most[s]) else None


def add_differences(
    grad_c: Tensor, close: Tensor, q: Tensor, k: Tensor, to: tuple[Tensor | None, Tensor | None]
) -> None:
    """Adds ``2 g_ij (q_i - k_j)`` of the ``close`` pairs to the gradients of q and, with the other sign, of k."""
    i, j = close.nonzero(as_tuple=True)
    step = max(1, BLOCK // q.shape[1])
    for s in range(0, i.numel(), step):
        ii, jj = i[s : s + step], j[s : s + step]
        rows = (q[ii] - k[jj]).mul_(2 * grad_c[ii, jj][:, None])
        for grad, index, sign in zip(to, (ii, jj), (1, -1), strict=True):
            if grad is not None:
                grad.index_add_(0, index, rows, alpha=sign)


def _costs(q: Tensor, k: Tensor, spec: ContrastSpec, masks: list[Tensor | None]) -> Tensor:
    positives = [m for kind, m in zip(spec.kinds, masks, strict=True) if kind in POSITIVE_KINDS]
    return block_cost(q, k, spec.inner_product, positives[0] if positives else None)


def contrast(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cost and log-sum-exp of each softmax, [S, P, N]; arguments: see ``operators/contrast.py``.

    The third output holds the maxima of the logits, the sums relative to them, and the values.
    """
    q, k, tau, spec = pack(*arguments)
    if spec.normalize:
        q, k = unit_rows(q), k if k is None else unit_rows(k)
    k, spec = (q, spec._replace(k_id=spec.q_id)) if k is None else (k, spec)
    q, k = q.contiguous(), k.contiguous()  # a BLAS rounds strided operands differently
    shape = (len(spec.kinds), len(spec.q_index), q.shape[1])
    # running maximum of the logits, and relative to it: sum of exp, and of exp times cost
    top = q.new_full(shape, -torch.inf)
    total, total_cost = tau.new_zeros(shape), tau.new_zeros(shape)
    taus = tau.to(q.dtype)
    for pair, rows, keys in blocks(len(spec.q_index), q.shape[1], k.shape[1]):
        masks = [members(kind, spec, rows, keys) for kind in spec.kinds]
        c = _costs(q[spec.q_index[pair], rows], k[spec.k_index[pair], keys], spec, masks)
        for s, mask in enumerate(masks):
            at = (s, pair, rows)
            cost = c if mask is None else c.masked_fill(~mask, 0.0)
            logit = taus[s] * cost
            if mask is not None:
                logit = logit.masked_fill_(~mask, -torch.inf)
            new_top = torch.maximum(top[at], logit.amax(-1))
            base = torch.where(new_top == -torch.inf, 0.0, new_top)
            e = logit.sub_(base[:, None]).exp_()
            shrink = (top[at] - base).to(tau.dtype).exp()
            total[at] = total[at] * shrink + e.sum(-1)
            total_cost[at] = total_cost[at] * shrink + (e * cost).sum(-1)
            top[at] = new_top
    empty = (total == 0) & (total_cost == 0)  # NaN shows in the costs; so do costs that are infinite and have no mass
    total = total + 0.0 * total_cost
    value = torch.where(empty, 0.0, total_cost / total)
    value = value + 0.0 * tau[:, None, None]  # a temperature that is not finite leaves no trace in exp
    lse = total.log() + top
    return value, torch.where(value.isnan(), value, lse), torch.stack([top.to(tau.dtype), total, value])


def contrast_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and tau: dL/dc_ij = w_ij (gF (1 + tau (c_ij - F)) + glse tau), blocks recomputed."""
    with torch.autocast(arguments[0].device.type, enabled=False):
        return gradients(*arguments)


def gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``contrast_backward`` where autocast is off."""
    q, k, tau, spec, *rest = pack(*arguments)
    if not spec.normalize:
        return gradients_of_rows(q, k, tau, spec, *rest)
    rows = unit_rows(q), k if k is None else unit_rows(k)
    *grads, grad_tau = gradients_of_rows(*rows, tau, spec, *rest)
    grad_q, grad_k = (of_raw_rows(g, x) if g.numel() else g for g, x in zip(grads, (q, k), strict=True))
    return grad_q, grad_k, grad_tau


def gradients_of_rows(
    q: Tensor, k: Tensor | None, tau: Tensor, spec: ContrastSpec, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of rows that are compared as they are."""
    value, row_state, grad_value, grad_lse, want_q, want_k, want_tau = rest
    inner_product, detach_weights = spec.inner_product, spec.detach_weights
    q, k = q.contiguous(), k if k is None else k.contiguous()
    grad_q = torch.zeros_like(q) if want_q else q.new_empty(0)
    if k is None:
        k, spec, want_k, grad_k = q, spec._replace(k_id=spec.q_id), want_q, grad_q
    else:
        grad_k = torch.zeros_like(k) if want_k else k.new_empty(0)
    grad_tau = torch.zeros_like(tau) if want_tau else tau.new_empty(0)
    taus = torch.zeros_like(tau, dtype=q.dtype) if detach_weights else tau.to(q.dtype)
    grad_lse = torch.where(row_state[1] == 0, 0.0, grad_lse)
    constants = grad_value + (0.0 if detach_weights else grad_lse * tau[:, None, None])
    # Two softmaxes over one set (rbf) nearly cancel: a w_0 + b w_1 = (a + b) w_0 + b (w_1 - w_0)
    cancelling = len(spec.kinds) == 2 and spec.kinds[0] == spec.kinds[1]
    if cancelling:
        constants = torch.stack([constants.sum(0), constants[1]])
    separate = separate_softmax(spec, grad_value, grad_lse, tau)
    for pair, rows, keys in blocks(len(spec.q_index), q.shape[1], k.shape[1]):
        x, y = spec.q_index[pair], spec.k_index[pair]
        masks = [members(kind, spec, rows, keys) for kind in spec.kinds]
        c = _costs(q[x, rows], k[y, keys], spec, masks)
        grad_c = first = torch.zeros_like(c)
        for s, mask in enumerate(masks):
            at = (s, pair, rows)
            cost = c if mask is None else c.masked_fill(~mask, 0.0)
            total = row_state[1][at][:, None]
            empty = total == 0
            shift = torch.where(empty, 0.0, row_state[0][at][:, None]).to(q.dtype)
            w = (tau[s].to(q.dtype) * cost - shift).exp_() * torch.where(empty, 0.0, 1 / total).to(q.dtype)
            if mask is not None:
                w = w.masked_fill_(~mask, 0.0)
            centred = cost - value[at][:, None].to(q.dtype)
            g_value = grad_value[at][:, None].to(q.dtype)
            share = w - first if cancelling and s else w
            part = share * constants[at][:, None].to(q.dtype) + w * (g_value * taus[s] * centred)
            if s == separate and mask is not None:
                norms = q[x, rows].square().sum(-1)[:, None] + k[y, keys].square().sum(-1)
                close = mask & ~(c > REFINE_BELOW * norms)
                to = grad_q[x, rows] if want_q else None, grad_k[y, keys] if want_k else None
                add_differences(part, close, q[x, rows], k[y, keys], to)
                part = part.masked_fill_(close, 0.0)
            grad_c = grad_c + part
            first = w
            if want_tau and not detach_weights:
                g_lse = grad_lse[at][:, None].to(q.dtype)
                moment = w * (g_value * centred.square() + g_lse * cost)
                grad_tau[s] += moment.sum(dtype=grad_tau.dtype)
        if want_q:
            of_row = 0.0 if inner_product else grad_c.sum(1)[:, None] * q[x, rows]
            grad_q[x, rows] += 2 * (of_row - product(grad_c, k[y, keys]))
        if want_k:
            of_row = 0.0 if inner_product else grad_c.sum(0)[:, None] * k[y, keys]
            grad_k[y, keys] += 2 * (of_row - product(grad_c.mT, q[x, rows]))
    return grad_q, q.new_empty(0) if grad_k is grad_q else grad_k, grad_tau


_KERNELS = {
    "contrast": contrast,
    "contrast_backward": contrast_backward,
    "repulsion": in_two_sweeps(contrast, contrast_backward),
}

BACKEND = Backend(
    "torch",
    "plain PyTorch in blocks; bounded memory, any device",
    any_device,
    operators=("contrast", "repulsion"),
    implement=lambda name: implement(f"{name}_torch", _KERNELS[name]),
    last_resort=True,
)
