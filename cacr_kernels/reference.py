"""The definition: CACR written down once, plainly, as N x M arrays. Every faster backend is measured against this file.

Symbols, the same in every backend
----------------------------------
    V views, B instances, D features, N queries, M keys, K queue entries
    q [.., N, D], k [.., M, D]     queries and keys
    cost    c_ij = |q_i - k_j|^2   (2 - 2 q_i.k_j for unit vectors)
    tau     an *inverse* temperature, it multiplies the cost: +tau_pos among positives (the more distant weigh more),
            -tau_neg among negatives (the closer weigh more), 0 gives uniform weights
    weights w_ij = softmax_{j in S_i}(tau c_ij)
    value   F_i = sum_{j in S_i} w_ij c_ij
    lse_i = log sum_{j in S_i} exp(tau c_ij)

In the paper (Zheng et al., arXiv 2105.03746) the weights are the conditional distributions pi+, proportional to
exp(t+ c), and pi-, proportional to exp(-t- c), and mean F+ - mean F- is the loss L_CA + L_CR. The published code calls
the two halves ``our_loss1`` and ``our_loss2``; its ``without_w1`` and ``without_w2`` are tau_pos = 0 and tau_neg = 0.

Gradients
---------
With l_ij = tau c_ij, dw_ij/dl_ik = w_ij (delta_jk - w_ik). Hence, for a cost map phi (phi(c) = c or phi(c) = exp(-s c))
and F_i = sum_j w_ij phi(c_ij):

    dF_i/dc_ik = w_ik phi'(c_ik) + sum_j phi(c_ij) tau w_ij (delta_jk - w_ik)
               = w_ik (phi'(c_ik) + tau (phi(c_ik) - F_i))            weights differentiated
               = w_ik  phi'(c_ik)                                     weights detached
    dlse_i/dc_ik = tau w_ik
    dF_i/dtau    = sum_j w_ij c_ij (phi(c_ij) - F_i)                  phi(c) = c: the variance of c under w
    dlse_i/dtau  = sum_j w_ij c_ij
    dc_ij/dq_i   = 2 (q_i - k_j) = -dc_ij/dk_j

so with g_ij = dL/dc_ij: dL/dq_i = 2 (q_i sum_j g_ij - sum_j g_ij k_j), dL/dk_j = 2 (k_j sum_i g_ij - sum_i g_ij q_i).
An incoming (gF, glse) gives g_ij = w_ij (a_i + b_i c_ij) with a = gF (1 - tau F) + glse tau and b = gF tau (weights
detached: a = gF, b = 0). A detached logit passes nothing to its temperature either.

Merge
-----
For disjoint key sets A, B of one query, with Z = exp(lse): Z = Z_A + Z_B and Z F = Z_A F_A + Z_B F_B. Therefore

    lse = logaddexp(lse_A, lse_B),   F = exp(lse_A - lse) F_A + exp(lse_B - lse) F_B.

Tiles, views, queue + batch and shards of keys are all this merge. The empty set (lse = -inf, F = 0) is its neutral
element.

Empty sets and bad numbers
--------------------------
An empty set contributes 0 with zero gradient, of any order. Costs outside the set are replaced before they meet any
arithmetic, so they cannot leak in; costs inside the set are used as they are, so a NaN or an Inf reaches the loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .types import ALONE, WHOLE_SETS, Cost, KeySets, Numbers, Pairing, Ranks, Temperature, Terms, WeightGrad

SHORTEST = 1e-12  # rows at least this long become unit vectors


def unit_rows(x: Tensor) -> Tensor:
    """``torch.nn.functional.normalize`` of the rows; those shorter than ``SHORTEST`` get no gradient.

    Theirs would be the incoming one times 1e12: no information, and more than a half type can hold.
    """
    # while compiling, requires_grad may be wrong; a trace is for both
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not (x.requires_grad or tracing):
        return normalize(x, dim=-1, eps=SHORTEST)
    short = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) < SHORTEST
    return normalize(torch.where(short, x.detach(), x), dim=-1, eps=SHORTEST)


def of_raw_rows(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient w.r.t. raw rows ``x`` of what has the gradient ``grad`` w.r.t. their unit vectors.

    u = x / |x|, du/dx = (1 - u u^T) / |x|, hence (g - (g.u) u) / |x|; 0 for rows shorter than ``SHORTEST``.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    short = length < SHORTEST
    length = torch.where(short, 1.0, length)  # so that a derivative of this is finite
    unit = x / length
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.where(short, 0.0, (grad - along * unit) / length)


def unit_norms(x: Tensor) -> Tensor:
    """Squared lengths of ``unit_rows(x)``: 1, or less where a row is shorter than ``SHORTEST``; constants."""
    length = torch.linalg.vector_norm(x.detach(), dim=-1)
    unit: Tensor = length / length.clamp(min=SHORTEST)
    return unit.square()


class Statistics(NamedTuple):
    """What one softmax per query yields: ``weights`` [.., N, M], all else [.., N]; ``entropy`` is detached."""

    value: Tensor
    lse: Tensor
    entropy: Tensor
    nonempty: Tensor
    weights: Tensor


def pairwise_cost(q: Tensor, k: Tensor) -> Tensor:
    """``c[.., i, j] = |q_i|^2 + |k_j|^2 - 2 q_i.k_j`` [.., N, M], for negatives: the eager matmul form.

    It cancels for close pairs, where the cost is small against the norms; harmless among negatives and N x M in memory.
    """
    return q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :] - 2 * q @ k.mT


def inner_product(q: Tensor, k: Tensor) -> Tensor:
    """All inner products ``q_i.k_j``, [.., N, M]."""
    return q @ k.mT


def difference_cost(q: Tensor, k: Tensor) -> Tensor:
    """``sum_d (q - k)^2`` over the last dimension, broadcasting, for positives.

    Views of one instance end up close together: differences keep full relative accuracy there.
    """
    return (q - k).square().sum(-1)


def statistics(logit: Tensor, cost: Tensor, members: Tensor) -> Statistics:
    """Softmax of ``logit`` over the ``members`` of each row, and the mean ``cost`` under it.

    ``logit`` and ``cost`` are [.., N, M], ``members`` is a mask that broadcasts to them, M >= 1. The logit is tau c, or
    that partly or wholly detached. Entropy of the weights: ``-sum w log w = -sum w (logit - lse) = lse - tau sum w c``.

    An empty row becomes a row of zero costs and zero logits, which is finite and constant: value 0, all derivatives 0.
    """
    members = members.expand(cost.shape)
    nonempty = members.any(-1)
    cost = torch.where(members, cost, 0.0)
    logit = torch.where(members, logit, 0.0)
    masked = torch.where(members | ~nonempty[..., None], logit, -math.inf)
    weights = torch.where(members, masked.softmax(-1), 0.0)
    lse = torch.where(nonempty, masked.logsumexp(-1), -math.inf)
    entropy = torch.where(nonempty, lse - (weights * logit).sum(-1), 0.0).detach().clamp(min=0.0)
    return Statistics((weights * cost).sum(-1), lse, entropy, nonempty, weights)


def no_term(rows: Tensor) -> Tensor:
    """A term of weight 0: one zero for each of ``rows`` [.., D], in whose graph they are; nothing flows to them."""
    return rows[..., :0].sum(-1)


def mean_entropy(stats: Statistics) -> Tensor:
    """Entropy averaged over the queries that have a non-empty set; 0 if there is none."""
    return stats.entropy.sum() / stats.nonempty.sum().clamp(min=1)


def entropy_of(value: Tensor, lse: Tensor, tau: Temperature) -> Tensor:
    """Entropy of the weights, averaged over the queries with a non-empty set: lse - tau F."""
    nonempty = lse != -torch.inf
    rows = torch.where(nonempty, lse - tau * value, 0.0).detach().clamp(min=0.0)  # rounding, where one key has all
    return rows.sum() / nonempty.sum().clamp(min=1)


def cacr(
    views: Tensor,
    numbers: Numbers,
    *,
    pairing: Pairing,
    cost: Cost,
    rbf_scale: float,
    tau_plus: float = 0.0,
    keys: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Terms:
    """CACR of ``views`` [V, B, D], V >= 2 (paper: L_CA + L_CR; published: ``our_loss1`` + ``our_loss2``).

    attraction[v, b] = alpha F+,  S = {z[u, b] : u != v},  tau = +tau_pos
    repulsion        = -beta F-   per query,  or for rbf  +beta mean_pairs log mean_b F-,  tau = -tau_neg

    ``"unordered"`` (x < y) and ``"ordered"`` (x != y) have P pairs of views and one softmax per pair and instance; the
    value of a pair stands on row x with the factor V / P, so that the mean of the rows is the mean of the pairs.
    ``tau_plus`` > 0 (published: ``with_debiased``) makes the repulsion of a query z[x, b] with the keys of view y
    (-beta F- - tau_plus c(z[x, b], z[y, b])) / (1 - tau_plus).
    ``"pooled"`` has one softmax per query over all views. Rows [V, B]; under rbf ``repulsion`` is 0-dimensional.
    ``keys`` [V, M, D]: the views of more instances, of which those of ``views`` come first; by default ``views``.
    """
    tau_pos, tau_neg, alpha, beta, *_ = numbers
    attracted = attraction_statistics(views, tau_pos)
    c, members = negative_costs(views, pairing, keys)
    repelled = statistics(-tau_neg * c, c, members)
    attraction = alpha * attracted.value
    if cost == "rbf":
        attraction, log_mean = ranks.rbf(attraction, rbf_log_mean(c, members, repelled, tau_neg, rbf_scale))
        repulsion = beta * log_mean.mean()
    else:
        repulsion = -beta * rows_of_pairs(repelled.value, views.shape[0], pairing)
    if tau_plus:
        own = torch.stack([difference_cost(views[x], views[y]) for x, y in view_pairs(views.shape[0], pairing)])
        repulsion = (repulsion - tau_plus * rows_of_pairs(own, views.shape[0], pairing)) / (1 - tau_plus)
    return Terms(attraction, repulsion, mean_entropy(attracted), mean_entropy(repelled))


def attraction_statistics(views: Tensor, tau_pos: Temperature) -> Statistics:
    """Each z[v, b] against the other views of its instance: rows [V, B], weights [V, B, V] with 0 at u = v."""
    z = views.transpose(0, 1)  # [B, V, D]
    c = difference_cost(z[:, :, None], z[:, None, :]).transpose(0, 1)  # [V, B, V]
    others = ~torch.eye(views.shape[0], dtype=torch.bool, device=views.device)
    return statistics(tau_pos * c, c, others[:, None, :])


def negative_costs(views: Tensor, pairing: Pairing, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Costs [P, N, M] of queries and keys, and the mask [N, M] of negatives: P pairs of views, or P = 1 and N = V B.

    ``keys``: see :func:`cacr`.
    """
    keys = views if keys is None else keys
    num_views, batch, dim = views.shape
    instance = torch.arange(keys.shape[1], dtype=torch.int64, device=views.device)
    if pairing == "pooled":
        q, k = views.reshape(1, -1, dim), keys.reshape(1, -1, dim)
        return pairwise_cost(q, k), instance[:batch].repeat(num_views)[:, None] != instance.repeat(num_views)
    pairs = view_pairs(num_views, pairing)
    q = torch.stack([views[x] for x, _ in pairs])
    k = torch.stack([keys[y] for _, y in pairs])
    return pairwise_cost(q, k), instance[:batch, None] != instance


