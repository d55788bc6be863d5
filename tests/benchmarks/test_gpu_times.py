"""Times of a GPU: the table, the check of the size rule and what is dropped, on made-up times and on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import child, compared, reckoned, report, rule, times
from benchmarks.gpu_check.child import Context, Task
from benchmarks.gpu_check.lines import Lines, tally
from benchmarks.gpu_check.problems import BATCHES, COMPARED, FIRST, PRODUCTS, WIDTHS, Timed, further
from benchmarks.gpu_check.steps import STEPS
from benchmarks.gpu_check.supervise import DONE, Outcome
from cacr_kernels.backends import cuda

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

TINY = Timed(13, 16, "ieee")
STEP = next(step for step in STEPS if step.name == "times")


def line(row: str, problem: Timed, milliseconds: float, **more: Any) -> dict[str, Any]:
    """What a row writes."""
    sizes = {"products": problem.products, "B": problem.B, "D": problem.D, "rows": problem.rows}
    found = {"p50 ms": milliseconds, "host µs": 40.0, "of peak": 0.25, "problem name": problem.name}
    about = {"step": "times", "event": "result", "task": f"{row} {problem.name}", "ok": True, "row": row}
    return about | sizes | found | more


def race(problem: Timed, work: float, cuda_ms: float, triton_ms: float, limit: float | None = 1e9) -> list[Any]:
    rule = {"work": work, "limit": limit}
    return [line("cuda", problem, cuda_ms, ours=True, **rule), line("triton", problem, triton_ms, ours=True)]


# ---- what is timed ---------------------------------------------------------------------------------------------------
def test_everything_that_was_asked_for_is_timed_once() -> None:
    problems = [*FIRST, *further()]
    assert len(problems) == len(set(problems)) == len(BATCHES) * len(WIDTHS) * len(PRODUCTS) * 2
    assert (min(BATCHES), max(BATCHES)) == (512, 65536)
    assert set(COMPARED) <= set(BATCHES)
    names = [task.name for task in times.tasks(["triton", "cuda"], "cuda")]
    assert len(names) == len(set(names))
    for problem in problems:
        wanted = {"triton", "cuda"} | (set(times.BASELINES) if problem.B in COMPARED else set())
        assert {name.split()[0] for name in names if name.endswith(f" {problem.name}")} == wanted


def test_what_matters_most_comes_first_and_has_to_end() -> None:
    tasks = list(times.tasks(["triton", "cuda"], "cuda"))
    needed = [task for task in tasks if not task.optional]
    assert needed == [task for task in tasks[: len(PRODUCTS) + 3 * len(FIRST)] if not task.name.startswith("eager")]
    assert all(task.name.startswith("compiled") for task in tasks[-len(FIRST) :])


# ---- the size rule ---------------------------------------------------------------------------------------------------
def test_a_right_rule() -> None:
    lines = race(Timed(512, 128, "bf16"), 5e8, 1.0, 2.0) + race(Timed(4096, 128, "bf16"), 4e9, 9.0, 3.0)
    said = rule.verdicts(lines)
    assert said[0] == (
        "- What `auto` takes for bf16, fp16 and TF32: right; over 2 problems it takes 0.0 % longer than the faster "
        "backend."
    )
    assert "IEEE float32: not checked" in said[1]


def test_a_wrong_rule_gets_its_number() -> None:
    """The first is faster up to a work of 3e10, and the limit is 1e9: half-way in logarithms between 3e10 and 1e11."""
    works = (1e8, 3e9, 3e10, 1e11, 1e12)
    lines = []
    for number, work in enumerate(works):
        quick, slow = number + 1.0, 2.0 * (number + 1)
        times_of = (quick, slow) if work <= 3e10 else (slow, quick)
        lines += race(Timed(512 << number, 128, "tf32"), work, *times_of)
    limit = rule.best_limit(rule.races(lines)["UP_TO"])
    assert limit == pytest.approx(math.sqrt(3e10 * 1e11), rel=0.05)
    assert rule.cost(rule.races(lines)["UP_TO"], limit) == 1.0
    said = rule.verdicts(lines)
    assert "**wrong**; over 5 problems it takes 32.0 % longer" in said[0]  # 2 of 5 take twice as long
    assert f"Put in UP_TO = {round(limit):_} (now 1_000_000_000): 0.0 %" in said[0]
    assert sorted(said[1:3]) == [
        "  - tf32 B=1024 D=128 unit: cuda 2 ms, triton 4 ms",
        "  - tf32 B=2048 D=128 unit: cuda 3 ms, triton 6 ms",
    ]


@pytest.mark.parametrize(("cuda_ms", "triton_ms", "written"), [(2.0, 1.0, "0"), (1.0, 2.0, "math.inf")])
def test_a_rule_that_one_backend_always_wins(cuda_ms: float, triton_ms: float, written: str) -> None:
    lines = race(Timed(512, 128, "fp16"), 1e8, cuda_ms, triton_ms)
    lines += race(Timed(8192, 128, "fp16"), 1e10, cuda_ms, triton_ms)
    assert f"UP_TO = {written} " in rule.verdicts(lines)[0]


def test_the_rule_of_ieee_has_no_limit() -> None:
    lines = race(Timed(512, 128, "ieee"), 1e8, 1.0, 2.0, None) + race(Timed(8192, 128, "ieee"), 1e10, 3.0, 1.0, None)
    said = rule.verdicts(lines)
    assert "not checked" in said[0]
    assert "Put in `suits`, in place of `ieee or`, a limit of 1_000_000_000 (now math.inf): 0.0 %" in said[1]


def test_numbers_of_a_limit_keep_two_digits_unless_that_is_too_few() -> None:
    lines = race(Timed(512, 128, "bf16"), 1.0001e9, 1.0, 2.0) + race(Timed(513, 128, "bf16"), 1.0002e9, 2.0, 1.0)
    (races,) = rule.races(lines).values()
    assert 1.0001e9 <= rule.best_limit(races) < 1.0002e9


def test_what_failed_takes_no_part_in_the_rule() -> None:
    lines = race(Timed(512, 128, "bf16"), 1e8, 1.0, 2.0)
    lines[1]["ok"] = False
    assert rule.races(lines) == {}
    lines = race(Timed(512, 128, "bf16"), 1e8, 1.0, 2.0)
    lines[0]["p50 ms"] = None  # where kernels are interpreted
    assert rule.races(lines) == {}


def test_the_limit_is_that_of_the_backend() -> None:
    found = times.rule(Timed(512, 128, "bf16"), "cpu", "cuda")
    assert (found["limit"], found["predicted ms"], found["ours"]) == (cuda.UP_TO, None, True)
    assert times.rule(Timed(512, 128, "bf16"), "cpu", "triton") == {"ours": True, "predicted ms": None}
    assert found["work"] == 512**2 * 128 * (1 + 2 * (2 + 3))
    assert times.rule(Timed(512, 128, "ieee"), "cpu", "cuda")["limit"] is None


# ---- the table -------------------------------------------------------------------------------------------------------
def test_the_table_of_times() -> None:
    problem = Timed(4096, 128, "bf16")
    ours = {"ours": True, "predicted ms": 1.5}
    lines = [line("triton", problem, 1.0, ours=True), line("cuda", problem, 2.0, **ours), line("eager", problem, 7.0)]
    lines += [line("torch", Timed(512, 128, "bf16", raw=True), 3.0), {"event": "result", "ok": True, "row": "torch.mm"}]
    head, rows = compared.table(lines)
    about = ["predicted", "of peak", "host µs"]
    assert head == ["products", "B", "D", "rows", "triton ms", *about, "cuda ms", *about, "eager", "torch"]
    assert rows == [
        ["bf16", 512, 128, "raw", *["–"] * 8, "–", "3 ms"],
        ["bf16", 4096, 128, "unit", 1.0, "–", "25 %", 40.0, 2.0, 1.5, "25 %", 40.0, "7.0 ×", "–"],
    ]


def test_the_report_has_the_table_and_the_rule(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "results.jsonl", "times")
    for found in race(Timed(512, 128, "ieee"), 1e8, 1.0, 2.0, None):
        lines.write(found["event"], **{key: value for key, value in found.items() if key not in ("step", "event")})
    report.write(tmp_path, (STEP,), {"times": Outcome(DONE, 1.0, 2.0)})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| ieee | 512 | 128 | unit | 1 | – | 25 % | 40 | 2 | – | 25 % | 40 |" in text
    assert "IEEE float32: right; over 1 problems" in text
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


# ---- rows that go wrong ----------------------------------------------------------------------------------------------
def run(task: Task, path: Path) -> Any:
    lines = Lines(path, "times")
    child.run_one(Context(lines), task, 100)
    return tally(lines.read())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more calls than are needed."""
    monkeypatch.setattr(times, "BUDGET", 1e-3)
    monkeypatch.setattr(times, "CALLS", (2, 2))
    monkeypatch.setattr(times, "PEAK_SIZE", 64)
    times.peak.cache_clear()
    times.expected.cache_clear()
    times.views.cache_clear()


