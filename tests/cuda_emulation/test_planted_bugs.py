"""Bugs planted in the kernel of pipeline.cuh are found, and the kernel without them passes, under every schedule."""

from __future__ import annotations

import re

import pytest

from .building import HERE, emulated, run

pytestmark = pytest.mark.exhaustive

BUGS = re.findall(r"^  k(\w+),", (HERE / "pipeline.cuh").read_text(), re.MULTILINE)[:-1]  # the last is their number
SEEDS = 32


def outcomes(bug: str, sanitizer: str, seeds: int, blocks: int = 3, features: int = 80) -> tuple[list[str], str]:
    """A line for every seed, and what the sanitizer has to say."""
    program = emulated("check_pipeline.cpp", sanitizer)
    done = run(program, BUGS.index(bug), blocks, features, seeds)
    return done.stdout.splitlines(), done.stderr


# How often of 32 schedules, at least, and as what.
FOUND = {
    "MissingBarrier": (30, "wrong"),
    "MissingTrailingBarrier": (8, "wrong"),
    "WaitCount": (30, "wrong"),
    "SharedIndex": (32, r"index \d+ in a shared array of \d+ elements"),
    "SharedAddress": (32, "ldmatrix_x4 at pipeline.cuh:.* address beyond a buffer of shared memory"),
    "SharedPointer": (32, r"byte \d+ of shared memory, outside all buffers, was written"),
    "SwappedRegister": (32, "wrong"),
    "MissingWarpSync": (30, "wrong"),
    "MissingGridBarrier": (16, "wrong"),
    "Unwritten": (32, "wrong"),
    "StaleLayout": (10, "wrong"),
}
INVISIBLE = {"None", "GlobalIndex"}  # a read of global memory out of bounds is the address sanitizer's


def test_every_bug_has_a_test() -> None:
    assert set(BUGS) == FOUND.keys() | INVISIBLE


@pytest.mark.parametrize("bug", FOUND)
def test_bug_is_found(bug: str) -> None:
    least, how = FOUND[bug]
    lines, _ = outcomes(bug, "plain", SEEDS)
    assert len(lines) == SEEDS
    assert set(lines) != {"ok"}
    assert sum(re.search(how, line) is not None for line in lines) >= least


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("features", [16, 32, 112])
def test_nothing_is_found_where_nothing_is(blocks: int, features: int) -> None:
    assert outcomes("None", "plain", 100, blocks, features) == (["ok"] * 100, "")


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("GlobalIndex", "heap-buffer-overflow.*READ of size"),
        ("SharedPointer", "use-after-poison.*WRITE of size 2"),
    ],
)
def test_found_by_the_address_sanitizer(bug: str, report: str) -> None:
    _, messages = outcomes(bug, "address", 2)
    assert re.search(report, messages, re.DOTALL)


def test_nothing_for_the_address_sanitizer() -> None:
    assert outcomes("None", "address", 12) == (["ok"] * 12, "")


@pytest.mark.parametrize("bug", ["MissingBarrier", "MissingTrailingBarrier", "MissingWarpSync", "MissingGridBarrier"])
def test_found_by_the_thread_sanitizer(bug: str) -> None:
    """A race is reported even by the schedule under which everything goes well."""
    _, messages = outcomes(bug, "thread", 4, blocks=2, features=48)
    assert "WARNING: ThreadSanitizer: data race" in messages


def test_nothing_for_the_thread_sanitizer() -> None:
    assert outcomes("None", "thread", 8, blocks=2, features=48) == (["ok"] * 8, "")


def test_portable_switch() -> None:
    """The switch between fibers for processors other than x86-64."""
    program = emulated("check_pipeline.cpp", "plain", "-DCUDA_EMULATION_UCONTEXT")
    assert run(program, 0, 3, 80, 6).stdout.split() == ["ok"] * 6
    assert set(run(program, BUGS.index("MissingBarrier"), 3, 80, 6).stdout.split()) == {"wrong"}
