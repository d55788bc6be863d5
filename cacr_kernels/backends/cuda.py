"""Backend "cuda": the operators on CUDA tensors, by the compiled ones of ``csrc/cuda/binding.cpp``.

Those have one more argument, the kind of products of float32, which torch keeps where its stable ABI does not reach,
and a namespace of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..operators import cacr, contrast
from ..operators.registry import constant_while_compiling, define, implement, operator
from ..operators.repulsion import in_two_sweeps
from ..types import Pairing, view_pair_count
from . import library
from .entry import Backend, Size, about_gpu
from .precision import fp32_products

SCHEMAS = cacr.SCHEMAS | contrast.SCHEMAS
COMPILED = "cacr_kernels_cuda"  # namespace of the compiled operators
IEEE, TF32, TF32X3 = range(3)
MAX_PAIRS = 64  # of views in the fused loss, kMaxPairs of csrc/cuda/parameters.h
MAX_ALIGNED = 1 << 24  # costs of views of one instance in the fused loss: B V^2

# "auto" takes "cuda" for a loss of up to this much work (multiply-adds of bfloat16), another backend with kernels
# beyond, for keys without a gradient, of which it needs one sweep, and for float64. For IEEE products of float32 it
# takes "cuda" whatever the size. Not timed: this is where the predicted times of both meet
# (benchmarks/results/codegen/predicted.csv), on an A100 at V = 2, D = 128, bfloat16 between B = 1024 and 4096.
UP_TO = 5 << 30


def float_products() -> int:
    """The number of the products of float32 in ``csrc/cuda/binding.cpp``; the operators ask when they run."""
    return {"ieee": IEEE, "tf32": TF32, "tf32x3": TF32X3}[fp32_products()]


@constant_while_compiling
def reckoned_products() -> int:
    """The same for the choice of ``"auto"``: in compiled code those there were when it was traced."""
    return float_products()


def fuses(shape: tuple[int, ...], pairing: Pairing) -> bool:
    """Whether the fused loss takes views of ``shape`` [V, B, D]; more views are composed of ``contrast``."""
    V, B = shape[:2]
    return view_pair_count(V, pairing) <= MAX_PAIRS and B * V * V <= MAX_ALIGNED


class Arithmetic(NamedTuple):
    """What the kernels do per product of two features (csrc/cuda/tile/arithmetic.cuh)."""

    owned: int  # features whose gradient a block adds up; for every such group similarities are computed again
    pieces: int  # multiply-adds that one product of a gradient takes
    cost: int  # of a multiply-add, in those of bfloat16: peaks of A100 and H100, three products for each of TF32X3


ARITHMETIC: dict[torch.dtype | int, Arithmetic] = {
    torch.bfloat16: Arithmetic(64, 3, 1),
    torch.float16: Arithmetic(64, 2, 1),
    TF32: Arithmetic(64, 1, 2),
    TF32X3: Arithmetic(32, 1, 6),
    IEEE: Arithmetic(64, 1, 16),
}


def work(size: Size) -> float:
    """Multiply-adds of bfloat16 that take as long as a loss of so many similarities and both its gradients.

    Infinite for float64, which the kernels compute on ordinary units in groups of 16 features.
    """
    if size.dtype == torch.float64:
        return math.inf
    owned, pieces, cost = ARITHMETIC[reckoned_products() if size.dtype == torch.float32 else size.dtype]
    groups = -(-size.features // owned)
    return size.similarities * size.features * cost * (1 + 2 * (groups + pieces))


def suits(size: Size) -> bool:
    """Whether ``"auto"`` takes the kernels for a loss of that size where others can run, too."""
    ieee = size.dtype == torch.float32 and reckoned_products() == IEEE
    return math.isfinite(size.similarities) and (ieee or work(size) <= UP_TO)


# ---- can it run ------------------------------------------------------------------------------------------------------
def why_not(device: torch.device | None) -> str | None:
    """Why the CUDA kernels cannot run on that device, if they cannot."""
    if (error := library.cuda_library().error) is not None:
        return error
    if device is not None and device.type != "cuda":
        return f"the CUDA kernels work on CUDA tensors, not on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device: torch finds none on this machine"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the CUDA kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    index = None if device is None else device.index
    reason: str | None = probe(torch.cuda.current_device() if index is None else index)
    return reason


@constant_while_compiling
def probe(index: int) -> str | None:
    """What a launch would meet only at run time: a library for other GPUs, a driver older than its CUDA runtime."""
    error = library.cuda_error(index)
    if error is None:
        return None
    return (
        f"the CUDA kernels cannot be launched on cuda:{index}: {error}; update its driver, or install from source with "
        "its compute capability in CACR_CUDA_ARCHS"
    )


# ---- operators -------------------------------------------------------------------------------------------------------
def _implement(name: str) -> None:
    """Declares the compiled operator, and lets that of the package call it; ``repulsion`` is made of ``contrast``."""
    if name == "repulsion":
        implement(f"{name}_cuda", in_two_sweeps(operator("contrast_cuda"), operator("contrast_backward_cuda")))
        return
    define(f"{COMPILED}::{name}", SCHEMAS[name].replace(") ->", ", int float_products) ->"))
    compiled: Callable[..., Any] = getattr(getattr(torch.ops, COMPILED), name).default
    implement(f"{name}_cuda", lambda *arguments: compiled(*arguments, float_products()), "CUDA")


def about(device: torch.device) -> dict[str, str]:
    """What a verdict of the self-check depends on: the GPU, its driver, and the compiled library."""
    library_file = library.cuda_library().path.stat()
    return about_gpu(device) | {"library": f"{library_file.st_size} {library_file.st_mtime_ns}"}


BACKEND = Backend(
    "cuda",
    "CUDA C++ kernels, one launch for a small loss",
    why_not,
    device="cuda",
    operators=("cacr", "contrast", "repulsion"),
    implement=_implement,
    half_types=True,
    fuses=fuses,
    suits=suits,
    check_first=about,
    products=fp32_products,
)
