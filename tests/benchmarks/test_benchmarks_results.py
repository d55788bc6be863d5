"""The results of the benchmarks: files, tables, goals, comparison, pictures, README, and the command."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.demo.config import QUICK
from benchmarks.suite import __main__ as command
from benchmarks.suite import (
    cases,
    gate,
    goals,
    machine,
    overhead,
    plots,
    readme,
    results,
    rows,
    runner,
    tables,
    training_step,
)
from benchmarks.suite.cases import LOSS, BenchmarkCase
from benchmarks.suite.rows import BASELINE, OURS, Row
from cacr_kernels import testing
from tests.benchmarks.benchmarking import BUDGET, ENVIRONMENT, PACKAGES, TINY, silent, uncompiled

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with gate.threads(1):
        yield


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Results of a tiny suite: an ordinary case twice as large as another, and one without gradients."""
    found = [TINY, replace(TINY, problem=cases.cacr(2, 18, 6)), replace(TINY, mode=LOSS)]
    found = [replace(case, problem=_features(case.problem, 128)) for case in found]
    with gate.threads(1):
        return runner.Suite(found, BUDGET, ENVIRONMENT, silent, uncompiled, with_processes=False).run()


def _features(problem: testing.Case, D: int) -> testing.Case:
    return problem._replace(shape=problem.shape | {"D": D})


