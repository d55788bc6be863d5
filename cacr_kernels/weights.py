"""Reading the loss: which positives and which negatives it weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends.table import check as check_backend
from .backends.torch import BLOCK, block_cost
from .losses import attraction
from .operators.aligned import aligned_cost
from .operators.registry import prepare_compilers
from .reference import unit_rows, view_pairs
from .types import PAIRINGS, Pairing, arithmetic_dtype


class CACRWeights(NamedTuple):
    """Softmax weights of ``cacr_loss``, detached.

    ``attraction`` [V, B, V]: weight of view u for the query z[v, b], 0 at u = v; sums to 1 over u.
    ``repulsion`` [P, Q, K]: the K largest weights of the chosen queries, descending.
    ``indices`` [P, Q, K]: whose weights they are: instance j of view ``pairs[p][1]``; for ``"pooled"`` the position
    u * B + j among the keys of all views.
    ``pairs``: the (query view, key view) of each p; empty for ``"pooled"``, where P = 1.

    Example:
        >>> import torch, cacr_kernels
        >>> found = cacr_kernels.cacr_weights(torch.eye(4).repeat(3, 1, 1), top_k=2)
        >>> found.attraction.shape, found.repulsion.shape, found.pairs
        (torch.Size([3, 4, 3]), torch.Size([3, 4, 2]), [(0, 1), (0, 2), (1, 2)])
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

    Those of all queries among positives, and the ``top_k`` largest of the chosen queries among negatives::

        attraction: w = softmax_u(+tau_pos c(z[v,b], z[u,b])),   u != v
        repulsion:  w = softmax_j(-tau_neg c(z[x,b], z[y,j])),   j != b

    Keys are read in blocks: beside the inputs and the result, memory is that of one block.

    Args:
        views: tensor [V, B, D], or a sequence of V >= 2 tensors [B, D], see :func:`cacr_kernels.cacr_loss`.
        queries: indices [Q] of the instances whose negatives are wanted (for ``"pooled"``: positions v * B + b), a
            tensor or a sequence of integers; ``None``: all.
        top_k: how many of the negatives; all, if there are fewer. Equal weights come in any order.
        tau_pos, tau_neg, pairing, normalize: see :func:`cacr_kernels.cacr_loss`.

    Returns:
        The weights and whose they are, attraction [V, B, V], repulsion and indices [P, Q, K] for P pairs of views.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_loss`.

    Source: Zheng et al., TMLR 2023, the conditional distributions pi+ and pi-.

    Example:
        >>> import torch, cacr_kernels
        >>> found = cacr_kernels.cacr_weights(torch.eye(4).repeat(2, 1, 1), queries=[0], top_k=2)
        >>> found.pairs, found.repulsion.shape
        ([(0, 1)], torch.Size([1, 1, 2]))
    """
    if torch.compiler.is_compiling():
        prepare_compilers()
    z = checks.views("views", views, at_least=2)
    check_backend("torch", z.device)
    tau_pos = checks.temperature("tau_pos", tau_pos, z.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, z.device)
    checks.option("pairing", pairing, PAIRINGS)
    checks.flag("normalize", normalize)
    top_k = checks.integer("top_k", top_k, 1, 2**31)
    pooled = pairing == "pooled"
    num_views, batch, dim = z.shape
    chosen = _chosen(queries, num_views * batch if pooled else batch, z.device)
    with checks.without_autocast(z.device):
        z = z.to(arithmetic_dtype(z))
        z = unit_rows(z) if normalize else z
        c = aligned_cost(z, z)
        positive = attraction(c, tau_pos * c).weights.transpose(1, 2)
        pairs = [] if pooled else view_pairs(num_views, pairing)
        if pooled:
            flat = z.reshape(num_views * batch, dim)
            found = [_top(flat, flat, chosen, top_k, tau_neg, batch)]
        else:
            found = [_top(z[x], z[y], chosen, top_k, tau_neg, batch) for x, y in pairs]
    weights, indices = (torch.stack(part) for part in zip(*found, strict=True))
    return CACRWeights(positive, weights, indices, pairs)


def _chosen(queries: Tensor | Sequence[int] | None, rows: int, device: torch.device) -> Tensor:
    if queries is None:
        return torch.arange(rows, dtype=torch.int64, device=device)
    if isinstance(queries, Tensor):
        index = queries.to(device)
    elif isinstance(queries, Sequence) and all(checks.is_integer(i) for i in queries):
        numbers = [checks.integer(f"queries[{n}]", i, 0, rows - 1) for n, i in enumerate(queries)]
        index = torch.tensor(numbers, dtype=torch.int64, device=device)
    else:
        raise TypeError(f"queries must be an integer tensor [Q] or a sequence of integers, got {queries!r}")
    if index.dtype not in checks.INTEGERS:
        raise TypeError(f"queries must have an integer dtype, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"queries must have shape [Q], got {list(index.shape)}")
    index = index.to(device, torch.int64)
    if bool(((index < 0) | (index >= rows)).any()):
        raise ValueError(f"queries must be in [0, {rows - 1}], got {index.min().item()} to {index.max().item()}")
    return index


def _top(
    q: Tensor, k: Tensor, chosen: Tensor, top_k: int, tau_neg: float | Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """The largest weights [Q, K] and whose they are; instance of row i: i % batch.

    Blocks of keys one after the other: the largest logits so far, and the sum of all relative to the top one.
    """
    most = min(top_k, k.shape[0] - k.shape[0] // batch)
    keys_per_block = min(k.shape[0], BLOCK)
    weights, indices = [], []
    for some in chosen.split(max(1, BLOCK // keys_per_block)):
        best = q.new_full((some.numel(), 0), -torch.inf)
        where = some.new_empty((some.numel(), 0))
        top, total = q.new_full((some.numel(), 1), -torch.inf), q.new_zeros((some.numel(), 1))
        for keys in torch.arange(k.shape[0], dtype=torch.int64, device=q.device).split(keys_per_block):
            logit = -tau_neg * block_cost(q[some], k[keys], False, None)
            logit = logit.clamp(min=torch.finfo(logit.dtype).min)  # an infinite cost is no reason to pass for no member
            logit = logit.masked_fill(some[:, None] % batch == keys % batch, -torch.inf)
            new_top = torch.maximum(top, logit.amax(1, keepdim=True))
            base = torch.where(new_top == -torch.inf, 0.0, new_top)
            total = total * (top - base).exp() + (logit - base).exp().sum(1, keepdim=True)
            top = new_top
            best, at = torch.cat([best, logit], 1).topk(min(most, best.shape[1] + logit.shape[1]), dim=1)
            where = torch.cat([where, keys.expand(some.numel(), -1)], 1).gather(1, at)
        weights.append((best - top).exp() / total)
        indices.append(where)
    return torch.cat(weights), torch.cat(indices)
