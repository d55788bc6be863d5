"""The machine at hand: what it is, what runs on it, how fast it multiplies."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark.utils.timer import timer as clock  # waits for the GPU, where there is one

import cacr_kernels
from benchmarks.host import cores
from cacr_kernels.__main__ import cpu_model
from cacr_kernels.backends.library import active_isa

ROOT = Path(__file__).resolve().parents[2]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def environment(device: str) -> dict[str, Any]:
    """What every row of the results carries along."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    cuda = device != "cpu"
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "cores": torch.get_num_threads() if cuda else cores(),
        "platform": platform.platform(),
        "isa": active_isa() or "none",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "version": cacr_kernels.__version__,
        "commit": commit + ("+changes" if commit and changed else ""),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def available_bytes(device: str) -> int:
    """Memory that can still be used without swapping."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return 8 * 2**30


def best(rate: Callable[[], float], seconds: float) -> float:
    """The best of trials: what the machine can do while nobody else uses it."""
    found, start = rate(), clock()
    while clock() - start < seconds:
        found = max(found, rate())
    return found


def _calls_per_second(call: Callable[[], object], threads: int, seconds: float) -> float:
    """How often the call could run in a second, from the fastest of its trials."""

    def rate() -> float:
        begin = clock()
        call()
        return 1.0 / float(clock() - begin)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call()
        return best(rate, seconds)
    finally:
        torch.set_num_threads(before)


@functools.cache
def product_gflops(dtype: torch.dtype, threads: int, device: str, seconds: float = 0.6) -> float:
    """GFLOP/s of a large ``torch.mm``."""
    n = 8192 if device != "cpu" else (2048 if dtype == torch.float32 else 1024)
    a, b = (torch.randn(n, n, dtype=torch.float32).to(dtype).to(device) for _ in range(2))
    out = torch.mm(a, b)
    return 2.0 * n**3 / 1e9 * _calls_per_second(lambda: torch.mm(a, b, out=out), threads, seconds)


@functools.cache
def bandwidth(threads: int, device: str, seconds: float = 0.4, mib: int = 512) -> float:
    """GB/s of a copy from memory to memory, reads and writes counted."""
    source = torch.ones(mib * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / 1e9 * _calls_per_second(lambda: target.copy_(source), threads, seconds)
