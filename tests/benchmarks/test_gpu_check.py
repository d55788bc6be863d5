"""``make gpu-check``: whatever a step does, the others run and the report has it all; nine minutes at most."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import build, environment, report, supervise, verify
from benchmarks.gpu_check.child import Context
from benchmarks.gpu_check.device_tests import FILES
from benchmarks.gpu_check.lines import Lines, read, tally
from benchmarks.gpu_check.steps import GPU, KERNELS, MINUTES, ONLY, STEPS
from cacr_kernels.backends.triton import ops
from tests.benchmarks.gpu_check_steps import fake

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

ROOT = Path(__file__).resolve().parents[2]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def processes(folder: Path, step: str | None = None) -> list[int]:
    notes = [line for line in read(folder / "results.jsonl") if line["event"] == "note"]
    return [int(line["text"].split()[1]) for line in notes if step in (None, line["step"])]


def in_report(folder: Path) -> dict[str, Any]:
    steps: dict[str, Any] = json.loads((folder / "report.json").read_text())["steps"]
    return steps


# ---- steps that go wrong ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_of_all(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("check") / "report"
    names = ("results", "crashing", "hanging")
    steps = (*map(fake, names), fake("late", 5.0), fake("absent"), fake("last"))
    return folder, check.main(["--out", str(folder)], steps)


def found(folder: Path, step: str) -> dict[str, list[str]]:
    """Names of the tasks by how they ended."""
    tasks = tally([line for line in read(folder / "results.jsonl") if line["step"] == step])
    good, failed, dropped = ([line["task"].split()[0] for line in group] for group in tasks[:3])
    return {"good": good, "failed": failed, "dropped": dropped, "lost": [task.split()[0] for task in tasks.lost]}


def test_results_are_told_apart(run_of_all: tuple[Path, int]) -> None:
    folder, status = run_of_all
    assert status == 1
    assert found(folder, "results") == {"good": ["fine"], "failed": ["wrong"], "dropped": ["drop"], "lost": []}
    text = (folder / "report.md").read_text()
    assert "wrong of results: 0.5 is not 0.25" in text
    assert "drop of results: out of memory" in text
    assert "| fine of results | 1.5 |" in text


def test_after_a_crash_the_next_task_runs(run_of_all: tuple[Path, int]) -> None:
    """And after an error that leaves the GPU of no use to the process."""
    folder, _ = run_of_all
    ended = {"good": ["fine"], "failed": ["sticky"], "dropped": ["drop"], "lost": ["crash"]}
    assert found(folder, "crashing") == ended
    assert len(processes(folder, "crashing")) == 3
    assert "Begun and not ended: `crash of crashing`" in (folder / "report.md").read_text()


def test_a_task_that_hangs_is_ended(run_of_all: tuple[Path, int]) -> None:
    folder, _ = run_of_all
    assert found(folder, "hanging") == {"good": ["fine"], "failed": [], "dropped": ["drop"], "lost": ["sleep"]}
    assert "time.sleep(60)" not in (folder / "report.md").read_text()
    assert "in sleep" in (folder / "log.txt").read_text()  # where it hung


def test_a_step_out_of_time_is_ended_with_what_it_started(run_of_all: tuple[Path, int]) -> None:
    folder, _ = run_of_all
    step = in_report(folder)["late"]
    assert step["status"] == "out of time"
    assert 5.0 <= step["seconds"] < 40.0
    assert found(folder, "late")["good"] == ["fine"]
    assert not any(map(is_alive, processes(folder)))


def test_the_rest_goes_on(run_of_all: tuple[Path, int]) -> None:
    folder, _ = run_of_all
    steps = in_report(folder)
    assert [step["status"] for step in steps.values()] == ["done", "done", "done", "out of time", "skipped", "done"]
    assert steps["absent"]["reason"] == "there is no GPU"
    assert found(folder, "last")["good"] == ["fine"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(check.FILES)
    assert len(check.FILES) <= 8


def test_steps_without_their_gpu_do_not_start(tmp_path: Path) -> None:
    steps = (fake("decides"), fake("last", needs=GPU)._replace(name="smoke"), fake("last", needs=KERNELS))
    assert check.main(["--out", str(tmp_path)], steps) == 2
    said = {name: (step["status"], step["reason"]) for name, step in in_report(tmp_path).items()}
    assert said == {"decides": ("done", ""), "smoke": ("skipped", "there is no GPU"), "last": ("done", "")}
    assert len(processes(tmp_path)) == 1


def test_what_is_optional_may_run_out_of_time(tmp_path: Path) -> None:
    assert check.main(["--out", str(tmp_path)], (fake("optional", 10.0),)) == 0
    assert found(tmp_path, "optional") == {"good": ["fine"], "failed": [], "dropped": ["sleep"], "lost": []}
    assert "without what is optional" in in_report(tmp_path)["optional"]["reason"]


def test_exit_status(tmp_path: Path) -> None:
    assert check.main(["--out", str(tmp_path)], (fake("last"),)) == 0
    absent = [fake("absent")._replace(name=name) for name in ("smoke", "last")]
    lines = Lines(tmp_path / "lines", "smoke")
    outcomes = {"smoke": supervise.Outcome("skipped"), "last": supervise.Outcome("done")}
    assert check.status(tuple(absent), outcomes, lines.path) == 2
    outcomes["last"] = supervise.Outcome("crashed")
    assert check.status(tuple(absent), outcomes, lines.path) == 1


def test_a_process_outlives_a_compiler_while_its_input_is_captured(tmp_path: Path) -> None:
    """What watches the parent must not take another file for it."""
    assert check.main(["--out", str(tmp_path)], (fake("captured"),)) == 0
    assert found(tmp_path, "captured")["good"] == ["captures", "fine"]


def test_a_step_that_cannot_start(tmp_path: Path) -> None:
    steps = (fake("last")._replace(module="tests.benchmarks.no_such_module"), fake("last")._replace(name="last"))
    assert check.main(["--out", str(tmp_path)], steps[:1]) == 1
    assert "ModuleNotFoundError" in (tmp_path / "report.md").read_text()


def test_shares_of_a_step(tmp_path: Path) -> None:
    """Each process does its share, and each task is done once."""
    assert check.main(["--out", str(tmp_path), "-n", "2"], (fake("results", processes=True),)) == 1
    assert len(processes(tmp_path)) == 2
    starts = [line["task"] for line in read(tmp_path / "results.jsonl") if line["event"] == "start"]
    assert len(starts) == len(set(starts)) == 3


def test_all_processes_are_killed_before_one_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []
    kill, wait = supervise.Share.kill, supervise.Share.wait
    monkeypatch.setattr(supervise.Share, "kill", lambda share: calls.append(("kill", 0.0)) or kill(share))
    monkeypatch.setattr(
        supervise.Share, "wait", lambda share, until: calls.append(("wait", until)) or wait(share, until)
    )
    commands = [[sys.executable, "-c", ""]] * 3
    with supervise.shares_of(fake("last"), commands, Lines(tmp_path / "lines", "last"), tmp_path / "log"):
        pass
    assert [name for name, _ in calls] == ["kill"] * 3 + ["wait"] * 3
    assert len({until for name, until in calls if name == "wait"}) == 1


def test_one_process_does_a_case_on_both_backends_in_all_dtypes(tmp_path: Path) -> None:
    """So what is expected is computed once, and every process has kernels of both backends to wait for."""
    shares = [Context(Lines(tmp_path, "verify"), share, 16) for share in range(16)]
    of_share: dict[int, list[str]] = {}
    for task in verify.tasks(["triton", "cuda"]):
        (taker,) = (context.share for context in shares if context.takes(task.group))
        of_share.setdefault(taker, []).append(task.name)
    assert len(of_share) == 16
    for names in of_share.values():
        assert {name.replace("triton", "cuda") for name in names if name.startswith("triton")} == {
            name for name in names if name.startswith("cuda")
        }
        assert {*verify.DTYPES} <= {name.split()[1] for name in names}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle(number: int, tmp_path: Path) -> None:
    """The report says what was done, and no process is left."""
    script = (
        "import sys; from benchmarks.gpu_check.__main__ import main;"
        "from tests.benchmarks.gpu_check_steps import fake;"
        "main(['--out', sys.argv[1]], (fake('last'), fake('late')))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = Lines(tmp_path / "results.jsonl", "late")
    wait_until(lambda: len(lines.started()) == 2 and len(processes(tmp_path)) == 3)
    parent.send_signal(number)
    parent.wait(timeout=30)
    steps = in_report(tmp_path)
    assert (steps["last"]["status"], steps["late"]["status"]) == ("done", "running")
    assert "fine of last" in (tmp_path / "report.md").read_text()
    wait_until(lambda: not any(map(is_alive, processes(tmp_path))))


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- limits ----------------------------------------------------------------------------------------------------------
def test_limits_sum_to_nine_minutes() -> None:
    assert sum(step.seconds for step in STEPS) == 60 * MINUTES == 540


def test_minutes_scale_the_limits(tmp_path: Path) -> None:
    check.main(["--out", str(tmp_path), "--minutes", "18"], (fake("last", 7.0),))
    assert in_report(tmp_path)["last"]["limit"] == pytest.approx(14.0)
    for wrong in ("0", "-1", "nan"):
        with pytest.raises(SystemExit):
            check.parse(["--minutes", wrong])


def test_minutes_are_those_of_the_chosen_steps(tmp_path: Path) -> None:
    """Whatever ``--only`` leaves out; and some time is left to what has to start first."""
    steps = (
        fake("last", 10.0, only=("smoke",), least=9.0),
        fake("results", 40.0)._replace(only=("smoke",)),
        fake("late"),
    )
    check.main(["--out", str(tmp_path), "--only", "smoke", "--minutes", "0.5"], steps)
    assert {name: step["limit"] for name, step in in_report(tmp_path).items()} == {"last": 9.0, "results": 24.0}


def test_build_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)
    monkeypatch.delenv("CXX", raising=False)
    assert build.missing_tools()[:2] == ["a C++ compiler (GCC or Clang)", "ninja"]


@pytest.mark.parametrize("nvcc", ["", "nvcc: NVIDIA\nBuild cuda_13.0"])
def test_environment_whatever_nvcc_prints(nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "first_lines", lambda *command: nvcc)
    lines = Lines(tmp_path / "lines", "environment")
    environment.describe(Context(lines))
    notes = [line["text"] for line in lines.read() if line["event"] == "note"]
    assert ("nvcc: Build cuda_13.0" if nvcc else "nvcc: prints nothing") in notes


@pytest.mark.parametrize("only", ONLY)
def test_only(only: str) -> None:
    names = [step.name for step in STEPS if only in step.only]
    expected = {
        "smoke": ["warm", "smoke"],
        "times": ["warm", "times", "cpu_threads"],
        "verify": ["verify"],
        "tests": ["device_tests"],
    }
    assert names == ["environment", "build", *expected[only]]


def test_large_logs_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LOG_BYTES", 1000)
    log = tmp_path / "log.txt"
    log.write_text("x" * 5000)
    supervise.shorten(log)
    assert log.stat().st_size == 500
    Lines(tmp_path / "lines", "step").write("result", task="t", ok=False, problem="x" * 10**6)
    assert (tmp_path / "lines").stat().st_size < 10_000


def test_a_full_file_takes_short_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_check.lines.FULL", 5000)
    lines = Lines(tmp_path / "lines", "step")
    for number in range(100):
        lines.write("result", task=f"{number} of a step", ok=False, problem="x" * 10**4)
    assert len(lines.read()) == 100
    assert lines.path.stat().st_size < 5000 + 100 * 400


def test_a_broken_line_is_left_out(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "lines", "step")
    lines.write("start", task="a")
    with lines.path.open("a") as file:
        file.write('{"step": "st')
    assert len(lines.read()) == 1
    report.write(tmp_path, (fake("last"),), {})
    assert "waiting" in (tmp_path / "report.md").read_text()


PLANTED = """
import os, pytest
from hypothesis import given, strategies as st

