"""Backend "cuda" on CPU tensors: the operators get an implementation that runs the kernels in the emulation.

Everything above the operators is the package as it is. Importing this module registers it, for the whole process; the
table of backends keeps saying that "cuda" needs a GPU, except inside ``emulated_cuda``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from cacr_kernels.operators.registry import NAMESPACE
from tests.cuda.emulated_cuda import Emulation
from tests.cuda_emulation.building import emulated_library

backends: Any = importlib.import_module("cacr_kernels.backends.table")
_active: list[Emulation] = []


def _register(name: str) -> None:
    operator = f"{NAMESPACE}::{name}_cuda"
    torch.library.impl(operator, "CPU", lambda *arguments: getattr(_active[-1], name)(*arguments))


for _name in ("contrast", "contrast_backward", "cacr"):
    _register(_name)


@contextlib.contextmanager
def emulated_cuda(**options: Any) -> Iterator[Emulation]:
    """``backend="cuda"`` can run on the CPU, with ``options`` of :class:`Emulation`."""
    table = backends.TABLE
    _active.append(Emulation(emulated_library("operators.cpp"), **options))
    backends.TABLE = tuple(
        backend._replace(why_not=lambda device: None) if backend.name == "cuda" else backend for backend in table
    )
    try:
        yield _active[-1]
    finally:
        backends.TABLE = table
        _active.pop()
