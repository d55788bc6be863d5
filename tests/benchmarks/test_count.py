"""Counting instructions: which tool, what is read of its answers, and that nothing fails without one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.suite import __main__ as command
from benchmarks.suite import cases, count
from benchmarks.suite.cases import BenchmarkCase
from tests.benchmarks.benchmarking import TINY, row_named

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

PERF = "5000000,,instructions:u,991,100.00,,\n"
NOT_ALLOWED = "<not supported>,,instructions:u,0,100.00,,\n"


def answering(stderr: str) -> Any:
    return lambda *_, **__: SimpleNamespace(stderr=stderr, stdout="", returncode=0)


def test_which_tool_counts() -> None:
    everything, nothing = (lambda name: f"/usr/bin/{name}"), (lambda name: None)
    perf = count.find_tool(answering(PERF), everything)
    assert isinstance(perf, count.Tool)
    assert perf.name == "perf stat"
    valgrind = count.find_tool(answering(NOT_ALLOWED), everything)
    assert isinstance(valgrind, count.Tool)
    assert valgrind.name == "callgrind"
    reason = count.find_tool(answering(PERF), nothing)
    assert reason == "no instructions are counted: perf is not installed; valgrind is not installed"
    only_perf = count.find_tool(answering(NOT_ALLOWED), lambda name: name if name == "perf" else None)
    assert "perf is not allowed to count instructions here; valgrind is not installed" in str(only_perf)


def test_without_a_tool_the_command_says_so_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(count, "find_tool", lambda: "no instructions are counted: because")
    assert command.main(["--count", "--filter", "B=32 D=64"]) == 0
    assert "no instructions are counted: because" in capsys.readouterr().out


def test_answers_of_the_tools() -> None:
    assert count.perf_total("noise\n" + PERF) == 5e6
    assert count.perf_total(NOT_ALLOWED) is None
    assert count.callgrind_total("events: Ir\nsummary: 1234\n") == 1234
    assert count.callgrind_total("fn=x\n1 2\n\ntotals: 77\n") == 77
    assert count.callgrind_total("") is None
    text = 'noise\n{"job": 2, "isa": "avx2"}\n'
    assert count.read_answers(text) == {2: {"job": 2, "isa": "avx2"}}


def test_perf_counts_the_calls_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 1e9 instructions in which every call has 1000."""

    def run(line: list[str], **_: Any) -> SimpleNamespace:
        calls = json.loads(Path(line[-1]).read_text(encoding="utf-8"))["calls"]
        total = 10**9 + 1000 * calls
        answer = json.dumps({"job": 1, "isa": "avx512"})
        return SimpleNamespace(stdout=f"{answer}\n", stderr=PERF.replace("5000000", str(total)), returncode=0)

    monkeypatch.setattr(count.subprocess, "run", run)
    (found,) = count.by_perf([(TINY, row_named("torch"))])
    assert found == count.Counted(TINY.key, "torch", 1000.0, "avx512")


def test_what_is_counted_has_one_thread_and_is_not_large() -> None:
    large = BenchmarkCase(cases.cacr(2, 4096, 512), threads=2)
    jobs, left_out = count.jobs_of([BenchmarkCase(TINY.problem, threads=2), large], lambda case: [row_named("torch")])
    assert [(case.threads, row.name) for case, row in jobs] == [(1, "torch")]
    assert left_out == [large.key]


def test_a_process_makes_the_calls_and_tells_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = BenchmarkCase(cases.cacr(2, 9, 6, tau=1.0))
    jobs = [(TINY, row_named("torch")), (bad, row_named("torch"))]
    *_, file = count.child(jobs, 2, False, tmp_path / "jobs.json")
    count.main([file])
    first, second = count.read_answers(capsys.readouterr().out).values()
    assert set(first) == {"job", "isa"}
    assert "TypeError" in second["error"]


def test_callgrind_writes_a_part_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process for all; the second row ended without a part, the third fails."""

    def run(line: list[str], **_: Any) -> SimpleNamespace:
        assert line[:2] == ["valgrind", "--tool=callgrind"]
        out = next(word for word in line if word.startswith("--callgrind-out-file=")).partition("=")[2]
        wanted = json.loads(Path(line[-1]).read_text(encoding="utf-8"))
        assert [job["row"] for job in wanted["jobs"]] == ["torch", "eager", "z.sum()"]
        Path(f"{out}.1").write_text(f"events: Ir\nsummary: {1000 * wanted['calls']}\n", encoding="utf-8")
        Path(f"{out}.3").write_text("summary: 5\n", encoding="utf-8")
        answers = [{"job": 1, "isa": "avx2"}, {"job": 2, "isa": "avx2"}, {"job": 3, "isa": "avx2", "error": "no"}]
        return SimpleNamespace(stdout="\n".join(map(json.dumps, answers)), stderr="", returncode=0)

    monkeypatch.setattr(count.subprocess, "run", run)
    found = count.by_callgrind([(TINY, row_named(name)) for name in ("torch", "eager", "z.sum()")])
    assert [(c.row, c.instructions, c.isa, c.reason) for c in found] == [
        ("torch", 1000.0, "avx2", ""),
        ("eager", None, "avx2", "callgrind wrote nothing"),
        ("z.sum()", None, "avx2", "no"),
    ]
