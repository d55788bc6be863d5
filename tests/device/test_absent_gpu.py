"""No test hands CPU tensors to a backend of a GPU: shown without one, on a device that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_TENSORS = """
import pytest, torch
from tests.agreement import LOSSES, each_backend, small_inputs, there

@each_backend
def test_cpu_tensors(backend):
    LOSSES["cacr"](**small_inputs("cacr"), backend=backend)

@each_backend
def test_tensors_of_two_devices(backend):
    tensors = there(small_inputs("cacr"), backend)
    tensors["views"] + small_inputs("cacr")["views"]

@each_backend
def test_tensors_of_the_device(backend):
    tensors = there(small_inputs("cacr"), backend)
    views = tensors["views"].requires_grad_()
    LOSSES["cacr"](**tensors, backend=backend).backward()
    assert views.grad.device.type == "absent"
"""


def with_absent_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    plugins = ["-p", "tests.device.absent_gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "CI")}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins, *arguments]
    environment = kept | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.exhaustive
def test_every_test_chooses_tensors_of_its_backend() -> None:
    """But for the slow ones of test_extremes.py, all of which leave that to ``assert_within_budget``."""
    done = with_absent_gpu("tests/losses", "tests/operators", "--ignore", "tests/losses/test_extremes.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.exhaustive
def test_cpu_tensors_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "test_planted.py"
    file.write_text(CPU_TENSORS, encoding="utf-8")
    done = with_absent_gpu(str(file), "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 1 passed" in done.stdout, done.stdout
    assert "works on absent tensors, not cpu" in done.stdout
    assert "to be on the same device" in done.stdout
