"""What the emulation refuses and how it executes: the cases of check_execution.cpp."""

from __future__ import annotations

import re

import pytest

from .building import emulated, run

pytestmark = pytest.mark.exhaustive


def outcome(case: str, seed: int) -> str:
    done = run(emulated("check_execution.cpp", "plain"), case, seed)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REFUSALS = {
    "divergent_barrier": r"divergent barrier: __syncthreads at \S+:\d+, while others wait in __syncthreads at \S+:\d+",
    "exit_before_barrier_of_the_grid": r"block \(1, 0, 0\): threads 0-4 wait in grid_sync .*; threads 5-31 have exited",
    "barrier_without_cooperation": "grid_sync in a launch that is not cooperative",
    "too_many_blocks": "a cooperative grid of more blocks than can be resident",
    "too_many_threads": "a launch that no device accepts",
    "shuffle_in_two_places": "divergent warp: __shfl_xor_sync at",
    "shuffle_of_some": "names lanes that have exited|deadlock",
    "shuffle_of_the_exited": "names lanes that have exited",
    "shuffle_without_oneself": "the calling lane is not in its mask",
    "shuffle_from_outside": "reads a lane outside the mask",
    "overlapping_masks": "overlapping masks|names lanes that have exited",
    "misaligned_copy": "misaligned address in shared memory",
    "misaligned_source": "misaligned source",
    "copy_to_global_memory": "address outside shared memory",
    "copy_of_too_much": "20 valid bytes",
    "negative_index": "index -1 in a shared array of 3 elements",
    "more_than_was_asked_for": r"the launch gives 511 bytes of shared memory, the kernel's buffers are 512",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str) -> None:
    for seed in range(8):
        assert re.search(REFUSALS[case], outcome(case, seed))


def test_deadlock_says_who_waits_where() -> None:
    assert re.fullmatch(
        r"deadlock: nobody can go on\nblock \(0, 0, 0\): threads 0-31 wait in __syncthreads at check_execution.cpp:\d+;"
        r" threads 32-47 wait in __syncwarp at check_execution.cpp:\d+; threads 48-63 have exited",
        outcome("barrier_of_a_half", 0),
    )


EXECUTED = {
    "early_exit": [40] * 40,  # exited threads do not count
    "reductions": [32 * 10000 + 1000 + 1] * 96,
    "halves_of_a_warp": [lane ^ 1 for lane in range(16)] + [lane ^ 2 for lane in range(16, 32)],
    "poisoned_memory": [-1, 10, -1],  # all bits are set until written, and when another struct takes the place
    "places": [1] * 12 * 30,
    "everybody_counts": [1920, 63, -63, 1, 6, 9, 9],
    "last_block_sums": [7, 1, 2, 3, 4, 5, 6, 7, 28],
}


@pytest.mark.parametrize("case", EXECUTED)
def test_executed(case: str) -> None:
    for seed in range(8):
        assert [int(x) for x in outcome(case, seed).split()] == EXECUTED[case]


def test_copy_under_way() -> None:
    """It arrives at once or at the wait, and nobody knows which; what was there before is gone."""
    assert {outcome("copy_under_way", seed) for seed in range(20)} == {"-1 23", "23 23"}


def test_schedules() -> None:
    """The same from the same seed, in order from seed 0, backwards from 1, others from others; nobody is left out."""
    orders = {seed: outcome("order_of_threads", seed).split()[1:] for seed in range(40)}
    blocks = [[str(1 + thread + 100 * block) for thread in range(64)] for block in range(3)]
    everybody = [thread for block in blocks for thread in block]
    assert orders[0] == everybody
    assert orders[1][:64] in [block[::-1] for block in blocks]
    assert all(sorted(order) == sorted(everybody) for order in orders.values())
    assert outcome("order_of_threads", 7).split()[1:] == orders[7]
    assert len({tuple(order) for order in orders.values()}) > 30
