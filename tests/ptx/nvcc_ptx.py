"""PTX that nvcc makes of a CUDA source at test time."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from . import launch


@functools.lru_cache(maxsize=64)
def compiled_text(source: Path, *flags: str) -> str:
    """The PTX of a source for sm_80."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-std=c++20", "-arch=sm_80", "-ptx", "-o", "-", *flags, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(source: Path, *flags: str) -> launch.Kernels:
    """The kernels of a source, for sm_80."""
    return launch.load(compiled_text(source, *flags), source.name)
