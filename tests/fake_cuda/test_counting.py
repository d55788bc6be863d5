"""How many Triton kernels ``make gpu-check`` compiles, counted without compiling one.

``python -m tests.fake_cuda -m pytest tests/fake_cuda``
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("FAKE_CUDA") != "1":
    pytest.skip("needs a CUDA device of its own kind: python -m tests.fake_cuda -m pytest", allow_module_level=True)

from benchmarks.gpu_check.reckoned import COMPILED

from . import counting

ROOT = Path(__file__).resolve().parents[2]


def test_a_kernel_counts_in_the_first_step_that_needs_it() -> None:
    def line(step: str, key: str) -> dict[str, str]:
        return {"step": step, "kernel": f"kernel {key[0]}", "key": key}

    # Processes of a step count for themselves, and the lines of all of them come in any order.
    lines = [line("verify", "a1"), line("warm", "a1"), line("warm", "a1"), line("warm", "a2"), line("verify", "b1")]
    found = counting.by_step(lines)
    assert found["warm"] == {"kernel a": 2}
    assert found["verify"] == {"kernel b": 1}
    assert found["device_tests"].total() == 0


def test_what_is_reckoned_is_what_is_compiled() -> None:
    """Of the step that compiles beforehand; the whole count takes too long here."""
    command = [sys.executable, "-m", "tests.fake_cuda.counting", "environment", "warm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (total,) = re.findall(r"^warm: (\d+) ", done.stdout, re.MULTILINE)
    assert int(total) == COMPILED["warm"], f"put the new number into benchmarks/gpu_check/reckoned.py:\n{done.stdout}"