def view_pairs(num_views: int, pairing: Pairing) -> list[tuple[int, int]]:
    """The pairs (x, y) of views: queries are those of x, keys those of y."""
    ordered = pairing == "ordered"
    return [(x, y) for x in range(num_views) for y in range(num_views) if x < y or (ordered and x != y)]


def rows_of_pairs(value: Tensor, num_views: int, pairing: Pairing) -> Tensor:
    """Rows [V, B] with the mean of ``value`` [P, B]: the sum over the pairs of view x stands on row x, times V / P."""
    if pairing == "pooled":
        return value.reshape(num_views, -1)
    counts = [num_views - 1 - (x if pairing == "unordered" else 0) for x in range(num_views)]
    # not torch.tensor: on another device a copy from here waits for it
    index = [torch.full((count,), x, dtype=torch.int64, device=value.device) for x, count in enumerate(counts)]
    rows = value.new_zeros(num_views, value.shape[1]).index_add(0, torch.cat(index), value)
    return rows * (num_views / sum(counts))


def rbf_log_mean(c: Tensor, members: Tensor, repelled: Statistics, tau_neg: Temperature, rbf_scale: float) -> Tensor:
    """``log mean_b F`` [P] for phi(c) = exp(-s c), in log space, so that it never underflows.

    F_i = sum_j exp(-tau c_ij) exp(-s c_ij) / sum_j exp(-tau c_ij)   =>   log F_i = lse_i(-(tau + s)) - lse_i(-tau)

    Its gradient, tau w_ij - (tau + s) v_ij with v = softmax(-(tau + s) c), is that of F_i divided by F_i, because
    v_ij = w_ij phi(c_ij) / F_i. With B = 1 all rows are empty, otherwise none is: log F := 0 then makes the result 0.
    """
    sharper = statistics(-(tau_neg + rbf_scale) * c, c, members)
    log_value = torch.where(repelled.nonempty, sharper.lse - repelled.lse, 0.0)
    log_value = log_value + 0.0 * repelled.value.detach()  # an infinite cost has no mass in lse: 0 * NaN shows it
    return log_value.logsumexp(-1) - math.log(log_value.shape[-1])


