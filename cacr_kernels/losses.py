"""The losses as compositions over the operators, for every backend but the reference.

Similarities of all queries with all keys go through ``contrast`` or, where the keys get no gradient,
``detached_keys``; the few positives that views of one instance are to each other go through ``aligned_cost``. What is
left are vectors of one entry per query. ``reference.py`` states what is computed; names and shapes are the same there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators.aligned import aligned_cost
from .operators.contrast import contrast
from .operators.detached_keys import detached_keys
from .operators.registry import Target, has_values
from .operators.repulsion import as_contrast, repulsion
from .reference import (
    entropy_of,
    no_term,
    rows_of_pairs,
    unit_norms,
    view_pairs,
)
from .types import (
    ALL,
    ALONE,
    OTHER,
    OTHER_NOT_SELF,
    SAME,
    SAME_NOT_SELF,
    WHOLE_SETS,
    ContrastSpec,
    Cost,
    Entropy,
    KeySets,
    Numbers,
    Pairing,
    Ranks,
    Temperature,
    Terms,
    WeightGrad,
    widest_dtype,
)


def vector(numbers: Sequence[Temperature], device: torch.device) -> Tensor:
    """One tensor of all in the widest dtype, differentiable w.r.t. those that are tensors."""
    dtype = widest_dtype(device)
    if device.type == "cpu" and not any(isinstance(x, Tensor) for x in numbers):
        return torch.tensor(numbers, dtype=dtype, device=device)
    # not torch.tensor on another device: a copy from here waits for it
    parts = [x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device) for x in numbers]
    return torch.stack([x.to(device=device, dtype=dtype, non_blocking=True) for x in parts])


def instance_ids(count: int, device: torch.device) -> Tensor:
    """0, 1, ... as the operators take ids."""
    return torch.arange(count, dtype=torch.int32, device=device)


class Attraction(NamedTuple):
    """The mean cost of the positives of a query, and their weights; no set is empty."""

    value: Tensor  # [V, B], or [B]
    weights: Tensor  # [V, U, B], or [U, B]

    def entropy(self) -> Tensor:
        """That of the weights, averaged over the queries."""
        rows: Tensor = torch.special.entr(self.weights.detach())
        return rows.sum(-2).clamp(min=0.0).mean()


def attraction(cost: Tensor, logit: Tensor) -> Attraction:
    """Softmax over the other views: cost and logit [V, U, B], of which u = v are not read where V > 1.

    A single view of queries meets its single key.
    """
    if cost.shape[0] > 1:
        itself = torch.eye(cost.shape[0], dtype=torch.bool, device=cost.device)[:, :, None]
        cost, logit = cost.masked_fill(itself, 0.0), logit.masked_fill(itself, -math.inf)
    weights = logit.softmax(1)
    return Attraction((weights * cost).sum(1), weights)


def cacr(
    on: Target,
    views: Tensor,
    numbers: Numbers,
    *,
    pairing: Pairing,
    cost: Cost,
    rbf_scale: float,
    keys: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Terms:
    """``reference.cacr``, with the repulsion from one call of ``contrast``; ``on.normalize``: of raw rows."""
    tau_pos, tau_neg, alpha, beta, attracts, repels = numbers
    num_views, batch, dim = views.shape
    entropy_pulled: Entropy
    if attracts:
        c = aligned_cost(views, views, on.normalize, on)
        attracted = attraction(c, tau_pos * c)
        pulled, entropy_pulled = alpha * attracted.value, attracted.entropy
    else:
        pulled, entropy_pulled = no_term(views), views.new_zeros(())
    if not repels or (batch == 1 and keys is None):  # no negatives
        zero = views.new_zeros(())
        return Terms(pulled, zero if cost == "rbf" else no_term(views), entropy_pulled, zero)
    taus = [-tau_neg, -(tau_neg + rbf_scale)] if cost == "rbf" else [-tau_neg]
    kinds = [OTHER] * len(taus)
    if keys is not None:
        q, keys, spec = as_contrast(views, keys, pairing, on.normalize, kinds)
    elif pairing == "pooled":
        q, q_id = views.reshape(1, num_views * batch, dim), instance_ids(batch, views.device).repeat(num_views)
        spec = ContrastSpec(q_id, None, kinds, [0], [0], normalize=on.normalize)
    else:
        pairs = view_pairs(num_views, pairing)
        index = [x for x, _ in pairs], [y for _, y in pairs]
        q, spec = views, ContrastSpec(instance_ids(batch, views.device), None, kinds, *index, normalize=on.normalize)
    value, lse = contrast(on, q, keys, vector(taus, views.device), spec)
    if pairing == "pooled":  # all queries are of one mean
        value, lse = value.flatten(1)[:, None], lse.flatten(1)[:, None]
    if cost == "rbf":
        log_value = lse[1] - lse[0] + 0.0 * value[0].detach()
        log_mean = log_value.logsumexp(-1) - math.log(log_value.shape[-1])
        pulled, log_mean = ranks.rbf(pulled, log_mean)
        repulsion = beta * log_mean.mean()
    else:
        repulsion = -beta * rows_of_pairs(value[0], num_views, pairing)
    return Terms(pulled, repulsion, entropy_pulled, partial(entropy_of, value[0], lse[0], -tau_neg))


def cacr_of_ranks(on: Target, views: Tensor, keys: Callable[[], Tensor], numbers: Numbers, pairing: Pairing) -> Terms:
    """``reference.cacr`` of mean costs, with the mean repulsion from one call of the operator of that name.

    ``keys`` waits for the views of all processes, after the attraction, which needs none of them.
    """
    tau_pos, tau_neg, alpha, beta, *_ = numbers
    c = aligned_cost(views, views, on.normalize, on)
    attracted = attraction(c, tau_pos * c)
    value, entropy = repulsion(on, views, keys(), vector([-tau_neg], views.device), pairing)
    return Terms(alpha * attracted.value, -beta * value, attracted.entropy, entropy)


def queue(
    on: Target,
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    numbers: Numbers,
    *,
    in_batch: bool | Callable[[], Tensor],
    weight_grad: WeightGrad,
    valid: Tensor | None = None,
) -> Terms:
    """``reference.queue``: the softmax over queue and batch is the merge of two.

    Queries of a larger batch, if ``in_batch`` waits for them, are used after the queue, which needs none of them. How
    many rows of the queue are ``valid`` is not read here, where a GPU would have to be waited for: the others have
    the id of the queries.
    """
    tau_pos, tau_neg, alpha, beta, attracts, repels = numbers
    num_views, batch, _ = queries.shape
    entropy_pulled: Entropy
    if attracts:
        c = aligned_cost(queries, keys.detach(), on.normalize, on)
        attracted = attraction(c, (tau_pos * c).detach())
        pulled, entropy_pulled = alpha * attracted.value, attracted.entropy
    else:
        pulled, entropy_pulled = no_term(queries), queries.new_zeros(())
    found: list[tuple[Tensor, Tensor]] = []  # value and lse of each softmax
    every = list(range(num_views))
    if repels and queue.shape[0]:
        ids: tuple[Tensor | None, Tensor | None] = None, None
        if valid is not None:
            k_id = (torch.arange(queue.shape[0], dtype=torch.int64, device=queue.device) < valid).to(torch.int32)
            ids = torch.zeros_like(queries[0, :, 0], dtype=torch.int32), k_id
        kind = ALL if valid is None else OTHER
        flags: dict[str, Any] = {"detach_weights": weight_grad != "full", "normalize": on.normalize}
        spec = ContrastSpec(*ids, [kind], every, [0] * num_views, **flags)
        (value,), (lse,) = detached_keys(on, queries, queue[None], vector([-tau_neg], queries.device), spec)
        found.append((value, lse))
    every_query = None if isinstance(in_batch, bool) or not repels else in_batch()
    if every_query is not None or (repels and in_batch and batch > 1):
        detached, tau = weight_grad == "none", vector([-tau_neg], queries.device)
        instances = instance_ids(batch, queries.device)
        among = None if every_query is None else instance_ids(every_query.shape[1], queries.device)
        spec = ContrastSpec(instances, among, [OTHER], every, every, detach_weights=detached, normalize=on.normalize)
        (value,), (lse,) = contrast(on, queries, every_query, tau.detach() if detached else tau, spec)
        found.append((value, lse.detach() if detached else lse))
    if not found:
        return Terms(pulled, no_term(queries), entropy_pulled, queries.new_zeros(()))
    value = found[0][0] if len(found) == 1 else merged(*found)
    return Terms(pulled, -beta * value, entropy_pulled, partial(entropy_of_union, found, value, -tau_neg))


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cost of the union of two disjoint sets, of each its value and lse (``reference.py``, Merge).

    The first may be empty: its value is 0, and the second has all the weight.
    """
    (value, lse), (other, other_lse) = first, second
    return value + (other_lse - lse).sigmoid() * (other - value)


