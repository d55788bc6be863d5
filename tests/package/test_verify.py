"""``python -m cacr_kernels.verify``: exit status, report, and that a planted error is found and named."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cacr_kernels import functional, testing, verify
from cacr_kernels.backends.table import available_backends

ROOT = Path(__file__).parents[2]
USABLE = [name for name, reason in available_backends().items() if reason is None and name != "reference"]
FEW = [
    testing.Case("cacr_loss", {"V": 2, "B": 5, "D": 3}, {"tau_pos": 1.0, "tau_neg": 2.0}),
    testing.Case("supervised_cacr_loss", {"B": 7, "D": 3, "C": 2}, {"tau_pos": 1.0, "tau_neg": 2.0}),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of seconds: two cases and no gradcheck."""
    monkeypatch.setattr(testing, "cases", lambda quick=False: FEW)
    monkeypatch.setattr(verify, "gradchecks", list)


def plant(monkeypatch: pytest.MonkeyPatch, backend: str, factor: float) -> None:
    """Makes ``cacr_loss`` of one backend wrong by ``factor``."""
    right = functional.cacr_loss

    def wrong(*args, **kw):
        return right(*args, **kw) * (factor if kw["backend"] == backend else 1.0)

    monkeypatch.setattr(functional, "cacr_loss", wrong)


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.exhaustive if name == "torch" else ()) for name in USABLE]
)
def test_quick_run_passes(backend: str, capsys: pytest.CaptureFixture[str]):
    status = verify.main(["--quick", "--backend", backend])
    assert status == 0, [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]


@pytest.mark.usefixtures("few")
def test_right_backends_exit_0_and_end_with_the_verdict(capsys: pytest.CaptureFixture[str]):
    assert verify.main([]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert all(name in out for name in USABLE)
    assert out.splitlines()[-1].endswith("all within tolerance")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("backend", USABLE)
def test_planted_error_exits_1_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
):
    plant(monkeypatch, backend, 1 + 1e-4)
    assert verify.main([]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failed
    assert all(line.startswith(f"FAILED {backend} ") and FEW[0].name in line for line in failed)
    assert {line.split()[2] for line in failed} == {f"{dtype}:" for dtype in verify.DTYPES}


@pytest.mark.usefixtures("few")
def test_nan_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, "torch", math.nan)
    assert verify.main(["--backend", "torch"]) == 1


@pytest.mark.usefixtures("few")
def test_exception_is_a_failure_that_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(*args, **kw):
        raise RuntimeError("kernel on fire")

    monkeypatch.setattr(functional, "supervised_cacr_loss", broken)
    assert verify.main(["--backend", "torch"]) == 1
    assert "kernel on fire" in capsys.readouterr().out


def test_wrong_gradient_is_found_by_gradcheck(monkeypatch: pytest.MonkeyPatch):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-2)

    right = functional.cacr_loss
    monkeypatch.setattr(functional, "cacr_loss", lambda views, **kw: right(Off.apply(views), **kw))
    checks = {check.label: check for check in verify.gradchecks()}
    assert not checks["cacr_loss unordered sqeuclidean"].run("torch", "cpu")
    assert checks["supervised_cacr_loss mean"].run("torch", "cpu")


@pytest.mark.parametrize("check", verify.gradchecks(), ids=lambda check: check.label)
def test_reference_passes_gradcheck(check: verify.Gradcheck):
    assert check.run("reference", "cpu")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_failed_gradcheck_exits_1_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, how: str
):
    def gradcheck(*args, **kw):
        if how == "raises":
            raise RuntimeError("kernel on fire")
        return False

    monkeypatch.setattr(verify, "gradchecks", lambda: [verify.Gradcheck("this one", "cacr_loss", {})])
    monkeypatch.setattr(torch.autograd, "gradcheck", gradcheck)
    assert verify.main(["--backend", "torch", "--json", str(tmp_path / "report.json")]) == 1
    out = capsys.readouterr().out
    assert "FAILED torch gradcheck: this one" in out
    assert ("kernel on fire" in out) is (how == "raises")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["ok"] is False
    assert [found["ok"] for found in report["gradcheck"]] == [False]
    assert all(found["ok"] for found in report["checks"])


def test_the_table_names_the_worst_check(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "cacr_loss": [testing.Result("loss", 7e-9, 1e-9, 8e-9), testing.Result("gradient", 1e-9, 1e-9, 8e-9)],
        "supervised_cacr_loss": [testing.Result("loss", 0.0, 0.0, 8e-9), testing.Result("gradient", 3e-9, 1e-9, 2e-9)],
    }
    monkeypatch.setattr(verify, "results_of", lambda case, *_: found[case.loss])
    row = verify.check_group("torch", "float64", "all", FEW, "cpu", lambda: None)
    assert row[3:6] == (4, 1, "gradient")
    assert (row.case, row.error) == (FEW[1].name, 3e-9)
    found["cacr_loss"][0] = testing.Result("loss", math.nan, 1e-9, 8e-9)
    assert verify.check_group("torch", "float64", "all", FEW, "cpu", lambda: None).case == FEW[0].name