def task(row: str, problem: Timed = TINY) -> Task:
    (found,) = times._rows(problem, (row,), "cpu")
    return found


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("row", ["torch", "eager", "reference"])
def test_rows_agree_with_float64(row: str, products: str, raw: bool, quick: None, tmp_path: Path) -> None:
    found = run(task(row, Timed(13, 16, products, raw)), tmp_path / "lines")
    (good,) = found.good
    assert good["p20 ms"] <= good["p50 ms"] <= good["p80 ms"]
    assert good["host µs"] > 0
    assert good["of peak"] == pytest.approx(good["TFLOP/s"] * 1e12 / times.peak(products, "cpu"))


@pytest.mark.parametrize(
    ("row", "kept", "reason"),
    [("eager", "dropped", "eager is wrong: error of the loss"), ("reference", "failed", "reference is wrong")],
)
def test_a_wrong_row(
    row: str, kept: str, reason: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline is dropped and named; a row of ours fails."""
    right = times.make_step

    def made(name: str, problem: Timed, z: torch.Tensor) -> times.Step:
        step = right(name, problem, z)
        return (lambda: (step()[0] + 0.1, step()[1])) if name == row else step

    monkeypatch.setattr(times, "make_step", made)
    found = run(task(row), tmp_path / "lines")
    ((line,),) = (getattr(found, kept),)
    assert reason in line["problem"]
    assert not found.good


@pytest.mark.parametrize(
    ("error", "kept"),
    [("CUDA out of memory. Tried to allocate", "dropped"), ("CUDA error: an illegal memory access", "failed")],
)
def test_a_baseline_that_cannot_run(
    error: str, kept: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is a reason to drop it; a GPU that is lost is not."""
    left: list[int] = []
    monkeypatch.setattr(child, "leave", left.append)
    monkeypatch.setattr(times, "in_pytorch", lambda problem: lambda leaves: (_ for _ in ()).throw(RuntimeError(error)))
    found = run(task("eager"), tmp_path / "lines")
    ((line,),) = (getattr(found, kept),)
    assert error in line["problem"]
    assert left == ([] if kept == "dropped" else [child.LOST])


def test_a_package_that_is_missing_is_named(quick: None, tmp_path: Path) -> None:
    ((line,),) = (run(task("inf_cl"), tmp_path / "lines").dropped,)
    assert line["problem"] == "inf_cl is not installed (pip install inf-cl)"


def test_another_function_only_has_to_be_finite(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "flash_loss", lambda problem: lambda leaves: (leaves[0] * leaves[1]).sum())
    assert run(task("inf_cl"), tmp_path / "one").good
    monkeypatch.setattr(times, "flash_loss", lambda problem: lambda leaves: (leaves[0] / 0 * leaves[1]).sum())
    ((line,),) = (run(task("inf_cl"), tmp_path / "two").dropped,)
    assert "not finite" in line["problem"]


def test_products_are_set_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for products in PRODUCTS:
        with times.multiplying(products):
            assert matmul.fp32_precision == ("ieee" if products == "ieee" else "tf32")
    assert matmul.fp32_precision == before


# ---- how long compiling takes ----------------------------------------------------------------------------------------
def test_compiling_is_reckoned_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reckoned, "COMPILED", {"warm": 30, "smoke": 0, "verify": 50})
    monkeypatch.setattr(reckoned, "SECONDS", 2.0)
    assert reckoned.sentence(STEPS, 4) == (
        "up to 80 Triton kernels to compile (warm 30, verify 50): at 2 s each 160 s of work, about 40 s for 4 "
        "processes side by side, once for this machine"
    )
    assert "(warm 30)" in reckoned.sentence(tuple(step for step in STEPS if "smoke" in step.only), 4)
    assert reckoned.sentence((), 4) == "no Triton kernels to compile"


def test_what_a_kernel_took_is_in_the_report(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "results.jsonl", "warm")
    for kernels, seconds in ((3, 6.0), (0, 1.0), (1, 4.0)):
        lines.write("result", task=f"{kernels}", ok=True, kernels=kernels, seconds=seconds)
    report.write(tmp_path, tuple(step for step in STEPS if step.name == "warm"), {})
    assert "- 4 kernels in 2.50 s each" in (tmp_path / "report.md").read_text(encoding="utf-8")


WITHOUT = """
import importlib, sys
for name in ("rich", "matplotlib", "scipy", "sklearn", "pandas"):
    sys.modules[name] = None  # an import of it fails
for step in ("warm", "smoke", "times", "verify", "device_tests", "cpu_threads", "environment", "build", "__main__"):
    importlib.import_module(f"benchmarks.gpu_check.{step}")
"""


def test_the_check_needs_what_the_package_needs() -> None:
    """It runs in the Python of whoever owns the GPU, which need not have what other benchmarks draw and print with."""
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=Path(__file__).parents[2], check=True)