def entropy_of_union(found: list[tuple[Tensor, Tensor]], value: Tensor, tau: Temperature) -> Tensor:
    """``entropy_of`` the softmax over disjoint sets with the mean cost ``value``."""
    return entropy_of(value, functools.reduce(torch.logaddexp, (lse.detach() for _, lse in found)), tau)


def momentum(
    on: Target,
    queries: Tensor,
    keys: Tensor,
    temperature: Temperature,
    *,
    cost: Cost,
    key_offset: int,
) -> Terms:
    """``reference.momentum``: q.k / T is -1 / (2T) times the inner cost -2 q.k, or the cost of unit keys.

    ``on.normalize``: of raw rows, u = x / max(|x|, 1e-12). Some keys may be zero, as in a bank partly filled: of
    these the weight is exp(0), not that of their cost |q|^2. So the costs are made of inner products, sum_j w_j c_j =
    |u_q|^2 + sum_j w_j |u_j|^2 - 2 sum_j w_j u_q.u_j, where |u|^2 is 1 but for rows shorter than 1e-12.
    """
    keys = keys.detach()
    batch = queries.shape[1]
    positives = slice(key_offset, key_offset + batch)
    positive = keys[positives]
    c_pos = aligned_cost(queries, positive[None], on.normalize, on)[:, 0]  # [V, B]
    p = (c_pos / temperature).detach().softmax(0)
    attracted = Attraction((p * c_pos).sum(0), p)
    tau = -0.5 / temperature
    taus, index = vector([tau], queries.device), (list(range(queries.shape[0])), [0] * queries.shape[0])
    if cost == "rbf":
        spec = ContrastSpec(None, None, [ALL], *index, inner_product=True, normalize=on.normalize)
        (value,), (lse,) = detached_keys(on, queries, keys[None], taus, spec, detach_value=True)
        entropy = partial(entropy_of, value, lse, tau)
        if on.normalize and keys.shape[0] == 1:  # the positive is the only key: rounded alike, both terms cancel
            inner_product = temperature * lse
        elif on.normalize:
            inner_product = (unit_norms(queries) + unit_norms(positive) - c_pos) / 2
        else:
            inner_product = (queries * positive).sum(-1)
        rows = -2 * (p * inner_product).sum(0), 2 * temperature * (p * lse).sum(0)
    else:
        ids = instance_ids(keys.shape[0], keys.device)
        flags: dict[str, Any] = {"inner_product": on.normalize, "detach_weights": True, "normalize": on.normalize}
        spec = ContrastSpec(ids[positives], ids, [OTHER], *index, **flags)
        (value,), (lse,) = detached_keys(on, queries, keys[None], taus, spec)
        entropy = partial(entropy_of, value, lse, tau)
        if on.normalize:
            missing = 1 - unit_norms(keys).to(lse.dtype)  # of a weight of about exp(0)
            norms = unit_norms(queries) + 1 - (missing.sum() - missing[positives]) * (-lse).exp()
            value = torch.where(lse == -torch.inf, value, value + norms)
        rows = attracted.value / 2, -(p * value).sum(0) / 2
    return Terms(*rows, attracted.entropy, entropy)


