"""A contrast problem as the kernels take it, and what starts one."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...types import SAME, SAME_NOT_SELF
from ..precision import fp32_products
from .table import Precision, Processor, Tile, processor_of, tile_of

AGAIN = 4  # kind of a second softmax over the set of the first; kernels/tile.py
WORKSPACE = 1 << 28  # bytes that the shares of one array may take
_tracing = contextvars.ContextVar("tracing", default=False)
_launched: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("launched", default=None)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Inside, kernels are recorded in the graph that is being traced (``torch.library.wrap_triton``)."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def recording(device: torch.device) -> bool:
    """Whether launches become part of a graph that is being traced or captured."""
    return _tracing.get() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


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
    if _tracing.get():
        torch.library.wrap_triton(kernel)[grid](*args, **constants)
        return
    compiled = kernel[grid](*args, **constants, enable_fp_fusion=True)  # from Triton 3.10 on not the default
    if (kernels := _launched.get()) is not None:
        kernels.append(compiled)


def on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: that of the first argument."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any) -> Any:
        if x.device.type == "cpu" or _tracing.get():
            return function(x, *args)
        with torch.cuda.device(x.device):
            return function(x, *args)

    return wrapped


def cdiv(a: int, b: int) -> int:
    """Rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The next one that is not smaller."""
    return 1 << max(0, n - 1).bit_length()


def view_table(index: tuple[int, ...], device: torch.device) -> Tensor:
    """Views by problem [P] int32, made on the device: a copy from the host would wait for it.

    Kept for the next call, unless it belongs to a graph that is being traced or captured.
    """
    if recording(device):
        return _made_there(index, device)
    return _kept(index, device)


def _made_there(index: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.full((), view, dtype=torch.int32, device=device) for view in index])


_kept = functools.lru_cache(maxsize=1024)(_made_there)


def precision_of(x: Tensor, processor: Processor) -> Precision:
    """The class of products that the launch table knows."""
    if x.dtype == torch.float32:
        asked = fp32_products()
        missing = (asked == "tf32x3" and not processor.has_tf32x3) or (asked == "tf32" and not processor.has_tf32)
        return "ieee" if missing else asked
    return "fp64" if x.dtype == torch.float64 else "half"


@dataclass(frozen=True)
class Problem:
    """Contiguous arrays and their sizes; symbols as in csrc/common/problem.h."""

    q: Tensor  # [views of q, N, D]
    k: Tensor  # [views of k, M, D]
    q_norm: Tensor
    k_norm: Tensor
    q_id: Tensor  # [N], anything if all kinds are ALL
    k_id: Tensor
    tau: Tensor  # [S] float64
    q_view: Tensor  # [P] int32
    k_view: Tensor
    kinds: tuple[int, ...]
    inner: bool
    own: bool  # the keys are the queries

    @property
    def N(self) -> int:  # noqa: N802
        """Queries of a problem."""
        return self.q.shape[1]

    @property
    def M(self) -> int:  # noqa: N802
        """Keys of a problem."""
        return self.k.shape[1]

    @property
    def D(self) -> int:  # noqa: N802
        """Features."""
        return self.q.shape[2]

    @property
    def P(self) -> int:  # noqa: N802
        """Problems."""
        return self.q_view.shape[0]

    @property
    def S(self) -> int:  # noqa: N802
        """Softmaxes."""
        return len(self.kinds)

    @property
    def arithmetic(self) -> torch.dtype:
        """What is computed in."""
        return self.q_norm.dtype

    @property
    def processor(self) -> Processor:
        """What it runs on."""
        return processor_of(self.q.device)

    @property
    def precision(self) -> Precision:
        """How products are made."""
        return precision_of(self.q, self.processor)

    @property
    def cancelling(self) -> bool:
        """Two softmaxes over one set: their gradients nearly cancel (rbf)."""
        return self.S == 2 and self.kinds[1] in (self.kinds[0], AGAIN)

    @property
    def second(self) -> int:
        """Kind of the second softmax, -1 if there is none."""
        return self.kinds[1] if self.S == 2 else -1

    def tile(self, kernel: str, two: bool = False) -> Tile:
        """Launch configuration of a kernel, with two softmaxes if the problem has them or if ``two``."""
        return tile_of(self.processor.family, kernel, self.precision, self.D, two or self.S == 2)

    def constants(self) -> dict[str, Any]:
        """What all kernels that see similarities are compiled for."""
        product = "ieee" if self.precision in ("half", "fp64") else self.precision
        return {"KIND0": self.kinds[0], "KIND1": self.second, "INNER": self.inner, "PRECISION": product}

    def by_cost(self, softmax: int) -> bool:
        """Whether it measures pairs by their cost (positives)."""
        return self.kinds[softmax] in (SAME, SAME_NOT_SELF) and not self.inner

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A new array on the device, in the type of the arithmetic."""
        return self.q.new_empty(shape, dtype=dtype or self.arithmetic)

    def shares(self, programs: int, length: int, block: int, row_bytes: int) -> tuple[int, int]:
        """Size and number of shares of a loop over ``length``, where there are ``programs`` without sharing.

        As many as fill the processor twice, of at least four blocks each, in the workspace.
        """
        if length <= 0:
            return block, 1
        wanted = cdiv(2 * self.processor.cores, max(1, programs))
        wanted = max(1, min(wanted, length // (4 * block), WORKSPACE // max(1, row_bytes)))
        share = cdiv(cdiv(length, wanted), block) * block
        return share, cdiv(length, share)
