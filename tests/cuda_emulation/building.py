"""Compiles what the tests of this directory run, once for all workers and until a source changes."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.building import ROOT, kept

HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cuda_emulation"
SOURCES = ("csrc/cuda", "csrc/common", "tests/cuda_emulation")

SANITIZERS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'csrc'}"]


def tool(name: str) -> str:
    """The path of a compiler or tool; the CUDA tools that the triton wheel brings are good as well."""
    found = shutil.which(name)
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(name, path=Path(triton.origin).parent / "backends/nvidia/bin")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def emulated(source: str, sanitizer: str = "plain", *flags: str) -> Path:
    """A program of the emulation: ``source``, of this directory or elsewhere, compiled by g++."""
    path = HERE / source
    command = [tool("g++"), "-std=c++20", *SANITIZERS[sanitizer], *WARNINGS, *INCLUDES, *flags, str(path)]
    places = *SOURCES, str(path.relative_to(ROOT))
    return kept(BUILD / f"{path.stem}-{sanitizer}{''.join(flags)}", command, places)


def emulated_library(source: str) -> Path:
    """The same as a shared object."""
    return emulated(source, "plain", "-fPIC", "-shared")


def by_nvcc(source: str, kind: str, arch: str = "sm_80") -> Path:
    """``source`` compiled by nvcc to ``kind``, "ptx" or "cubin"."""
    command = [tool("nvcc"), f"-arch={arch}", "-std=c++20", *INCLUDES[1:], f"--{kind}", "-x", "cu", str(HERE / source)]
    return kept(BUILD / f"{Path(source).stem}-{arch}.{kind}", command, SOURCES)


def disassembly(cubin: Path) -> dict[str, str]:
    """The machine code of every kernel of a cubin."""
    command = [tool("cuobjdump"), "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = text.split("Function : ")[1:]
    return {part.split("\n", 1)[0].strip(): part for part in parts}


def run(program: Path, *arguments: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Runs a program of the emulation and gives back what it left."""
    command = [str(program), *map(str, arguments)]
    setarch, random_bits = shutil.which("setarch"), Path("/proc/sys/vm/mmap_rnd_bits")
    if setarch is not None and random_bits.exists() and int(random_bits.read_text()) > 28:
        command = [setarch, "-R", *command]  # the thread sanitizer's map of the address space knows no more than 28
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=0:exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
