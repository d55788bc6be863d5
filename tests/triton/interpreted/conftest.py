"""All tests in here run kernels in Triton's interpreter."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _in_the_interpreter(interpreter: None) -> None:
    """Skips where that cannot be."""
