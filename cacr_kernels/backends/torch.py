"""Backend "torch": the ``contrast`` operator in plain PyTorch, in blocks of queries and keys, on any device.

A block of costs has at most ``BLOCK`` elements, so that memory stays bounded for any N and M; statistics of key blocks
merge (``reference.py``, Merge), and the backward recomputes the blocks. Statistics of rows have the dtype of the
temperatures: float64, or float32 on a device that has none (MPS).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
TOGETHER = 1 << 17  # costs and features of small pairs in a block: more of them leave the caches
FEWEST = 16  # pairs that are worth it
PIECE = 256  # terms of a sum that is left to BLAS
REFINE_BELOW = 0.5  # positives closer than this share of |q|^2 + |k|^2 are recomputed as differences


class Block(NamedTuple):
    """Queries [rows] and keys [keys] of some pairs of views."""

    pairs: slice
    rows: slice
    keys: slice


def blocks(spec: ContrastSpec, q: Tensor, k: Tensor) -> Iterator[Block]:
    """All blocks, key blocks innermost. Small pairs are taken together: of V views there are V^2 of them.

    Not on a GPU, where views are to be chosen without waiting for it, and gradients added up in a fixed order.
    """
    pairs, n, m = len(spec.q_index), q.shape[1], k.shape[1]
    keys = max(1, min(m, BLOCK))
    rows = max(1, min(n, BLOCK // keys))
    largest = max(1, n * m, max(n, m) * q.shape[2])
    together = min(BLOCK, TOGETHER) // largest
    together = together if together >= FEWEST and q.device.type == "cpu" else 1
    for p in range(0, pairs, together):
        for i in range(0, n, rows):
            for j in range(0, m, keys):
                some = slice(p, min(pairs, p + together))
                yield Block(some, slice(i, min(n, i + rows)), slice(j, min(m, j + keys)))


def rows_of(x: Tensor, views: Sequence[int], some: slice) -> Tensor:
    """Rows of some views of ``x`` [V, N, D], as [len(views), rows, D]."""
    if len(views) == 1:
        return x[views[0], some][None]
    return x.index_select(0, torch.tensor(views, dtype=torch.int64, device=x.device))[:, some]


def add_rows(x: Tensor | None, views: Sequence[int], some: slice, rows: Tensor) -> None:
    """Adds ``rows`` to what ``rows_of`` takes, if there is something; a view may be there several times."""
    if x is None:
        return
    if len(views) == 1:
        x[views[0], some] += rows[0]
    else:
        x[:, some].index_add_(0, torch.tensor(views, dtype=torch.int64, device=x.device), rows)


def block_cost(q: Tensor, k: Tensor, inner_product: bool, positives: Tensor | None) -> Tensor:
    """Costs [.., rows, keys]; those of close ``positives`` are taken from differences, which do not cancel."""
    if inner_product:
        return -2 * times(q, k.mT)
    norms = sums_of_squares(q, k)
    c = norms - 2 * times(q, k.mT)
    if positives is None:
        return c
    close = positives & ~(c > REFINE_BELOW * norms)
    return (close_by_index if q.device.type == "cpu" else close_by_mask)(c, q, k, close)


def sums_of_squares(q: Tensor, k: Tensor) -> Tensor:
    """|q|^2 + |k|^2, [.., rows, keys]."""
    return q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]


def times(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; of one pair of views by the product of matrices, which is that of many libraries."""
    return (a[0] @ b[0])[None] if a.dim() == 3 and a.shape[0] == 1 else a @ b


def close_by_mask(c: Tensor, q: Tensor, k: Tensor, close: Tensor) -> Tensor:
    """``c`` with the ``close`` ones from differences, which are taken of all: counting would wait for a GPU."""
    return torch.where(close, torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square_(), c)


def close_by_index(c: Tensor, q: Tensor, k: Tensor, close: Tensor) -> Tensor:
    """The same, of the ``close`` alone and in place."""
    for *p, i, j in _in_steps(close, q.shape[-1]):
        at, at_q, at_k = (*p, i, j), (*p, i), (*p, j)
        c[at] = (q[at_q] - k[at_k]).square().sum(-1)
    return c


