"""What the losses know of other processes: rows of all ranks, and the numbers that belong to the whole batch.

A rank computes the rows of its own queries against the keys of all ranks. Its loss is W times the share of these rows
in the loss of the whole batch, so that the mean over the W ranks is that loss, and the mean of the gradients is its
gradient: what flows into the keys of another rank goes there by the reduce-scatter in the backward of ``gather``.

    forward     sizes (where that costs no wait for a device), rows of embeddings, at most labels and a few numbers
    backward    gradients of the embeddings, gradients of the temperatures

Each of these is one collective; docs/several_processes.md says which a loss needs. The rows are sent first and awaited
when they are used (``gathering``).

Rows of this rank come first, those of rank + 1 next, and so on round to rank - 1: query i is key i on every rank.
``torch.distributed`` is the engine; its functional collectives are what ``torch.compile`` can trace. Nothing here runs
in a single process.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .operators import _torch_private
from .operators.registry import SingleProblem, constant_while_compiling, in_graphs, opaque
from .types import ALONE, Ranks, widest_dtype

ON_HOST = ("gloo", "mpi")  # backends whose collectives wait in any case
PATIENCE = 120.0  # seconds that the ranks of a command wait for one that has failed
TENSORS, SIZES = 2, 5  # how many tensors are compared; numbers for each: dimensions, up to three sizes, dtype


@in_graphs
class Group(NamedTuple):
    """The processes that share a batch: how torch names the group, this one's rank in it, and how many there are."""

    name: str
    rank: int
    size: int


