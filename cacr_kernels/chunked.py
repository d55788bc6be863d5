"""Batches larger than memory: the gradient of a contrastive loss with the activations of one chunk at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks

Encoder = Callable[[Any], Tensor]


def chunked_backward(
    encoder: Encoder | Sequence[Encoder],
    views: Sequence[Any],
    loss: Callable[[Tensor], Any],
    *,
    chunk_size: int,
) -> Any:
    """``loss(encoded views).backward()`` with activations of ``chunk_size`` instances in memory, not of all.

    A loss whose negatives are the batch needs all embeddings at once, but not all activations. The views are encoded
    in chunks without a graph; the loss and the gradients of the embeddings are found; then each chunk is encoded again,
    with the random numbers of the first time, and its part of these gradients is pushed back. Gradients are accumulated
    as by ``backward``, in the parameters of the loss too. (Gao et al., 2021, arXiv 2101.06983, *GradCache*.) With z the
    embeddings and w the parameters of the encoder, that is the chain rule, chunk by chunk::

        dL/dw = sum over chunks C of (dL/dz_C) (dz_C/dw)

    The result is that of the whole batch for an encoder without dropout and batch statistics; with dropout that of the
    same chunks with their graphs kept. Batch statistics are those of a chunk, and running averages see it twice.

    Works under ``torch.autocast``, and with encoders wrapped in ``DistributedDataParallel``, which communicate at the
    last chunk alone; with ``gather_distributed=True`` the chunks of all ranks are one batch. For a ``GradScaler`` let
    ``loss`` return the scaled loss.

    Args:
        encoder: from inputs to embeddings [b, D], or a sequence with one for each view.
        views: the inputs of each view: a tensor [B, ...], or a dict, list or tuple of those.
        loss: from embeddings [V, B, D] to the loss, or to a tuple that begins with it. Called once.
        chunk_size: how many instances are encoded at once.

    Returns:
        What ``loss`` returned, detached.

    Raises:
        TypeError, ValueError: the views are not of one length, there is not one encoder or one for each view,
            ``chunk_size`` is not a positive integer, or something is not callable.

    Example:
        >>> import torch, cacr_kernels
        >>> encoder, loss_fn = torch.nn.Linear(6, 4), cacr_kernels.CACRLoss()
        >>> x = torch.randn(2, 8, 6)
        >>> value = cacr_kernels.chunked_backward(encoder, [x[0], x[1]], loss_fn, chunk_size=3)
        >>> encoder.weight.grad.shape
        torch.Size([4, 6])
    """
    encoders, lengths, chunk_size = _checked(encoder, views, loss, chunk_size)
    chunks = [
        _Chunk(v, encode, _rows(view, slice(start, start + chunk_size)))
        for v, (encode, view) in enumerate(zip(encoders, views, strict=True))
        for start in range(0, lengths[v], chunk_size)
    ]
    devices = {x.device for view in views for x in _tensors(view)}
    with torch.no_grad(), _without_autocast_cache():
        states, found = [], []
        for chunk in chunks:
            states.append(_random_states(devices))
            found.append(chunk.encode(chunk.inputs))
    by_view = [[z for chunk, z in zip(chunks, found, strict=True) if chunk.view == v] for v in range(len(views))]
    embeddings = torch.stack([torch.cat(some) for some in by_view]).requires_grad_()
    with torch.enable_grad():
        result = loss(embeddings)
    (result if isinstance(result, Tensor) else result[0]).backward()
    if embeddings.grad is not None:
        pieces = [piece for rows in embeddings.grad for piece in rows.split(chunk_size)]
        after = _random_states(devices)
        for i, (chunk, state, gradient) in enumerate(zip(chunks, states, pieces, strict=True)):
            last = all(later.encode is not chunk.encode for later in chunks[i + 1 :])
            _set_random_states(state)
            with torch.enable_grad(), _without_sync(chunk.encode, last):
                z = chunk.encode(chunk.inputs)
                if z.requires_grad:
                    torch.autograd.backward(z, gradient)
        _set_random_states(after)
    if isinstance(result, Tensor):
        return result.detach()
    detached = [x.detach() if isinstance(x, Tensor) else x for x in result]
    return type(result)(*detached) if hasattr(result, "_fields") else tuple(detached)


class _Chunk(NamedTuple):
    view: int
    encode: Encoder
    inputs: Any


# ---- inputs ----------------------------------------------------------------------------------------------------------
def _checked(encoder: Any, views: Any, loss: Any, chunk_size: Any) -> tuple[list[Encoder], list[int], int]:
    """An encoder for each view, the length of each view, and the size of a chunk; refuses what cannot be used."""
    if not checks.is_integer(chunk_size):
        raise TypeError(f"chunk_size must be an integer >= 1, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer >= 1, got {chunk_size!r}")
    if not isinstance(views, list | tuple | Tensor):
        raise TypeError(f"views must be a sequence with the inputs of each view, got {type(views).__name__}")
    lengths = [_length(view) for view in views]
    if not lengths or min(lengths) != max(lengths) or min(lengths) == 0:
        raise ValueError(f"views must hold at least one view, all of the same B >= 1 instances, got {lengths}")
    encoders = list(encoder) if isinstance(encoder, list | tuple) else [encoder] * len(views)
    if len(encoders) != len(views):
        raise ValueError(f"encoder must be one, or one for each of {len(views)} views, got {len(encoders)}")
    for name, functions in (("encoder", encoders), ("loss", [loss])):
        if not all(map(callable, functions)):
            raise TypeError(f"{name} must be callable, got {', '.join(type(f).__name__ for f in functions)}")
    return encoders, lengths, int(chunk_size)


def _tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, list | tuple):
        for value in x:
            yield from _tensors(value)
    else:
        raise TypeError(f"views must be tensors, or dicts, lists or tuples of tensors, got {type(x).__name__}")


def _length(view: Any) -> int:
    lengths = {x.shape[0] for x in _tensors(view)}
    if len(lengths) != 1:
        raise ValueError(f"views must hold tensors of one length B, got {sorted(lengths)}")
    return lengths.pop()


def _rows(x: Any, rows: slice) -> Any:
    if isinstance(x, Tensor):
        return x[rows]
    if isinstance(x, Mapping):
        return {name: _rows(value, rows) for name, value in x.items()}
    return type(x)([_rows(value, rows) for value in x])


# ---- what the second pass has to find as the first did ---------------------------------------------------------------
def _random_states(devices: set[torch.device]) -> dict[torch.device, Tensor]:
    """States of the generators of the CPU and of the devices of the inputs."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """A torch whose autocast kept weights that it cast without a graph would hand them to the second pass."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _without_sync(encode: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
    """In which ``DistributedDataParallel`` only adds gradients up; the last chunk of an encoder has them averaged."""
    no_sync: Any = getattr(encode, "no_sync", None)
    return no_sync() if no_sync is not None and not last else contextlib.nullcontext()
