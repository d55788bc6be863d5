"""The ceiling that GFLOP/s are compared with: the processor's own peak of fused multiply-adds, measured.

``fma_peak.cpp`` is compiled on first use, with the compiler that would build the package, and kept in ``build/``.
Without a compiler, and on a GPU, a large ``torch.mm`` stands in; ``Peak.source`` says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cacr_kernels.__main__ import cpu_model

from . import machine

SOURCE = Path(__file__).with_name("fma_peak.cpp")
BUILD = machine.ROOT / "build" / "benchmarks"
# -march=native is right here and nowhere else: the library never leaves the machine that it measures.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
NATIVE = (("-march=native",), ("-mcpu=native",))
TRIAL_SECONDS = 0.003  # shorter than a time slice: some trials are not interrupted even on a busy machine
FMA, PRODUCT = "FMA micro-benchmark", "a large torch.mm"


class Peak(NamedTuple):
    """GFLOP/s that cannot be exceeded, and what they were measured with."""

    gflops: float
    source: str


class BuildError(Exception):
    """Why there is no micro-benchmark here."""


def find_compiler() -> list[str]:
    """The command that ``setup.py`` would compile the package with."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise BuildError("no C++ compiler (GCC or Clang) was found")
    return [found]


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), f"status {error.returncode}")
        raise BuildError(f"{command[0]} failed: {reason.strip()}") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error


def build(directory: Path = BUILD) -> Path:
    """The compiled micro-benchmark; compiled again for another source, compiler or processor."""
    compiler = find_compiler()
    parts = [SOURCE.read_text(encoding="utf-8"), _run([*compiler, "--version"]), *FLAGS, cpu_model()]
    library = directory / f"fma_peak-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    for i, native in enumerate(NATIVE):
        try:
            _run([*compiler, *FLAGS, *native, str(SOURCE), "-o", str(partial)])
            break
        except BuildError:
            if i == len(NATIVE) - 1:
                raise
    partial.replace(library)
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def fma_gflops(dtype: torch.dtype, threads: int, seconds: float = 0.2) -> float:
    """GFLOP/s of all threads together: the best of short trials, what the machine does while nobody else uses it.

    Raises ``BuildError`` where the micro-benchmark cannot be had.
    """
    name = f"fma_peak_{dtype}".replace("torch.", "")
    try:
        trial: Callable[[int, int], float] = getattr(_library(), name)
    except OSError as error:
        raise BuildError(f"the micro-benchmark cannot be loaded: {error}") from error
    trial.restype, trial.argtypes = ctypes.c_double, (ctypes.c_int, ctypes.c_long)  # type: ignore[attr-defined]
    vector_bytes: int = _library().fma_peak_vector_bytes()
    flop_per_turn = 2 * 48 * vector_bytes / dtype.itemsize * threads  # at least, see kChains and kStepsPerTurn
    turns = max(1000, int(TRIAL_SECONDS * 1e9 * trial(threads, 20000) / flop_per_turn))
    return machine.best(lambda: trial(threads, turns), seconds)


def peak(dtype: torch.dtype, threads: int, device: str) -> Peak:
    """What the products of a case could do at most, as far as the machine shows it now."""
    reason = "a GPU"
    if device == "cpu":
        try:
            return Peak(fma_gflops(dtype, threads), FMA)
        except BuildError as error:
            reason = str(error)
    return Peak(machine.product_gflops(dtype, threads, device), f"{PRODUCT} ({reason})")


class Peaks:
    """The highest peak seen in a run: measured again beside every case, as others may have the machine meanwhile."""

    def __init__(self) -> None:
        self._found: dict[tuple[torch.dtype, int, str], Peak] = {}

    def see(self, dtype: torch.dtype, threads: int, device: str) -> None:
        """Measures the peak again and keeps the highest."""
        key = dtype, threads, device
        self._found[key] = max(peak(*key), self._found.get(key, Peak(0.0, "")))

    def highest(self, dtype: torch.dtype, threads: int, device: str) -> Peak:
        """The highest of all measurements; there has been one."""
        return self._found[dtype, threads, device]