def count() -> int:
    """How many processes there are."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@constant_while_compiling
def _place(process_group: Any) -> tuple[str, int, int]:
    """Name, rank and size of a group; size 1 without processes."""
    distributed: Any = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return "", 0, 1
    group = distributed.group.WORLD if process_group is None else process_group
    return group.group_name, distributed.get_rank(group), distributed.get_world_size(group)


def world() -> Group:
    """The group of all processes."""
    return Group(*_place(None))


def find(gather_distributed: object, process_group: Any) -> Group | None:
    """The group whose batches are one; ``None`` where there is nothing to gather."""
    checks.flag("gather_distributed", gather_distributed)
    checks.process_group("process_group", process_group)
    if process_group is not None and not gather_distributed:
        raise ValueError("process_group needs gather_distributed=True, without which nothing is gathered")
    group = Group(*_place(process_group)) if gather_distributed else None
    return group if group is not None and group.size > 1 else None


def group_of(gather_distributed: object, process_group: Any, tensors: dict[str, Tensor | None]) -> Group | None:
    """The same for a call, after a look whether the ``tensors``, two at most, are alike on all ranks."""
    group = find(gather_distributed, process_group)
    if group is not None and not torch.compiler.is_compiling():
        _compare_sizes(group, process_group, tensors)
    return group


@contextlib.contextmanager
def connected(device: torch.device, store: Path | None, rank: int, size: int) -> Iterator[Group]:
    """Inside, this process is one of ``size`` that find each other by the file ``store``, or as torchrun says."""
    distributed: Any = torch.distributed
    method = "env://" if store is None else store.absolute().as_uri()
    limit = datetime.timedelta(seconds=PATIENCE)
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, init_method=method, rank=rank, world_size=size, timeout=limit)
    try:
        yield world()
    finally:
        distributed.destroy_process_group()


# ---- sizes -----------------------------------------------------------------------------------------------------------
def _compare_sizes(group: Group, process_group: Any, tensors: dict[str, Tensor | None]) -> None:
    """Every rank raises ``ValueError`` where shapes or dtypes differ; collectives would end in garbage or a crash."""
    distributed: Any = torch.distributed
    device = next(x.device for x in tensors.values() if x is not None)
    by_device = dict(part.split(":") for part in distributed.get_backend_config(process_group).split(","))
    on_host = by_device.get(device.type) in ON_HOST
    if not on_host:
        off = distributed.get_debug_level() == distributed.DebugLevel.OFF
        if off or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
    where = torch.device("cpu") if on_host and by_device.get("cpu") in ON_HOST else device
    described = [_described(x) for x in tensors.values()]
    described += [_described(None)] * (TENSORS - len(described))
    own = torch.tensor(described, dtype=torch.int64, device=where)
    all_sizes = _all_gather(own[None], group).tolist()
    for rank, sizes in enumerate(all_sizes):
        for name, first, other in zip(tensors, all_sizes[0], sizes, strict=False):
            if first != other:
                raise ValueError(
                    f"{name} must have one shape and dtype on all ranks, got {_in_words(first)} on rank 0 and "
                    f"{_in_words(other)} on rank {rank}"
                )


def _described(x: Tensor | None) -> list[int]:
    if x is None:
        return [0] * SIZES
    return [x.dim(), *x.shape, *[0] * (SIZES - 2 - x.dim()), checks.FLOATS.index(x.dtype)]


def _in_words(sizes: list[int]) -> str:
    dims, *shape, dtype = sizes
    if not dims:
        return "none"
    return f"{shape[:dims]} {checks.FLOATS[dtype]}"


# ---- collectives, each with the gradient of the sum of all ranks' losses ---------------------------------------------
def _all_gather(x: Tensor, group: Group) -> Tensor:
    """``x`` [n, ...] of all ranks as [W n, ...], rank by rank."""
    return _torch_private.arrived(_start(x, group))


def _start(x: Tensor, group: Group) -> Tensor:
    """The same before it has arrived."""
    return _torch_private.start_all_gather(x.contiguous(), group.size, group.name)


class Gather(SingleProblem):
    """``x`` of all ranks as [W, ...], this rank first; its backward hands every rank the gradients of its ``x``.

    ``gathered`` [W, ...] is what has arrived, rank by rank, in a dtype that holds ``x`` without loss. Gradients are
    added in the dtype of ``x``.
    """

    @staticmethod
    @_torch_private.positional
    def forward(x: Tensor, gathered: Tensor, group: Group) -> Tensor:
        """All ranks' ``x`` in its own dtype."""
        return gathered.roll(-group.rank, 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the group for the backward."""
        _, _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The sum over the ranks of what flowed into this rank's part."""
        return Scatter.apply(grad, ctx.group), None, None  # type: ignore[no-untyped-call]


class Scatter(SingleProblem):
    """Of [W, ...], this rank first, what all ranks have for this one, added: the backward of :class:`Gather`."""

    @staticmethod
    @_torch_private.positional
    def forward(x: Tensor, group: Group) -> Tensor:
        """The sum over the ranks."""
        rows = x.roll(group.rank, 0).contiguous()
        return _torch_private.reduce_scatter(rows, group.size, group.name)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the group for the backward."""
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradient goes to every rank."""
        return _gather(grad, ctx.group), None


class Mean(SingleProblem):
    """The mean over the ranks, its own backward."""

    @staticmethod
    @_torch_private.positional
    def forward(x: Tensor, group: Group) -> Tensor:
        """The same on all ranks."""
        return _torch_private.all_reduce(x.contiguous(), group.name) / group.size

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the group for the backward."""
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The mean of the gradients."""
        return Mean.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class MeanInBackward(Mean):
    """The identity, whose gradient is averaged over the ranks as that of the mean is."""

    @staticmethod
    @_torch_private.positional
    def forward(x: Tensor, group: Group) -> Tensor:
        """A view of the input."""
        return x.view_as(x)


@opaque
def _send(x: Tensor, group: Group) -> Tensor:
    """What arrives of ``x`` of all ranks, [W, ...], rank by rank; no gradient."""
    return _start(x.detach()[None], group)


@opaque
def _wait(arriving: Tensor) -> Tensor:
    return _torch_private.arrived(arriving)


@opaque
def _with_gradient(x: Tensor, gathered: Tensor, group: Group) -> Tensor:
    rows: Tensor = Gather.apply(x, gathered, group)  # type: ignore[no-untyped-call]
    return rows


def _gather(x: Tensor, group: Group) -> Tensor:
    """``x`` of all ranks as [W, ...], this rank first; gradients flow back."""
    return _with_gradient(x, _wait(_send(x, group)), group)


@opaque
def _mean_in_backward(x: Tensor, group: Group) -> Tensor:
    passed: Tensor = MeanInBackward.apply(x, group)  # type: ignore[no-untyped-call]
    return passed


# ---- what the losses use ---------------------------------------------------------------------------------------------
def gathering(
    x: Tensor, group: Group, *, wire: torch.dtype | None = None, beside: Tensor | None = None
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Sends the rows ``x`` [.., B, D] to all ranks; what is computed before they are used runs beside the gather.

    The first function waits and gives the rows of all ranks, [.., W B, D], those of this rank first; gradients flow
    back. The second gives what ``beside`` [V, B, D] is of all ranks, as ``in_order_of_ranks``: it travels in the same
    message. ``wire``: a half type that ``x`` came in, which it travels in.
    """
    sent = x.detach().to(wire or x.dtype)
    if beside is not None:
        dtype = torch.promote_types(sent.dtype, beside.dtype)
        sent = torch.cat([sent.to(dtype), beside.to(dtype)])
    arriving = _send(sent, group)

    def rows() -> Tensor:
        gathered = _wait(arriving)
        of_all = _with_gradient(x, gathered if beside is None else gathered[:, : x.shape[0]], group)
        return of_all.movedim(0, -3).flatten(-3, -2).contiguous()

    def others() -> Tensor:
        return _in_order(_wait(arriving)[:, x.shape[0] :])

    return rows, others


def labels_of_all(labels: Tensor, group: Group) -> Tensor:
    """``labels`` [n] of all ranks as [W, n], this rank first; no gradient."""
    return stacked(labels, group).roll(-group.rank, 0)


def stacked(x: Tensor, group: Group) -> Tensor:
    """``x`` of all ranks as [W, ...], rank 0 first; no gradient."""
    return _all_gather(x.detach()[None], group)


def in_order_of_ranks(x: Tensor, group: Group) -> Tensor:
    """``x`` [.., B, D] of all ranks as [.., W B, D], rank 0 first, as one process would hold it; no gradient."""
    return _in_order(stacked(x, group))


def _in_order(of_ranks: Tensor) -> Tensor:
    return of_ranks.movedim(0, -3).flatten(-3, -2)


def averaged(group: Group | None, device: torch.device, *temperatures: float | Tensor) -> tuple[Any, ...]:
    """The temperatures, whose gradients the backward averages over the ranks, in one all-reduce on ``device``.

    A rank finds the part of its own queries. The mean is what DDP makes of it for a parameter of the wrapped module,
    to which the mean of equals changes nothing; a parameter outside would stay with its part.
    """
    tensors = [t for t in temperatures if isinstance(t, Tensor)]
    if group is None or not tensors:
        return temperatures
    if not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return temperatures
    dtype = widest_dtype(device)
    vector = torch.stack([t.to(device=device, dtype=dtype, non_blocking=True) for t in tensors])
    each = iter(_mean_in_backward(vector, group).unbind())
    return tuple(next(each) if isinstance(t, Tensor) else t for t in temperatures)


def ranks_of(group: Group | None) -> Ranks:
    """What turns numbers of this rank's queries into those of the whole batch."""
    return ALONE if group is None else Ranks(group.size, partial(_total, group), partial(_rbf, group))


def _total(group: Group, counts: Tensor) -> Tensor:
    return _torch_private.all_reduce(counts.contiguous(), group.name)


def _rbf(group: Group, attraction: Tensor, log_mean: Tensor) -> tuple[Tensor, Tensor]:
    numbers = torch.cat([log_mean, attraction.mean()[None].to(log_mean.dtype)])
    of_ranks = _gather(numbers, group)
    return of_ranks[:, -1].mean(), of_ranks[:, :-1].logsumexp(0) - math.log(group.size)
