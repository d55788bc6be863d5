"""The losses as modules: they hold the options and delegate to :mod:`cacr_kernels.functional`.

``normalize`` is ``True`` here. Temperatures may be ``torch.nn.Parameter``\\ s of 0 dimensions, which the module then owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import functional
from .types import Cost, Pairing, Reduction, WeightGrad


class _Loss(nn.Module):
    """Options by name; numbers and strings as attributes, parameters and tensors registered."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        """The options as they are now."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class CACRLoss(_Loss):
    """:func:`cacr_kernels.cacr_loss` with ``normalize=True``.

    ``CACRLoss()(z0, z1, ...)`` takes the views as arguments [B, D], or one tensor [V, B, D], or one list of views.

    Example:
        >>> import torch, cacr_kernels
        >>> loss_fn = cacr_kernels.CACRLoss(tau_neg=2.0)
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        tau_pos: float | Tensor = 1.0,
        tau_neg: float | Tensor = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        pairing: Pairing = "unordered",
        cost: Cost = "sqeuclidean",
        rbf_scale: float = 2.0,
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            alpha=alpha,
            beta=beta,
            pairing=pairing,
            cost=cost,
            rbf_scale=rbf_scale,
            normalize=normalize,
            reduction=reduction,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(self, *views: Tensor | Sequence[Tensor]) -> Any:
        """The loss of the views."""
        return functional.cacr_loss(views[0] if len(views) == 1 else views, **self.options())  # type: ignore[arg-type]


class CACRQueueLoss(_Loss):
    """:func:`cacr_kernels.cacr_queue_loss` with ``normalize=True``; the caller keeps the queue."""

    def __init__(
        self,
        *,
        tau_pos: float | Tensor = 1.0,
        tau_neg: float | Tensor = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        in_batch: bool = True,
        weight_grad: WeightGrad = "in_batch",
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            alpha=alpha,
            beta=beta,
            in_batch=in_batch,
            weight_grad=weight_grad,
            normalize=normalize,
            reduction=reduction,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(self, queries: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor], queue: Tensor) -> Any:
        """The loss of queries and keys [V, B, D] with the queue [K, D]."""
        return functional.cacr_queue_loss(queries, keys, queue, **self.options())


class CACRMomentumLoss(_Loss):
    """:func:`cacr_kernels.cacr_momentum_loss` with ``normalize=True``."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        cost: Cost = "rbf",
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            cost=cost,
            normalize=normalize,
            reduction=reduction,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(self, queries: Tensor | Sequence[Tensor], keys: Tensor, *, key_offset: int = 0) -> Any:
        """The loss of queries [V, B, D] with the keys [M, D] of all ranks."""
        return functional.cacr_momentum_loss(queries, keys, key_offset=key_offset, **self.options())


class SupervisedCACRLoss(_Loss):
    """:func:`cacr_kernels.supervised_cacr_loss` with ``normalize=True``."""

    def __init__(
        self,
        *,
        tau_pos: float | Tensor = 1.0,
        tau_neg: float | Tensor = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            reduction=reduction,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss of embeddings [N, D] with labels [N]."""
        return functional.supervised_cacr_loss(
            embeddings, labels, ref_embeddings=ref_embeddings, ref_labels=ref_labels, **self.options()
        )
