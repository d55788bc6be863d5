"""Registers the kernels for the operators of the package, and says what the table of backends has to know of them.

For ``torch.compile`` an operator is a whole. Inductor copies the source of the kernels that it is shown, without the
named tuples that these use (2.11 to 2.14): that code does not compile.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...operators.registry import constant_while_compiling, implement
from ..entry import Backend, about_gpu, any_device
from ..precision import fp32_products
from .launch import release

_LAUNCHERS = {  # by operator: the module, which imports Triton, and the function that launches
    "cacr": ("cacr", "cacr"),
    "contrast": ("contrast", "contrast"),
    "contrast_backward": ("contrast", "contrast_backward"),
    "detached_keys": ("detached_keys", "detached_keys"),
    "repulsion": ("contrast", "repulsion"),
}


@constant_while_compiling
def installed() -> bool:
    """Whether there is a Triton to import, which a compiler that traces a loss cannot ask."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors; the environment says so as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@constant_while_compiling
def about_numpy() -> str | None:
    """Why the interpreter cannot run: an old one makes numbers of arrays, which NumPy refuses since 2.4."""
    found, numpy = triton_version(), str(importlib.import_module("numpy").__version__)
    if release(found) >= (3, 7) or release(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {found} needs NumPy < 2.4, and there is {numpy}"


def why_not(device: torch.device | None) -> str | None:
    """Why the Triton kernels cannot run on that device, if they cannot."""
    if not installed():
        return "Triton is not installed (pip install triton; it comes with torch for CUDA)"
    if interpreted():
        return any_device(device) or about_numpy()
    if device is not None and device.type != "cuda":
        how = "; CPU tensors need its interpreter: TRITON_INTERPRET=1 in the environment of Python"
        return f"Triton compiles for GPUs, not for {device.type} tensors{how if device.type == 'cpu' else ''}"
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _implement(name: str) -> None:
    loaded: list[Callable[..., Any]] = []

    def launch(*arguments: Any) -> Any:
        if not loaded:
            module, function = _LAUNCHERS[name]
            loaded.append(getattr(importlib.import_module(f"{__package__}.{module}"), function))
        return loaded[0](*arguments)

    implement(f"{name}_triton", launch, ("CPU", "CUDA"))


def triton_version() -> str:
    """Asked of the module: what it is installed from has other names for other devices."""
    return str(importlib.import_module("triton").__version__)


def about(device: torch.device) -> dict[str, str]:
    """What a verdict of the self-check depends on: the GPU, its driver, and the compiler."""
    return about_gpu(device) | {"triton": triton_version(), "source": _sources()}


@functools.cache
def _sources() -> str:
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


BACKEND = Backend(
    "triton",
    "Triton kernels for GPUs",
    why_not,
    device="cuda",
    operators=("cacr", "contrast", "detached_keys", "repulsion"),
    implement=_implement,
    half_types=True,
    rounds_coefficients=(torch.float16, torch.bfloat16),
    tests_only_on=("cpu",),  # in its interpreter
    check_first=about,
    products=fp32_products,
)
