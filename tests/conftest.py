"""Session-wide test configuration: threads, and skips that a complete test machine may not have."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

# Kernels run in Triton's interpreter or are compiled, by an environment variable that is read when Triton is imported:
# the tests in there are for processes of their own (tests/triton/test_interpreter.py).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton/interpreted"]

# What a test machine may lack. Any other skip is a failure under CI=true: what can run there has to.
ALLOWED_SKIPS = ("needs a CUDA device", "needs an AVX-512 processor")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # one pytest-xdist worker per core; tests about threads set their own number


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
