"""The Triton backend: in Triton's interpreter (a process with ``TRITON_INTERPRET=1`` for each suite), and as registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Numbers of the published code; what runs in a few seconds of an interpreter.
VECTORS = "triton and (views_00 or views_03 or rbf_01 or queue_01 or momentum_02) and not weights"
SUITES = {
    "operators": ["interpreted/test_triton_operators.py"],
    "losses": ["interpreted/test_triton_losses.py"],
    "vectors": ["test_vectors.py", "-k", VECTORS],
}


@pytest.mark.parametrize("suite", SUITES)
def test_in_the_interpreter(suite: str) -> None:
    file, *selection = SUITES[suite]
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    command = [sys.executable, "-m", "pytest", str(TESTS / file), *selection, *quiet]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    found = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
