"""The losses as modules: they hold the options and delegate to :mod:`cacr_kernels.functional`.

``normalize`` is ``True`` here. A temperature may be a ``torch.nn.Parameter`` of one number, 0-dim or (for
``fully_shard``) of shape [1], which the module then owns. Options are checked when the module is made. Those that are
Python numbers may follow a schedule, also under ``torch.compile``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from . import checks, distributed, functional, ring
from .operators import state
from .operators.registry import tracing
from .operators.second_derivative import refuse_second_derivative_of_compiled
from .reference import unit_norms, unit_rows
from .types import ENQUEUES, Cost, Enqueue, Pairing, Reduction, WeightGrad, arithmetic_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .types import CACRParts, MomentumModuleKeywords, QueueModuleKeywords, SupervisedModuleKeywords, ViewsKeywords

Result = TypeVar("Result", bound="Tensor | CACRParts")


class _Loss(nn.Module, Generic[Result]):
    """Options by name, checked; numbers and strings as attributes, parameters and tensors registered.

    To type checkers a loss is generic in what it returns, which ``return_parts`` decides.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        checks.options(options)
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:  # to torch.compile a number of NumPy is an array
                setattr(self, name, value.item() if isinstance(value, (np.number, np.bool_)) else value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy for the same processes: torch cannot copy their group."""
        group = getattr(self, "process_group", None)
        memo[id(group)] = group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return copied

    def options(self) -> dict[str, Any]:
        """The options as they are now."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """The options as they are written in a call."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class CACRLoss(_Loss[Result]):
    """:func:`cacr_kernels.cacr_loss` with ``normalize=True``.

    ``CACRLoss()(z0, z1, ...)`` takes the views as arguments [B, D], or one tensor [V, B, D], or one list of views::

        attraction = alpha mean_{v,b} sum_u w c(z[v,b], z[u,b]),               u != v
        repulsion  = -beta mean_{x<y} mean_b sum_j w c(z[x,b], z[y,j]),        j != b

    Args:
        tau_pos, tau_neg: inverse temperatures; ``tau_neg = 1 / (2 * temperature)`` of other losses.
        alpha, beta, pairing, cost, rbf_scale, tau_plus: see :func:`cacr_kernels.cacr_loss`.
        normalize, reduction, return_parts, gather_distributed, process_group, backend: see there.

    Returns:
        From a call the loss, or :class:`CACRParts`, see :func:`cacr_kernels.cacr_loss`.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_loss`; of options when the module is made.

    Example:
        >>> import torch, cacr_kernels
        >>> loss_fn = cacr_kernels.CACRLoss(tau_neg=2.0)
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    @overload
    def __init__(
        self: CACRLoss[Tensor], *, return_parts: Literal[False] = ..., **options: Unpack[ViewsKeywords]
    ) -> None: ...
    @overload
    def __init__(
        self: CACRLoss[CACRParts], *, return_parts: Literal[True], **options: Unpack[ViewsKeywords]
    ) -> None: ...
    @overload
    def __init__(
        self: CACRLoss[Tensor | CACRParts], *, return_parts: bool, **options: Unpack[ViewsKeywords]
    ) -> None: ...

    @checks.without_temperature
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
        tau_plus: float = 0.0,
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
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
            tau_plus=tau_plus,
            normalize=normalize,
            reduction=reduction,
            return_parts=return_parts,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )
        checks.reduction_of_rbf(cost, reduction)
        checks.tau_plus("tau_plus", tau_plus, pairing, cost)

    def forward(self, *views: Tensor | Sequence[Tensor]) -> Result:
        """The loss of the views: two or more tensors [B, D], or one tensor [V, B, D], or one sequence of views."""
        given: Any = views[0] if len(views) == 1 else views
        loss: Result = functional.cacr_loss(given, **self.options())
        return loss

    if TYPE_CHECKING:
        __call__ = forward


class CACRQueueLoss(_Loss[Result]):
    """:func:`cacr_kernels.cacr_queue_loss` with ``normalize=True``, which keeps its queue if asked to.

    ``CACRQueueLoss()(queries, keys, queue)`` uses the caller's queue [K, D]. ``CACRQueueLoss(queue_size=K, dim=D)``
    keeps the last K keys itself: ``loss_fn(queries, keys)`` compares with the keys of earlier calls, and its own enter
    at the next one, where the oldest leave. Until it is full, the queue is the keys that came so far. They are stored
    normalised (if ``normalize``) in the dtype of the module, whose buffers follow the keys to their device, and
    normalised again when they are read.

    Keys are stored in training mode with gradients enabled; ``update_queue=True`` stores them in any mode, ``False``
    never: a closure that an optimizer evaluates twice (SAM, LBFGS) passes ``False`` the second time. A forward that
    stores none reads the queue as the last one that did left it. A symmetric step is one call,
    ``loss_fn([q0, q1], [k0, k1])``; of two calls the first needs ``update_queue=False``, or its keys are negatives of
    their own instances in the second.

    All state is in buffers: ``queue`` and ``incoming`` [K, D], the keys that wait for the next call, and the counters
    ``queue_count`` and ``incoming_count``; whatever copies or loads buffers copies the queue. Do not average them
    (``AveragedModel(use_buffers=True)``): a mean of queues is no queue. Nothing that a graph saved is written, so any
    number of forwards may come before their backwards.

    Activation checkpointing is exact where the backward runs before the next call in training; if it does not, pass
    the queue. A reentrant checkpoint runs its forward without gradients: pass ``update_queue=True`` there.

    With ``gather_distributed=True`` every rank keeps the same queue: the keys of all ranks, as one process would store
    them, so that a checkpoint of it serves any number of ranks. Without, every rank keeps its own: pass
    ``broadcast_buffers=False`` to ``DistributedDataParallel``, or the queue of rank 0 replaces the others at every
    forward. (Its successor ``forward_sync_buffers=False`` copies the buffers of
    rank 0 once, when wrapping: load a rank's checkpoint after that.) The replicas of ``nn.DataParallel`` cannot fill
    the queue. Keys get no gradient; those that require one are warned about once.

    The formula::

        attraction = alpha mean_{v,b} sum_u w c(q[v,b], k[u,b]),   u != v,   weights w detached
        repulsion  = -beta mean_{v,b} sum_j w c(q[v,b], n_j),      n in queue + {q[v,j] : j != b}, one softmax

    Args:
        queue_size: K, how many keys to keep; 0: none.
        dim: D, the number of features, together with ``queue_size``.
        enqueue: the keys of which views are stored, ``"all"`` or, as published, ``"last"``; of more than K the last K.
        tau_pos, tau_neg: inverse temperatures; ``tau_neg = 1 / (2 * temperature)`` of other losses.
        alpha, beta, in_batch, weight_grad: see :func:`cacr_kernels.cacr_queue_loss`.
        normalize, reduction, return_parts, gather_distributed, process_group, backend: see there.

    Returns:
        From a call the loss, or :class:`CACRParts`, see :func:`cacr_kernels.cacr_queue_loss`.

    Raises:
        ValueError: a queue is given although the module keeps one, or the reverse; features that are not ``dim``.
        TypeError, ValueError: see :func:`cacr_kernels.cacr_queue_loss`; of options when the module is made.

    Example:
        >>> import torch, cacr_kernels
        >>> loss_fn = cacr_kernels.CACRQueueLoss(queue_size=32, dim=16)
        >>> for _ in range(3):
        ...     loss = loss_fn(torch.randn(2, 8, 16), torch.randn(2, 8, 16))
    """

    queue: Tensor
    queue_count: Tensor
    incoming: Tensor
    incoming_count: Tensor

    @overload
    def __init__(
        self: CACRQueueLoss[Tensor], *, return_parts: Literal[False] = ..., **options: Unpack[QueueModuleKeywords]
    ) -> None: ...
    @overload
    def __init__(
        self: CACRQueueLoss[CACRParts], *, return_parts: Literal[True], **options: Unpack[QueueModuleKeywords]
    ) -> None: ...
    @overload
    def __init__(
        self: CACRQueueLoss[Tensor | CACRParts], *, return_parts: bool, **options: Unpack[QueueModuleKeywords]
    ) -> None: ...

    @checks.without_temperature
    def __init__(
        self,
        *,
        queue_size: int = 0,
        dim: int | None = None,
        enqueue: Enqueue = "all",
        tau_pos: float | Tensor = 1.0,
        tau_neg: float | Tensor = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        in_batch: bool = True,
        weight_grad: WeightGrad = "in_batch",
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
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
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )
        self.queue_size = checks.integer("queue_size", queue_size, 0, 2**62)
        if (dim is None) != (queue_size == 0):
            raise ValueError(f"dim must be given together with queue_size > 0, got dim={dim}, queue_size={queue_size}")
        self.dim: int | None = dim
        checks.option("enqueue", enqueue, ENQUEUES)
        self.enqueue = enqueue
        self._unstored = False  # the last forward in training mode had no gradients; decides about a warning only
        if dim is not None:
            self.dim = checks.integer("dim", dim, 1, 2**31)
            for rows, count in _ROWS:
                self.register_buffer(rows, torch.zeros(self.queue_size, self.dim))
                self.register_buffer(count, torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        queries: Tensor | Sequence[Tensor],
        keys: Tensor | Sequence[Tensor],
        queue: Tensor | None = None,
        *,
        update_queue: bool | None = None,
    ) -> Result:
        """The loss of queries and keys [V, B, D] (or both [B, D]) with a queue [K, D]: the caller's, or the module's.

        ``update_queue``: whether a queue that the module keeps takes these keys; by default in training mode with
        gradients enabled. Never inside a backward, where a checkpoint computes a forward again.
        """
        checks.keys_without_gradient("CACRQueueLoss", keys)
        if update_queue is not None:
            checks.flag("update_queue", update_queue)
        if self.dim is None:
            if queue is None:
                raise ValueError("queue must be a tensor [K, D], got None; or let the module keep one with queue_size=")
            if update_queue:
                raise ValueError("update_queue=True needs a module that keeps its queue, with queue_size=")
            loss: Result = functional.cacr_queue_loss(queries, keys, queue, **self.options())
            return loss
        if queue is not None:
            raise ValueError(f"queue must not be given: this module keeps its own of queue_size={self.queue_size}")
        (queries,) = refuse_second_derivative_of_compiled(queries)
        q, k = checks.queries_and_keys(queries, keys)
        if k.shape[-1] != self.dim:
            raise ValueError(f"keys must have dim = {self.dim} features, got {k.shape[-1]}")
        k = k.detach()
        self._follow(k.device)
        update = self._updates(update_queue)
        own, valid = self._traced_queue(update) if _traced(self.queue) else self._queue_of_host(update)
        one_direction = isinstance(queries, Tensor) and queries.dim() == 2
        pair = (q[0], k[0]) if one_direction else (q, k)
        entering = None if not update else k if self.enqueue == "all" else k[-1:]
        call = functional.queue_call(*pair, own, valid, functional.QueueOptions(**self.options()), entering)
        with checks.without_autocast(call.device):
            loss = call.reduced(call.compute(*call.arguments))
        if (stored := call.entering()) is not None:
            self._store(self._normalized(stored))
        return loss

    if TYPE_CHECKING:
        __call__ = forward

    def reset_parameters(self) -> None:
        """An empty queue, as after construction; whatever makes modules on the meta device calls this."""
        for name in (name for pair in _ROWS for name in pair if self.dim is not None):
            with state.writing():
                self._writable(name).zero_()

    def extra_repr(self) -> str:
        """The size of the queue, if the module keeps one, and the options as they are written in a call."""
        own = f"queue_size={self.queue_size}, dim={self.dim}, enqueue={self.enqueue!r}, " if self.queue_size else ""
        return own + super().extra_repr()

    # ---- when keys are stored ----------------------------------------------------------------------------------------
    def _updates(self, update_queue: bool | None) -> bool:
        """Whether this forward stores its keys; in compiled code, unless it runs inside a backward."""
        wanted = self.training and torch.is_grad_enabled() if update_queue is None else update_queue
        if tracing() and (self.training or update_queue):
            raise ValueError("CACRQueueLoss that keeps its queue can only be traced in eval(): a trace keeps no queue")
        if torch.compiler.is_compiling():
            if (self.training or update_queue) and state.exporting():
                raise ValueError(
                    "CACRQueueLoss that keeps its queue can only be exported in eval(): a program keeps no queue"
                )
            return wanted
        if state.inside_backward():
            if wanted and self._unstored:
                checks.warn_once(
                    "a checkpoint computes a CACRQueueLoss again whose keys were not stored, because its first forward "
                    "ran without gradients: pass update_queue=True, or use_reentrant=False"
                )
            return False
        if self.training and update_queue is None:
            self._unstored = not wanted
        if wanted and getattr(self, "_is_replica", False):
            checks.warn_once(
                "the queue of a CACRQueueLoss cannot be filled under nn.DataParallel, whose replicas end with each "
                "forward: use DistributedDataParallel, or call the loss outside"
            )
            return False
        if wanted and not self.gather_distributed and distributed.count() > 1:
            checks.warn_once(
                "each rank keeps a queue of its own keys, and DistributedDataParallel overwrites it with that of rank "
                "0 unless it is made with broadcast_buffers=False; gather_distributed=True keeps the keys of all ranks",
                kind="ranks",
            )
        return wanted

    def _follow(self, device: torch.device) -> None:
        """Moves the buffers to the device of the keys; to the one without data does nothing."""
        if self.queue.device == device or device.type == "meta":
            return
        for name in (name for pair in _ROWS for name in pair):
            x = getattr(self, name)
            setattr(self, name, torch.zeros_like(x, device=device) if x.is_meta else x.to(device))

    # ---- where the host knows the numbers ----------------------------------------------------------------------------
    def _queue_of_host(self, update: bool) -> tuple[Tensor, None]:
        """The keys in the queue, for a graph to save; ``update``: after those that wait have entered."""
        with state.writing():
            if update:
                waiting = int(self.incoming_count.clamp(0, self.queue_size))
                if waiting:
                    ring.enter_(self._writable("queue"), self._writable("queue_count"), self.incoming, waiting)
                    self._writable("incoming_count").zero_()
            filled = int(ring.filled_rows(self.queue_count, self.queue_size))
        return self.queue.detach()[:filled], None

    def _normalized(self, keys: Tensor) -> Tensor:
        """Unit vectors, if the loss normalises, which does that to what it reads again: so short rows stay as short."""
        if not self.normalize:
            return keys
        keys = keys.to(arithmetic_dtype(keys))
        return torch.where(unit_norms(keys)[..., None] < 1, keys, unit_rows(keys))

    def _writable(self, name: str) -> Tensor:
        """The buffer for writing: moved to new memory first where a graph or a snapshot uses the old.

        It stays the same object, and autograd does not count the writing: a graph that saved it has the old memory.
        Only where a graph of the user saved the object itself the module takes another.
        """
        buffer: Tensor = getattr(self, name)
        if state.is_saved(buffer) or buffer.is_inference():
            buffer = buffer.clone()
            setattr(self, name, buffer)
        elif state.is_shared(buffer):
            buffer.data = buffer.clone()
        return buffer.data

    def _store(self, keys: Tensor) -> None:
        """Lets keys [V, B, D] wait for the next forward."""
        keys = keys.flatten(0, 1)
        keys = keys[-self.queue_size :]
        if _traced(self.queue):
            self._store_traced(keys)
            return
        with state.writing():
            self._writable("incoming")[: keys.shape[0]] = state.unwrapped(keys)
            self._writable("incoming_count").fill_(keys.shape[0])

    # ---- where it does not: in compiled code and on a device ---------------------------------------------------------
    def _traced_queue(self, update: bool) -> tuple[Tensor, Tensor]:
        """The queue and how many of its rows hold keys; ``update``: as above."""
        if not update:  # a graph may save it, and the next forward writes to the buffer
            rows = self.queue.clone() if torch.is_grad_enabled() or tracing() else self.queue  # one trace for both
            return rows, ring.filled_rows(self.queue_count, self.queue_size)
        with state.writing():
            waiting = self.incoming_count * state.outside_backward(self.incoming_count)
            rows, count = ring.enter(self.queue, self.queue_count, self.incoming, waiting)
            state.overwrite(self.queue, rows)
            state.overwrite(self.queue_count, count)
            state.overwrite(self.incoming_count, self.incoming_count - waiting)
        return rows, ring.filled_rows(count, self.queue_size)

    def _store_traced(self, keys: Tensor) -> None:
        with state.writing():
            first = state.outside_backward(self.incoming_count)
            old = self.incoming[: keys.shape[0]]
            state.overwrite(old, torch.where(first > 0, state.unwrapped(keys).to(old.dtype), old))
            state.overwrite(self.incoming_count, torch.where(first > 0, keys.shape[0], self.incoming_count))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        counts = {}
        if self.dim is not None:
            for rows, count in _ROWS:
                counts[count] = getattr(self, count).clone()
                buffer = getattr(self, rows)
                if state.is_saved(buffer) or state.is_shared(
                    buffer
                ):  # loading copies in place, a graph may have saved them
                    for name in (rows, count):
                        setattr(self, name, getattr(self, name).clone())
        super()._load_from_state_dict(state_dict, prefix, *args)
        for rows, count in _ROWS if counts else ():
            given = state_dict.get(prefix + rows)
            if given is None or given.shape != getattr(self, rows).shape:  # torch has said so; a count is of its rows
                setattr(self, count, counts[count])


_ROWS = ("queue", "queue_count"), ("incoming", "incoming_count")


def _traced(x: Tensor) -> bool:
    """Whether numbers in ``x`` cannot be read without a cost: while compiling or tracing, or on a device."""
    return torch.compiler.is_compiling() or tracing() or x.device.type != "cpu"


class CACRMomentumLoss(_Loss[Result]):
    """:func:`cacr_kernels.cacr_momentum_loss` with ``normalize=True``.

    ``CACRMomentumLoss()(queries, keys, key_offset=0)`` takes queries [V, B, D] or [B, D] and the momentum keys [M, D].
    Only the queries get a gradient. Where the keys come from an encoder that is to learn, a text tower say, this is not
    its loss: use :class:`CACRLoss`. Keys that require grad are warned about once. With ``cost="rbf"``, per instance::

        sum_v p_v 2T (logsumexp_j(q_v.k_j / T) - q_v.k+ / T),   p_v = softmax_v(|q_v - k+|^2 / T), detached

    Args:
        temperature, cost: see :func:`cacr_kernels.cacr_momentum_loss`, with the formula of ``cost="sqeuclidean"``.
        normalize, reduction, return_parts, gather_distributed, process_group, backend: see there.

    Returns:
        From a call the loss, or :class:`CACRParts`, see :func:`cacr_kernels.cacr_momentum_loss`.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_momentum_loss`; of options when the module is made.

    Example:
        >>> import torch, cacr_kernels
        >>> loss_fn = cacr_kernels.CACRMomentumLoss(temperature=0.2)
        >>> loss_fn(torch.randn(2, 8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    @overload
    def __init__(
        self: CACRMomentumLoss[Tensor],
        *,
        return_parts: Literal[False] = ...,
        **options: Unpack[MomentumModuleKeywords],
    ) -> None: ...
    @overload
    def __init__(
        self: CACRMomentumLoss[CACRParts], *, return_parts: Literal[True], **options: Unpack[MomentumModuleKeywords]
    ) -> None: ...
    @overload
    def __init__(
        self: CACRMomentumLoss[Tensor | CACRParts], *, return_parts: bool, **options: Unpack[MomentumModuleKeywords]
    ) -> None: ...

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        cost: Cost = "rbf",
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            cost=cost,
            normalize=normalize,
            reduction=reduction,
            return_parts=return_parts,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )

    def forward(self, queries: Tensor | Sequence[Tensor], keys: Tensor, *, key_offset: int = 0) -> Result:
        """The loss of queries [V, B, D] or [B, D] with the keys [M, D]: of all ranks, or to be gathered."""
        checks.keys_without_gradient("CACRMomentumLoss", keys)
        loss: Result = functional.cacr_momentum_loss(queries, keys, key_offset=key_offset, **self.options())
        return loss

    if TYPE_CHECKING:
        __call__ = forward


class SupervisedCACRLoss(_Loss[Result]):
    """:func:`cacr_kernels.supervised_cacr_loss` with ``normalize=True``.

    ``SupervisedCACRLoss()(embeddings, labels)`` takes embeddings [N, D] and labels [N]; or also a reference set [M, D]
    and its labels [M], which are the keys then::

        attraction = alpha mean_i sum_j w c(z[i], z[j]),   y[j] == y[i], j != i
        repulsion  = -beta mean_i sum_j w c(z[i], z[j]),   y[j] != y[i]

    Args:
        tau_pos, tau_neg: inverse temperatures; ``tau_neg = 1 / (2 * temperature)`` of other losses.
        alpha, beta, ignore_index: see :func:`cacr_kernels.supervised_cacr_loss`.
        normalize, reduction, return_parts, gather_distributed, process_group, backend: see there.

    Returns:
        From a call the loss, or :class:`CACRParts`, see :func:`cacr_kernels.supervised_cacr_loss`.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.supervised_cacr_loss`; of options when the module is made.

    Example:
        >>> import torch, cacr_kernels
        >>> loss_fn = cacr_kernels.SupervisedCACRLoss()
        >>> loss_fn(torch.randn(8, 16), torch.arange(8) % 3).shape
        torch.Size([])
    """

    @overload
    def __init__(
        self: SupervisedCACRLoss[Tensor],
        *,
        return_parts: Literal[False] = ...,
        **options: Unpack[SupervisedModuleKeywords],
    ) -> None: ...
    @overload
    def __init__(
        self: SupervisedCACRLoss[CACRParts], *, return_parts: Literal[True], **options: Unpack[SupervisedModuleKeywords]
    ) -> None: ...
    @overload
    def __init__(
        self: SupervisedCACRLoss[Tensor | CACRParts], *, return_parts: bool, **options: Unpack[SupervisedModuleKeywords]
    ) -> None: ...

    @checks.without_temperature
    def __init__(
        self,
        *,
        tau_pos: float | Tensor = 1.0,
        tau_neg: float | Tensor = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        ignore_index: int | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        gather_distributed: bool = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            alpha=alpha,
            beta=beta,
            ignore_index=ignore_index,
            normalize=normalize,
            reduction=reduction,
            return_parts=return_parts,
            gather_distributed=gather_distributed,
            process_group=process_group,
            backend=backend,
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
        ref_index: Tensor | None = None,
    ) -> Result:
        """The loss of embeddings [N, D] with labels [N]; keys are the embeddings, or a reference set [M, D].

        ``ref_index`` [N] says which row of the reference set a query is itself, -1: none.
        """
        loss: Result = functional.supervised_cacr_loss(
            embeddings,
            labels,
            ref_embeddings=ref_embeddings,
            ref_labels=ref_labels,
            ref_index=ref_index,
            **self.options(),
        )
        return loss

    if TYPE_CHECKING:
        __call__ = forward
