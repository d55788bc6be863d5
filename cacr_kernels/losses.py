"""The losses as compositions over the ``contrast`` operator, for every backend but the reference.

Similarities of all queries with all keys go through ``contrast``; the few positives that views of one instance are to
each other go through ``aligned_cost``. What is left are vectors of one entry per query. ``reference.py`` states what is
computed; names and shapes are the same there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends.torch import ALL, OTHER, SAME, SAME_NOT_SELF
from .operators.autograd import aligned_cost, contrast
from .operators.frozen import contrast_frozen
from .reference import Statistics, Temperature, mean_entropy, rows_of_pairs, statistics, view_pairs
from .types import Cost, Pairing, Terms, WeightGrad

FROZEN = ("triton", "cpu")  # backends with the operator contrast_frozen_<backend>


class Softmaxes(NamedTuple):
    """Mean cost and log-sum-exp [S, P, N] of the softmaxes of one call, in float64."""

    value: Tensor
    lse: Tensor


class Contrast:
    """The ``contrast`` operator of one backend."""

    def __init__(self, backend: str, narrow: torch.dtype | None = None) -> None:
        self.backend = backend
        self.narrow = narrow  # the half type that the embeddings, float32 here, came in

    def __call__(
        self,
        q: Tensor,
        k: Tensor | None,
        sets: Sequence[tuple[int, Temperature]],
        *,
        q_id: Tensor | None = None,
        k_id: Tensor | None = None,
        pairs: Sequence[tuple[int, int]] = ((0, 0),),
        inner: bool = False,
        detach_weights: bool = False,
    ) -> Softmaxes:
        """``q`` [Vq, N, D], ``k`` [Vk, M, D]; ``sets``: kind and signed temperature of each softmax.

        ``k`` is ``None`` where the queries are the keys, which computes symmetric similarities once.
        """
        tau = vector([t for _, t in sets], q.device)
        tau = tau.detach() if detach_weights else tau
        kinds = [kind for kind, _ in sets]
        index = [x for x, _ in pairs], [y for _, y in pairs]
        arguments = q, k, q_id, k_id, tau, kinds, *index, inner, detach_weights
        return Softmaxes(*contrast(self.backend, *arguments, self.narrow))

    def frozen(
        self,
        queries: Tensor,
        keys: Tensor,
        kind: int,
        tau: Temperature,
        *,
        q_id: Tensor | None = None,
        k_id: Tensor | None = None,
        inner: bool = False,
        detach_weights: bool = False,
        detach_value: bool = False,
    ) -> Softmaxes:
        """Queries [V, B, D] against ``keys`` [M, D], which get no gradient: statistics [1, V, B] of one softmax.

        ``detach_weights``: only the value carries a gradient, by the costs; ``detach_value``: only the lse does.
        """
        k, pairs = keys.detach()[None], [(v, 0) for v in range(queries.shape[0])]
        if self.backend in FROZEN:
            taus, grad = vector([tau], queries.device), torch.is_grad_enabled()
            taus = taus.detach() if detach_weights else taus
            index = [x for x, _ in pairs], [y for _, y in pairs]
            flags = inner, detach_weights, detach_value
            wanted = grad and queries.requires_grad, grad and taus.requires_grad
            arguments = queries, k, q_id, k_id, taus, [kind], *index, *flags, *wanted
            s = Softmaxes(*contrast_frozen(self.backend, *arguments, self.narrow))
        else:
            options = {"inner": inner, "detach_weights": detach_weights}
            s = self(queries, k, [(kind, tau)], q_id=q_id, k_id=k_id, pairs=pairs, **options)
        return Softmaxes(s.value.detach() if detach_value else s.value, s.lse.detach() if detach_weights else s.lse)


def vector(numbers: Sequence[Temperature], device: torch.device) -> Tensor:
    """One float64 tensor of all, differentiable w.r.t. those that are tensors."""
    if device.type == "cpu" and not any(isinstance(x, Tensor) for x in numbers):
        return torch.tensor(numbers, dtype=torch.float64)
    # not torch.tensor on another device: a copy from here waits for it
    parts = [x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device) for x in numbers]
    return torch.stack([x.to(device=device, dtype=torch.float64, non_blocking=True) for x in parts])


def entropy_of(value: Tensor, lse: Tensor, tau: Temperature) -> Tensor:
    """Entropy of the weights, averaged over the queries with a non-empty set: lse - tau F."""
    nonempty = lse != -torch.inf
    rows = torch.where(nonempty, lse - tau * value, 0.0).detach()
    return rows.sum() / nonempty.sum().clamp(min=1)


def instance_ids(count: int, device: torch.device) -> Tensor:
    """0, 1, ... as the operators take ids."""
    return torch.arange(count, dtype=torch.int32, device=device)


def attraction(cost: Tensor, logit: Tensor) -> Statistics:
    """Softmax over the other views: cost and logit [V, U, B] with u != v, rows [V, B]."""
    others = ~torch.eye(cost.shape[0], dtype=torch.bool, device=cost.device)
    return statistics(logit.transpose(1, 2), cost.transpose(1, 2), others[:, None, :])


def cacr(
    compare: Contrast,
    views: Tensor,
    tau_pos: Temperature,
    tau_neg: Temperature,
    *,
    alpha: float,
    beta: float,
    pairing: Pairing,
    cost: Cost,
    rbf_scale: float,
) -> Terms:
    """``reference.cacr``."""
    num_views, batch, dim = views.shape
    c = aligned_cost(views, views)
    attracted = attraction(c, tau_pos * c)
    zero = views.new_zeros(())
    if batch == 1:  # no negatives
        rows = zero if cost == "rbf" else torch.zeros_like(attracted.value)
        return Terms(alpha * attracted.value, rows, mean_entropy(attracted), zero)
    sets: list[tuple[int, Temperature]] = [(OTHER, -tau_neg)]
    if cost == "rbf":
        sets.append((OTHER, -(tau_neg + rbf_scale)))
    if pairing == "pooled":
        z = views.reshape(1, num_views * batch, dim)
        ids = instance_ids(batch, views.device).repeat(num_views)
        negative = compare(z, None, sets, q_id=ids)
    else:
        ids = instance_ids(batch, views.device)
        negative = compare(views, None, sets, q_id=ids, pairs=view_pairs(num_views, pairing))
    if cost == "rbf":
        log_value = negative.lse[1] - negative.lse[0] + 0.0 * negative.value[0].detach()
        log_mean = log_value.logsumexp(-1) - math.log(log_value.shape[-1])
        repulsion = beta * log_mean.mean()
    else:
        repulsion = -beta * rows_of_pairs(negative.value[0], num_views, pairing)
    entropy = entropy_of(negative.value[0], negative.lse[0], -tau_neg)
    return Terms(alpha * attracted.value, repulsion, mean_entropy(attracted), entropy)


def queue(
    compare: Contrast,
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    tau_pos: Temperature,
    tau_neg: Temperature,
    *,
    alpha: float,
    beta: float,
    in_batch: bool,
    weight_grad: WeightGrad,
) -> Terms:
    """``reference.queue``: the softmax over queue and batch is the merge of two."""
    num_views, batch, _ = queries.shape
    c = aligned_cost(queries, keys.detach())
    attracted = attraction(c, (tau_pos * c).detach())

    value, lse = torch.zeros_like(attracted.value), torch.full_like(attracted.value, -torch.inf)
    if queue.shape[0]:
        s = compare.frozen(queries, queue, ALL, -tau_neg, detach_weights=weight_grad != "full")
        value, lse = s.value[0], s.lse[0]
    if in_batch and batch > 1:
        ids = instance_ids(batch, queries.device)
        pairs = [(v, v) for v in range(num_views)]
        detached = weight_grad == "none"
        s = compare(queries, None, [(OTHER, -tau_neg)], q_id=ids, pairs=pairs, detach_weights=detached)
        batch_value, batch_lse = s.value[0], s.lse[0].detach() if detached else s.lse[0]
        value, lse = merge(value, lse, batch_value, batch_lse) if queue.shape[0] else (batch_value, batch_lse)
    return Terms(alpha * attracted.value, -beta * value, mean_entropy(attracted), entropy_of(value, lse, -tau_neg))


def merge(value_a: Tensor, lse_a: Tensor, value_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of the union of two disjoint non-empty sets (``reference.py``, Merge)."""
    lse = torch.logaddexp(lse_a, lse_b)
    return (lse_a - lse).exp() * value_a + (lse_b - lse).exp() * value_b, lse


