"""The benchmarks: baselines agree with the reference, a wrong row stops all, times and memory are measured right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cacr_kernels
from benchmarks.host import quantile
from benchmarks.suite import __main__ as command
from benchmarks.suite import cases, eager, gate, measure, others, peak, processes, results, rows, runner
from benchmarks.suite.cases import GRADIENTS, LOSS, BenchmarkCase
from benchmarks.suite.rows import BASELINE, OTHER, OURS, Row
from cacr_kernels import testing
from cacr_kernels.backends import table
from tests.benchmarks.benchmarking import BUDGET, ENVIRONMENT, PACKAGES, TINY, row_named, silent, uncompiled

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with gate.threads(1):
        yield


def suite_of(*found: BenchmarkCase, make: Callable[[], list[Row]] = uncompiled) -> runner.Suite:
    """A suite that starts no processes."""
    return runner.Suite(list(found), BUDGET, ENVIRONMENT, silent, make, with_processes=False)


# ---- baselines -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("mode", [LOSS, GRADIENTS])
def test_every_row_agrees_with_the_reference_in_float64(problem: testing.Case, mode: str) -> None:
    case = BenchmarkCase(problem, mode=mode, dtype="float64")
    checked = [row for row in uncompiled() if row.checked and row.why_not(case) is None]
    assert {"eager", "reference", "torch"} <= {row.name for row in checked}
    for row in checked:
        check = gate.Gate().check(case, row)
        assert check.ok, check
        assert max(check.loss_error, check.gradient_error) < 1e-12, check
        assert (check.gradient_error > 0) or mode == LOSS or row.name == "reference"


def test_the_published_formulation_and_the_products_are_measured_where_they_make_sense() -> None:
    for problem in PROBLEMS:
        pairs = problem.loss == "cacr_loss" and problem.options.get("pairing") != "pooled"
        assert (row_named("broadcasting").why_not(BenchmarkCase(problem)) is None) == pairs
        assert (row_named("bare mm").why_not(BenchmarkCase(problem)) is None) == (problem.loss == "cacr_loss")
    assert row_named("broadcasting").why_not(BenchmarkCase(cases.cacr(2, 4096, 512)))  # 32 GiB
    assert row_named("eager").why_not(BenchmarkCase(cases.cacr(2, 10**6, 4)))


@pytest.mark.parametrize("name", ["eager", rows.ours(TINY), "z.sum()"])
def test_a_step_gives_the_same_gradients_every_time(name: str) -> None:
    step = row_named(name).step(TINY, TINY.inputs())
    first, second = step(), step()
    assert len(first) > 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a is not b


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_inputs_are_computed_in_float32(dtype: str) -> None:
    case = BenchmarkCase(cases.cacr(2, 13, 7), dtype=dtype)
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


def test_other_packages_are_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case, large = BenchmarkCase(cases.cacr(2, 16, 8)), BenchmarkCase(cases.cacr(2, 4096, 128))
    assert "GiB" in (row_named("ntxent pml").why_not(large) or "")  # it compares every two pairs
    assert row_named("keops").why_not(large)
    assert row_named("ntxent lightly").why_not(BenchmarkCase(cases.cacr(3, 16, 8))) == "a loss of two views"
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: None)
    assert all("not installed" in (row_named(name).why_not(case) or "") for name in PACKAGES)
    others.load.cache_clear()
    monkeypatch.setattr(others, "_name_torchvision_operators", lambda: None)
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(others.importlib, "import_module", lambda name: _raise(name))
    assert all("imported: RuntimeError: cannot" in (row_named(name).why_not(case) or "") for name in PACKAGES)


def test_a_case_measures_only_the_rows_that_it_names() -> None:
    def measured(**fields: Any) -> set[str]:
        case = replace(TINY, **fields)
        return {row.name for row in runner.Suite([case], BUDGET, ENVIRONMENT, silent, uncompiled).measured(case)}

    ours, everything = rows.ours(TINY), measured()
    assert {ours, "torch", "reference", "eager", "broadcasting", "bare mm", "z.sum()"} <= everything
    assert measured(only=("eager",)) == {ours, "eager"}
    assert measured(only=cases.OURS_ONLY) == {ours}
    assert measured(leave_out=("torch",)) == everything - {"torch"}


@pytest.mark.parametrize(("problem", "dtype", "expected"), [
    (cases.cacr(2, 128, 64), "float32", "cuda"),
    (cases.cacr(2, 128, 64), "float64", "triton"),
    (cases.cacr(2, 1024, 128), "bfloat16", "cuda"),
    (cases.cacr(2, 2048, 128), "bfloat16", "triton"),
    (cases.cacr(2, 4096, 128), "float32", "cuda"),
    (cases.cacr(2, 2048, 128, pairing="pooled"), "bfloat16", "triton"),
    (cases.queue(2, 64, 32, 128), "float32", "triton"),
    (cases.momentum(2, 64, 32, 128), "float32", "triton"),
    (cases.supervised(256, 32, 5), "float32", "cuda"),
    (cases.supervised(16384, 32, 5), "bfloat16", "triton"),
], ids=lambda x: x if isinstance(x, str) else x.name)  # fmt: skip
def test_ours_is_the_backend_that_auto_takes(
    monkeypatch: pytest.MonkeyPatch, problem: testing.Case, dtype: str, expected: str
) -> None:
    """On a GPU on which all backends can run but that of the CPU.

    ``cacr_loss`` is called there, on fake tensors; the other losses do what asks for a real GPU.
    """
    usable = tuple(b._replace(why_not=lambda device, b=b: None if b.name != "cpu" else "no CPU") for b in table.TABLE)
    monkeypatch.setattr(table, "TABLE", usable)
    monkeypatch.setenv("CACR_SELF_CHECK", "0")  # fake tensors hold no numbers
    case = BenchmarkCase(problem, dtype=dtype, device="cuda")
    assert rows.ours(case) == expected
    if problem.loss != "cacr_loss":
        return
    with FakeTensorMode(), _Operators() as called:
        inputs = replace(case, device="cpu").inputs()
        inputs = {name: torch.empty_like(x, device="cuda") for name, x in inputs.items()}
        getattr(cacr_kernels, problem.loss)(**inputs, **problem.options, backend="auto")
    assert called.backends == {expected}


class _Operators(TorchDispatchMode):
    """The backends whose operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cacr_kernels":
            self.backends |= {func._opname.rpartition("_")[2]}
        return func(*args, **(kwargs or {}))


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
    monkeypatch.setattr(runner, "interleave", lambda *_: pytest.fail("timed"))
    make = lambda: [*uncompiled(), replace(planted(change), family=family)]  # noqa: E731
    with pytest.raises(runner.RedGateError) as caught:
        runner.Suite(
            [TINY, BenchmarkCase(cases.cacr(2, 8, 5))], BUDGET, ENVIRONMENT, silent, make, with_processes=False
        ).run()
    assert {check.row for check in caught.value.checks} == {"planted"}
    assert len(caught.value.checks) == 2


