"""Loads the compiled libraries and remembers why one could not be loaded.

The libraries register implementations of ``torch.ops.cacr_kernels``; they are loaded once, when this module is
imported. ``CACR_DISABLE_EXTENSION=1`` leaves them out, which shows what the pure Python package does.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Extension:
    """A compiled library: where it lies, and in ``error`` a sentence that says why it is not loaded (else ``None``)."""

    path: Path
    error: str | None

    @property
    def loaded(self) -> bool:
        """Whether the operators of the library are there."""
        return self.error is None

    def text(self, symbol: str, *arguments: int) -> str:
        """What the exported C function ``const char* symbol(int ...)`` returns; needs a loaded library."""
        function = getattr(ctypes.CDLL(str(self.path)), symbol)
        function.restype = ctypes.c_char_p
        value: bytes = function(*arguments)
        return value.decode()


def _load(name: str) -> Extension:
    path = Path(__file__).parents[1] / f"{name}.abi3.so"
    if os.environ.get("CACR_DISABLE_EXTENSION", "0") not in ("", "0"):
        return Extension(path, "the compiled extension is disabled by the environment variable CACR_DISABLE_EXTENSION")
    if not path.exists():
        reason = "this is a pure Python installation; install again with a C++ compiler at hand"
        if (path.parents[1] / "setup.py").exists():
            reason = "this is a source tree that was not built; leave it, or build it with pip install -e ."
        return Extension(path, f"the compiled library {path.name} does not exist: {reason}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Extension(path, f"the compiled library {path.name} cannot be loaded: {error.__cause__ or error}")
    return Extension(path, None)


def _load_cuda() -> Extension:
    path = Path(__file__).parents[1] / "_C_cuda.abi3.so"
    if torch.version.cuda is None:  # its symbols are those of a CUDA build
        return Extension(path, f"the installed torch {torch.__version__} is not a CUDA build")
    if not path.exists() and os.environ.get("CACR_DISABLE_EXTENSION", "0") in ("", "0"):
        return Extension(
            path,
            f"the compiled library {path.name} was not made when cacr_kernels was installed: that takes its source, "
            "nvcc, this torch (pip install --no-build-isolation) and CACR_BUILD_CUDA not 0",
        )
    return _load("_C_cuda")


def _let_signals_interrupt(library: Extension) -> None:
    """Hands over what ``csrc/cpu/binding.cpp`` needs of Python to see Ctrl-C while its kernels run."""
    names = (
        "PyGILState_Ensure", "PyGILState_Release", "PyErr_CheckSignals",
        "PyErr_Fetch", "PyErr_Restore", "Py_AddPendingCall",
    )  # fmt: skip
    functions = (ctypes.c_void_p * len(names))(
        *(ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in names)
    )
    ctypes.CDLL(str(library.path)).cacr_cpu_use_python(functions)


_CPU = _load("_C_cpu")
if _CPU.loaded:
    _let_signals_interrupt(_CPU)
_CUDA = _load_cuda()
_CUDA_ERRORS: dict[int, str | None] = {}


def cpu_library() -> Extension:
    """The library with the CPU kernels."""
    return _CPU


def cuda_library() -> Extension:
    """The library with the CUDA kernels, loaded only under a CUDA build of torch."""
    return _CUDA


def cuda_error(device: int) -> str | None:
    """What CUDA says against running the loaded kernels on that device, asked once; ``None`` if nothing."""
    if device not in _CUDA_ERRORS:
        with torch.cuda.device(device):
            _CUDA_ERRORS[device] = _CUDA.text("cacr_cuda_error", device) or None
    return _CUDA_ERRORS[device]


def compiled_isas() -> tuple[str, ...]:
    """Instruction sets the CPU kernels are compiled for; empty without the library."""
    return tuple(_CPU.text("cacr_cpu_compiled_isas").split(",")) if _CPU.loaded else ()


def active_isa() -> str | None:
    """Instruction set the CPU kernels run with on this machine; ``None`` without the library."""
    return _CPU.text("cacr_cpu_active_isa") if _CPU.loaded else None


def failed_isas() -> str:
    """Instruction sets that this processor has, but whose kernels disagree with the portable ones on it."""
    return _CPU.text("cacr_cpu_failed_isas") if _CPU.loaded else ""


def bf16_products() -> bool:
    """Whether the CPU kernels make products of bfloat16."""
    return active_isa() in ("amx", "avx512_bf16")


def isa_error() -> str | None:
    """Why the instruction set asked for by the environment variable ``CACR_CPU_ISA`` is not used, if it is not."""
    return (_CPU.text("cacr_cpu_isa_error") or None) if _CPU.loaded else None
