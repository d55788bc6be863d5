"""Backend "cpu": the compiled kernels of ``csrc/cpu``, which register themselves when their library is loaded."""

from __future__ import annotations

import warnings

import torch

from ..operators.registry import line_of_user
from . import library, precision
from .entry import Backend

_ERROR = library.cpu_library().error or library.isa_error()
if failed := library.failed_isas():
    warnings.warn(
        f"cacr_kernels: the CPU kernels for {failed} are not used, as they disagree with the portable ones on this "
        f"processor; {library.active_isa()} is used. Please report it.",
        RuntimeWarning,
        stacklevel=line_of_user(),
    )


def why_not(device: torch.device | None) -> str | None:
    """Why the CPU kernels cannot run on that device, if they cannot."""
    if device is not None and device.type != "cpu":
        return f"the CPU kernels work on CPU tensors, not on {device.type}"
    return _ERROR


BACKEND = Backend(
    "cpu",
    "SIMD kernels in C++ for the CPU",
    why_not,
    device="cpu",
    operators=("aligned", "cacr", "contrast", "detached_keys", "repulsion"),
    variants=("_bf16",),
    variant=precision.cpu_products if library.bf16_products() else lambda dtype: "",
    rounds_coefficients=(torch.bfloat16,) if library.bf16_products() else (),
)
