"""Backend "cuda" on CPU tensors, its kernels as nvcc compiled them.

The host side of ``csrc/cuda`` up to the launches is compiled by g++ (``nvcc/launches.cpp``); every launch runs the PTX
in the interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tests.cuda import emulated_backend
from tests.cuda.emulated_cuda import Call, Emulation
from tests.cuda_emulation.building import ROOT, emulated_library

from . import launch
from .arguments import Image
from .nvcc_ptx import compiled_text
from .schedule import Lockstep

HERE = Path(__file__).resolve().parent / "nvcc"
ARITHMETICS = {
    "bf16": "Bf16Arithmetic",
    "f16": "F16Arithmetic",
    "tf32": "Tf32",
    "tf32x3": "Tf32x3",
    "float": "Float",
    "double": "Double",
}
TEMPLATES = {
    "tf32": "Tf32Arithmetic<1>",
    "tf32x3": "Tf32Arithmetic<2>",
    "float": "IeeeArithmetic<float>",
    "double": "IeeeArithmetic<double>",
}
OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "double"}
Patch = Callable[[str], str]
_OnLaunch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_bool)
_OnWorkspace = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
_loaded: dict[str, launch.Kernels] = {}


def phases(arithmetic: str) -> str:
    """The PTX of the kernel for one arithmetic."""
    include = f"-I{ROOT / 'csrc/cuda'}"
    name = TEMPLATES.get(arithmetic, ARITHMETICS[arithmetic])
    return compiled_text(HERE / "phases.cu", include, f"-DARITHMETIC={name}")


def memory(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def arrays_of(call: Call, element: int, accumulator: int) -> list[np.ndarray]:
    """Everything a call may read and write, with its exact size."""
    loss = call.operation == 2
    rows = call.softmaxes * call.pairs * call.N * 8
    sizes = {
        "q": call.q_views * call.N * call.D * element,
        "k": call.k_views * call.M * call.D * element,
        "q_id": call.N * 4,
        "k_id": call.M * 4,
        "q_self": call.N * 4,
        "tau": call.softmaxes * 8,
        **dict.fromkeys(("value", "lse", "grad_value", "grad_lse"), rows),
        "row_state": 3 * rows,
        "grad_q": call.q_views * call.N * call.D * accumulator,
        "grad_k": 0 if loss else call.k_views * call.M * call.D * accumulator,
        "grad_tau": call.softmaxes * 8,
        "numbers": 5 * 8,
        "loss": accumulator,
        "parts": 4 * accumulator,
        "grad_numbers": 5 * 8,
    }
    pointers = {getattr(call, name): size for name, size in sizes.items() if getattr(call, name) and size}
    return [memory(address, size) for address, size in pointers.items()]


class Interpreted(Emulation):
    """``Emulation`` with the interpreter in place of the emulated kernels; ``launches`` counts instructions of each."""

    def __init__(
        self,
        schedule: Callable[[], Lockstep] = Lockstep,
        patch: Patch | None = None,
        float32: str = "float",
        resident_blocks: int = 3,
    ):
        self.host = ctypes.CDLL(str(emulated_library(str(HERE / "launches.cpp"))))
        self.schedule, self.patch = schedule, patch
        self.float32, self.resident_blocks = float32, resident_blocks
        self.launches: list[int] = []

    def kernels(self, arithmetic: str) -> launch.Kernels:
        text = phases(arithmetic) if self.patch is None else self.patch(phases(arithmetic))
        if text not in _loaded:
            _loaded[text] = launch.load(text, f"phases of {arithmetic}")
        return _loaded[text]

    def run(self, call: Call, dtype: torch.dtype) -> None:
        arithmetic = self.float32 if dtype == torch.float32 else OF_DTYPE[dtype]
        kernels = self.kernels(arithmetic)
        arrays = arrays_of(call, dtype.itemsize, max(4, dtype.itemsize))
        (shared,) = (v.content for v in kernels.module.variables if v.name == "shared_bytes")
        errors: list[Exception] = []

        def on_launch(job: int, size: int, blocks: int, threads: int, cooperative: bool) -> int:
            try:
                image = Image(ctypes.string_at(job, size), arrays)
                where = (blocks,), (threads,), [image], int.from_bytes(shared, "little")
                self.launches.append(kernels.launch("run_phases", *where, self.schedule(), cooperative))
            except Exception as error:  # C++ between here and the caller cannot pass it on
                errors.append(error)
            return len(errors)

        def on_workspace(address: int, size: int) -> None:
            if size:
                arrays.append(memory(address, size))

        function = getattr(self.host, f"run_{ARITHMETICS[arithmetic]}")
        function(ctypes.byref(call), _OnLaunch(on_launch), _OnWorkspace(on_workspace), self.resident_blocks)
        if errors:
            raise errors[0]


@contextlib.contextmanager
def interpreted_cuda(
    schedule: Callable[[], Lockstep] = Lockstep,
    patch: Patch | None = None,
    float32: str = "float",
    resident_blocks: int = 3,
) -> Iterator[Interpreted]:
    """``backend="cuda"`` can run on the CPU.

    Args:
        schedule: makes the schedule of each launch.
        patch: changes the PTX before it runs, to plant a bug.
        float32: the arithmetic of float32: float, tf32, tf32x3.
        resident_blocks: of a cooperative launch; 0: one launch for each phase instead.
    """
    with emulated_backend.emulated_cuda():
        found = Interpreted(schedule, patch, float32, resident_blocks)
        emulated_backend._active.append(found)
        try:
            yield found
        finally:
            emulated_backend._active.pop()