def momentum(
    compare: Contrast, queries: Tensor, keys: Tensor, temperature: Temperature, *, cost: Cost, key_offset: int
) -> Terms:
    """``reference.momentum``: q.k / T is -1 / (2T) times the inner cost -2 q.k."""
    keys = keys.detach()
    batch = queries.shape[1]
    positive = keys[key_offset : key_offset + batch]
    c_pos = aligned_cost(queries, positive[None])[:, 0].mT  # [B, V]
    attracted = statistics((c_pos / temperature).detach(), c_pos, torch.ones_like(c_pos, dtype=torch.bool))
    p = attracted.weights.mT  # [V, B]
    tau = -0.5 / temperature
    if cost == "rbf":
        w = compare.frozen(queries, keys, ALL, tau, inner=True, detach_value=True)
        inner_product = (queries * positive).sum(-1)
        rows = -2 * (p * inner_product).sum(0), 2 * temperature * (p * (w.lse[0] + 0.0 * w.value[0])).sum(0)
    else:
        ids = instance_ids(keys.shape[0], keys.device)
        q_id = ids[key_offset : key_offset + batch]
        w = compare.frozen(queries, keys, OTHER, tau, q_id=q_id, k_id=ids, detach_weights=True)
        rows = attracted.value / 2, -(p * w.value[0]).sum(0) / 2
    return Terms(*rows, mean_entropy(attracted), entropy_of(w.value[0], w.lse[0], tau))


