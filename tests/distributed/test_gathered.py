"""``gather_distributed=True``: for any number of processes what one process with the whole batch computes."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cacr_kernels import distributed
from cacr_kernels.verify_distributed import Row, cases_in, compare

from . import wrappers
from .checks import CHECKS, SLOW
from .processes import failures, in_processes

BACKENDS = ("reference", "torch", "cpu")
WORLDS = [2, *(pytest.param(world, marks=pytest.mark.exhaustive) for world in (1, 3, 4, 8))]
assert wrappers  # whose checks are among CHECKS
THOROUGH = os.environ.get("CACR_TEST_ALL") == "1"  # else each backend has a third of the cases


def everything() -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Compared cases by dtype, and what each check said."""
    rows: dict[str, list[Row]] = {}
    for dtype in (torch.float64, torch.float32) if THOROUGH and dist.get_world_size() == 2 else (torch.float64,):
        rows[str(dtype)] = []
        for i, backend in enumerate(BACKENDS):
            cases = cases_in(dtype, dist.get_world_size())
            for case in cases if THOROUGH else cases[i :: len(BACKENDS)]:
                rows[str(dtype)].append(compare(case, backend, dtype, distributed.world(), torch.device("cpu")))
    return rows, failures(CHECKS)


def slow() -> dict[str, str]:
    """What each slow check said."""
    return failures(SLOW)


@functools.cache
def started(world: int) -> list[tuple[dict[str, list[Row]], dict[str, str]]] | Exception:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return in_processes(world, Path(folder), everything)
        except Exception as error:
            return error


def found(world: int) -> list[tuple[dict[str, list[Row]], dict[str, str]]]:
    """What the ranks say: the processes of a world start once."""
    result = started(world)
    if isinstance(result, Exception):
        raise result
    return result


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_compute_what_one_process_does(world: int) -> None:
    rows = found(world)[0][0]["torch.float64"]
    assert len(rows) > 40
    assert [row for row in rows if not row.ok] == []


@pytest.mark.exhaustive
def test_float32_is_as_exact_as_in_one_process() -> None:
    rows = found(2)[0][0]["torch.float32"]
    assert len(rows) > 100
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CHECKS)
def test_check(world: int, name: str) -> None:
    said = [checks[name] for _, checks in found(world)]
    assert said == [""] * world, "\n".join(said)


@pytest.mark.exhaustive
def test_slow_checks(tmp_path: Path) -> None:
    for said in in_processes(2, tmp_path, slow):
        assert list(said.values()) == [""] * len(SLOW), "\n".join(said.values())
