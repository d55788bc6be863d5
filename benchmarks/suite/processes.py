"""What takes a process of its own: peak memory, and the first call of a fresh process.

``python -m benchmarks.suite.processes`` reads what to do from standard input and prints figures as JSON. Peak memory is
what a call adds, gradients included, to a process that already holds the inputs and has run the row once on a small
instance, so that libraries are loaded and compilers have started. A start is the first call of all, from the row's
imports to the result; importing torch and making the inputs come before it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from .cases import BenchmarkCase
from .machine import ROOT
from .rows import Row, rows

TIMEOUT = 600.0
Figures = dict[str, Any]


def memory(case: BenchmarkCase, row: Row, timeout: float = TIMEOUT) -> Figures:
    """``memory_mib`` above the inputs and ``single_ms`` of that call, or ``memory_reason``."""
    found = _ask("memory", case, row, {}, timeout)
    return {"memory_reason": found} if isinstance(found, str) else found


def start(case: BenchmarkCase, row: Row, timeout: float = TIMEOUT) -> Figures:
    """``cold_ms`` with empty compiler caches; for rows that have such, ``warm_ms`` with the caches just filled."""
    found: Figures = {}
    with tempfile.TemporaryDirectory(prefix="cacr-caches-", ignore_cleanup_errors=True) as caches:
        environment = {"TORCHINDUCTOR_CACHE_DIR": caches, "KEOPS_CACHE_FOLDER": caches}
        for name in ("cold_ms", "warm_ms") if row.caches else ("cold_ms",):
            answer = _ask("start", case, row, environment, timeout)
            if isinstance(answer, str):
                break
            found[name] = answer["first_ms"]
    return found


def _ask(task: str, case: BenchmarkCase, row: Row, environment: dict[str, str], timeout: float) -> Figures | str:
    """The figures, or the reason why there are none."""
    command = [sys.executable, "-m", "benchmarks.suite.processes"]
    data = json.dumps({"task": task, "case": case.to_json(), "row": row.name})
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=True,
            env=os.environ | environment,
        )  # fmt: skip
        found: Figures = json.loads(done.stdout.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return f"no figure within {timeout:.0f} s"
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        text = getattr(error, "stderr", None) or str(error)
        return text.strip().splitlines()[-1] if text.strip() else "the process ended without a figure"


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(field)


def _settle() -> None:
    """Hands freed memory back to the system, so that it does not hide what comes next."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _now_and_restart_peak() -> int:
    """Bytes held now; from here on the peak is counted anew.

    Not by ``getrusage`` where Linux can tell: its maximum cannot be reset, and a child inherits that of its parent.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return _maximum()


def _maximum() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return _maximum()


def _peak_memory(case: BenchmarkCase, row: Row) -> Figures:
    """Peak MiB that a call adds in this process, and how long it takes."""
    small = case.smaller()
    row.step(small, small.inputs())()
    step = row.step(case, case.inputs())
    if case.device != "cpu":
        torch.cuda.synchronize(case.device)
        before = torch.cuda.memory_allocated(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize(case.device)
        milliseconds = 1e3 * (time.perf_counter() - begin)
        return {
            "memory_mib": (torch.cuda.max_memory_allocated(case.device) - before) / 2**20,
            "single_ms": milliseconds,
        }
    if row.compiles:
        step()  # the compiler's own memory is not the row's
    _settle()
    before = _now_and_restart_peak()
    begin = time.perf_counter()
    outputs = step()
    milliseconds = 1e3 * (time.perf_counter() - begin)
    found = _peak() - before
    del outputs
    return {"memory_mib": max(found, 0) / 2**20, "single_ms": milliseconds}


def _first_call(case: BenchmarkCase, row: Row) -> Figures:
    """How long the first call of this process takes, imports and compilation of the row included."""
    inputs = case.inputs()
    begin = time.perf_counter()
    row.step(case, inputs)()
    if case.device != "cpu":
        torch.cuda.synchronize(case.device)
    return {"first_ms": 1e3 * (time.perf_counter() - begin)}


TASKS = {"memory": _peak_memory, "start": _first_call}


def main() -> None:
    """Measures what standard input asks for and prints the figures as JSON."""
    warnings.simplefilter("ignore")
    data = json.load(sys.stdin)
    case = BenchmarkCase.from_json(data["case"])
    torch.set_num_threads(case.threads)
    row = next(row for row in rows() if row.name == data["row"])
    print(json.dumps(TASKS[data["task"]](case, row)))


if __name__ == "__main__":
    main()
