"""Session-wide test configuration: what ``make test`` runs, threads, and skips that a complete machine may not have."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

# Kernels run in Triton's interpreter or are compiled, by an environment variable that is read when Triton is imported:
# the tests in there are for processes of their own (tests/triton/test_interpreter.py).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton/interpreted"]
# Tests with the libraries of the extra "integrations": .ci/run names them, in an environment that has these.
if not all(map(importlib.util.find_spec, ("pytorch_metric_learning", "sentence_transformers", "datasets"))):
    collect_ignore.append("integrations")

# What a test machine may lack. Any other skip is a failure under CI=true: what can run there has to.
ALLOWED_SKIPS = (
    "needs a CUDA device",
    "needs a CUDA build of torch",
    "needs a processor that multiplies bfloat16",
    "needs a library for x86-64",
)


@pytest.fixture(autouse=True)
def _the_same_in_any_order() -> None:
    """No compiled code, the same random numbers, one thread: workers of pytest-xdist take a core each."""
    torch._dynamo.reset()
    torch.default_generator.manual_seed(0)
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def threads() -> Generator[Callable[[int], None]]:
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """How long an example of Hypothesis takes says how busy the machine is.

    Only where it is used: importing it takes a second.
    """
    if "from hypothesis" in module_path.read_text(encoding="utf-8"):
        from hypothesis import HealthCheck, settings

        ignored = {*settings().suppress_health_check, HealthCheck.too_slow}
        settings.register_profile("tests", settings(), deadline=None, suppress_health_check=list(ignored))
        settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("CACR_TEST_ALL") == "1" or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def _fail_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which CI=true does not allow: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_unexpected_skip(report)
    return report
