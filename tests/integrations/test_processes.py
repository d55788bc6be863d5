"""Two processes in other libraries: what one process computes, in float64."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path

import pytest

from tests.distributed.processes import failures, in_processes

from .processes import CHECKS

RANKS = 2


def everything() -> dict[str, str]:
    """What each check said."""
    warnings.simplefilter("ignore")  # libraries of their own settings
    return failures(CHECKS)


@functools.cache
def started() -> list[dict[str, str]] | Exception:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return in_processes(RANKS, Path(folder), everything)
        except Exception as error:
            return error


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    """The processes start once, for all checks."""
    found = started()
    if isinstance(found, Exception):
        raise found
    said = [checks[name] for checks in found]
    assert said == [""] * RANKS, "\n".join(said)
