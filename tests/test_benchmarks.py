"""The benchmarks: baselines agree with the reference, a wrong row stops all, results can be read and compared."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import cases, eager, gate, machine, measure, memory, plots, results, rows, suite, tables
from benchmarks.cases import GOALS, GRADIENTS, LOSS, Case
from benchmarks.rows import BASELINE, OURS, Row
from cacr_kernels import testing

PROBLEMS = [
    cases.cacr(2, 13, 7),
    cases.cacr(3, 11, 5, pairing="ordered"),
    cases.cacr(3, 6, 9, pairing="pooled"),
    cases.cacr(2, 13, 7, cost="rbf", rbf_scale=1.5),
    cases.cacr(3, 6, 5, cost="rbf", pairing="pooled"),
    cases.cacr(2, 19, 8, tau_pos=3.0, tau_neg=50.0),
    cases.queue(2, 7, 9, 23),
    cases.queue(3, 7, 9, 23, weight_grad="full"),
    cases.queue(2, 7, 9, 23, weight_grad="none", in_batch=False),
    cases.momentum(2, 7, 9, 17, cost="rbf", key_offset=3),
    cases.momentum(3, 7, 9, 17, cost="sqeuclidean", key_offset=3),
    cases.supervised(29, 9, 4),
    cases.supervised(5, 9, 40),  # most have no positive
]
ENVIRONMENT = machine.environment("cpu")
TINY = Case(cases.cacr(2, 9, 6))
BUDGET = measure.Budget(0.05)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with gate.threads(1):
        yield


def silent(text: str, weight: float) -> None:
    """No progress bar."""


def row_named(name: str) -> Row:
    return next(row for row in rows.rows("cpu") if row.name == name)


def uncompiled(device: str) -> list[Row]:
    return [row for row in rows.rows(device) if not row.compiles and row.name != "keops"]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Results of a tiny suite: an ordinary case twice as large as another, and one without gradients."""
    found = [TINY, replace(TINY, problem=cases.cacr(2, 18, 6)), replace(TINY, mode=LOSS)]
    found = [replace(case, problem=_features(case.problem, 128)) for case in found]
    with gate.threads(1):
        return suite.Suite(found, BUDGET, ENVIRONMENT, silent, uncompiled, with_memory=False).run()


def _features(problem: testing.Case, D: int) -> testing.Case:
    return problem._replace(shape=problem.shape | {"D": D})


# ---- baselines -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("mode", [LOSS, GRADIENTS])
def test_every_row_agrees_with_the_reference_in_float64(problem: testing.Case, mode: str) -> None:
    case = Case(problem, mode=mode, dtype="float64")
    checked = [row for row in uncompiled("cpu") if row.checked and row.why_not(case) is None]
    assert {"eager", "reference", "torch"} <= {row.name for row in checked}
    for row in checked:
        check = gate.Gate().check(case, row)
        assert check.ok, check
        assert max(check.loss_error, check.gradient_error) < 1e-12, check
        assert (check.gradient_error > 0) or mode == LOSS or row.name == "reference"


