"""The kernels of csrc/cuda under many schedules and the sanitizers: the same bits, nothing unwritten, nothing reported.

Their values are compared with float64 by the tests of the "cuda" backend, which also run in the emulation.
"""

from __future__ import annotations

import pytest

from .building import emulated, run

PLAIN = ("bf16", "f16", "tf32", "tf32x3", "float", "double")
SANITIZED = ("f16", "tf32x3", "double")  # one of each kind of arithmetic, to save compiling the others
PROGRAM = "check_operators.cpp"


@pytest.mark.parametrize("blocks", [3, 1, 0])  # side by side, in one block, and with a launch for every phase
@pytest.mark.parametrize("arithmetic", PLAIN)
def test_schedules(arithmetic: str, blocks: int) -> None:
    done = run(emulated(PROGRAM), arithmetic, {3: 6, 1: 2, 0: 2}[blocks], blocks)
    assert (done.stdout, done.stderr) == ("0 failures\n", "")


@pytest.mark.parametrize("arithmetic", SANITIZED)
def test_address_sanitizer(arithmetic: str) -> None:
    done = run(emulated(PROGRAM, "address", "-DSANITIZED"), arithmetic, 2, 3)
    assert (done.stdout, done.stderr) == ("0 failures\n", "")


@pytest.mark.parametrize("arithmetic", SANITIZED)
def test_thread_sanitizer(arithmetic: str) -> None:
    done = run(emulated(PROGRAM, "thread", "-DSANITIZED"), arithmetic, 1, 2)
    assert (done.stdout, done.stderr) == ("0 failures\n", "")
