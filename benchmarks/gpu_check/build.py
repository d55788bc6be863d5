"""Builds the compiled libraries for the GPU of this machine, where that is not done yet."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.host import nvcc
from cacr_kernels.backends.library import cuda_library
from cacr_kernels.backends.table import named

from . import child, devices
from .child import Context, Task
from .lines import NOTE

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
SETUPTOOLS = 77  # of pyproject.toml
NO_NVCC = "no nvcc here (NVCC, CUDA_HOME or PATH): the CUDA library is not built"


def newest(folder: Path) -> float:
    """When something in the folder was last changed."""
    return max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())


def why(library: Path, sources: Path) -> str | None:
    """Why the library has to be built, or ``None``."""
    if not library.exists():
        return f"{library.name} is missing"
    if library.stat().st_mtime < newest(sources):
        return f"{library.name} is older than csrc"
    return named("cuda").why_not(None)


def why_not(sources: Path) -> str | None:
    """Why nothing can be built."""
    if devices.absent():
        return "the GPUs are not there: their CUDA library is the kernels in the emulation, and nvcc builds nothing"
    if not (ROOT / "setup.py").exists() or not sources.exists():
        return "this is no source tree"
    if not torch.cuda.is_available():
        return "torch finds no GPU here, so there is nothing to build for"
    if torch.version.cuda is None:
        return "torch is no CUDA build: the CUDA library cannot be built for it"
    if nvcc() is None:
        return NO_NVCC
    if missing := missing_tools():
        return f"the CUDA library is not built: {' and '.join(missing)} missing"
    return None


def missing_tools() -> list[str]:
    """What ``setup.py`` needs beside nvcc and is not here."""
    import shutil

    found = importlib.util.find_spec("setuptools") and importlib.metadata.version("setuptools")
    here = {
        "a C++ compiler (GCC or Clang)": "CXX" in os.environ or any(map(shutil.which, ("c++", "g++", "clang++"))),
        "ninja": shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent)),
        f"setuptools >= {SETUPTOOLS}": found and int(found.partition(".")[0]) >= SETUPTOOLS,
    }
    return [name for name, is_here in here.items() if not is_here]


def build() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    environment = {"CACR_CUDA_ARCHS": f"{major}{minor}"} | os.environ
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout[-3000:]}")
    after = "from benchmarks.gpu_check import build as b; print(b.why(b.cuda_library().path, b.SOURCES) or '')"
    said = subprocess.run([sys.executable, "-c", after], cwd=ROOT, capture_output=True, text=True)
    if problem := (said.stdout if not said.returncode else said.stderr).strip():
        raise RuntimeError(f"built, but the library is not usable: {problem[-500:]}")
    return {"architecture": environment["CACR_CUDA_ARCHS"]}


def run(context: Context) -> None:
    if (reason := why_not(SOURCES)) is not None:
        return context.skip(reason)
    if (reason := why(cuda_library().path, SOURCES)) is None:
        return context.skip("the CUDA library is newer than its sources, and the GPU takes it")
    context.lines.write(NOTE, text=f"built because {reason}")
    child.run(context, [Task("build", build)], 1000)
    return None
