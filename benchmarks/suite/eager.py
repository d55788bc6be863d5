"""The losses as one would write them in PyTorch with N x M arrays: the matmul form, and the broadcasting formulation.

Views are a Python list of [B, D] tensors, one loop pass per pair; gradients come from autograd. Costs of positives are
differences, as in the library. Half precision inputs are computed in float32, as in the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PairCost = Callable[[Tensor, Tensor], Tensor]


def matmul_cost(q: Tensor, k: Tensor) -> Tensor:
    """Squared distances [N, M] from one matrix product."""
    return q.square().sum(1)[:, None] + k.square().sum(1) - 2 * q @ k.T


def broadcast_cost(q: Tensor, k: Tensor) -> Tensor:
    """Squared distances [N, M] from all differences [N, M, D], as the published code computes them."""
    return (q[:, None, :] - k[None, :, :]).square().sum(-1)


def expected_cost(c: Tensor, logit: Tensor, excluded: Tensor) -> Tensor:
    """The mean of ``c`` under the softmax of ``logit`` over the keys that are not excluded, per row."""
    return (logit.masked_fill(excluded, -math.inf).softmax(1) * c).sum(1)


def eye(n: int, like: Tensor) -> Tensor:
    """The mask [n, n] of a query and its own instance."""
    return torch.eye(n, dtype=torch.bool, device=like.device)


def single(x: Tensor) -> Tensor:
    """Converts half precision to float32 and leaves other dtypes as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def attraction(q: Sequence[Tensor], k: Sequence[Tensor] | None, tau: float, detach: bool = False) -> Tensor:
    """Mean cost of each query to the other views of its instance (``k``; the queries themselves if ``None``)."""
    V = len(q)
    if k is None:  # symmetric: each cost once
        half = {(u, v): (q[u] - q[v]).square().sum(1) for u in range(V) for v in range(u + 1, V)}
        costs = [[half[min(u, v), max(u, v)] for u in range(V) if u != v] for v in range(V)]
    else:
        costs = [[(q[v] - k[u]).square().sum(1) for u in range(V) if u != v] for v in range(V)]
    c = torch.stack([torch.stack(row) for row in costs])  # [V, V-1, B]
    logit = tau * (c.detach() if detach else c)
    return (logit.softmax(1) * c).sum(1).mean()


def cacr_loss(
    views: Sequence[Tensor],
    *,
    tau_pos: float,
    tau_neg: float,
    pairing: str = "unordered",
    cost: str = "sqeuclidean",
    rbf_scale: float = 2.0,
    pair_cost: PairCost = matmul_cost,
) -> Tensor:
    """The loss ``cacr_kernels.cacr_loss`` with alpha = beta = 1."""
    views = [single(view) for view in views]
    V, B = len(views), len(views[0])
    if pairing == "pooled":
        z = torch.cat(views)
        excluded, pairs = eye(B, z).repeat(V, V), [(z, z)]
    else:
        ordered = pairing == "ordered"
        pairs = [(views[x], views[y]) for x in range(V) for y in range(V) if x < y or (ordered and x != y)]
        excluded = eye(B, views[0])
    terms = []
    for q, k in pairs:
        c = pair_cost(q, k)
        if cost == "rbf":
            # log of the mean of exp(-s c), in log space
            value = [(-t * c).masked_fill(excluded, -math.inf).logsumexp(1) for t in (tau_neg + rbf_scale, tau_neg)]
            terms.append(math.log(len(q)) - (value[0] - value[1]).logsumexp(0))
        else:
            terms.append(expected_cost(c, -tau_neg * c, excluded).mean())
    return attraction(views, None, tau_pos) - torch.stack(terms).mean()