def supervised(
    on: Target,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    numbers: Numbers,
    *,
    sets: KeySets = WHOLE_SETS,
    ranks: Ranks = ALONE,
) -> Terms:
    """``reference.supervised``: both sets of a query from one pass over the similarities.

    Embeddings in no set have been replaced by zeros (``rows_in_sets``), but for one that is alone.
    """
    tau_pos, tau_neg, alpha, beta, attracts, repels = numbers
    if not attracts and not repels:
        zero = embeddings.new_zeros(())
        return Terms(no_term(embeddings), no_term(embeddings), zero, zero)
    keys_are_queries = ref_embeddings is None or ref_labels is None
    if keys_are_queries and labels.shape[0] == 1:  # in no set: not read
        embeddings = torch.zeros_like(embeddings) + 0.0 * torch.where(
            torch.ones_like(embeddings, dtype=torch.bool), 0.0, embeddings
        )
    keys = None if ref_embeddings is None else ref_embeddings[None]
    ref_index, ignore_index, queries_first = sets
    kinds, q_self = [SAME_NOT_SELF if keys_are_queries or queries_first else SAME, OTHER], None
    if ref_index is not None or ignore_index is not None:
        kinds = [SAME_NOT_SELF, OTHER_NOT_SELF]
        if not keys_are_queries and not queries_first:
            q_self = (torch.full_like(labels, -1) if ref_index is None else ref_index).to(torch.int32)
    ids = compact_ids(labels, ref_labels, ignore_index)
    taus, weights = [tau_pos, -tau_neg], [alpha, -beta]
    asked = [s for s, term in enumerate((attracts, repels)) if term]
    spec = ContrastSpec(*ids, [kinds[s] for s in asked], [0], [0], q_self=q_self, normalize=on.normalize)
    numbers_asked = vector([taus[s] for s in asked], embeddings.device)
    value, lse = contrast(on, embeddings[None], keys, numbers_asked, spec)
    value, lse = value[:, 0], lse[:, 0]
    nonempty = ranks.total((lse != -torch.inf).sum(-1)).clamp(min=1).to(value.dtype)
    factor = value.shape[1] * ranks.size / nonempty
    rows = [no_term(embeddings)] * 2
    entropies: list[Entropy] = [embeddings.new_zeros(())] * 2
    for i, (s, counted) in enumerate(zip(asked, (value * factor[:, None]).unbind(), strict=True)):
        rows[s] = weights[s] * counted
        entropies[s] = partial(entropy_of_softmax, i, value, lse, taus[s])
    return Terms(*rows, *entropies)


