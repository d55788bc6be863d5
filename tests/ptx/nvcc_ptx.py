"""PTX that nvcc makes of a CUDA source at test time."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from tests.building import ROOT, kept
from tests.cuda_emulation.building import tool

from . import launch

BUILD = ROOT / "build" / "ptx"
SOURCES = ("csrc/cuda", "csrc/common", "tests/ptx/nvcc")


@functools.lru_cache(maxsize=64)
def compiled_text(source: Path, *flags: str) -> str:
    """The PTX of a source for sm_80."""
    name = "-".join([source.stem, *(re.sub(r"\W+", "_", flag) for flag in flags if flag.startswith("-D"))])
    command = [tool("nvcc"), "-std=c++20", "-arch=sm_80", "-ptx", *flags, str(source)]
    return kept(BUILD / f"{name}.ptx", command, SOURCES).read_text()


def compiled(source: Path, *flags: str) -> launch.Kernels:
    """The kernels of a source, for sm_80."""
    return launch.load(compiled_text(source, *flags), source.name)
