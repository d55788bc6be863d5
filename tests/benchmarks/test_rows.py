"""Rows of the table of goals: modules on raw rows, sums and single losses, reference sets, queues that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.codegen import predict
from benchmarks.codegen import rows as codegen
from benchmarks.suite import cases, eager, gate, history, others, predicted, results, rows, runner
from benchmarks.suite.cases import GRADIENTS, LOSS, BenchmarkCase
from benchmarks.suite.results import TIMED
from cacr_kernels import testing
from tests.benchmarks.benchmarking import BUDGET, ENVIRONMENT, TINY, row_named, silent, uncompiled

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

RAW = [
    cases.raw(cases.cacr(2, 13, 7)),
    cases.raw(cases.cacr(3, 6, 5, pairing="pooled")),
    cases.raw(cases.queue(2, 7, 9, 23)),
    cases.raw(cases.momentum(2, 7, 9, 17, key_offset=3)),
    cases.raw(cases.supervised(29, 9, 4)),
    cases.raw(cases.supervised(29, 9, 4, 41)),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with gate.threads(1):
        yield


@pytest.mark.parametrize("problem", RAW, ids=lambda problem: problem.name)
@pytest.mark.parametrize("mode", [LOSS, GRADIENTS])
def test_modules_on_raw_rows_agree_with_the_reference(problem: testing.Case, mode: str) -> None:
    case = BenchmarkCase(problem, mode=mode, dtype="float64", module=True)
    for name, row in case.inputs().items():
        if name not in ("labels", "ref_labels"):
            assert not torch.allclose(row.norm(dim=-1), torch.ones(()).double(), atol=0.05), "rows are of unit length"
    checked = [row for row in uncompiled() if row.checked and row.why_not(case) is None]
    assert {"eager", "reference", "torch", rows.ours(case)} <= {row.name for row in checked}
    for row in checked:
        check = gate.Gate().check(case, row)
        assert check.ok, check
        assert max(check.loss_error, check.gradient_error) < 1e-12, check


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("module", [False, True])
def test_other_reductions_are_checked_as_the_mean_is(reduction: str, module: bool) -> None:
    problem = cases.cacr(2, 13, 7, reduction=reduction)
    case = BenchmarkCase(cases.raw(problem) if module else problem, dtype="float64", module=module)
    for name in ("reference", "torch", rows.ours(case)):
        check = gate.Gate().check(case, row_named(name))
        assert check.ok, check
        assert 0 <= max(check.loss_error, check.gradient_error) < 1e-12
    assert row_named("eager").why_not(case) == "measured for the mean"
    value = row_named("torch").step(case, case.inputs())()[0]
    assert value.shape == ((2, 13) if reduction == "none" else ())
    found = runner.Suite([case], BUDGET, ENVIRONMENT, silent, uncompiled, with_processes=False).run()
    assert all(row["p50_ms"] > 0 for row in found if row["row"] == "torch")


@pytest.mark.parametrize("problem", [cases.supervised(29, 9, 4), cases.supervised(29, 9, 4, 41), *RAW])
def test_what_is_compiled_is_the_eager_form(problem: testing.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = BenchmarkCase(problem, dtype="float64")
    inputs = case.inputs()
    for found, eager_one in zip(*(row_named(name).step(case, inputs)() for name in ("compiled", "eager")), strict=True):
        assert torch.equal(found, eager_one)


def test_a_reference_set_gets_no_gradient() -> None:
    case = BenchmarkCase(cases.supervised(29, 9, 4, 41))
    assert case.flop == 2 * 2.0 * 29 * 41 * 9  # one product beside the similarities, which are not symmetric
    for name in ("torch", "eager"):
        assert len(row_named(name).step(case, case.inputs())()) == 2


def test_the_kept_queue_is_full_and_takes_keys() -> None:
    case = BenchmarkCase(cases.raw(cases.queue(2, 5, 6, 32)), module=True)
    inputs = case.inputs()
    unit = case.problem.options | {"normalize": False}
    step = row_named("kept queue").step(case, inputs)
    first, second = step()[0], step()[0]
    handed_in = row_named("torch").step(case, inputs)()[0]
    torch.testing.assert_close(first, handed_in)
    assert not torch.equal(first, second)  # ten keys of the first call are in the queue now
    queue = F.normalize(inputs["queue"], dim=-1)
    entered = torch.cat([queue[10:], F.normalize(inputs["keys"].flatten(0, 1), dim=-1)])
    tensors = {"queries": F.normalize(inputs["queries"], dim=-1), "keys": F.normalize(inputs["keys"], dim=-1)}
    plain = BenchmarkCase(case.problem._replace(options=unit))
    torch.testing.assert_close(second, row_named("torch").step(plain, tensors | {"queue": entered})()[0])
    assert row_named("kept queue").why_not(TINY)


def test_a_case_can_have_another_base() -> None:
    case = BenchmarkCase(cases.cacr(2, 9, 6), only=("torch", "reference"), base="torch")
    found = runner.Suite([case], BUDGET, ENVIRONMENT, silent, uncompiled, with_processes=False).run()
    timed = {row["row"]: row for row in found if row["status"] == TIMED}
    assert set(timed) == {"torch", "reference"}
    assert timed["torch"]["ours"]
    assert timed["torch"]["ratio"] == 1.0
    assert case.key != BenchmarkCase(cases.cacr(2, 9, 6)).key


def test_the_inputs_are_part_of_a_case() -> None:
    clustered = BenchmarkCase(cases.cacr(2, 9, 6)._replace(data="clustered"))
    row = results.record(clustered, row_named("torch"), True, ENVIRONMENT)
    assert row["inputs"] == "unit rows around 5 centres"
    assert "unit rows around 5 centres" in results.label(row)
    assert clustered.key != TINY.key
    for suite in cases.SUITES.values():
        assert all(case.inputs_kind for case in suite(2, "cpu"))
    z = clustered.inputs()["views"][0]
    assert (z[0] - z[5]).norm() < 0.5 < (z[0] - z[1]).norm()


# ---- other losses ----------------------------------------------------------------------------------------------------
def test_ntxent_is_that_of_simclr() -> None:
    views = [torch.randn(5, 4, dtype=torch.float64) for _ in range(2)]
    z = F.normalize(torch.cat(views), dim=1)
    s = (z @ z.T / 0.5).exp()
    expected = [-(s[i, (i + 5) % 10] / (s[i].sum() - s[i, i])).log() for i in range(10)]
    torch.testing.assert_close(eager.ntxent(views, 0.5), torch.stack(expected).mean())


@pytest.mark.parametrize("name", ["ntxent lightly", "ntxent pml", "supcon pml", "cosine lightly"])
def test_modules_of_other_packages_normalise(name: str) -> None:
    case = BenchmarkCase(cases.raw(cases.cacr(2, 16, 8)), module=True)
    row = row_named(name)
    if reason := row.why_not(case):
        assert "not installed" in reason
        return
    inputs = case.inputs()
    unit = {"views": F.normalize(inputs["views"], dim=-1)}
    value, once = (row.step(case, x)()[0] for x in (inputs, unit))
    torch.testing.assert_close(value, once)
    if name.startswith("ntxent"):
        torch.testing.assert_close(value, eager.ntxent(list(inputs["views"]), others.TEMPERATURE))


# ---- predictions -----------------------------------------------------------------------------------------------------
def test_rows_on_a_gpu_carry_the_predicted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    case = BenchmarkCase(cases.cacr(2, 65536, 128), dtype="bfloat16", device="cuda")
    found = predicted.on("NVIDIA H200", case, "triton")
    assert found is not None
    assert 1 < found < 100
    assert predicted.on("NVIDIA H200", case, "torch") is None
    assert predicted.on("NVIDIA GeForce RTX 2080", case, "triton") is None
    assert predicted.on("NVIDIA H200", BenchmarkCase(cases.queue(2, 8, 128, 64), device="cuda"), "triton") is None
    raw = predicted.on("NVIDIA H200", BenchmarkCase(cases.raw(case.problem), dtype="bfloat16"), "triton")
    report = codegen.load(codegen.OUT / "codegen.json")
    gpu = next(gpu for gpu in predict.GPUS if gpu.name == "H200")
    for time, normalize in ((found, False), (raw, True)):  # kernels of their own, either may be the slower
        whole = predict.predict(report, "triton", predict.Problem(2, 65536, 128, "bf16", normalize), gpu)
        assert whole is not None
        assert time == 1e3 * whole.seconds
    assert raw != found
    monkeypatch.setattr(predicted.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert predicted.milliseconds(case, "triton") == found
    assert predicted.milliseconds(TINY, "triton") is None  # on the CPU


# ---- history ---------------------------------------------------------------------------------------------------------
def test_the_history_joins_runs_of_one_machine(tmp_path: Path) -> None:
    def run(name: str, date: str, share: float, **other: Any) -> str:
        row = results.record(TINY, row_named("torch"), True, ENVIRONMENT, fraction=share, peak_source=history.FMA)
        about = ENVIRONMENT | {"date": date, "commit": f"{name}0123456789"}
        clustered = {"inputs": cases.INPUTS["clustered"], "fraction": 0.1}  # is another problem than that of unit rows
        results.write(tmp_path / name, [row | about | other, row | about | other | clustered], about, "quick")
        return f"{name}/results.json"

    names = [
        run("second", "2026-02-02T00:00:00Z", 0.8),
        run("first", "2026-01-01T00:00:00Z", 0.5),
        run("elsewhere", "2026-03-03T00:00:00Z", 0.9, machine="another"),
        run("no-peak", "2026-04-04T00:00:00Z", 0.7, peak_source="a large torch.mm"),
        run("processes", "2026-05-05T00:00:00Z", 0.7, processes=2),
    ]
    found = history.runs(tmp_path, names)
    assert [title.split("\n")[0] for title, _ in found] == ["first", "second", "elsewhere"]
    lines = history.series(found)
    assert [[share for _, share in points] for points in lines.values()] == [[50.0, 80.0], [90.0]]
    assert history.draw(found, tmp_path / "history.png") == 1
    assert (tmp_path / "history.png").stat().st_size > 1000


def test_the_history_is_committed_and_shown() -> None:
    """If not: ``python -m benchmarks.suite.history``."""
    assert history.PICTURE.exists()
    page = (history.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "(../benchmarks/results/history.png)" in page
