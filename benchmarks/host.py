"""What several of the programs here ask of the machine, and of a list of times; needs Python alone."""

from __future__ import annotations

import importlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def require(packages: Mapping[str, str], what: str, extra: str) -> None:
    """Leave with one sentence if ``what`` lacks a package of its extra; ``packages``: names by their modules."""
    missing = []
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise SystemExit(f"{what} needs {' and '.join(missing)}: pip install cacr_kernels[{extra}]")


def nvcc() -> Path | None:
    """The compiler that ``setup.py`` would take, or ``None``."""
    homes = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    given = [Path(os.environ["NVCC"])] if "NVCC" in os.environ else []
    found = [Path(path) for path in [shutil.which("nvcc")] if path]
    return next((path for path in (*given, *homes, *found) if path.exists()), None)


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile, linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
