"""The kernels of csrc/cuda under many schedules and the sanitizers: the same bits, nothing unwritten, nothing reported.

Their values are compared with float64 by the tests of the "cuda" backend, which also run in the emulation.
"""

from __future__ import annotations

import re
import signal

import pytest

from .building import ROOT, emulated, run

pytestmark = pytest.mark.exhaustive

PLAIN = ("bf16", "f16", "tf32", "tf32x3", "float", "double")
PROGRAM = "check_operators.cpp"


@pytest.mark.parametrize("blocks", [3, 1, 0])  # side by side, in one block, and with a launch for every phase
@pytest.mark.parametrize("arithmetic", PLAIN)
def test_schedules(arithmetic: str, blocks: int) -> None:
    done = run(emulated(PROGRAM), arithmetic, {3: 6, 1: 2, 0: 2}[blocks], blocks)
    assert (done.stdout, done.stderr) == ("0 failures\n", "")


@pytest.mark.parametrize("arithmetic", PLAIN)
def test_address_sanitizer(arithmetic: str) -> None:
    done = run(emulated(PROGRAM, "address", f"-DONLY=k{arithmetic.capitalize()}"), arithmetic, 2, 3)
    assert (done.stdout, done.stderr) == ("0 failures\n", "")


@pytest.mark.parametrize("arithmetic", PLAIN)
def test_thread_sanitizer(arithmetic: str) -> None:
    done = run(emulated(PROGRAM, "thread", f"-DONLY=k{arithmetic.capitalize()}"), arithmetic, 1, 2)
    assert (done.stdout, done.stderr) == ("0 failures\n", "")


def barriers() -> dict[str, int]:
    """Every barrier and every wait of the kernels, as "file:line", and how many blocks miss it."""
    found = {}
    for path in sorted((ROOT / "csrc/cuda").rglob("*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if path.name != "ptx.cuh" and re.search(r"__sync\w+\(.*\);|cp_async_wait<\d>\(\);|grid_sync\(\);", line):
                found[f"{path.name}:{number}"] = 3 if "grid_sync" in line else 1
    return found


BARRIERS = barriers()


def test_barriers_are_known() -> None:
    assert len(BARRIERS) >= 10
    assert {3, 1} == set(BARRIERS.values())


@pytest.mark.parametrize("left_out", BARRIERS)
def test_every_barrier_is_missed(left_out: str) -> None:
    """Without it, some results are not those of the orderly schedule, or not numbers: none is there in vain.

    Or memory is read that is none: addresses stand in shared memory, too. One barrier is not that of float64.
    """
    for arithmetic in ("double", "float"):
        done = run(emulated(PROGRAM), arithmetic, 4, BARRIERS[left_out], left_out)
        if done.returncode == -signal.SIGSEGV or re.search(r"^[1-9]\d* failures$", done.stdout, re.MULTILINE):
            return
    pytest.fail(f"nobody misses {left_out}")


def test_offsets_beyond_32_bits() -> None:
    assert run(emulated("check_offsets.cpp")).stdout == "0 failures\n"
