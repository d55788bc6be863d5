"""The GPU that Triton's kernels are compiled for where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cacr_kernels.backends.triton import ops

if TYPE_CHECKING:
    from .ptx_cases import Target


@pytest.fixture
def interpreter() -> None:
    """For a test that runs kernels in Triton's interpreter, in this process or in another one."""
    if ops.installed() and (reason := ops.about_numpy()) is not None:
        pytest.skip(reason)


@pytest.fixture(params=["sm_80", "sm_90"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    from .ptx_cases import TARGETS, compile_for

    compile_for(TARGETS[request.param], monkeypatch)
    return TARGETS[request.param]
