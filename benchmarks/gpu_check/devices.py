"""Which backends can use a GPU here; asked in the process of a step, since the answer makes a CUDA context."""

from __future__ import annotations

import os

import torch

from cacr_kernels.backends.table import TABLE, device_type_of
from cacr_kernels.backends.triton.ops import interpreted

GPU = "cuda"  # the type of device
GPU_BACKENDS = tuple(backend.name for backend in TABLE if backend.device == GPU)


def reasons() -> dict[str, str | None]:
    """Why each of these backends cannot run."""
    return {backend.name: backend.why_not(None) for backend in TABLE if backend.name in GPU_BACKENDS}


def usable() -> list[str]:
    """The backends that can run."""
    return [name for name, reason in reasons().items() if reason is None]


def interprets() -> bool:
    """Whether kernels are interpreted, by Triton or by GPUs that are not there: steps then take few, small problems."""
    return interpreted() or (absent() and os.environ.get("FAKE_CUDA_TRITON") != "count")


def absent() -> bool:
    """Whether the GPUs are those of ``tests/fake_cuda``, which are not there."""
    return os.environ.get("FAKE_CUDA") == "1"


def device_of(backend: str) -> str:
    """Where the tensors of a backend lie: on the CPU if it can run there."""
    return device_type_of(backend)


def why_none(interpreter: bool = False) -> str | None:
    """Why a step that needs a GPU cannot run; ``interpreter``: it can do with that."""
    found = reasons()
    if all(reason is not None for reason in found.values()):
        return "; ".join(f"{name}: {reason}" for name, reason in found.items())
    if interpreted() and not interpreter:
        return "Triton's kernels are interpreted (TRITON_INTERPRET): only the smoke step runs so"
    return None


def wait() -> None:
    """Until the GPU has done all it was given; what went wrong there is raised here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