def _in_steps(mask: Tensor, features: int) -> Iterator[tuple[Tensor, ...]]:
    """Where the mask is set, a bounded number of places at a time."""
    where = mask.nonzero(as_tuple=True)
    step = max(1, BLOCK // features)
    for s in range(0, where[0].numel(), step):
        yield tuple(x[s : s + step] for x in where)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with the sum in pieces: a BLAS may make it one running sum, which loses digits as it grows."""
    total = times(a[..., :PIECE], b[..., :PIECE, :])
    for i in range(PIECE, b.shape[-2], PIECE):
        total += times(a[..., i : i + PIECE], b[..., i : i + PIECE, :])
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


def of_differences(grad_c: Tensor, close: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """What ``2 g_ij (q_i - k_j)`` of the ``close`` pairs gives to q [pairs, rows, D] and, negative, to k."""
    to = torch.zeros_like(q), torch.zeros_like(k)
    for p, i, j in _in_steps(close, q.shape[-1]):
        rows = (q[p, i] - k[p, j]).mul_(2 * grad_c[p, i, j][:, None])
        for grad, index, sign in zip(to, (i, j), (1, -1), strict=True):
            grad.flatten(0, 1).index_add_(0, p * grad.shape[1] + index, rows, alpha=sign)
    return to


def weights_of(logit: Tensor, mask: Tensor | None, top: Tensor, total: Tensor) -> Tensor:
    """The weights that the forward gave: exp(logit - top) / total, 0 outside of a set and where it is empty."""
    top, total = top[..., None], total[..., None]
    empty = total == 0
    shift = torch.where(empty, 0.0, top).to(logit.dtype)
    w = (logit - shift).exp_() * torch.where(empty, 0.0, 1 / total).to(logit.dtype)
    return w if mask is None else w.masked_fill_(~mask, 0.0)


def of_products(grad_c: Tensor, x: Tensor, y: Tensor, inner_product: bool) -> Tensor:
    """2 (x_i sum_j g_ij - sum_j g_ij y_j), without the first for inner products."""
    of_row = 0.0 if inner_product else grad_c.sum(-1)[..., None] * x
    return 2 * (of_row - product(grad_c, y))


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
    for pairs, rows, keys in blocks(spec, q, k):
        masks = [members(kind, spec, rows, keys) for kind in spec.kinds]
        c = _costs(rows_of(q, spec.q_index[pairs], rows), rows_of(k, spec.k_index[pairs], keys), spec, masks)
        for s, mask in enumerate(masks):
            at = (s, pairs, rows)
            cost = c if mask is None else c.masked_fill(~mask, 0.0)
            logit = taus[s] * cost
            if mask is not None:
                logit = logit.masked_fill_(~mask, -torch.inf)
            new_top = torch.maximum(top[at], logit.amax(-1))
            base = torch.where(new_top == -torch.inf, 0.0, new_top)
            e = logit.sub_(base[..., None]).exp_()
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
    for pairs, rows, keys in blocks(spec, q, k):
        of_q, of_k = (spec.q_index[pairs], rows), (spec.k_index[pairs], keys)
        x, y = rows_of(q, *of_q), rows_of(k, *of_k)  # [pairs, rows, D], [pairs, keys, D]
        sides = (grad_q if want_q else None, *of_q), (grad_k if want_k else None, *of_k)
        masks = [members(kind, spec, rows, keys) for kind in spec.kinds]
        c = _costs(x, y, spec, masks)
        grad_c = first = torch.zeros_like(c)
        for s, mask in enumerate(masks):
            at = (s, pairs, rows)
            cost = c if mask is None else c.masked_fill(~mask, 0.0)
            w = weights_of(tau[s].to(q.dtype) * cost, mask, row_state[0][at], row_state[1][at])
            centred = cost - value[at][..., None].to(q.dtype)
            g_value = grad_value[at][..., None].to(q.dtype)
            share = w - first if cancelling and s else w
            part = share * constants[at][..., None].to(q.dtype) + w * (g_value * taus[s] * centred)
            if s == separate and mask is not None:
                close = mask & ~(c > REFINE_BELOW * sums_of_squares(x, y))
                for to, found in zip(sides, of_differences(part, close, x, y), strict=True):
                    add_rows(*to, found)
                part = part.masked_fill_(close, 0.0)
            grad_c = grad_c + part
            first = w
            if want_tau and not detach_weights:
                g_lse = grad_lse[at][..., None].to(q.dtype)
                moment = w * (g_value * centred.square() + g_lse * cost)
                grad_tau[s] += moment.sum(dtype=grad_tau.dtype)
        if want_q:
            add_rows(*sides[0], of_products(grad_c, x, y, inner_product))
        if want_k:
            add_rows(*sides[1], of_products(grad_c.mT, y, x, inner_product))
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