def cacr_queue_loss(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    queue: Tensor,
    *,
    tau_pos: float,
    tau_neg: float,
    in_batch: bool = True,
    weight_grad: str = "in_batch",
) -> Tensor:
    """The loss ``cacr_kernels.cacr_queue_loss`` with alpha = beta = 1."""
    queries, keys, queue = [single(q) for q in queries], [single(k) for k in keys], single(queue)
    excluded = eye(len(queries[0]), queries[0])
    terms = []
    for q in queries:
        c = matmul_cost(q, queue)
        logit = -tau_neg * (c if weight_grad == "full" else c.detach())
        if in_batch:
            c_batch = matmul_cost(q, q)
            logit_batch = -tau_neg * (c_batch.detach() if weight_grad == "none" else c_batch)
            c = torch.cat([c, c_batch], 1)
            logit = torch.cat([logit, logit_batch.masked_fill(excluded, -math.inf)], 1)
        terms.append((logit.softmax(1) * c).sum(1).mean())
    return attraction(queries, keys, tau_pos, detach=True) - torch.stack(terms).mean()


def cacr_momentum_loss(
    queries: Sequence[Tensor], keys: Tensor, *, temperature: float, cost: str = "rbf", key_offset: int = 0
) -> Tensor:
    """The loss ``cacr_kernels.cacr_momentum_loss`` in eager PyTorch."""
    queries, keys = [single(q) for q in queries], single(keys)
    B = len(queries[0])
    positive = keys[key_offset : key_offset + B]
    c_pos = torch.stack([(q - positive).square().sum(1) for q in queries])  # [V, B]
    p = (c_pos.detach() / temperature).softmax(0)
    terms = []
    for q in queries:
        inner = q @ keys.T
        if cost == "rbf":
            aligned = (q * positive).sum(1)
            terms.append(2 * temperature * (inner / temperature).logsumexp(1) - 2 * aligned)
        else:
            index = torch.arange(len(keys), device=keys.device)
            excluded = index == key_offset + torch.arange(B, device=keys.device)[:, None]
            c = q.square().sum(1)[:, None] + keys.square().sum(1) - 2 * inner
            terms.append((-expected_cost(c, inner.detach() / temperature, excluded)) / 2)
    loss = torch.stack(terms) if cost == "rbf" else torch.stack(terms) + c_pos / 2
    return (p * loss).sum(0).mean()


def supervised_cacr_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    tau_pos: float,
    tau_neg: float,
) -> Tensor:
    """The loss ``cacr_kernels.supervised_cacr_loss`` by masks."""
    embeddings = single(embeddings)
    keys, key_labels = embeddings, labels
    if ref_embeddings is not None and ref_labels is not None:
        keys, key_labels = single(ref_embeddings), ref_labels
    c = matmul_cost(embeddings, keys)
    same = labels[:, None] == key_labels
    positive = same & ~eye(len(labels), embeddings) if ref_embeddings is None else same
    loss = embeddings.new_zeros(())
    for tau, members, sign in ((tau_pos, positive, 1.0), (-tau_neg, ~same, -1.0)):
        # A row without members gets equal finite logits and counts as 0.
        logit = (tau * c).masked_fill(~members & members.any(1, keepdim=True), -math.inf)
        value = torch.where(members, logit.softmax(1) * c, 0.0).sum(1)
        loss = loss + sign * value.sum() / members.any(1).sum().clamp(min=1)
    return loss


def normalized(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of unit rows: every tensor of numbers, and every tensor of a list of views, is normalised first."""

    def unit(x: Any) -> Any:
        if isinstance(x, Tensor):
            return F.normalize(single(x), dim=-1) if x.is_floating_point() else x
        return [unit(view) for view in x]

    return lambda *tensors, **named: loss(*map(unit, tensors), **{name: unit(x) for name, x in named.items()})


def ntxent(views: Sequence[Tensor], temperature: float) -> Tensor:
    """NT-Xent of two views of raw rows, as in SimCLR: 2B x 2B cosines, the other view of an instance is the class."""
    z = F.normalize(torch.cat([single(view) for view in views]), dim=1)
    B = len(views[0])
    logits = (z @ z.T / temperature).masked_fill(eye(2 * B, z), -math.inf)
    return F.cross_entropy(logits, torch.arange(2 * B, device=z.device).roll(B))
