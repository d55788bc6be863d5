"""Makes torch and the package see the fake devices; ``site/sitecustomize.py`` calls it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any


def into_torch() -> None:
    """After torch was imported: its kernels, its allocator, and Triton's launches."""
    import torch

    from . import aten, runtime

    runtime.start()
    aten.install()
    torch.cuda.init()
    ctypes.CDLL(os.environ["FAKE_CUDA_ALLOCATIONS"]).fake_watch_allocations()
    if importlib.util.find_spec("triton") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from . import triton_launches
        triton_launches.install()


def into_library(library: ModuleType | Any) -> None:
    """After ``cacr_kernels.backends.library`` was imported: the CUDA library is the one with emulated kernels.

    Where Triton's kernels are counted there is none.
    """
    import torch

    if os.environ.get("FAKE_CUDA_TRITON") == "count":
        return
    path = os.environ["FAKE_CUDA_LIBRARY"]
    torch.ops.load_library(path)
    library._CUDA = library.Extension(type(library._CUDA.path)(path), None)
