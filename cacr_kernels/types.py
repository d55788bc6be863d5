"""Types shared by every layer: options, set kinds, what travels as one argument, what the losses return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Pairing = Literal["unordered", "ordered", "pooled"]
Cost = Literal["sqeuclidean", "rbf"]
Reduction = Literal["mean", "sum", "none"]
WeightGrad = Literal["in_batch", "full", "none"]
Enqueue = Literal["all", "last"]
Temperature = float | Tensor

PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)  # the operators take the index
COSTS: tuple[Cost, ...] = get_args(Cost)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
WEIGHT_GRADS: tuple[WeightGrad, ...] = get_args(WeightGrad)
ENQUEUES: tuple[Enqueue, ...] = get_args(Enqueue)

# Kinds of key sets: all keys, those with the id of the query, those with another id, those with its id but not itself.
ALL, SAME, OTHER, SAME_NOT_SELF = range(4)
POSITIVE_KINDS = SAME, SAME_NOT_SELF


def view_pair_count(num_views: int, pairing: Pairing) -> int:
    """How many times queries of a view meet negatives of a view."""
    return {"unordered": num_views * (num_views - 1) // 2, "ordered": num_views * (num_views - 1), "pooled": 1}[pairing]


WITHOUT_FLOAT64 = ["mps"]  # types of devices


def widest_dtype(device: torch.device) -> torch.dtype:
    """In which temperatures and statistics of rows are kept on a device: float64, where it has that."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of the arithmetic and of the gradients: float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Numbers(NamedTuple):
    """The four numbers of attraction and repulsion."""

    tau_pos: Temperature
    tau_neg: Temperature
    alpha: Any = 1.0  # a number; while compiling a 0-dim tensor
    beta: Any = 1.0


class CACROptions(NamedTuple):
    """The arguments of the operator ``cacr`` that are no tensors; its numbers count only without the tensor of them."""

    tau_pos: float
    tau_neg: float
    alpha: float
    beta: float
    pairing: int  # index into PAIRINGS
    rbf: bool
    rbf_scale: float

    @property
    def numbers(self) -> Any:
        """The five numbers in the order in which the tensor holds them."""
        return self.tau_pos, self.tau_neg, self.alpha, self.beta, self.rbf_scale


class ContrastSpec(NamedTuple):
    """The arguments of the operators ``contrast`` and ``detached_keys`` to which no gradient flows.

    Softmax s of pair p compares the queries of view ``q_index[p]`` with the keys of view ``k_index[p]`` that are in the
    set of kind ``kinds[s]``. ``inner_product``: the cost is -2 q.k, not |q - k|^2. ``detach_weights``: the weights are
    constants.
    """

    q_id: Tensor | None  # [N] int32, with k_id [M] needed by every kind but ALL
    k_id: Tensor | None
    kinds: list[int]
    q_index: list[int]
    k_index: list[int]
    inner_product: bool = False
    detach_weights: bool = False


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


class Ranks(NamedTuple):
    """What makes numbers of this rank's queries those of all ``size`` ranks; the ranks have equally many queries.

    ``total`` adds counts. ``rbf`` takes the attraction of this rank's queries and the logs [P] of their mean repulsion,
    and gives the mean attraction and the logs of all.
    """

    size: int
    total: Callable[[Tensor], Tensor]
    rbf: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


ALONE = Ranks(1, lambda counts: counts, lambda attraction, log_mean: (attraction, log_mean))