def queue(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    numbers: Numbers,
    *,
    in_batch: bool | Tensor,
    weight_grad: WeightGrad,
    valid: Tensor | None = None,
) -> Terms:
    """CACR with a momentum queue (published for MoCo v2): queries and keys [V, B, D], queue [K, D]; rows [V, B].

    attraction[v, b] = alpha sum_u w c(q[v, b], k[u, b]),  u != v,  weights detached     (V = 1: c(q[0, b], k[0, b]))
    repulsion[v, b]  = -beta F- over queue + {q[v, j] : j != b} in one softmax (published: ``unif_intra_batch``)

    ``weight_grad`` says which logits are differentiated: with "in_batch" those of the queue entries are detached inside
    the softmax, so dF/dc = w for them and w (1 + tau (c - F)) for in-batch negatives, where F is that of the whole set,
    and dF/dtau is the sum over the in-batch negatives alone. "full" differentiates all of them, "none" none.
    Of the queue the first ``valid`` rows count, all if it is ``None``. ``in_batch`` is whether other queries of the
    batch are negatives, or the queries [V, M, D] of a larger batch, of which these come first.
    """
    tau_pos, tau_neg, alpha, beta, *_ = numbers
    keys, queue = keys.detach(), queue.detach()
    num_views, batch, _ = queries.shape
    device = queries.device

    c = difference_cost(queries[:, None], keys[None]).transpose(1, 2)  # [V, B, V]
    others = ~torch.eye(num_views, dtype=torch.bool, device=device)
    others = torch.ones_like(others) if num_views == 1 else others
    attracted = statistics((tau_pos * c).detach(), c, others[:, None, :])

    own = in_batch if isinstance(in_batch, Tensor) else queries
    k = torch.cat([queue.expand(num_views, *queue.shape), own], dim=1)  # [V, K + M, D]
    c = pairwise_cost(queries, k)  # [V, B, K + M]
    # of the keys in the batch; negative in the queue
    index = torch.arange(-queue.shape[0], own.shape[1], dtype=torch.int64, device=device)
    in_queue = index < 0
    not_self = index != torch.arange(batch, dtype=torch.int64, device=device)[:, None]
    logit = -tau_neg * c
    if weight_grad == "none":
        logit = logit.detach()
    elif weight_grad == "in_batch":
        logit = torch.where(in_queue, logit.detach(), logit)
    members = in_queue if in_batch is False else not_self
    if valid is not None:
        members = members & (~in_queue | (index + queue.shape[0] < valid))
    repelled = statistics(logit, c, members)
    return Terms(alpha * attracted.value, -beta * repelled.value, mean_entropy(attracted), mean_entropy(repelled))


