"""CACR as a loss of pytorch-metric-learning, and two of its wrappers that take only losses they know by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses, reducers
from torch import Tensor

from .. import checks
from ..functional import supervised_cacr_loss
from .pairs import pair_rows


class RowsOfBatch(NamedTuple):
    """In the place of tuples of indices: which rows of the reference set the embeddings themselves are."""

    ref_index: Tensor


class CACRLoss(losses.BaseMetricLossFunction):  # type: ignore[misc]
    """:func:`cacr_kernels.supervised_cacr_loss` with the interface of pytorch-metric-learning.

    Takes ``(embeddings, labels, indices_tuple, ref_emb, ref_labels)``. Without ``indices_tuple`` the fused kernels
    compute all pairs. With one, from a miner, the listed pairs are the sets: positives and negatives of each anchor,
    each in a softmax of its own, in O(pairs · D) time and O(pairs) memory; a pair that is listed twice counts twice.

    The loss is usually negative, so the default reducer is ``MeanReducer``; reducers that drop values that are not
    positive (``AvgNonZeroReducer``, ``ThresholdReducer``) change it. Per-element values [N] are what reducers see.

    Args:
        tau_pos, tau_neg, alpha, beta, normalize, backend: see :class:`cacr_kernels.SupervisedCACRLoss`.
        reducer, embedding_regularizer, embedding_reg_weight, collect_stats: those of the library. There is no
            ``distance``: the cost is the squared distance, of unit vectors with ``normalize=True``.

    Returns:
        From a call with embeddings [N, D] and labels [N] what the reducer makes of the values [N], with
        ``MeanReducer`` a scalar. ``ref_emb`` is [M, D], ``ref_labels`` [M].

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.supervised_cacr_loss`; a ``distance`` or a ``temperature``.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.pytorch_metric_learning import CACRLoss
        >>> loss_fn = CACRLoss(tau_neg=5.0)
        >>> loss_fn(torch.randn(8, 16), torch.arange(8) % 3).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        tau_pos: float | Tensor = 1.0,
        tau_neg: float | Tensor = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        normalize: bool = True,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        if "temperature" in options:
            checks.no_temperature("CACRLoss", options["temperature"])
        if "distance" in options:
            raise ValueError("CACRLoss takes no distance: its cost is the squared distance; see normalize")
        super().__init__(**options)
        self.tau_pos, self.tau_neg, self.alpha, self.beta = tau_pos, tau_neg, alpha, beta
        self.normalize, self.backend = normalize, backend

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Sequence[Tensor] | RowsOfBatch | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        """Values [N] whose mean is the loss, in the library's form."""
        numbers: Any = {name: getattr(self, name) for name in ("tau_pos", "tau_neg", "alpha", "beta")}
        if indices_tuple is None or isinstance(indices_tuple, RowsOfBatch):
            if labels is None:
                raise ValueError("labels or indices_tuple must be given, got None for both")
            own = None if indices_tuple is None else indices_tuple.ref_index
            reference: Any = {} if ref_emb is embeddings else {"ref_embeddings": ref_emb, "ref_labels": ref_labels}
            rows = supervised_cacr_loss(
                embeddings,
                labels,
                **reference,
                ref_index=own,
                **numbers,
                normalize=self.normalize,
                reduction="none",
                backend=self.backend,
            )
        else:
            rows = pair_rows(embeddings, ref_emb, indices_tuple, normalize=self.normalize, **numbers)
        index = torch.arange(embeddings.shape[0], dtype=torch.int64, device=embeddings.device)
        return {"loss": {"losses": rows, "indices": index, "reduction_type": "element"}}

    def get_default_reducer(self) -> Any:
        """The mean: CACR's values are of any sign."""
        return reducers.MeanReducer()


class CrossBatchMemory(losses.CrossBatchMemory):  # type: ignore[misc]
    """The library's ``CrossBatchMemory``, for :class:`CACRLoss`.

    The batch is in the memory when the loss is computed. Without a miner and without ``indices_tuple`` no list of all
    N x M pairs is made: the rows of the memory that are the batch itself are left out of their own sets.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.pytorch_metric_learning import CACRLoss, CrossBatchMemory
        >>> memory = CrossBatchMemory(CACRLoss(), embedding_size=16, memory_size=32)
        >>> memory(torch.randn(8, 16), torch.arange(8) % 3).shape
        torch.Size([])
    """

    @staticmethod
    def supported_losses() -> list[str]:
        """The library's, and this package's."""
        return [*losses.CrossBatchMemory.supported_losses(), CACRLoss.__name__]

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Refuses a loss that the library does not support."""
        if loss_name not in cls.supported_losses():
            raise ValueError(f"CrossBatchMemory does not support {loss_name}")

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        memory: Tensor,
        memory_labels: Tensor,
        given: Any,
        without_self: bool,
    ) -> Any:
        """Lists of pairs, or which rows of the memory the batch is."""
        if self.miner is None and given is None and isinstance(self.loss, CACRLoss):
            return RowsOfBatch(self.curr_batch_idx) if without_self else None
        return super().create_indices_tuple(embeddings, labels, memory, memory_labels, given, without_self)


class SelfSupervisedLoss(losses.SelfSupervisedLoss):  # type: ignore[misc]
    """The library's ``SelfSupervisedLoss``, for :class:`CACRLoss`: two views [B, D] of each instance.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.pytorch_metric_learning import CACRLoss, SelfSupervisedLoss
        >>> SelfSupervisedLoss(CACRLoss())(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    @staticmethod
    def supported_losses() -> list[str]:
        """The library's, and this package's."""
        return [*losses.SelfSupervisedLoss.supported_losses(), CACRLoss.__name__]
