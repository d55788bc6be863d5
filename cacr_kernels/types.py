"""Types shared by every layer: options, set kinds, what travels as one argument, what the losses return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, get_args

import torch
from torch import Tensor

Pairing = Literal["unordered", "ordered", "pooled"]
Cost = Literal["sqeuclidean", "rbf"]
Reduction = Literal["mean", "sum", "none"]
WeightGrad = Literal["in_batch", "full", "none"]
Enqueue = Literal["all", "last"]
Temperature = float | Tensor
Views = Tensor | Sequence[Tensor]

PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)  # the operators take the index
COSTS: tuple[Cost, ...] = get_args(Cost)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
WEIGHT_GRADS: tuple[WeightGrad, ...] = get_args(WeightGrad)
ENQUEUES: tuple[Enqueue, ...] = get_args(Enqueue)

# Kinds of key sets: all keys, those with the id of the query, those with another id; the last two again without the
# query itself, the second of them also without rows that have a negative id.
ALL, SAME, OTHER, SAME_NOT_SELF, OTHER_NOT_SELF = range(5)
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
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


class Numbers(NamedTuple):
    """The four numbers of attraction and repulsion, and whether anybody asks for either term."""

    tau_pos: Temperature
    tau_neg: Temperature
    alpha: Any = 1.0  # a number; while compiling a 0-dim tensor
    beta: Any = 1.0
    attracts: bool = True
    repels: bool = True


class SharedKeywords(TypedDict, total=False):
    """For type checkers: what every loss takes by keyword, but ``return_parts``, which decides what it returns."""

    normalize: bool
    reduction: Reduction
    gather_distributed: bool
    process_group: Any
    backend: str


class MomentumModuleKeywords(SharedKeywords, total=False):
    """For type checkers: the keywords of ``CACRMomentumLoss``."""

    temperature: Temperature
    cost: Cost


class MomentumKeywords(MomentumModuleKeywords, total=False):
    """For type checkers: the keywords of ``cacr_momentum_loss``."""

    key_offset: int


class NumbersKeywords(SharedKeywords, total=False):
    """For type checkers: the keywords of every other loss."""

    tau_pos: Temperature
    tau_neg: Temperature
    alpha: float
    beta: float


class ViewsKeywords(NumbersKeywords, total=False):
    """For type checkers: the keywords of ``cacr_loss``."""

    pairing: Pairing
    cost: Cost
    rbf_scale: float
    tau_plus: float


class QueueKeywords(NumbersKeywords, total=False):
    """For type checkers: the keywords of ``cacr_queue_loss``."""

    in_batch: bool
    weight_grad: WeightGrad


class QueueModuleKeywords(QueueKeywords, total=False):
    """For type checkers: the keywords of ``CACRQueueLoss``."""

    queue_size: int
    dim: int | None
    enqueue: Enqueue


class SupervisedModuleKeywords(NumbersKeywords, total=False):
    """For type checkers: the keywords of ``SupervisedCACRLoss``."""

    ignore_index: int | None


class SupervisedKeywords(SupervisedModuleKeywords, total=False):
    """For type checkers: the keywords of ``supervised_cacr_loss``."""

    ref_embeddings: Tensor | None
    ref_labels: Tensor | None
    ref_index: Tensor | None


class CACROptions(NamedTuple):
    """The arguments of the operator ``cacr`` that are no tensors; its numbers count only without the tensor of them."""

    tau_pos: float
    tau_neg: float
    alpha: float
    beta: float
    pairing: int  # index into PAIRINGS
    rbf: bool
    rbf_scale: float
    normalize: bool  # the views are raw rows

    @property
    def numbers(self) -> Any:
        """The five numbers in the order in which the tensor holds them."""
        return self.tau_pos, self.tau_neg, self.alpha, self.beta, self.rbf_scale


class ContrastSpec(NamedTuple):
    """The arguments of the operators ``contrast`` and ``detached_keys`` to which no gradient flows.

    Softmax s of pair p compares the queries of view ``q_index[p]`` with the keys of view ``k_index[p]`` that are in the
    set of kind ``kinds[s]``. ``inner_product``: the cost is -2 q.k, not |q - k|^2. ``detach_weights``: the weights are
    constants. The kinds without the query itself leave out key ``q_self[i]`` of query i, none where that is -1;
    without ``q_self`` they leave out key i. Only ``contrast`` has them.

    ``normalize``: queries and keys are raw rows. Those compared are x / max(|x|, 1e-12), in float32 or wider, and the
    gradients are those of the raw rows, zero for rows shorter than 1e-12.

    A row whose negative id no other row has is in no set of SAME_NOT_SELF and OTHER_NOT_SELF: nobody's, and its own
    are empty. OTHER takes negative ids as any others.
    """

    q_id: Tensor | None  # [N] int32, with k_id [M] needed by every kind but ALL
    k_id: Tensor | None
    kinds: list[int]
    q_index: list[int]
    k_index: list[int]
    inner_product: bool = False
    detach_weights: bool = False
    q_self: Tensor | None = None  # [N] int32
    normalize: bool = False


class CACRParts(NamedTuple):
    """The loss and what it is made of; all but ``loss`` are detached scalars for logging.

    ``attraction`` and ``repulsion`` have alpha and beta applied and are means whatever the reduction is;
    under ``reduction="mean"`` they add up to ``loss``. The entropies (in nats) are those of the softmax weights,
    averaged over the queries that have a non-empty set.

    Example:
        >>> import torch, cacr_kernels
        >>> parts = cacr_kernels.cacr_loss(torch.eye(4).repeat(2, 1, 1), return_parts=True)
        >>> parts.attraction.item(), parts.repulsion.item(), round(parts.repulsion_entropy.exp().item(), 4)
        (0.0, -2.0, 3.0)
    """

    loss: Tensor
    attraction: Tensor
    repulsion: Tensor
    attraction_entropy: Tensor
    repulsion_entropy: Tensor


Entropy: TypeAlias = Tensor | Callable[[], Tensor]


class Terms(NamedTuple):
    """What an implementation of a loss hands back before it is reduced.

    ``attraction`` and ``repulsion`` hold one value per query (alpha and beta applied), scaled so that their *mean* is
    the mean-reduced term; ``repulsion`` is 0-dimensional where only the mean exists (``cacr_loss`` with
    ``cost="rbf"``). Both are differentiable. The entropies are 0-dimensional and detached; or they are functions that
    give them, as most callers do not ask.
    """

    attraction: Tensor
    repulsion: Tensor
    attraction_entropy: Entropy
    repulsion_entropy: Entropy

    def entropies(self) -> tuple[Tensor, Tensor]:
        """Both of them, computed now where they are not yet."""
        a, r = self[2:]
        return a if isinstance(a, Tensor) else a(), r if isinstance(r, Tensor) else r()


class Ranks(NamedTuple):
    """What makes numbers of this rank's queries those of all ``size`` ranks; the ranks have equally many queries.

    ``total`` adds counts. ``rbf`` takes the attraction of this rank's queries and the logs [P] of their mean repulsion,
    and gives the mean attraction and the logs of all.
    """

    size: int
    total: Callable[[Tensor], Tensor]
    rbf: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KeySets(NamedTuple):
    """What the supervised loss leaves out of the sets of its queries, see ``reference.supervised``."""

    ref_index: Tensor | None = None  # [N] int64, -1: none
    ignore_index: int | None = None
    queries_first: bool = False


WHOLE_SETS = KeySets()
ALONE = Ranks(1, lambda counts: counts, lambda attraction, log_mean: (attraction, log_mean))