def momentum(queries: Tensor, keys: Tensor, temperature: Temperature, *, cost: Cost, key_offset: int) -> Terms:
    """CACR with momentum keys (published for MoCo v3: ``cacr_rbfloss``, ``cacr_euclideanloss``): rows [B].

    queries [V, B, D], keys [M, D] of all ranks, the positive of query b is key ``key_offset + b``, all unit vectors.
    p_v = softmax_v(|q_v - k+|^2 / T) over the V query views, detached.

    "sqeuclidean":  sum_v p_v (|q_v - k+|^2 - sum_j w_j |q_v - k_j|^2) / 2,   w = softmax_{j != +}(q_v.k_j / T) detached
    "rbf":          sum_v p_v 2T (lse_j(q_v.k_j / T) - q_v.k+ / T)            lse over all j, the positive included

    Both are the softmax of costs used everywhere: for unit vectors q.k / T = 1 / T - c / (2T), so tau_pos = 1 / T and
    tau_neg = 1 / (2T), and "rbf" is c+ + 2T lse_j(-c_j / (2T)). Written as its parts, -2 q.k+ (attraction) and 2T lse
    (repulsion), its gradient w.r.t. q_v is 2 p_v (sum_j w_j k_j - k+), w = softmax_j(q_v.k_j / T), and w.r.t. T it is
    2 sum_v p_v (lse - sum_j w_j q_v.k_j / T), the entropies of w. Detached weights give T no gradient ("sqeuclidean").
    """
    keys = keys.detach()
    batch = queries.shape[1]
    instance = torch.arange(batch, dtype=torch.int64, device=queries.device)
    positive = keys[key_offset : key_offset + batch]

    c_pos = difference_cost(queries, positive)  # [V, B]
    attracted = statistics((c_pos / temperature).detach().mT, c_pos.mT, torch.ones_like(c_pos.mT, dtype=torch.bool))
    p = attracted.weights.mT  # [V, B]

    inner = inner_product(queries, keys)  # [V, B, M]
    is_positive = (
        torch.arange(keys.shape[0], dtype=torch.int64, device=queries.device) == key_offset + instance[:, None]
    )
    if cost == "rbf":
        w = statistics(inner / temperature, inner, torch.ones_like(is_positive))
        lse = w.lse + 0.0 * w.value.detach()  # an inner product of -inf has no mass in lse: 0 * NaN shows it
        attraction = -2 * (p * (queries * positive).sum(-1)).sum(0)
        repulsion = 2 * temperature * (p * lse).sum(0)
    else:
        w = statistics((inner / temperature).detach(), pairwise_cost(queries, keys), ~is_positive)
        attraction = attracted.value / 2
        repulsion = -(p * w.value).sum(0) / 2
    return Terms(attraction, repulsion, mean_entropy(attracted), mean_entropy(w))