def test_the_published_formulation_and_the_products_are_measured_where_they_make_sense() -> None:
    for problem in PROBLEMS:
        pairs = problem.loss == "cacr_loss" and problem.options.get("pairing") != "pooled"
        assert (row_named("broadcasting").why_not(Case(problem)) is None) == pairs
        assert (row_named("bare mm").why_not(Case(problem)) is None) == (problem.loss == "cacr_loss")
    assert row_named("broadcasting").why_not(Case(cases.cacr(2, 4096, 512)))  # 32 GiB
    assert row_named("eager").why_not(Case(cases.cacr(2, 10**6, 4)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_inputs_are_computed_in_float32(dtype: str) -> None:
    case = Case(cases.cacr(2, 13, 7), dtype=dtype)
    for name in ("eager", "broadcasting"):
        outputs = row_named(name).step(case, case.inputs())()
        assert outputs[0].dtype == torch.float32
        assert outputs[1].dtype == case.torch_dtype
        assert gate.Gate().check(case, row_named(name)).ok


def test_the_compiled_row_has_a_code_object_of_its_own_and_the_options() -> None:
    loss = rows._compiled(TINY)
    again = rows._compiled(TINY)
    inner, other = (f.func._torchdynamo_orig_callable for f in (loss, again))
    assert inner.__code__ is not other.__code__
    assert inner.__code__ is not eager.cacr_loss.__code__
    views = list(TINY.inputs()["views"])
    torch.testing.assert_close(inner(views, **loss.keywords), eager.cacr_loss(views, **TINY.problem.options))


# ---- gate ------------------------------------------------------------------------------------------------------------
def planted(change: Any) -> Row:
    """The torch backend with its loss changed."""
    row = row_named("torch")
    return replace(row, name="planted", loss=lambda case: lambda **x: change(row.loss(case)(**x)))


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.001


def _raise(loss: Tensor) -> Tensor:
    raise RuntimeError("cannot\nrun")


@pytest.mark.parametrize(
    "change", [lambda x: x * 1.001, lambda x: x * math.nan, lambda x: x + 1e-4, _WrongGradient.apply, _raise]
)
@pytest.mark.parametrize("family", [OURS, BASELINE])
def test_a_wrong_row_is_caught_and_nothing_is_timed(change: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "interleave", lambda *_: pytest.fail("timed"))
    make = lambda device: [*uncompiled(device), replace(planted(change), family=family)]  # noqa: E731
    with pytest.raises(suite.RedGateError) as caught:
        suite.Suite([TINY, Case(cases.cacr(2, 8, 5))], BUDGET, ENVIRONMENT, silent, make, with_memory=False).run()
    assert {check.row for check in caught.value.checks} == {"planted"}
    assert len(caught.value.checks) == 2


def test_a_row_that_is_wrong_only_at_full_size_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_named("torch")
    wrong = replace(row, name="planted", loss=lambda case: lambda views: _beyond(row.loss(case), views))
    monkeypatch.setattr(suite, "interleave", lambda *_: pytest.fail("timed"))
    make = lambda device: [*uncompiled(device), wrong]  # noqa: E731
    large = Case(cases.cacr(2, 70, 6))
    with pytest.raises(suite.RedGateError) as caught:
        suite.Suite([large], BUDGET, ENVIRONMENT, silent, make, with_memory=False).run()
    (check,) = caught.value.checks
    assert "full size" in check.case


def _beyond(loss: Any, views: Tensor) -> Tensor:
    return loss(views=views) * (1.0 if views.shape[1] <= 61 else 1.01)


def test_the_command_exits_1_on_a_red_gate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [*uncompiled("cpu"), planted(lambda x: x * 1.01)]
    monkeypatch.setattr(rows, "rows", lambda device: found)
    monkeypatch.setitem(cases.SUITES, "quick", lambda threads, device: [TINY])
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert "RED GATE" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_gate_checks_the_compiled_row_at_the_shape_that_is_timed() -> None:
    case = Case(cases.cacr(2, 2048, 128))
    found = gate.Gate()
    assert found.instance(case, row_named("compiled")) == case
    assert found.instance(case, row_named("eager")).problem.shape == {"V": 2, "B": 61, "D": 128}
    assert found.instance(Case(cases.cacr(2, 16384, 128)), row_named("compiled")).problem.shape["B"] == 61


# ---- timing ----------------------------------------------------------------------------------------------------------
def test_rounds_are_interleaved_and_a_slow_row_takes_part_in_few() -> None:
    rounds, calls, share = measure.plan({"fast": 1e-4, "medium": 0.01, "slow": 3.0}, measure.Budget(4.0))
    assert rounds >= measure.MIN_ROUNDS
    assert calls == {"fast": 200, "medium": 2, "slow": 1}
    assert share == {"fast": rounds, "medium": rounds, "slow": 1}
    orders = [measure.order(["a", "b", "c"], r) for r in range(6)]
    assert {tuple(order) for order in orders} == {
        ("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a"), ("a", "c", "b"), ("c", "a", "b"), ("b", "a", "c"),
    }  # fmt: skip


def test_ratios_are_taken_within_a_round() -> None:
    ours = measure.Timing({0: 1.0, 1: 10.0, 2: 100.0}, 0.0)
    other = measure.Timing({0: 2.0, 1: 20.0, 2: 200.0}, 0.0)
    assert measure.ratios(other, ours) == [2.0, 2.0, 2.0]
    assert measure.ratios(measure.Timing({1: 30.0}, 0.0), ours) == [3.0]
    assert ours.quantile(0.5) == ours.measurement.median == 10.0
    assert [measure.quantile([3.0, 1.0, 2.0], q) for q in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]


def test_flop_of_every_loss() -> None:
    def units(problem: testing.Case, mode: str = GRADIENTS) -> float:
        case = Case(problem, mode=mode)
        P, N, M, D = case.extent
        return case.flop / (2 * P * N * M * D)

    assert Case(cases.cacr(5, 128, 64)).extent == (10, 128, 128, 64)
    assert Case(cases.cacr(5, 128, 64, pairing="ordered")).extent == (20, 128, 128, 64)
    assert Case(cases.queue(2, 8, 4, 100)).extent == (2, 8, 108, 4)
    assert units(cases.cacr(5, 128, 64)) == 3
    assert units(cases.cacr(5, 128, 64), LOSS) == 1
    assert units(cases.cacr(2, 8, 4, pairing="pooled")) == units(cases.supervised(8, 4, 2)) == 2
    assert units(cases.queue(2, 8, 4, 9)) == units(cases.momentum(2, 8, 4, 9)) == 2


def test_a_case_survives_json_and_goals_belong_to_cases_of_the_full_suite() -> None:
    for case in cases.full(2, "cpu"):
        assert Case.from_json(json.loads(json.dumps(case.to_json()))).key == case.key
    keys = {case.key for case in cases.full(2, "cpu")}
    assert set(GOALS) <= keys | {case.key for case in cases.quick(2, "cpu")}
    required = {goal.row: goal.required for goal in GOALS[Case(cases.cacr(2, 2048, 128), threads=2).key]}
    assert required == {"eager": 2.5, "compiled": 2.0, "bare mm": None, "broadcasting": None}
    assert cases.quick(2, "cpu")[0].key in GOALS


def test_a_process_that_fails_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "false")
    assert isinstance(memory.measure(TINY, "eager"), str)


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    case = Case(cases.cacr(2, 1024, 16))  # one array N x M: 4 MiB
    peak = memory.measure(case, "eager")
    assert isinstance(peak, float), peak
    assert 8 < peak < 80


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
        if row["status"] == results.TIMED:
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["ratio"] > 0
            assert (row["gflops"] is None) == (row["family"] not in (OURS, BASELINE))
        else:
            assert row["reason"]
    timed = [row for row in data["rows"] if row["status"] == results.TIMED]
    assert {row["row"] for row in timed if row["ours"]} == {rows.ours("cpu")}
    assert all(row["ratio"] == 1.0 for row in timed if row["ours"])


def test_the_environment_names_machine_commit_and_instruction_set() -> None:
    assert set(ENVIRONMENT) <= set(results.FIELDS)
    assert all(ENVIRONMENT[k] for k in ("machine", "cores", "torch", "isa", "python", "version"))
    assert 0 < machine.ceiling(torch.float64, 1, "cpu", seconds=0.1) < 1e6


def test_other_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("", "[]", '{"schema": 99, "rows": []}', '{"schema": 1, "rows": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json"):
            results.read(path)
    with pytest.raises(ValueError, match="missing"):
        results.read(tmp_path / "missing.json")


def changed(rows: list[dict[str, Any]], factors: dict[str, float]) -> list[dict[str, Any]]:
    """Results with the times of some rows multiplied."""
    times = ("p20_ms", "p50_ms", "p80_ms")
    return [
        row | {t: row[t] * factors.get(row["row"], 1.0) for t in times} if row["status"] == results.TIMED else row
        for row in rows
    ]


@pytest.mark.parametrize(
    ("factors", "threshold", "code"),
    [
        ({}, "1.25", 0),
        ({"torch": 2.0}, "1.25", 1),
        ({"torch": 2.0}, "2.5", 0),
        ({"torch": 0.5}, "1.25", 0),
        ({"reference": 9.0}, "1.25", 0),  # no backend that is meant to be fast
        ({"eager": 9.0, "bare mm": 9.0}, "1.25", 0),
        (
            dict.fromkeys(("cpu", "torch", "reference", "eager", "broadcasting", "bare mm"), 3.0),
            "1.25",
            0,
        ),  # the machine
    ],
)
def test_compare_exits_1_when_the_library_got_slower(
    factors: dict[str, float], threshold: str, code: int, measured: list[dict[str, Any]], tmp_path: Path
) -> None:
    old, _ = results.write(tmp_path / "old", measured, ENVIRONMENT, "quick")
    new, _ = results.write(tmp_path / "new", changed(measured, factors), ENVIRONMENT, "quick")
    arguments = ["--load", str(new), "--compare", str(old), "--threshold", threshold, "--out", str(tmp_path / "none")]
    assert command.main(arguments) == code


def test_compare_without_a_common_case_fails(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    old, _ = results.write(tmp_path / "old", [row | {"case": "other"} for row in measured], ENVIRONMENT, "quick")
    new, _ = results.write(tmp_path / "new", measured, ENVIRONMENT, "quick")
    assert command.main(["--load", str(new), "--compare", str(old), "--out", str(tmp_path / "none")]) == 1


def test_the_command_measures_prints_writes_and_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Case(cases.cacr(2, B, 128), threads=1) for B in (8, 16)]
    monkeypatch.setitem(cases.SUITES, "quick", lambda threads, device: found)
    monkeypatch.setattr(rows, "rows", lambda device, every=rows.rows: [r for r in every(device) if not r.compiles])
    out = tmp_path / "out"
    arguments = [
        "--out",
        str(out),
        "--seconds",
        "0.05",
        "--no-memory",
        "--rows",
        "eager,bare mm",
        "--filter",
        "V=2 D=128",
    ]
    assert command.main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {
        "results.json", "results.csv", "sweep.png", "speedup.png", "roofline.png",
    }  # fmt: skip
    assert {row["row"] for row in results.read(out / "results.json")["rows"]} == {rows.ours("cpu"), "eager", "bare mm"}
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


def test_goals_are_judged(measured: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    case = Case(cases.cacr(2, 2048, 128), threads=2).key
    fake = [row | {"case": case, "row": name, "ratio": ratio, "status": results.TIMED} for row, name, ratio in zip(
        measured, ("eager", "compiled", "bare mm"), (2.4, 2.5, 1.6), strict=False)]  # fmt: skip
    verdicts = {v.row: v for v in results.verdicts(fake)}
    assert (verdicts["eager"].met, verdicts["eager"].aimed) == (False, False)
    assert (verdicts["compiled"].met, verdicts["compiled"].aimed) == (True, False)
    assert (verdicts["bare mm"].met, verdicts["bare mm"].aimed) == (True, True)
    tables.print_goals(Console(width=120), list(verdicts.values()))
    printed = capsys.readouterr().out
    assert "missed" in printed
    assert "below the aim" in printed


def test_pictures_need_data(tmp_path: Path) -> None:
    assert plots.draw(tmp_path, []) == []
