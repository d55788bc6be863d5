"""The ordered table of backends: each says why it cannot run here."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import library as _extension


class Backend(NamedTuple):
    """One way to compute the losses.

    ``why_not(device)`` is ``None`` if it can run on tensors of that device (``None``: on some device of this machine),
    else a sentence.
    """

    name: str
    summary: str
    why_not: Callable[[torch.device | None], str | None]


def _any_device(device: torch.device | None) -> str | None:
    if device is not None and device.type == "meta":
        return "tensors of the device meta hold no data; shapes alone can be computed with FakeTensorMode"
    return None


_CPU_ERROR = _extension.cpu_library().error or _extension.isa_error()


def _cpu(device: torch.device | None) -> str | None:
    if device is not None and device.type != "cpu":
        return f"the CPU kernels work on CPU tensors, not on {device.type}"
    return _CPU_ERROR


def _triton(device: torch.device | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; it comes with torch for CUDA)"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):  # as Triton does
        return _any_device(device)
    if device is not None and device.type != "cuda":
        how = "; CPU tensors need its interpreter: TRITON_INTERPRET=1 in the environment of Python"
        return f"Triton compiles for GPUs, not for {device.type} tensors{how if device.type == 'cpu' else ''}"
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _cuda(device: torch.device | None) -> str | None:
    if (error := _extension.cuda_library().error) is not None:
        return error
    if device is not None and device.type != "cuda":
        return f"the CUDA kernels work on CUDA tensors, not on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device: torch finds none on this machine"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the CUDA kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    index = None if device is None else device.index
    reason: str | None = _cuda_probe(torch.cuda.current_device() if index is None else index)
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_probe(index: int) -> str | None:
    """What a launch would meet only at run time: a library for other GPUs, a driver older than its CUDA runtime."""
    error = _extension.cuda_error(index)
    if error is None:
        return None
    return (
        f"the CUDA kernels cannot be launched on cuda:{index}: {error}; update its driver, or install from source with "
        "its compute capability in CACR_CUDA_ARCHS"
    )


# Slowest first. "auto" takes the last that can run on the tensors' device, but never the reference.
TABLE = (
    Backend("reference", "the definition in plain PyTorch; N x M arrays, any device", _any_device),
    Backend("torch", "plain PyTorch in blocks; bounded memory, any device", _any_device),
    Backend("triton", "Triton kernels for GPUs", _triton),
    Backend("cuda", "CUDA C++ kernels, one launch for a small loss", _cuda),
    Backend("cpu", "SIMD kernels in C++ for the CPU", _cpu),
)
NAMES = ("auto", *(backend.name for backend in TABLE))

# Where both can run "auto" takes "cuda" for a loss of up to this much work (``_cuda.work``: multiply-adds of bfloat16),
# "triton" beyond, for keys without a gradient, of which it needs one sweep, and for float64. Reckoned from what the
# kernels multiply and what data sheets promise, not timed: 2^35 multiply-adds are 0.2 ms of an A100 at its peak, of the
# order of what the launches cost that "cuda" saves.
CUDA_UP_TO = 1 << 35


def backends() -> dict[str, str | None]:
    """Every backend by name, from the slowest to the fastest; ``None`` if it can run here, else the reason why not.

    ``"auto"`` takes the last that can run on the tensors' device. Where both can, it takes ``"cuda"`` for losses of up
    to 2^35 multiply-adds of bfloat16, or what takes as long, and ``"triton"`` for larger ones, for float64 and for keys
    without a gradient (queue, momentum). That is reckoned, not timed.

    >>> import cacr_kernels
    >>> cacr_kernels.backends()["torch"] is None
    True
    """
    return {backend.name: backend.why_not(None) for backend in TABLE}


def select(name: str, device: torch.device, work: float = 0) -> str:
    """The backend that ``name`` stands for on ``device``; ``work``: see ``CUDA_UP_TO``.

    Raises ``ValueError`` for an unknown name, and for a backend named explicitly that cannot run there.
    """
    if name == "auto":
        name = _fastest(device, work)
    else:
        check(name, device)
    if name != "reference":
        _refuse_vmap(name)
    return name


def check(name: object, device: torch.device | None = None) -> None:
    """Refuses what is no backend, and one that cannot run on ``device`` (``None``: on any device of this machine)."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__} {name!r}")
    if name not in ("auto", *(backend.name for backend in TABLE)):
        raise ValueError(f"backend={name!r} is unknown; accepted: {', '.join(map(repr, NAMES))}")
    reason = next((backend.why_not(device) for backend in TABLE if backend.name == name), None)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run here: {reason}")


def _fastest(device: torch.device, work: float) -> str:
    usable = [backend for backend in TABLE if backend.why_not(device) is None]
    if work > CUDA_UP_TO and any(backend.name == "triton" for backend in usable):
        usable = [backend for backend in usable if backend.name != "cuda"]
    if device.type == "cpu":  # an interpreter is for tests
        usable = [backend for backend in usable if backend.name != "triton"]
    if not usable:
        reasons = dict.fromkeys(str(backend.why_not(device)) for backend in TABLE)
        raise ValueError(f"backend='auto' finds none that can run on {device.type}: {'; '.join(reasons)}")
    if usable[-1].name == "torch":
        _warn_slow(device.type, "; ".join(f"{b.name}: {b.why_not(device)}" for b in TABLE if b not in usable))
    return usable[-1].name


def _refuse_vmap(name: str) -> None:
    """Neither the kernels nor blocks of data-dependent size have the rule for batches that ``vmap`` needs.

    What tells that one is active is not public; without it the Functions refuse (``autograd.SingleProblem``).
    """
    levels = getattr(torch._C._functorch, "get_interpreter_stack", lambda: None)
    if torch.compiler.is_compiling():
        return
    if any(str(level.key()).endswith("Vmap") for level in levels() or ()):
        raise ValueError(no_vmap(f"backend={name!r}"))


def no_vmap(what: str) -> str:
    """Why ``what`` cannot be called inside ``torch.func.vmap``."""
    return (
        f"{what} cannot run inside torch.func.vmap: its operators take one problem at a time; "
        "call the loss in a loop and stack the results, or use backend='reference'"
    )


_warned: set[str] = set()


def _warn_slow(device: str, reasons: str) -> None:
    if device in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device)
    warnings.warn(
        f"cacr_kernels: only the plain PyTorch backend can run on {device} ({reasons})", RuntimeWarning, stacklevel=6
    )
