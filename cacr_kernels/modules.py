"""The losses as modules: they hold the options and delegate to :mod:`cacr_kernels.functional`.

``normalize`` is ``True`` here. A temperature may be a ``torch.nn.Parameter`` of one number, 0-dim or (for
``fully_shard``) of shape [1], which the module then owns. Options are checked when the module is made. Those that are
Python numbers may follow a schedule, also under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize

from . import checks, functional
from .operators.second_derivative import refuse_second_derivative_of_compiled
from .types import Cost, Pairing, Reduction, WeightGrad, arithmetic_dtype


class _Loss(nn.Module):
    """Options by name, checked; numbers and strings as attributes, parameters and tensors registered."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        checks.options(options)
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:  # to torch.compile a number of NumPy is an array
                setattr(self, name, float(value) if isinstance(value, np.number) else value)

    def options(self) -> dict[str, Any]:
        """The options as they are now."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """The options as they are written in a call."""
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
        checks.reduction_of_rbf(cost, reduction)

    def forward(self, *views: Tensor | Sequence[Tensor]) -> Any:
        """The loss of the views."""
        return functional.cacr_loss(views[0] if len(views) == 1 else views, **self.options())  # type: ignore[arg-type]


class CACRQueueLoss(_Loss):
    """:func:`cacr_kernels.cacr_queue_loss` with ``normalize=True``, which keeps its queue if asked to.

    ``CACRQueueLoss()(queries, keys, queue)`` uses the caller's queue [K, D]. ``CACRQueueLoss(queue_size=K, dim=D)``
    keeps the last K keys itself: ``loss_fn(queries, keys)`` compares with the keys of earlier calls, and the keys of
    this call enter the queue at the next one, all V B of them, the oldest leave. Until it is full, the queue holds the
    keys that came so far. A tensor that a pending backward reads is never changed, so any number of forwards may come
    before their backwards. The keys are stored normalised (if ``normalize``), in the dtype of the module. In evaluation
    mode (``eval()``) the queue is read, and no key is added.

    The queue is a persistent buffer, oldest key first: ``state_dict()`` holds it with the keys of the last call, and a
    resumed run goes on exactly. Under ``DistributedDataParallel`` every rank keeps its own queue: pass
    ``broadcast_buffers=False``, or rank 0's queue replaces the others at every forward. (Its successor
    ``forward_sync_buffers=False`` copies rank 0's buffers once, when wrapping: load a rank's checkpoint after that.)

    ``torch.compile`` breaks the graph where the keys of the last call enter, at a change of Python state, and compiles
    the loss for any number of keys; ``fullgraph=True`` needs the caller's queue, or a queue that is only read:
    ``eval()``, after one call. ``torch.export`` takes the latter too.

    Args:
        queue_size: K, how many keys to keep; 0: none.
        dim: D, the number of features, together with ``queue_size``.

    Raises:
        ValueError: a queue is given although the module keeps one, or the reverse; features that are not ``dim``.

    Example:
        >>> import torch, cacr_kernels
        >>> loss_fn = cacr_kernels.CACRQueueLoss(queue_size=32, dim=16)
        >>> for _ in range(3):
        ...     loss = loss_fn(torch.randn(2, 8, 16), torch.randn(2, 8, 16))
    """

    queue: Tensor
    queue_length: Tensor

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
        self.dim = dim
        self._held = 0  # the first keys of the buffer are filled: that number, here where no device has to be asked
        self._pending: Tensor | None = None  # keys [V, B, D] of the last call
        if dim is not None:
            checks.integer("dim", dim, 1, 2**31)
            self.register_buffer("queue", torch.zeros(queue_size, dim))
            self.register_buffer("queue_length", torch.zeros((), dtype=torch.int64))

    def forward(
        self, queries: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor], queue: Tensor | None = None
    ) -> Any:
        """The loss of queries and keys [V, B, D] with a queue [K, D]: the caller's, or the module's own."""
        if self.dim is None:
            if queue is None:
                raise ValueError("queue must be a tensor [K, D], got None; or let the module keep one with queue_size=")
            return functional.cacr_queue_loss(queries, keys, queue, **self.options())
        if queue is not None:
            raise ValueError(f"queue must not be given: this module keeps its own of queue_size={self.queue_size}")
        (queries,) = refuse_second_derivative_of_compiled(queries)
        q, k = checks.views("queries", queries, at_least=2), checks.views("keys", keys, at_least=2)
        if k.shape[-1] != self.dim:
            raise ValueError(f"keys must have dim = {self.dim} features, got {k.shape[-1]}")
        if self.training and torch.compiler.is_exporting():
            raise ValueError(
                "CACRQueueLoss that keeps its queue can only be exported in eval(): a program keeps no queue"
            )
        own = self.queue[: self._held] if self._pending is None else self._enqueue()
        options = self.options()
        if options.pop("normalize"):
            q, k = (l2_normalize(x.to(arithmetic_dtype(x)), dim=-1) for x in (q, k.detach()))
        loss = functional.cacr_queue_loss(q, k, own, **options)
        if self.training:
            self._pending = k.detach().clone()
        return loss

    def extra_repr(self) -> str:
        """The size of the queue, if the module keeps one, and the options as they are written in a call."""
        own = f"queue_size={self.queue_size}, dim={self.dim}, " if self.queue_size else ""
        return own + super().extra_repr()

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="the keys of the last call enter the queue of CACRQueueLoss between two graphs"
    )
    def _enqueue(self) -> Tensor:
        """Lets the pending keys enter; returns the keys held. New tensors: a pending backward still reads the old."""
        assert self._pending is not None
        with torch.inference_mode(False), torch.no_grad():
            fresh = self._pending.flatten(0, 1)[-self.queue_size :].to(self.queue)
            leaving = max(0, self._held + len(fresh) - self.queue_size)
            kept = self.queue[leaving : self._held]
            self._held = len(kept) + len(fresh)
            self.queue = torch.cat([kept, fresh, self.queue[self._held :]])
            self.queue_length = self.queue_length.new_full((), self._held)
        self._pending = None
        return self.queue[: self._held]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._pending is not None:
            self._enqueue()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self._pending is not None:
            self._enqueue()
        if self.dim is None:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        length, given = self.queue_length, state_dict.get(f"{prefix}queue")
        self.queue, self.queue_length = self.queue.clone(), length.clone()  # loading copies in place
        super()._load_from_state_dict(state_dict, prefix, *args)
        if given is None or given.shape != self.queue.shape:  # torch has said so; a length belongs to its queue
            self.queue_length = length
        self._held = int(self.queue_length)


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
