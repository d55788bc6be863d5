"""Backend "cpu": the compiled kernels of ``csrc/cpu``, which register themselves when their library is loaded.

Those that take no flag ``normalize`` do so in a namespace of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from ..operators.registry import define, implement
from . import library
from .entry import Adapt, Backend
from .normalizing import schema_without_flag

NORMALIZES: frozenset[str] = frozenset()  # operators that the library registers as the package declares them
WITHOUT_FLAG = "cacr_kernels_cpu"  # namespace of the others
_ERROR = library.cpu_library().error or library.isa_error()


def why_not(device: torch.device | None) -> str | None:
    """Why the CPU kernels cannot run on that device, if they cannot."""
    if device is not None and device.type != "cpu":
        return f"the CPU kernels work on CPU tensors, not on {device.type}"
    return _ERROR


def _implement(name: str, adapt: Adapt) -> None:
    """Lets the operator of the package call the compiled one, where that takes no flag."""
    if name in NORMALIZES:
        return
    define(f"{WITHOUT_FLAG}::{name}_cpu", schema_without_flag(name))
    compiled: Any = getattr(getattr(torch.ops, WITHOUT_FLAG), f"{name}_cpu").default
    implement(f"{name}_cpu", adapt(compiled), "CPU")


BACKEND = Backend(
    "cpu",
    "SIMD kernels in C++ for the CPU",
    why_not,
    device="cpu",
    operators=("cacr", "contrast", "detached_keys"),
    implement=_implement,
    normalizes=NORMALIZES,
)
