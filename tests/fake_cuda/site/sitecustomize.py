"""Python imports this at its start: where FAKE_CUDA is set, torch and cacr_kernels see the devices that are not there.

Two modules get something done right after they are imported: torch its kernels on the fake device, and the module that
loads the compiled libraries the one with emulated kernels.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _install(module: ModuleType) -> None:
    from tests.fake_cuda import install

    install.into_torch()


def _load_library(module: ModuleType) -> None:
    from tests.fake_cuda import install

    install.into_library(module)


def _count_launches(module: ModuleType) -> None:
    from tests.fake_cuda import counting

    counting.computes_on_the_host(module)


AFTER: dict[str, Callable[[ModuleType], None]] = {"torch": _install, "cacr_kernels.backends.library": _load_library}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, then: Callable[[ModuleType], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        then = AFTER.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if then is not None else None
        if spec is None or spec.loader is None or then is None:
            return None
        spec.loader = _Loader(spec.loader, then)
        return spec


if os.environ.get("FAKE_CUDA_TRITON") == "count":
    AFTER |= {f"cacr_kernels.backends.triton.{name}": _count_launches for name in ("contrast", "cacr", "detached_keys")}
if os.environ.get("FAKE_CUDA") == "1":
    sys.meta_path.insert(0, _Finder())
