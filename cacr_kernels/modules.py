"""The losses as modules: they hold the options and delegate to :mod:`cacr_kernels.functional`.

``normalize`` is ``True`` here. A temperature may be a 0-dim ``torch.nn.Parameter``, which the module then owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize

from . import checks, functional
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
    """:func:`cacr_kernels.cacr_queue_loss` with ``normalize=True``, which keeps its queue if asked to.

    ``CACRQueueLoss()(queries, keys, queue)`` uses the caller's queue [K, D]. ``CACRQueueLoss(queue_size=K, dim=D)``
    keeps the last K keys itself: ``loss_fn(queries, keys)`` compares with the keys of earlier calls, and the keys of
    this call enter the queue at the next one, so that nothing a pending backward needs is ever changed. Until it is
    full, the queue holds the keys that came so far. The keys are stored normalised (if ``normalize``).

    The queue is a persistent buffer: it is in ``state_dict()``, with the keys of the last call, and a resumed run goes
    on exactly. Under ``DistributedDataParallel`` every rank keeps its own queue: pass ``broadcast_buffers=False``, or
    rank 0's queue replaces the others at every forward. In evaluation mode (``eval()``) the queue is read, not changed.

    Raises:
        ValueError: a queue is given although the module keeps one, or the reverse; features that are not ``dim``.
    """

    queue: Tensor
    queue_state: Tensor

    def __init__(
        self,
        *,
        queue_size: int = 0,
        dim: int | None = None,
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
        self.queue_size = checks.integer("queue_size", queue_size, 0, 2**62)
        if (dim is None) != (queue_size == 0):
            raise ValueError(f"dim must be given together with queue_size > 0, got dim={dim}, queue_size={queue_size}")
        self._pending: list[Tensor] = []
        if dim is not None:
            checks.integer("dim", dim, 1, 2**31)
            self.register_buffer("queue", torch.zeros(queue_size, dim))
            self.register_buffer(
                "queue_state", torch.zeros(2, dtype=torch.int64, device="cpu")
            )  # keys held, next place
            self._held, self._place = 0, 0
            hooked: Any = self  # torch does not annotate the hooks
            hooked.register_state_dict_post_hook(_saving)
            hooked.register_load_state_dict_post_hook(_after_loading)

    def forward(
        self, queries: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor], queue: Tensor | None = None
    ) -> Any:
        """The loss of queries and keys [V, B, D] with a queue [K, D]: the caller's, or the module's own."""
        if self.queue_size == 0:
            if queue is None:
                raise ValueError("queue must be a tensor [K, D], got None; or let the module keep one with queue_size=")
            return functional.cacr_queue_loss(queries, keys, queue, **self.options())
        if queue is not None:
            raise ValueError(f"queue must not be given: this module keeps its own of queue_size={self.queue_size}")
        q, k = checks.views("queries", queries, at_least=2), checks.views("keys", keys, at_least=2)
        if k.shape[-1] != self.queue.shape[1]:
            raise ValueError(f"keys must have dim = {self.queue.shape[1]} features, got {k.shape[-1]}")
        if self.training:
            self._enqueue()
        options = self.options()
        if options.pop("normalize"):
            q, k = (l2_normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in (q, k.detach()))
        loss = functional.cacr_queue_loss(q, k, self.queue[: self._held], **options)
        if self.training:
            self._pending = [k.detach()]
        return loss

    def extra_repr(self) -> str:
        """The options."""
        return f"queue_size={self.queue_size}, {super().extra_repr()}" if self.queue_size else super().extra_repr()

    def _enqueue(self) -> None:
        """Lets the pending keys enter: a pending backward still reads the old tensor."""
        self.queue, self._held, self._place = self._after_pending()
        self._pending = []

    @torch.no_grad()
    def _after_pending(self) -> tuple[Tensor, int, int]:
        """The queue as it will be with the pending keys, how many keys it holds and where the next goes."""
        size, queue, held, place = self.queue_size, self.queue, self._held, self._place
        for keys in self._pending:
            fresh = keys.reshape(-1, keys.shape[-1])[-size:].to(queue)
            queue, n = queue.clone(), fresh.shape[0]
            first = min(n, size - place)
            queue[place : place + first] = fresh[:first]
            queue[: n - first] = fresh[first:]
            place, held = (place + n) % size, min(size, held + n)
        return queue, held, place


def _saving(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    """The state is that of the next call, so that no key is lost; the module itself does not change."""
    assert isinstance(module, CACRQueueLoss)
    queue, held, place = module._after_pending()
    state_dict[f"{prefix}queue"] = queue
    state_dict[f"{prefix}queue_state"] = torch.tensor([held, place])


def _after_loading(module: nn.Module, incompatible: object) -> None:
    assert isinstance(module, CACRQueueLoss)
    module._pending = []
    module._held, module._place = (int(n) for n in module.queue_state.tolist())


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
