"""Gradients in two passes: ``cacr_kernels/chunked.py``."""

from __future__ import annotations

from ..fault import Fault

FILE = "cacr_kernels/chunked.py"
TESTS = "tests/losses/test_chunked.py"

FAULTS = (
    Fault(
        "chunked-other-random-numbers",
        FILE,
        text="            _set_random_states(state)\n",
        replacement="",
        why="dropout of the second pass is another than that of the gradients",
        tests=TESTS,
    ),
    Fault(
        "chunked-random-numbers-come-again",
        FILE,
        text="        _set_random_states(after)\n",
        replacement="",
        why="the next batch gets the dropout of this one",
        tests=TESTS,
    ),
    Fault(
        "chunked-never-averaged",
        FILE,
        text="if no_sync is not None and not last else",
        replacement="if no_sync is not None else",
        why="under DDP gradients stay those of each rank",
        tests="tests/distributed/test_gathered.py::test_check[chunks_of_all_ranks-2]",
    ),
)
