"""Peak memory of one row in a process of its own: ``python -m benchmarks.memory`` reads the case from standard input.

What is counted is what a call adds, gradients included, to a process that already holds the inputs and has run the row
once on a small instance, so that libraries are loaded and compilers have started.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from .cases import Case
from .machine import ROOT
from .rows import rows

TIMEOUT = 600.0


def measure(case: Case, row: str, timeout: float = TIMEOUT) -> float | str:
    """Peak MiB above the inputs, or the reason why there is no figure."""
    command = [sys.executable, "-m", "benchmarks.memory"]
    data = json.dumps({"case": case.to_json(), "row": row})
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=True
        )
        return float(done.stdout.split()[-1])
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


def peak(case: Case, name: str) -> float:
    """Peak MiB that a call of a row adds, in this process."""
    torch.set_num_threads(case.threads)
    row = next(row for row in rows(case.device) if row.name == name)
    small = case.smaller()
    row.step(small, small.inputs())()
    step = row.step(case, case.inputs())
    if case.device != "cpu":
        torch.cuda.synchronize(case.device)
        before = torch.cuda.memory_allocated(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        step()
        torch.cuda.synchronize(case.device)
        return (torch.cuda.max_memory_allocated(case.device) - before) / 2**20
    if row.compiles:
        step()  # the compiler's own memory is not the row's
    _settle()
    before = _now_and_restart_peak()
    outputs = step()
    found = _peak() - before
    del outputs
    return max(found, 0) / 2**20


def main() -> None:
    """One figure on standard output."""
    warnings.simplefilter("ignore")
    data = json.load(sys.stdin)
    print(f"{peak(Case.from_json(data['case']), data['row']):.3f}")


if __name__ == "__main__":
    main()
