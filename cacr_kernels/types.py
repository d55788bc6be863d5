"""Types shared by every layer: what the losses return and what they are made of."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Pairing = Literal["unordered", "ordered", "pooled"]
Cost = Literal["sqeuclidean", "rbf"]
Reduction = Literal["mean", "sum", "none"]
WeightGrad = Literal["in_batch", "full", "none"]


class CACRParts(NamedTuple):
    """The loss and what it is made of; all but ``loss`` are detached scalars for logging.

    ``attraction`` and ``repulsion`` have alpha and beta applied and are means whatever the reduction is;
    under ``reduction="mean"`` they add up to ``loss``. The entropies (in nats) are those of the softmax weights,
    averaged over the queries that have a non-empty set.
    """

    loss: Tensor
    attraction: Tensor
    repulsion: Tensor
    attraction_entropy: Tensor
    repulsion_entropy: Tensor


class Terms(NamedTuple):
    """What an implementation of a loss hands back before it is reduced.

    ``attraction`` and ``repulsion`` hold one value per query (alpha and beta applied), scaled so that their *mean* is
    the mean-reduced term; ``repulsion`` is 0-dimensional where only the mean exists (``cacr_loss`` with
    ``cost="rbf"``). Both are differentiable. The entropies are 0-dimensional and detached.
    """

    attraction: Tensor
    repulsion: Tensor
    attraction_entropy: Tensor
    repulsion_entropy: Tensor
