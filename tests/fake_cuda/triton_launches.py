"""Triton on the fake device: kernels are compiled for it, and the interpreter of ``tests/ptx`` runs the PTX.

A launch goes to the current stream of the current device, as Triton's own does; memory of another device is an error
when the work is done. ``FAKE_CUDA_TRITON=compile`` runs nothing (results stay NaN) and compiles for sm_90 instead.
``FAKE_CUDA_TRITON=count`` compiles nothing either: what would be compiled goes into the file ``FAKE_CUDA_COUNT``, and
the operators compute what those of the CPU do (``counting.py``).
"""

from __future__ import annotations

import collections
import os
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.ptx import launch, triton_ptx
from tests.ptx.arguments import Pointer
from tests.ptx.schedule import WARP, Lockstep

from . import counting
from .runtime import Place, current_stream, place_of, submit

MODE = os.environ.get("FAKE_CUDA_TRITON", "run")
RUNS = MODE == "run"
launches: collections.Counter[str] = collections.Counter()
_loaded: dict[str, launch.Kernels] = {}
_compile = JITFunction.run


class FakeGpu(triton_ptx.AbsentGpu):
    """What Triton asks of its driver."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def get_current_device(self) -> int:  # type: ignore[override]
        return torch.cuda.current_device()

    def get_current_stream(self, device: object) -> int:
        return current_stream(int(device))  # type: ignore[call-overload]


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = _compile(self, *args, grid=grid, warmup=True, **kwargs)
    if warmup:
        return kernel
    launches[kernel.name] += 1
    device = torch.cuda.current_device()
    binder = self.device_caches[device][-1]
    bound = binder(*args, **kwargs)[0]
    values = [value for name, value in bound.items() if kernel.src.signature[name] != "constexpr"]
    for value in values:
        if isinstance(value, torch.Tensor) and value.device.type != "cuda":
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    if RUNS:
        places = [place_of(v, device) if isinstance(v, torch.Tensor) else v for v in values]
        whole_grid = tuple(grid(bound) if callable(grid) else grid)
        submit(device, lambda: _interpret(kernel, whole_grid, places))
    else:
        submit(device, lambda: None)
    return kernel


def _interpret(kernel: Any, grid: tuple[int, ...], values: list[Any]) -> None:
    text = kernel.asm["ptx"]
    if text not in _loaded:
        _loaded[text] = launch.load(text, kernel.name)
    arguments = [_pointer(v, kernel.name) if isinstance(v, Place) else v for v in values]
    own = len(_loaded[text].find(kernel.name).params) - len(arguments)
    threads = kernel.metadata.num_warps * WARP
    shared = kernel.metadata.shared
    _loaded[text].launch(kernel.name, grid, (threads,), [*arguments, *[0] * own], shared, Lockstep())


def _pointer(place: Place, name: str) -> Pointer:
    place.check(name)
    flat = place._replace(dtype=torch.uint8, size=(place.bytes,), stride=(1,), offset=0).tensor()
    return Pointer(flat.numpy(), place.offset * place.dtype.itemsize)


def install() -> None:
    driver.set_active(FakeGpu(80 if RUNS else 90))
    JITFunction.run = counting.launch if MODE == "count" else _run
