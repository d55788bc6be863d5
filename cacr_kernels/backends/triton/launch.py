"""How kernels are launched: on the right device."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_launched: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("launched", default=None)


def recording(device: torch.device) -> bool:
    """Whether launches become part of a graph that is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels that are launched inside, in order."""
    kernels: list[Any] = []
    token = _launched.set(kernels)
    try:
        yield kernels
    finally:
        _launched.reset(token)


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """One launch, on the current stream of the current device; nothing for an empty grid."""
    if 0 in grid:
        return
    compiled = kernel[grid](*args, **constants, enable_fp_fusion=True)  # from Triton 3.10 on not the default
    if (kernels := _launched.get()) is not None:
        kernels.append(compiled)


def on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the device of the first argument the current one, which is where Triton launches."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any) -> Any:
        if x.device.type == "cpu":
            return function(x, *args)
        with torch.cuda.device(x.device):
            return function(x, *args)

    return wrapped


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (3, 7, 1) of "3.7.1+git1a2b"."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def width_of(D: int, most: int) -> int:
    """Features of a tile of a kernel that works on rows: no fewer than 64, so that few features share one kernel."""
    return min(most, max(64, power_of_two(D)))