def entropy_of_softmax(s: int, value: Tensor, lse: Tensor, tau: Temperature) -> Tensor:
    """``entropy_of`` one of two softmaxes: value and lse [S, N]."""
    return entropy_of(value[s], lse[s], tau)


def rows_in_sets(
    labels: Tensor, ref_labels: Tensor | None, ref_index: Tensor | None, ignore_index: int | None, everywhere: bool
) -> list[Tensor]:
    """Which embeddings [N] and which of the reference set [M] are in a set, their own or another's; of M without it.

    A query meets all keys that are not ignored but itself. Without ``everywhere`` there are queries and keys of other
    ranks, and only what is ignored is in no set.
    """
    queries = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    if ref_labels is None:
        return [queries & (queries.sum() > 1) if everywhere else queries]
    keys = torch.ones_like(ref_labels, dtype=torch.bool) if ignore_index is None else ref_labels != ignore_index
    if not everywhere:
        return [queries, keys]
    met_by, meets = queries.sum(), keys.sum()
    if ref_index is not None:  # those that are no key stand for a key, and count nothing
        known = (ref_index >= 0) & (ref_index < ref_labels.shape[0])
        index = torch.where(known, ref_index, 0)
        met_by = met_by - torch.zeros_like(ref_labels).index_add(0, index, (known & queries).to(ref_labels.dtype))
        meets = meets - (known & keys[index]).to(ref_labels.dtype)
    return [queries & (meets > 0), keys & (met_by > 0)]


def are_small(labels: Tensor) -> bool:
    """Whether int64 labels are what most are, 0, 1, ...; larger ones may share the slots of the kernels' filters."""
    if labels.numel() == 0:
        return True
    low, high = labels.aminmax()
    return bool(low.item() >= 0 and high.item() < 2**16)


def compact_ids(
    labels: Tensor, ref_labels: Tensor | None, ignore_index: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """int64 labels as int32 ids that are equal exactly where the labels are.

    Those of embeddings to ignore are negative and all different.
    """
    given = [labels] if ref_labels is None else [labels, ref_labels]
    if ignore_index is None and all(has_values(x) and are_small(x) for x in given):
        ids, *others = (x.to(torch.int32) for x in given)
        return ids, others[0] if others else None
    both = labels if ref_labels is None else torch.cat([labels, ref_labels])
    # Not torch.unique: its size depends on the data, which synchronises, and torch 2.10 cannot trace it in torch.func.
    ordered, where = both.sort()
    rank = (ordered != ordered.roll(1)).cumsum(0, dtype=torch.int32)
    ids = torch.zeros_like(rank).scatter(0, where, rank - rank[:1])
    if ignore_index is not None:
        ids = torch.where(both == ignore_index, ~instance_ids(both.shape[0], both.device), ids)
    return ids[: labels.shape[0]], None if ref_labels is None else ids[labels.shape[0] :]
