"""``make gpu-check`` on the GPUs that are not there: every step runs as far as no silicon is needed, and says how far.

``python -m tests.fake_cuda -m pytest tests/fake_cuda``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("FAKE_CUDA") != "1":
    pytest.skip("needs a CUDA device of its own kind: python -m tests.fake_cuda -m pytest", allow_module_level=True)

from benchmarks.gpu_check.problems import PRODUCTS, TINY
from benchmarks.gpu_check.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("triton", "cuda")


class Report:
    """What the check has written."""

    def __init__(self, folder: Path, status: int, printed: str) -> None:
        self.status, self.printed = status, printed
        self.text = (folder / "report.md").read_text(encoding="utf-8")
        self.steps: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))["steps"]

    def results(self, step: str, ok: bool | None = True) -> dict[str, dict[str, Any]]:
        """The tasks of a step that ended so, by name."""
        lines = (line for line in self.steps[step]["lines"] if line["event"] == "result")
        return {line["task"]: line for line in lines if line["ok"] is ok}

    def notes(self, step: str) -> str:
        return " ".join(line["text"] for line in self.steps[step]["lines"] if line["event"] == "note")


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(folder), "-n1", "--minutes=60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return Report(folder, done.returncode, done.stdout)


def test_nothing_fails(check: Report) -> None:
    assert check.status == 0, check.text
    assert list(check.steps) == [step.name for step in STEPS]
    ended = {name: step["status"] for name, step in check.steps.items() if name != "cpu_threads"}
    assert ended == {name: "skipped" if name == "build" else "done" for name in ended}, check.text
    assert all(check.results(name, ok=False) == {} for name in check.steps)


def test_it_says_at_the_beginning_how_long_it_takes(check: Report) -> None:
    first = check.printed.splitlines()[0]
    assert first.startswith("at most 60.0 minutes; up to ")
    assert "Triton kernels to compile (warm " in first
    assert "kernels in" in check.text


def test_the_environment_knows_both_backends(check: Report) -> None:
    notes = check.notes("environment")
    assert all(f'backend "{name}": can run' in notes for name in BACKENDS)


def test_what_needs_a_gpu_says_so(check: Report) -> None:
    assert "the GPUs are not there" in check.steps["build"]["reason"]
    for step in ("times", "verify", "device_tests"):
        assert "kernels are interpreted" in check.notes(step)
    dropped = check.results("times", ok=None)
    assert {name: line["problem"] for name, line in dropped.items() if name.startswith("compiled")} == {
        f"compiled {problem.name}": "torch.compile makes kernels of its own, which need a GPU that is there"
        for problem in TINY
    }


def test_every_row_of_the_times_runs_and_none_is_timed(check: Report) -> None:
    good = check.results("times")
    rows = {f"{row} {problem.name}" for problem in TINY for row in (*BACKENDS, "eager", "torch")}
    assert set(good) == rows | {f"peak {products}" for products in PRODUCTS}
    for line in good.values():
        assert line.get("p50 ms") is None
        assert line["TFLOP/s"] is None
    assert good[f"triton {TINY[0].name}"]["predicted ms"] > 0
    assert "not checked, no problem has times of both backends" in check.text


def test_kernels_of_both_backends_are_compared(check: Report) -> None:
    for step in ("smoke", "verify", "device_tests"):
        for backend in BACKENDS:
            assert any(backend in name for name in check.results(step)), f"{step} {backend}"
    losses = {name.split()[2] for name in check.results("verify") if "gradcheck" not in name}
    assert losses == {"cacr_loss", "cacr_queue_loss", "cacr_momentum_loss", "supervised_cacr_loss"}
