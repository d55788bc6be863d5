"""What this machine is: versions, devices, which backends can run and why others cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.host import cores
from cacr_kernels.__main__ import report

from . import child, devices
from .child import Context, Task
from .lines import ABSENT, NOTE
from .steps import GPU, KERNELS

ROOT = Path(__file__).resolve().parents[2]
NVIDIA = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,memory.used,mig.mode.current"


def first_lines(*command: str) -> str:
    """What a program says about itself."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()[-600:]


def versions() -> dict[str, Any]:
    data = report()
    return {
        "report": data,
        "commit": first_lines("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "numpy": np.__version__,
        "cores": cores(),
        "nvidia-smi": first_lines("nvidia-smi", f"--query-gpu={NVIDIA}", "--format=csv,noheader"),
        "nvcc": first_lines("nvcc", "--version"),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("CACR_", "TRITON_", "CUDA_", "TORCH"))},
    }


def gpu() -> dict[str, Any]:
    """The properties of the current device; makes a context, which a broken driver shows."""
    if not torch.cuda.is_available():
        return {"ok": None, "problem": "torch finds no GPU here"}
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, _ = torch.cuda.mem_get_info()
    torch.ones(1000, device="cuda").sum().item()
    return {
        "name": p.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "processors": p.multi_processor_count,
        "GiB": p.total_memory / 2**30,
        "free GiB": free / 2**30,
    }


def describe(context: Context) -> dict[str, Any]:
    """Notes for the report, and everything for its JSON."""
    found = versions()
    data = found["report"]
    build = data["torch"]["cuda"] or data["torch"]["hip"]
    for text in (
        f"cacr_kernels {data['cacr_kernels']}, Python {data['python']}, numpy {found['numpy']}, {data['platform']}",
        f"commit {found['commit']}",
        f"torch {data['torch']['version']} ({f'GPU build {build}' if build else 'CPU build'}), "
        f"Triton {data['triton']['version'] or data['triton']['error']}",
        f"{data['cpu']['model']}, {found['cores']} cores for this process",
        f"GPUs by nvidia-smi: {found['nvidia-smi']}",
        f"nvcc: {found['nvcc'].rpartition(chr(10))[2] or 'prints nothing'}",
        *(f'backend "{name}": {reason or "can run"}' for name, reason in data["backends"].items()),
    ):
        context.lines.write(NOTE, text=text)
    context.lines.write("everything", **found)
    return {}


def absent(context: Context) -> dict[str, Any]:
    """Decides for all steps that without a GPU they need not start."""
    if not torch.cuda.is_available():
        context.lines.write(ABSENT, **{GPU: devices.why_none(), KERNELS: devices.why_none(interpreter=True)})
    return {}


def run(context: Context) -> None:
    tasks = [
        Task("backends", lambda: absent(context)),
        Task("versions", lambda: describe(context)),
        Task("device", gpu),
    ]
    child.run(context, tasks, 20)
