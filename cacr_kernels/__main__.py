"""``python -m cacr_kernels``: what is installed, what can run on this machine, and why the rest cannot."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from cacr_kernels._version import __version__
from cacr_kernels.backends.kept import cache_dir
from cacr_kernels.backends.library import active_isa, compiled_isas, cpu_library, cuda_library, isa_error
from cacr_kernels.backends.table import available_backends


def cpu_model() -> str:
    """The name of the processor, as the operating system gives it."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, subprocess.SubprocessError):
        return platform.processor() or platform.machine()


def _triton() -> dict[str, str | None]:
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return {"version": None, "error": str(error)}
    return {"version": version, "error": None}


def _autotune() -> dict[str, Any]:
    try:
        tuning = importlib.import_module("cacr_kernels.backends.triton.tuning")
    except ValueError as error:
        return {"on": False, "cache": None, "error": str(error)}
    return {"on": tuning.ON, "cache": str(cache_dir()), "error": None}


def report() -> dict[str, Any]:
    """The environment as plain data; wherever something cannot run, ``error`` or the backend's entry says why."""
    library = cpu_library()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cacr_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "triton": _triton(),
        "autotune": _autotune(),
        "cpu": {"model": cpu_model(), "logical_cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "gpus": gpus,
        "cpu_library": {
            "path": str(library.path),
            "error": library.error,
            "compiled_isas": compiled_isas(),
            "active_isa": active_isa(),
            "isa_error": isa_error(),
        },
        "cuda_library": {"path": str(cuda_library().path), "error": cuda_library().error},
        "backends": available_backends(),
    }


def _lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as lines of a name and a text."""
    cpu, library, triton, autotune = data["cpu"], data["cpu_library"], data["triton"], data["autotune"]
    tuned = f"on, choices kept in {autotune['cache']}" if autotune["on"] else "off (CACR_AUTOTUNE=1 turns it on)"
    gpu_build = data["torch"]["cuda"] or data["torch"]["hip"]
    isas = ", ".join(f"{isa} (active)" if isa == library["active_isa"] else isa for isa in library["compiled_isas"])
    if library["isa_error"]:
        isas = f"{isas}; {library['isa_error']}"
    return [
        ("cacr_kernels", data["cacr_kernels"]),
        ("Python", f"{data['python']} on {data['platform']}"),
        ("torch", f"{data['torch']['version']} ({f'GPU build {gpu_build}' if gpu_build else 'CPU build'})"),
        ("Triton", triton["version"] or f"not available: {triton['error']}"),
        ("Triton autotuning", autotune["error"] or tuned),
        ("CPU", f"{cpu['model']}, {cpu['logical_cores']} logical cores, torch uses {cpu['torch_threads']} threads"),
        ("GPU", ", ".join(data["gpus"]) or "none"),
        ("CPU library", library["error"] or library["path"]),
        ("CUDA library", data["cuda_library"]["error"] or data["cuda_library"]["path"]),
        ("CPU instruction sets", isas or "none compiled"),
        *((f'backend "{name}"', reason or "can run") for name, reason in data["backends"].items()),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the report, as text or with ``--json`` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m cacr_kernels", description="What can run here, and why not.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    data = report()
    if options.json:
        print(json.dumps(data, indent=2))
        return
    lines = _lines(data)
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
