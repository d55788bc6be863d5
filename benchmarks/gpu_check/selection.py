"""Plugin of pytest: takes the share of a process of the tests that concern a GPU, and writes how each ended."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from typing import Any

import pytest

from .child import LOST, Context, is_sticky, leave
from .devices import GPU_BACKENDS
from .lines import RESULT, START


def backend_of(item: pytest.Item) -> str | None:
    """The backend that is a parameter of the test."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend") if callspec else None


def concerns_gpu(item: pytest.Item) -> bool:
    """A test of one backend of a GPU, and no more of its parameters than without one (``tests/covering.py``).

    Tests that draw shapes at random or loop over many have no end there: each shape is a kernel to compile.
    """
    return backend_of(item) in GPU_BACKENDS and not any(map(item.get_closest_marker, ("exhaustive", "hypothesis")))


def group_of(item: pytest.Item) -> str:
    """The id of a test without its backend: what is expected of one is computed for all of them at once."""
    name, _, parameters = item.nodeid.partition("[")
    return f"{name}[{'-'.join(part for part in parameters.rstrip(']').split('-') if part not in GPU_BACKENDS)}]"


class Selection:
    """A test that an earlier process of the share has begun is left out: it crashed or hung there.

    ``few``: of every test the first parameters of each backend are enough.
    """

    def __init__(self, context: Context, seconds: float, few: bool = False) -> None:
        self.context, self.seconds, self.few = context, seconds, few
        self.verdict: dict[str, Any] = {}
        self.errors = os.fdopen(os.dup(2), "w")  # before pytest takes what is printed

    @pytest.hookimpl(trylast=True)  # after Hypothesis has marked its tests
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = self.context.lines.started()
        chosen = [item for item in items if concerns_gpu(item)]
        if self.few:
            first = {(item.nodeid.partition("[")[0], backend_of(item)): item for item in reversed(chosen)}
            chosen = [item for item in chosen if item in first.values()]
        share = [item for item in chosen if self.context.takes(group_of(item)) and item.nodeid not in done]
        kept = {id(item) for item in share}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = share

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.context.lines.write(RESULT, task=f"collect {report.nodeid}", ok=False, problem=report.longreprtext)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.context.lines.write(START, task=item.nodeid, share=self.context.share)
        self.verdict = {"ok": True, "seconds": 0.0}
        faulthandler.dump_traceback_later(self.seconds * self.context.scale, exit=True, file=self.errors)
        try:
            found = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.context.lines.write(RESULT, task=item.nodeid, **self.verdict)
        if self.verdict["ok"] is False and is_sticky(self.verdict["problem"]):
            leave(LOST)
        return found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.verdict["seconds"] = round(self.verdict["seconds"] + report.duration, 3)
        if report.failed and self.verdict["ok"] is not False:
            self.verdict |= {"ok": False, "problem": report.longreprtext}
        elif report.skipped and self.verdict["ok"]:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.verdict |= {"ok": None, "problem": reason}