@pytest.mark.parametrize(("family", "ok"), [(OURS, False), (BASELINE, True)])
def test_the_gate_holds_the_library_to_its_own_promise(family: str, ok: bool) -> None:
    """Off by five times what the library is allowed, which is less than what a baseline is."""
    checker = gate.Gate()
    allowed = checker.check(TINY, row_named("torch")).loss_tolerance
    scale = max(draw.scale[0] for draw in checker.draws(TINY.smaller(), testing.DRAWS))
    assert checker.check(TINY, replace(planted(lambda loss: loss + 5 * allowed * scale), family=family)).ok == ok


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gate_allows_for_coefficients_of_half_types(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of gradients, and only of a backend that says that it rounds them."""
    case, eps = replace(TINY, dtype=dtype), torch.finfo(getattr(torch, dtype)).eps
    exact = gate.Gate().check(case, row_named("torch"))
    assert exact.ok
    assert max(exact.loss_tolerance, exact.gradient_tolerance) < eps / 100
    rounds = table.named("torch")._replace(rounds_coefficients=(case.torch_dtype,))
    monkeypatch.setattr(gate, "named", lambda name: rounds)
    rounded = gate.Gate().check(case, row_named("torch"))
    assert rounded.loss_tolerance == exact.loss_tolerance
    assert eps < rounded.gradient_tolerance < 8 * eps


def test_the_gate_has_a_truth_for_every_dtype() -> None:
    checker, wide = gate.Gate(), replace(TINY, dtype="float64")
    draws = [checker.draws(case, 1)[0] for case in (TINY, wide)]
    assert [draw.inputs["views"].dtype for draw in draws] == [torch.float32, torch.float64]
    assert checker.draws(replace(TINY, mode=LOSS), 1)[0] is draws[0]


def test_a_row_that_is_wrong_only_at_full_size_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_named("torch")
    wrong = replace(row, name="planted", loss=lambda case: lambda views: _beyond(row.loss(case), views))
    monkeypatch.setattr(runner, "interleave", lambda *_: pytest.fail("timed"))
    make = lambda: [*uncompiled(), wrong]  # noqa: E731
    large = BenchmarkCase(cases.cacr(2, 70, 6))
    with pytest.raises(runner.RedGateError) as caught:
        suite_of(large, make=make).run()
    (check,) = caught.value.checks
    assert "full size" in check.case


@pytest.mark.parametrize("family", [OURS, BASELINE, OTHER])
def test_a_row_that_fails_at_full_size_is_red_or_of_another_function_left_out(family: str) -> None:
    row = row_named("torch")

    def loss(case: BenchmarkCase) -> Any:
        return row.loss(case) if case.problem.shape["B"] <= 61 else lambda **_: _raise(torch.zeros(()))

    make = lambda: [*uncompiled(), replace(row, name="planted", loss=loss, family=family)]  # noqa: E731
    run = runner.Suite(
        [BenchmarkCase(cases.cacr(2, 70, 6))], BUDGET, ENVIRONMENT, silent, make, with_processes=False
    ).run
    if family != OTHER:
        with pytest.raises(runner.RedGateError) as caught:
            run()
        assert [(check.row, check.problem) for check in caught.value.checks] == [("planted", "RuntimeError: cannot")]
        return
    planted = next(row for row in run() if row["row"] == "planted")
    assert (planted["status"], planted["reason"]) == (results.SKIPPED, "RuntimeError: cannot")


def _beyond(loss: Any, views: Tensor) -> Tensor:
    return loss(views=views) * (1.0 if views.shape[1] <= 61 else 1.01)


def test_the_command_exits_1_on_a_red_gate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [*uncompiled(), planted(lambda x: x * 1.01)]
    monkeypatch.setattr(rows, "rows", lambda: found)
    monkeypatch.setitem(cases.SUITES, "quick", lambda threads, device: [TINY])
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert "RED GATE" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_gate_checks_the_compiled_row_at_the_shape_that_is_timed() -> None:
    case = BenchmarkCase(cases.cacr(2, 2048, 128))
    found = gate.Gate()
    assert found.instance(case, row_named("compiled")) == case
    assert found.instance(case, row_named("eager")).problem.shape == {"V": 2, "B": 61, "D": 128}
    assert found.instance(BenchmarkCase(cases.cacr(2, 16384, 128)), row_named("compiled")).problem.shape["B"] == 61


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


def test_times_of_interleaved_blocks_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lengths = [0.0], iter([4.0, 0.01, 0.02, 0.03, 1.0, 2.0, 3.0])
    monkeypatch.setattr(measure, "clock", lambda: now[0])

    def step() -> Tensor:
        now[0] += next(lengths)
        return torch.empty(0)

    assert measure.once(step) == 4.0  # too slow for a second call
    assert measure.once(step) == pytest.approx(0.01)  # the best of three
    assert measure.block(step, 3, "cpu") == pytest.approx(2.0)


def test_ratios_are_taken_within_a_round() -> None:
    ours = measure.Timing({0: 1.0, 1: 10.0, 2: 100.0})
    other = measure.Timing({0: 2.0, 1: 20.0, 2: 200.0})
    assert measure.ratios(other, ours) == [2.0, 2.0, 2.0]
    assert measure.ratios(measure.Timing({1: 30.0}), ours) == [3.0]
    assert ours.quantile(0.5) == ours.measurement.median == 10.0
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]


def test_ratios_that_are_shown() -> None:
    case = BenchmarkCase(cases.cacr(2, 32, 16))
    ours, other = measure.Timing(dict.fromkeys(range(3), 1.0)), measure.Timing({0: 2.0, 1: 3.0, 2: 7.0})
    found = results.figures(case, row_named("z.sum()"), other, ours)
    assert [found[name] for name in ("ratio_p20", "ratio", "ratio_p80")] == pytest.approx([2.4, 3.0, 5.4])
    assert [found[name] for name in ("p20_ms", "p50_ms", "p80_ms")] == pytest.approx([2400.0, 3000.0, 5400.0])
    assert "gflops" not in found  # it does other work
    assert results.figures(case, row_named("eager"), other, ours)["gflops"] == pytest.approx(case.flop / 3e9)


def test_flop_of_every_loss() -> None:
    def units(problem: testing.Case, mode: str = GRADIENTS) -> float:
        case = BenchmarkCase(problem, mode=mode)
        P, N, M, D = case.extent
        return case.flop / (2 * P * N * M * D)

    assert BenchmarkCase(cases.cacr(5, 128, 64)).extent == (10, 128, 128, 64)
    assert BenchmarkCase(cases.cacr(5, 128, 64, pairing="ordered")).extent == (20, 128, 128, 64)
    assert BenchmarkCase(cases.queue(2, 8, 4, 100)).extent == (2, 8, 108, 4)
    assert units(cases.cacr(5, 128, 64)) == 3
    assert units(cases.cacr(5, 128, 64), LOSS) == 1
    assert units(cases.cacr(2, 8, 4, pairing="pooled")) == units(cases.supervised(8, 4, 2)) == 2
    assert units(cases.queue(2, 8, 4, 9)) == units(cases.momentum(2, 8, 4, 9)) == 2


def test_a_case_survives_json() -> None:
    for make in cases.SUITES.values():
        for case in make(2, "cpu"):
            assert BenchmarkCase.from_json(json.loads(json.dumps(case.to_json()))).key == case.key


# ---- processes of their own ------------------------------------------------------------------------------------------
def test_a_process_that_fails_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "executable", "false")
    found = processes.memory(TINY, row_named("eager"))
    assert found.keys() == {"memory_reason"}
    assert "non-zero exit status" in found["memory_reason"]
    assert processes.start(TINY, row_named("eager")) == {}


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    case = BenchmarkCase(cases.cacr(2, 1024, 16))  # one array N x M: 4 MiB
    found = processes.memory(case, row_named("eager"))
    assert found.keys() == {"memory_mib", "single_ms"}, found
    assert 8 < found["memory_mib"] < 80
    assert found["single_ms"] > 0


def test_a_cold_start_is_the_first_call_of_a_fresh_process() -> None:
    found = processes.start(TINY, row_named("eager"))
    assert found.keys() == {"cold_ms"}
    assert 0 < found["cold_ms"] < 60_000


def test_a_cold_start_has_empty_compiler_caches_and_a_warm_one_those_that_it_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[dict[str, str], bool]] = []

    def ask(task: str, case: BenchmarkCase, row: Row, environment: dict[str, str], timeout: float) -> dict[str, float]:
        assert task == "start"
        filled = Path(environment["TORCHINDUCTOR_CACHE_DIR"], "kernel")
        seen.append((environment, filled.exists()))
        filled.touch()
        return {"first_ms": float(len(seen))}

    monkeypatch.setattr(processes, "_ask", ask)
    assert processes.start(TINY, row_named("compiled")) == {"cold_ms": 1.0, "warm_ms": 2.0}
    assert [filled for _, filled in seen] == [False, True]
    assert set(seen[0][0]) == {"TORCHINDUCTOR_CACHE_DIR", "KEOPS_CACHE_FOLDER"}
    assert not Path(seen[0][0]["TORCHINDUCTOR_CACHE_DIR"]).exists()


def test_the_suite_adds_what_processes_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def memory(case: BenchmarkCase, row: Row) -> dict[str, Any]:
        asked.append(("memory", case.key, row.name))
        return {"memory_mib": 3.0, "single_ms": 9.0}

    def start(case: BenchmarkCase, row: Row) -> dict[str, Any]:
        asked.append(("start", case.key, row.name))
        return {"cold_ms": 7.0}

    monkeypatch.setattr(processes, "memory", memory)
    monkeypatch.setattr(processes, "start", start)
    once = replace(TINY, problem=cases.cacr(2, 8, 6), memory=True, timed=False, only=("torch",))
    both = replace(TINY, memory=True, start=("eager",), only=("eager", "torch", "bare mm"))
    found = runner.Suite([once, both], BUDGET, ENVIRONMENT, silent, uncompiled).run()
    ours = rows.ours(TINY)
    assert sorted(asked) == sorted(
        [("memory", once.key, name) for name in (ours, "torch")]
        + [("memory", both.key, name) for name in (ours, "eager", "torch")]
        + [("start", both.key, name) for name in (ours, "eager")]
    )
    by_row = {(row["case"], row["row"]): row for row in found}
    single = by_row[once.key, ours]
    assert (single["status"], single["p50_ms"], single["single_ms"]) == (results.SINGLE, None, 9.0)
    assert by_row[both.key, "eager"]["cold_ms"] == 7.0
    assert by_row[both.key, "torch"]["cold_ms"] is None
    assert by_row[both.key, "torch"]["memory_mib"] == 3.0
    assert by_row[once.key, "eager"]["status"] == results.SKIPPED


# ---- the peak of the machine -----------------------------------------------------------------------------------------
def test_the_peak_is_that_of_multiply_adds_in_registers() -> None:
    """Twice as many of float32 as of float64: by turns until both have had the processor for themselves."""
    best = {torch.float32: 0.0, torch.float64: 0.0}
    for turn in range(200):
        for dtype in best:
            best[dtype] = max(best[dtype], peak.fma_gflops(dtype, 1, seconds=0.02))
        ratio = best[torch.float32] / best[torch.float64]
        if turn >= 10 and 1.3 < ratio < 3:
            break
    assert 1.3 < ratio < 3
    most = peak._library().fma_peak_vector_bytes() / 4 * 2 * 4 * 6  # four units at 6 GHz: more than any core has
    assert 1 < best[torch.float32] < most
    assert peak.fma_gflops(torch.float32, 64) < 64 * most


def test_the_micro_benchmark_is_compiled_once_and_again_for_another_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = peak.build(tmp_path)
    modified = library.stat().st_mtime_ns
    assert peak.build(tmp_path) == library
    assert library.stat().st_mtime_ns == modified
    other = tmp_path / "other.cpp"
    other.write_text("int one() { return 1; }\n")
    monkeypatch.setattr(peak, "SOURCE", other)
    assert peak.build(tmp_path) != library


@pytest.mark.parametrize(
    ("compiler", "reason"), [(None, "no C++ compiler"), ("false", "false failed"), ("no-such-c++", "cannot be run")]
)
def test_without_a_compiler_a_large_product_is_the_ceiling_and_says_so(
    compiler: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(peak.shutil, "which", lambda name: None)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(peak.machine, "product_gflops", lambda *_: 7.0)
    peak._library.cache_clear()
    try:
        found = peak.peak(torch.float32, 1, "cpu")
    finally:
        peak._library.cache_clear()
    assert found.gflops == 7.0
    assert found.source.startswith(peak.PRODUCT)
    assert reason in found.source


def test_the_share_is_of_the_highest_peak_seen_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([50.0, 80.0, 20.0])
    monkeypatch.setattr(peak, "peak", lambda *_: peak.Peak(next(seen), peak.FMA))
    few = [replace(TINY, problem=cases.cacr(2, B, 6), only=("eager",)) for B in (7, 8, 9)]
    found = suite_of(*few).run()
    timed = [row for row in found if row["status"] == results.TIMED]
    assert {row["peak_gflops"] for row in timed} == {80.0}
    assert all(row["fraction"] == row["gflops"] / 80.0 for row in timed)
