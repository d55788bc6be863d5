"""``verify --distributed``, and the example of the documents, as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from cacr_kernels import verify, verify_distributed
from cacr_kernels.verify_distributed import Order, Row

ROOT = Path(__file__).parents[2]
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True)


@pytest.mark.exhaustive
def test_under_torchrun(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = "-m", "cacr_kernels.verify", "--distributed", "--backend", "cpu", "--quick", "--json", str(report)
    done = run(*TORCHRUN, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: ") == 1
    assert "2 processes: 26 checks: what one process computes" in done.stdout
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["ok"]
    assert len(found["checks"]) == 26


@pytest.mark.exhaustive
def test_it_starts_processes_itself(capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--processes", "3", "--backend", "torch", "--quick"]) == 0
    assert "3 processes: 26 checks: what one process computes" in capfd.readouterr().out


def _with_a_wrong_gradient(rank: int, store: str, status: int) -> None:
    def wrong(*arguments: object) -> Row:
        return Row("torch", "float64", "cacr_loss", "a case", "views", float("nan") if rank == 0 else 0.0, 1e-12)

    verify_distributed.compare = wrong  # type: ignore[assignment]
    with Path(f"{store}.{rank}").open("w", encoding="utf-8") as said, contextlib.redirect_stdout(said):
        found = verify_distributed.run_rank(rank, 2, Path(store), Order(["torch"], "cpu", quick=True))
    assert found == status


@pytest.mark.exhaustive
def test_a_failure_shows_on_every_rank(tmp_path: Path) -> None:
    """In the status of each; rank 0 says what failed."""
    arguments = str(tmp_path / "store"), 1
    mp.start_processes(_with_a_wrong_gradient, arguments, nprocs=2, start_method="forkserver")
    said, silent = ((tmp_path / f"store.{rank}").read_text(encoding="utf-8") for rank in range(2))
    assert not silent
    assert "FAILED torch float64: views of a case: error nan > 1.00e-12" in said
    assert "NOT what one process computes" in said


def test_what_it_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert verify.main(["--distributed"]) == 2
    assert "start it with torchrun --nproc-per-node N -m, or give --processes N" in capsys.readouterr().err
    assert verify.main(["--processes", "0"]) == 2
    assert "--processes must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_the_example_of_the_documents(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "several_processes.md").read_text(encoding="utf-8")
    example = tmp_path / "train.py"
    example.write_text(section.split("```python\n")[1].split("```")[0], encoding="utf-8")
    done = run(*TORCHRUN, str(example))
    assert done.returncode == 0, done.stderr