def supervised(
    compare: Contrast,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    tau_pos: Temperature,
    tau_neg: Temperature,
    *,
    alpha: float,
    beta: float,
) -> Terms:
    """``reference.supervised``: both sets of a query from one pass over the similarities."""
    own = ref_embeddings is None or ref_labels is None
    if own and labels.shape[0] == 1:  # in no set: not read
        embeddings = torch.zeros_like(embeddings) + 0.0 * torch.where(
            torch.ones_like(embeddings, dtype=torch.bool), 0.0, embeddings
        )
    keys = None if ref_embeddings is None else ref_embeddings[None]
    q_id, k_id = compact_ids(labels, ref_labels)
    same = SAME_NOT_SELF if own else SAME
    s = compare(embeddings[None], keys, [(same, tau_pos), (OTHER, -tau_neg)], q_id=q_id, k_id=k_id)
    value, lse = s.value[:, 0], s.lse[:, 0]
    nonempty = (lse != -torch.inf).sum(-1).clamp(min=1).to(value.dtype)
    factor = value.shape[1] / nonempty
    return Terms(
        alpha * value[0] * factor[0],
        -beta * value[1] * factor[1],
        entropy_of(value[0], lse[0], tau_pos),
        entropy_of(value[1], lse[1], -tau_neg),
    )


def compact_ids(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """int64 labels as int32 ids that are equal exactly where the labels are."""
    both = labels if ref_labels is None else torch.cat([labels, ref_labels])
    # Not torch.unique: its size depends on the data, which synchronises, and torch 2.10 cannot trace it in torch.func.
    ordered, where = both.sort()
    rank = (ordered != ordered.roll(1)).cumsum(0, dtype=torch.int32)
    ids = torch.zeros_like(rank).scatter(0, where, rank - rank[:1])
    return ids[: labels.shape[0]], None if ref_labels is None else ids[labels.shape[0] :]


__all__ = ["Contrast", "cacr", "merge", "momentum", "queue", "reference", "supervised"]