@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_backend(backend):
    assert backend != "cuda"

@pytest.mark.parametrize("backend", ["triton"])
def test_sticky(backend):
    raise RuntimeError("CUDA error: unspecified launch failure")

@pytest.mark.parametrize("backend", ["triton"])
def test_crash(backend):
    os.abort()

@pytest.mark.parametrize("backend", ["triton"])
def test_skipped(backend):
    pytest.skip("no second device")

def test_all_backends():
    raise AssertionError("not chosen")

@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["triton"])
def test_more_of_the_same(backend):
    raise AssertionError("not chosen")

@given(st.integers())
@pytest.mark.parametrize("backend", ["triton"])
def test_any_shape(backend, n):
    raise AssertionError("not chosen")
"""
SELECT = """
import sys
from pathlib import Path
import pytest
from benchmarks.gpu_check.child import Context
from benchmarks.gpu_check.lines import Lines
from benchmarks.gpu_check.selection import Selection
context = Context(Lines(Path(sys.argv[1]), "device_tests"))
arguments = [sys.argv[2], "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", "--rootdir", "."]
raise SystemExit(pytest.main(arguments, plugins=[Selection(context, 60)]))
"""


def test_tests_of_a_gpu_are_selected_and_go_on_after_a_crash(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(PLANTED, encoding="utf-8")
    lines = Lines(tmp_path / "lines", "device_tests")
    command = [sys.executable, "-c", SELECT, str(lines.path), str(tmp_path / "test_planted.py")]
    codes = [subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode for _ in range(3)]
    assert codes == [86, -signal.SIGABRT, 0]
    good, failed, dropped, lost = tally(lines.read())
    assert [line["task"].rpartition("::")[2] for line in good] == ["test_backend[triton]"]
    assert [line["task"].rpartition("::")[2] for line in failed] == ["test_backend[cuda]", "test_sticky[triton]"]
    assert [line["problem"] for line in dropped] == ["Skipped: no second device"]
    assert [task.rpartition("::")[2] for task in lost] == ["test_crash[triton]"]


def test_files_with_tests_exist() -> None:
    assert all((ROOT / name).exists() for name in FILES)


# ---- the whole check, without a GPU ----------------------------------------------------------------------------------
def whole(folder: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(folder), "-n1", "--minutes=40", *arguments]
    env = kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, in_report(folder)


def test_whole_check_without_a_gpu(tmp_path: Path) -> None:
    status, steps = whole(tmp_path)
    assert status == 2
    assert list(steps) == [step.name for step in STEPS]
    assert steps["environment"]["status"] == "done"
    assert steps["cpu_threads"]["status"] in ("done", "skipped")
    for name in ("build", "warm", "smoke", "times", "verify", "device_tests"):
        assert steps[name]["status"] == "skipped", steps[name]
        assert "no GPU" in steps[name]["reason"] or "torch finds none" in steps[name]["reason"], steps[name]
    assert 'backend "cpu"' in (tmp_path / "report.md").read_text()


def test_smoke_in_the_interpreter(tmp_path: Path) -> None:
    """Every loss, on CPU tensors; other steps say that they need a GPU."""
    pytest.importorskip("triton")
    if (reason := ops.about_numpy()) is not None:
        pytest.skip(reason)
    status, steps = whole(tmp_path, "--only", "smoke", TRITON_INTERPRET="1")
    assert (steps["warm"]["status"], steps["smoke"]["status"]) == ("skipped", "done")
    results = [line for line in steps["smoke"]["lines"] if line["event"] == "result"]
    assert len({line["task"].split()[2] for line in results}) == 4
    assert all(line["ok"] and line["error"] <= line["tolerance"] for line in results)
    assert status == 0
