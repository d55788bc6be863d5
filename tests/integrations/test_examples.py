"""The examples in the docstrings of the modules that need another library."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["pytorch_metric_learning", "sentence_transformers"])
def test_examples_of_the_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"cacr_kernels.integrations.{name}"))
    assert result.failed == 0
    assert result.attempted > 0