def supervised(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    numbers: Numbers,
    *,
    sets: KeySets = WHOLE_SETS,
    ranks: Ranks = ALONE,
) -> Terms:
    """CACR with labels: positives share the label of the query, negatives have another; rows [N].

    embeddings [N, D], labels [N]. The keys are the embeddings themselves, or the reference set [M, D], [M]. A query is
    in no set of its own: it is key i of the embeddings, key ``ref_index[i]`` of a reference set, none where that is -1;
    with ``queries_first`` key i of the reference set. Embeddings with the label ``ignore_index`` are in no set, and
    theirs are empty. Only the N_pos queries that have a positive count in the mean of the attraction, only the N_neg
    that have a negative in that of the repulsion: the rows carry the factors N / N_pos and N / N_neg.

    The costs of positives are differences: this holds an [N, M, D] array.
    """
    tau_pos, tau_neg, alpha, beta, *_ = numbers
    self, ignore_index, queries_first = sets
    k, k_labels = ref_embeddings, ref_labels
    if k is None or k_labels is None:
        k, k_labels = embeddings, labels
    if ref_embeddings is None or queries_first:
        self = torch.arange(len(labels), dtype=torch.int64, device=labels.device)
    same = labels[:, None] == k_labels
    met = torch.ones_like(same)  # the keys that are in a set of the query
    if self is not None:
        met = self[:, None] != torch.arange(len(k_labels), dtype=torch.int64, device=labels.device)
    if ignore_index is not None:
        met = met & (labels != ignore_index)[:, None] & (k_labels != ignore_index)
    same, other = same & met, ~same & met
    # What is in no set is not read, not even multiplied by a zero gradient.
    embeddings = torch.where(met.any(1)[:, None], embeddings, 0.0)
    k = embeddings if ref_embeddings is None else torch.where(met.any(0)[:, None], k, 0.0)

    c = difference_cost(embeddings[:, None], k)
    attracted = statistics(tau_pos * c, c, same)
    c = pairwise_cost(embeddings, k)
    repelled = statistics(-tau_neg * c, c, other)
    counts = ranks.total(torch.stack([attracted.nonempty.sum(), repelled.nonempty.sum()])).clamp(min=1)
    factor = len(embeddings) * ranks.size / counts.to(c.dtype)
    return Terms(
        alpha * attracted.value * factor[0],
        -beta * repelled.value * factor[1],
        mean_entropy(attracted),
        mean_entropy(repelled),
    )