# ---- results ---------------------------------------------------------------------------------------------------------
def test_json_and_csv_hold_every_field_in_every_row(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    as_json, as_csv = results.write(tmp_path / "new" / "folder", measured, ENVIRONMENT, "quick")
    data = results.read(as_json)
    assert [set(row) for row in data["rows"]] == [set(results.FIELDS)] * len(measured)
    with as_csv.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(results.FIELDS)
    assert len(table) == len(measured)
    for row in data["rows"]:
        assert {k: row[k] for k in ENVIRONMENT} == ENVIRONMENT
        assert row["inputs"] == "random unit rows"
        if row["status"] == results.TIMED:
            assert len(row["round_ms"]) == row["rounds"]
            assert sorted(row["round_ms"])[0] <= row["p50_ms"] * (1 + 1e-5)
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["ratio"] > 0
            assert (row["gflops"] is None) == (row["family"] not in (OURS, BASELINE))
        else:
            assert row["reason"]
    timed = [row for row in data["rows"] if row["status"] == results.TIMED]
    assert {row["row"] for row in timed if row["ours"]} == {rows.ours(TINY)}
    assert all(row["ratio"] == 1.0 for row in timed if row["ours"])


def test_the_environment_names_machine_commit_and_instruction_set() -> None:
    assert set(ENVIRONMENT) <= set(results.FIELDS)
    assert all(ENVIRONMENT[k] for k in ("machine", "cores", "torch", "isa", "python", "version"))
    assert 0 < machine.product_gflops(torch.float64, 1, "cpu", seconds=0.1) < 1e6


def test_other_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("", "[]", '{"schema": 99, "rows": []}', '{"schema": 2, "rows": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json"):
            results.read(path)
    with pytest.raises(ValueError, match="missing"):
        results.read(tmp_path / "missing.json")


def test_the_command_measures_prints_writes_and_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [BenchmarkCase(cases.cacr(2, B, 128), threads=1) for B in (8, 16)]
    monkeypatch.setitem(cases.SUITES, "quick", lambda threads, device: found)
    monkeypatch.setattr(rows, "rows", lambda every=rows.rows: [r for r in every() if not r.compiles])
    out = tmp_path / "out"
    arguments = [
        "--out",
        str(out),
        "--seconds",
        "0.05",
        "--no-processes",
        "--rows",
        "eager,bare mm",
        "--filter",
        "V=2 D=128",
    ]
    assert command.main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {
        "results.json", "results.csv", "sweep.png", "speedup.png", "roofline.png",
    }  # fmt: skip
    assert {row["row"] for row in results.read(out / "results.json")["rows"]} == {rows.ours(TINY), "eager", "bare mm"}
    printed = capsys.readouterr().out
    assert all(f"cacr_loss V=2 B={B} D=128, float32, loss+gradients, 1 thread" in printed for B in (8, 16))
    assert command.main(["--filter", "no such case"]) == 1
    assert command.main(["--list", "--threads", "3"]) == 0
    assert "threads=3" not in capsys.readouterr().out  # the planted suite knows its own
    with pytest.raises(SystemExit, match="unknown name; accepted: "):
        command.main(["--rows", "eagre"])


@pytest.mark.parametrize("option", ["--threads", "--seconds", "--threshold"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "x"])
def test_options_that_count_refuse_other_values(option: str, value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        command.parse_arguments([option, value])
    assert caught.value.code == 2


# ---- goals -----------------------------------------------------------------------------------------------------------
def test_goals_are_those_promised_and_every_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "available_bytes", lambda device: 2**40)
    assert len(goals.GOALS) == 32 + 5 + 4 + 38
    by_case = {name: {case.key: case for case in cases.SUITES[name](2, "cpu")} for name in ("goals", "full")}
    called = BenchmarkCase(cases.raw(cases.cacr(2, 2048, 128)), threads=2, module=True)
    assert set(cases.MODULES) <= set(by_case["full"][called.key].only)  # it is in the table, too, with fewer rows
    for_orientation = set(by_case["goals"]) - {goal.case for goal in goals.GOALS}
    assert len(for_orientation) == 2
    assert all("bfloat16" in case or "supervised" in case for case in for_orientation)
    for found in by_case.values():
        for goal in goals.GOALS:
            case = found[goal.case]
            names = {row.name for row in runner.Suite([case], BUDGET, ENVIRONMENT, silent, few_rows).measured(case)}
            assert (goal.row or rows.ours(TINY)) in names, goal
            assert case.timed if goal.unit in ("×", "%") else case.memory, goal
    wanted = {(goal.case, goal.row): goal for goal in goals.GOALS}
    large = BenchmarkCase(cases.cacr(2, 2048, 128), threads=2).key
    required = {row: wanted[large, row].required for row in ("eager", "compiled", "bare mm", "broadcasting", None)}
    assert required == {"eager": 3.3, "compiled": 3.0, "bare mm": 1.5, "broadcasting": 300.0, None: 80.0}


def few_rows() -> list[Row]:
    return [row for row in rows.rows() if row.name not in PACKAGES]


def goal_row(shape: tuple[int, int, int], name: str, **values: Any) -> dict[str, Any]:
    """What a run would say about a case that a goal is set for."""
    case, ours = BenchmarkCase(cases.cacr(*shape), threads=2), name == rows.ours(TINY)
    return results.record(case, few_rows()[0], ours, ENVIRONMENT) | {"row": name} | values


def test_goals_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    ours, large, huge = rows.ours(TINY), (2, 2048, 128), (2, 65536, 128)
    spread = {"p20_ms": 9.0, "p50_ms": 10.0, "p80_ms": 12.5, "peak_gflops": 200.0, "peak_source": goals.FMA}
    found = [
        goal_row(large, ours, fraction=0.85, ratio=1.0, **spread),
        goal_row(large, "eager", ratio_p20=3.0, ratio=3.2, ratio_p80=3.6),
        goal_row(large, "compiled", ratio_p20=3.1, ratio=3.2, ratio_p80=3.3),
        goal_row((2, 512, 128), ours, fraction=0.95, ratio=1.0, **(spread | {"peak_source": "a large torch.mm"})),
        goal_row((2, 32, 64), "z.sum()", ratio_p20=0.25, ratio=0.4, ratio_p80=0.5),
        goal_row((2, 32768, 128), ours, status=results.SINGLE, memory_mib=161.0, single_ms=5e3),
        goal_row(huge, ours, status=results.SINGLE, memory_mib=222.0, single_ms=2e4),
    ]
    verdicts = goals.verdicts(found)
    by_text = {(v.goal.text, v.label): v for v in verdicts}
    assert len(by_text) == len(verdicts) == 6  # a large product is no FMA peak
    judged = {text: (v.met, round(v.low, 3), round(v.found, 3), round(v.high, 3)) for (text, _), v in by_text.items()}
    assert judged == {
        "eager / ours": (False, 3.0, 3.2, 3.6),
        "compiled / ours": (True, 3.1, 3.2, 3.3),
        "share of the FMA peak": (True, 68.0, 85.0, 94.444),
        "ours / z.sum()": (True, 2.0, 2.5, 4.0),
        "memory above the inputs": (False, 161.0, 161.0, 161.0),
        "runs to its end": (True, 1.0, 1.0, 1.0),
    }
    needed = {text: round(v.needed, 2) for (text, _), v in by_text.items() if v.needed}
    assert needed == {"eager / ours": round(85 * 3.3 / 3.2, 2), "compiled / ours": round(85 * 3.0 / 3.2, 2)}
    killed = goals.verdicts([goal_row(huge, ours, status=results.SINGLE, memory_reason="killed")])
    assert [v.met for v in killed] == [False]
    assert goals.verdicts([goal_row(huge, ours, status=results.SINGLE)]) == []  # not tried

    tables.print_goals(Console(width=160), verdicts)
    printed = capsys.readouterr().out
    for text in (
        "≥ 3.30×",
        "3.20×",
        "3.00–3.60",
        "missed",
        "≥ 80.0 %",
        "85.0 %",
        "≤ 3.00×",
        "2.50×",
        "≤ 160 MiB",
        "88 %",
        "80 %",
    ):
        assert text in printed, text
    assert re.search(r"3.00–3.60 *│ *88 %", printed)
    assert f"4 of 6 goals met; {len(goals.GOALS) - 6} need cases that were not measured" in printed


# ---- README ----------------------------------------------------------------------------------------------------------
def test_readme_shows_committed_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    name = readme.shown(text)
    if name is None:
        assert not readme.committed(), "results are committed, but README shows none of them"
    else:
        assert name in readme.committed()
        assert readme.render(name) in text


def test_readme_is_written_from_results_and_disagrees_once_they_change(
    measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    case = BenchmarkCase(cases.cacr(2, 2048, 128), threads=2)
    ours = next(row for row in measured if row["ours"] and row["status"] == results.TIMED)
    found = [
        ours | {"case": case.key, "V": 2, "B": 2048, "p50_ms": 12.34, "fraction": 0.876, "memory_mib": 8.4},
        *(ours | {"case": case.key, "row": row, "ours": False, "family": BASELINE, "ratio": ratio, "memory_mib": 99.0}
          for row, ratio in (("eager", 3.21), ("broadcasting", 321.0))),
    ]  # fmt: skip
    found[0] |= {"rounds": 9}
    found[1] |= {"rounds": 9}
    found[2] |= {"rounds": 4}
    called = BenchmarkCase(cases.raw(case.problem), threads=2, module=True)
    raw = {"case": called.key, "module": True, "options": found[0]["options"] + " normalize=True"}
    found += [
        found[0] | raw | {"p50_ms": 13.0, "fraction": 0.8, "memory_mib": None},
        found[1] | raw | {"row": "ntxent lightly", "ratio": 7.3},
        found[0] | raw | {"case": BenchmarkCase(readme.POOLED, threads=2, module=True).key, "p50_ms": 39.0},
    ]
    results.write(tmp_path / "results" / "here", found, ENVIRONMENT, "goals")
    plots.draw(tmp_path / "results" / "here", found)
    page, file = tmp_path / "README.md", tmp_path / "results" / "here" / "results.json"
    empty = readme.BEGIN.format(name="none") + "\n" + readme.END
    page.write_text(f"before\n{empty}\nafter\n", encoding="utf-8")
    assert readme.shown(page.read_text(encoding="utf-8")) is None
    name = readme.write(file, page, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert name == readme.shown(text) == "results/here/results.json"
    assert text == f"before\n{readme.render(name, tmp_path)}\nafter\n"
    assert "| `cacr_loss`, V = 2, B = 2048, D = 128 | 12.3 ms | 88 % | 3.2 × |  | 321 × * |  |" in text
    assert "| `CACRLoss`, V = 2, B = 2048, D = 128 | 13.0 ms | 80 % |  | 7.3 × |  |  |" in text
    assert "8 MiB for" in text
    assert 'with as many, `pairing="pooled"`, it takes 3.0 × as long' in text
    assert "(results/here/speedup.png)" in text
    results.write(file.parent, [found[0] | {"p50_ms": 99.0}, *found[1:]], ENVIRONMENT, "goals")
    assert readme.render(name, tmp_path) not in text
    assert readme.write(file, page, tmp_path) == name
    assert page.read_text(encoding="utf-8").count(readme.END) == 1
    with pytest.raises(ValueError, match="has no block"):
        readme.replace("nothing", "block")
    with pytest.raises(ValueError, match="does not lie in the repository"):
        readme.write(file, page, tmp_path / "elsewhere")
    results.write(file.parent, measured, ENVIRONMENT, "quick")
    with pytest.raises(ValueError, match=r"no case of README\.md was measured"):
        readme.write(file, page, tmp_path)


# ---- training step ---------------------------------------------------------------------------------------------------
@pytest.fixture
def small_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "Config", lambda: replace(QUICK, batch=16))
    monkeypatch.setattr(training_step, "WARM_UP", 1)


@pytest.mark.usefixtures("small_step")
def test_the_training_step_is_measured_with_every_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "step.json"
    assert training_step.main(["--steps", "3", "--threads", "1", "--json", str(path)]) == 0
    data = json.loads(path.read_text(encoding="utf-8"))
    assert list(data["losses"]) == [training_step.BEFORE, training_step.AFTER, training_step.LOGGING]
    for found in data["losses"].values():
        for name in ("step_ms", "loss_ms", "loss_share"):
            assert 0 < found[f"{name}_p20"] <= found[f"{name}_p50"] <= found[f"{name}_p80"]
        assert found["loss_share_p80"] < 1
        assert found["loss_ms_p80"] < found["step_ms_p80"]
    assert data["environment"]["commit"] == ENVIRONMENT["commit"]
    assert "The loss takes" in capsys.readouterr().out


@pytest.mark.usefixtures("small_step")
@pytest.mark.parametrize("wrong", [lambda x: x * 1.001, lambda x: x + (x - x.detach()) * 0.01, lambda x: x * math.nan])
def test_losses_that_differ_are_not_timed(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = training_step.eager.cacr_loss
    monkeypatch.setattr(training_step.eager, "cacr_loss", lambda *a, **k: wrong(right(*a, **k)))
    monkeypatch.setattr(training_step, "measure", lambda *_: pytest.fail("timed"))
    assert training_step.main(["--steps", "1"]) == 1
    assert "RED" in capsys.readouterr().out


def test_the_overhead_of_a_small_problem_is_split_up(capsys: pytest.CaptureFixture[str]) -> None:
    z = TINY.inputs()["views"].requires_grad_()
    found = overhead.steps(z)
    loss = found[overhead.FORWARD]()
    found[overhead.WHOLE]()
    assert loss.requires_grad
    assert z.grad is not None
    outputs = found[overhead.OPERATOR]()  # the operator finds loss and gradients at once
    assert any(torch.equal(output, loss.detach()) for output in outputs)
    assert any(torch.equal(output, z.grad) for output in outputs)
    overhead.main(["--seconds", "0.05", "--threads", "1"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)
    assert "The operator takes" in printed


# ---- pictures --------------------------------------------------------------------------------------------------------
def test_pictures_need_data(tmp_path: Path) -> None:
    assert plots.draw(tmp_path, []) == []
