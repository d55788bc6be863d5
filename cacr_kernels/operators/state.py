"""What a module that keeps tensors has to know of autograd and of the transforms of ``torch.func``.

The operator ``outside_backward`` is for compiled code: whether a forward runs for the first time, asked when it runs. A
checkpoint around a compiled module calls it again in the backward, where the compiler is not asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _torch_private
from .registry import constant_while_compiling, declare, implement, operator


def compute(like: Tensor) -> Tensor:
    """1, or 0 inside a backward: a 0-dim int64 tensor on the device of ``like``."""
    return torch.full((), int(not inside_backward()), dtype=torch.int64, device=like.device)


declare("outside_backward", "(Tensor like) -> Tensor", lambda like: like.new_empty((), dtype=torch.int64))
implement("outside_backward", compute)


def outside_backward(like: Tensor) -> Tensor:
    """``compute`` as a call that a compiler keeps."""
    answer: Tensor = operator("outside_backward")(like)
    return answer


def _copy(x: Tensor, y: Tensor) -> None:
    x.copy_(y)


# ``x.copy_(y)`` for compiled code inside a transform of torch.func, which forbids to write to what it did not make.
declare("overwrite", "(Tensor(a!) x, Tensor y) -> ()", lambda x, y: None)
implement("overwrite", _copy)


@constant_while_compiling
def _transforms_are_active() -> bool:
    return _torch_private.transforms_are_active()


def overwrite(x: Tensor, y: Tensor) -> None:
    """``x.copy_(y)``, also where a transform of ``torch.func`` is compiled."""
    if torch.compiler.is_compiling() and _transforms_are_active():
        operator("overwrite")(x, y.to(x.dtype))
    else:
        x.copy_(y)


def inside_backward() -> bool:
    """Whether autograd is running a backward, in which a checkpoint computes a forward again."""
    return _torch_private.inside_backward()


def exporting() -> bool:
    """Whether ``torch.export`` traces what runs."""
    return _torch_private.exporting()


def is_shared(x: Tensor) -> bool:
    """Whether other tensors use the memory of ``x``, such as one that a graph has saved."""
    return _torch_private.is_shared(x)


def is_saved(x: Tensor) -> bool:
    """Whether a graph, or a view, holds the tensor ``x`` itself."""
    return _torch_private.is_saved(x)


def unwrapped(x: Tensor) -> Tensor:
    """The tensor without what transforms of ``torch.func`` put around it; they are compiled away."""
    return x if torch.compiler.is_compiling() else _torch_private.unwrapped(x)


@contextlib.contextmanager
def _outside_everything() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), _torch_private.without_transforms():
        yield


def writing() -> contextlib.AbstractContextManager[Any]:
    """In which buffers are written: no gradients, and no transform of ``torch.func`` around what is stored."""
    return torch.no_grad() if torch.compiler.is_compiling() else _outside_everything()
