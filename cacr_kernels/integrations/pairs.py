"""CACR over listed pairs: the sets of an anchor are what a list says, not all rows with a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import unit_rows
from ..types import arithmetic_dtype

PAIRS_AT_ONCE = 1 << 16  # rows of a temporary array


class PairCosts(torch.autograd.Function):
    """|x_i - y_j|^2 of listed pairs (i, j), in blocks of pairs; gradients of both.

    A second derivative is refused.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Costs [P] of the pairs in their order."""
        blocks = zip(i.split(PAIRS_AT_ONCE), j.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([(x[a] - y[b]).square().sum(-1) for a, b in blocks])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps rows and lists for the backward."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """2 g (x_i - y_j), added up for x_i, and taken from y_j."""
        x, y, i, j = ctx.saved_tensors
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        for a, b, g in zip(*(t.split(PAIRS_AT_ONCE) for t in (i, j, grad)), strict=True):
            rows = 2 * g[:, None] * (x[a] - y[b])
            grad_x.index_add_(0, a, rows)
            grad_y.index_add_(0, b, rows, alpha=-1)
        return grad_x, grad_y, None, None


def listed_means(cost: Tensor, anchor: Tensor, tau: float | Tensor, count: int) -> Tensor:
    """Mean cost [count] of each anchor's pairs with the weights softmax(tau cost), 0 where it has none.

    Scaled so that the mean over all anchors is the mean over those that have pairs.
    """
    logit = tau * cost
    top = cost.new_full((count,), -torch.inf).scatter_reduce(0, anchor, logit.detach(), "amax")
    weight = (logit - top[anchor]).exp()
    total = cost.new_zeros(count).index_add(0, anchor, weight)
    some = total > 0
    mean = cost.new_zeros(count).index_add(0, anchor, weight * cost) / torch.where(some, total, 1.0)
    return mean * (count / some.sum().clamp(min=1).to(mean.dtype))


def pair_rows(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    indices: Sequence[Tensor],
    *,
    tau_pos: float | Tensor,
    tau_neg: float | Tensor,
    alpha: float,
    beta: float,
    normalize: bool,
) -> Tensor:
    """Values [N] whose mean is the loss; ``indices``: (anchors, positives, anchors, negatives), or triplets.

    Attraction is averaged over the anchors that have a positive, repulsion over those that have a negative.
    """
    anchor, positive, other, negative = indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])
    x, y = embeddings, embeddings if ref_emb is None else ref_emb
    dtype = torch.promote_types(arithmetic_dtype(x), arithmetic_dtype(y))
    x, y = x.to(dtype), y.to(dtype)
    if normalize:
        x, y = (unit_rows(x), unit_rows(y)) if y is not x else (unit_rows(x),) * 2
    count = x.shape[0]
    pulled = listed_means(PairCosts.apply(x, y, anchor, positive), anchor, tau_pos, count)  # type: ignore[no-untyped-call]
    pushed = listed_means(PairCosts.apply(x, y, other, negative), other, -tau_neg, count)  # type: ignore[no-untyped-call]
    return alpha * pulled - beta * pushed
