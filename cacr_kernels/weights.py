"""Reading the loss: which positives and which negatives it weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize

from . import checks, ops
from ._blocks import BLOCK, block_cost
from .autograd import aligned_cost
from .losses import attraction
from .reference import view_pairs
from .types import Pairing


class CACRWeights(NamedTuple):
    """Softmax weights of ``cacr_loss``, detached.

    ``attraction`` [V, B, V]: weight of view u for the query z[v, b], 0 at u = v; sums to 1 over u.
    ``repulsion`` [P, Q, K]: the K largest weights of the chosen queries, descending.
    ``indices`` [P, Q, K]: whose weights they are: instance j of view ``pairs[p][1]``; for ``"pooled"`` the position
    u * B + j among the keys of all views.
    ``pairs``: the (query view, key view) of each p; empty for ``"pooled"``, where P = 1.
    """

    attraction: Tensor
    repulsion: Tensor
    indices: Tensor
    pairs: list[tuple[int, int]]


@torch.no_grad()
def cacr_weights(
    views: Tensor | Sequence[Tensor],
    *,
    queries: Tensor | Sequence[int] | None = None,
    top_k: int = 10,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.0,
    pairing: Pairing = "unordered",
    normalize: bool = False,
) -> CACRWeights:
    """The weights that ``cacr_loss`` gives to positives and negatives, as the paper plots them.

    w+ = softmax_u(tau_pos c), u != v, of all queries, and the ``top_k`` largest of w- = softmax_j(-tau_neg c), j != b,
    of the chosen ones. Keys are read in blocks: memory is O(N D + Q (K + block)), no N x M array.

    Args:
        views: see :func:`cacr_kernels.cacr_loss`.
        queries: indices [Q] of the instances whose negatives are wanted (for ``"pooled"``: positions v * B + b);
            ``None``: all.
        top_k: how many, at most the number of negatives (fewer are returned if there are fewer).
        tau_pos, tau_neg, pairing, normalize: see :func:`cacr_kernels.cacr_loss`.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_loss`.

    Source: Zheng et al., TMLR 2023, the conditional distributions pi+ and pi-.
    """
    z = checks.views("views", views, at_least=2)
    tau_pos = checks.temperature("tau_pos", tau_pos, z.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, z.device)
    checks.option("pairing", pairing, ops.PAIRINGS)
    checks.flag("normalize", normalize)
    checks.integer("top_k", top_k, 1, 2**31)
    z = z if z.dtype == torch.float64 else z.float()
    z = l2_normalize(z, dim=-1) if normalize else z
    num_views, batch, dim = z.shape
    c = aligned_cost(z, z)
    positive = attraction(c, tau_pos * c).weights
    pooled = pairing == "pooled"
    rows = num_views * batch if pooled else batch
    chosen = _chosen(queries, rows, z.device)
    pairs = [] if pooled else view_pairs(num_views, pairing)
    if pooled:
        flat = z.reshape(rows, dim)
        found = [_top(flat, flat, chosen, top_k, tau_neg, batch)]
    else:
        found = [_top(z[x], z[y], chosen, top_k, tau_neg, batch) for x, y in pairs]
    weights, indices = (torch.stack(part) for part in zip(*found, strict=True))
    return CACRWeights(positive, weights, indices, pairs)


def _chosen(queries: Tensor | Sequence[int] | None, rows: int, device: torch.device) -> Tensor:
    if queries is None:
        return torch.arange(rows, device=device)
    index = torch.as_tensor(queries, device=device)
    if index.dtype not in checks.INTEGERS:
        raise TypeError(f"queries must be integers, got {index.dtype}")
    if index.dim() != 1 or bool(((index < 0) | (index >= rows)).any()):
        raise ValueError(f"queries must be a list of indices in [0, {rows - 1}], got shape {list(index.shape)}")
    return index.long()


def _top(
    q: Tensor, k: Tensor, chosen: Tensor, top_k: int, tau_neg: float | Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """The largest weights [Q, K] and whose they are, over blocks of keys; instance of row i: i % batch."""
    most = min(top_k, k.shape[0] - k.shape[0] // batch)
    weights, indices = [], []
    for some in chosen.split(max(1, BLOCK // min(k.shape[0], BLOCK))):
        lse = q.new_full((some.numel(),), -torch.inf)
        best = q.new_full((some.numel(), 0), -torch.inf)
        where = some.new_empty((some.numel(), 0))
        for start in range(0, k.shape[0], BLOCK):
            keys = torch.arange(start, min(k.shape[0], start + BLOCK), device=q.device)
            logit = -tau_neg * block_cost(q[some], k[keys], False, None)
            logit = logit.masked_fill(some[:, None] % batch == keys % batch, -torch.inf)
            lse = torch.logaddexp(lse, logit.logsumexp(-1))
            best, at = torch.cat([best, logit], 1).topk(min(most, best.shape[1] + logit.shape[1]), dim=1)
            where = torch.cat([where, keys.expand(some.numel(), -1)], 1).gather(1, at)
        weights.append((best - lse[:, None]).exp())
        indices.append(where)
    return torch.cat(weights), torch.cat(indices)