@pytest.mark.parametrize("quick", [False, True])
def test_what_is_compared_is_what_was_asked_for(few: None, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    devices, dtypes, suites = set(), set(), []

    def compare(case: testing.Case, backend: str, dtype: torch.dtype, device: str = "nowhere") -> list[testing.Result]:
        devices.add(device)
        dtypes.add(dtype)
        return [testing.Result("loss", 0.0, 0.0, 1.0)]

    monkeypatch.setattr(testing, "compare", compare)
    monkeypatch.setattr(testing, "cases", lambda quick=False: suites.append(quick) or FEW)
    assert verify.main(["--backend", "torch", "--device", "cpu:0", *(["--quick"] if quick else [])]) == 0
    assert devices == {"cpu:0"}
    assert dtypes == set(verify.DTYPES.values())
    assert suites == [quick]


@pytest.mark.parametrize("check", verify.gradchecks(), ids=lambda check: check.label)
def test_gradchecks_use_the_device_and_the_backend(check: verify.Gradcheck, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [tensor for group in check.tensors("meta") for tensor in group.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    used, right = [], getattr(functional, check.loss)

    def loss(*args, **kw):
        used.append(kw["backend"])
        return right(*args, **kw).detach()

    monkeypatch.setattr(functional, check.loss, loss)
    check.run("torch", "cpu")
    assert set(used) == {"torch"}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("few")
def test_progress_in_a_file_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert verify.main(["--backend", "torch"]) == 0
    assert capsys.readouterr().err.splitlines() == ["  0 %  torch float64 cacr_loss unordered sqeuclidean"]  # seconds
    monkeypatch.setattr(verify.Progress, "PAUSE", 0.0)
    assert verify.main(["--backend", "torch"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert " 87 %  torch float16 supervised_cacr_loss" in lines
    assert lines[-1].startswith("100 %")
    assert not any("\x1b" in line or "\r" in line for line in lines)


@pytest.mark.usefixtures("few")
def test_progress_on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", _Terminal())
    assert verify.main(["--backend", "torch"]) == 0
    shown = sys.stderr.getvalue()
    assert " 87 %  torch float16 supervised_cacr_loss" in shown  # two cases in four dtypes
    assert shown.endswith("\r\x1b[K")


@pytest.mark.parametrize("module", ["cacr_kernels.verify", "cacr_kernels.__main__"])
def test_commands_need_nothing_but_the_dependencies(module: str):
    """No package that ``pip install cacr_kernels`` does not bring."""
    code = f"import sys, {module}; raise SystemExit('rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_report_that_cannot_be_written_exits_2_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(verify, "run_checks", None)
    assert verify.main(["--json", str(tmp_path / "nowhere" / "report.json")]) == 2
    assert "report.json" in capsys.readouterr().err


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_json_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float):
    plant(monkeypatch, "torch", factor)
    file = tmp_path / "report.json"
    status = verify.main(["--backend", "torch", "--json", str(file)])
    report = json.loads(file.read_text(encoding="utf-8"))
    assert set(report) == {"environment", "backends", "ok", "checks", "gradcheck"}
    assert report["ok"] is (status == 0) is (factor == 1.0)
    assert report["environment"]["torch"] == torch.__version__
    assert {row["dtype"] for row in report["checks"]} == {"float64", "float32", "bfloat16", "float16"}
    for row in report["checks"]:
        assert set(row) == {*verify.Row._fields, "ok"}
        assert row["ok"] is (row["failures"] == 0)
        assert row["backend"] == "torch"
        assert row["tolerance"] > 0


@pytest.mark.parametrize("name", ["reference", "abacus"])
def test_backend_that_is_not_to_be_checked_exits_2(capsys: pytest.CaptureFixture[str], name: str):
    assert verify.main(["--backend", name]) == 2
    err = capsys.readouterr().err
    assert name in err
    assert "torch" in err  # what is accepted


def test_unknown_device_exits_2(capsys: pytest.CaptureFixture[str]):
    assert verify.main(["--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_unknown_option_exits_2():
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--fast"])
    assert stopped.value.code == 2


def test_backend_that_cannot_run_exits_2_with_its_reason():
    code = "from cacr_kernels import verify; raise SystemExit(verify.main(['--backend', 'cpu']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"CACR_DISABLE_EXTENSION": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert "CACR_DISABLE_EXTENSION" in done.stderr
