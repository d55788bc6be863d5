"""The faults, one file per layer; the name of a fault begins with that of its file."""

from __future__ import annotations

import importlib
import pkgutil

from ..fault import Fault


def layers() -> list[str]:
    """The files of the catalogue."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def faults() -> list[Fault]:
    """All of them."""
    modules = (importlib.import_module(f"{__name__}.{layer}") for layer in layers())
    return [fault for module in modules for fault in module.FAULTS]
