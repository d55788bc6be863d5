"""The package as installed: without its compiled extension, as a command, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cacr_kernels

ROOT = Path(cacr_kernels.__file__).parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


SCRIPT = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cacr_kernels as ck
    imported = len(caught)
    torch.manual_seed(0)
    z, labels = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([0, 1, 0, 1, 2])
    losses = [ck.cacr_loss(z)]
    first = len(caught)
    losses += [ck.cacr_loss(z, pairing="pooled", cost="rbf"), ck.CACRLoss()(z), ck.cacr_loss(z, backend="torch")]
    losses += [ck.cacr_queue_loss(z, z, z[0]), ck.cacr_momentum_loss(z, z[0], normalize=True)]
    losses += [ck.supervised_cacr_loss(z[0], labels), ck.SupervisedCACRLoss()(z[0], labels)]
    sum(losses).backward()
    named = ck.cacr_loss(z), ck.cacr_loss(z, backend="torch"), ck.cacr_loss(z, backend="reference")
refusals = []
for call in (lambda: ck.cacr_loss(z, backend="cpu"), lambda: ck.CACRLoss(backend="cpu")(z)):
    try:
        call()
    except ValueError as error:
        refusals.append(str(error))
print(json.dumps({
    "imported": imported, "first": first, "count": len(caught), "finite": bool(z.grad.isfinite().all()),
    "named": [x.item() for x in named], "backends": ck.backends(), "refusals": refusals,
    "warnings": [[w.category.__name__, str(w.message), w.filename] for w in caught],
}))
"""


def test_pure_python_package(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = json.loads(python(str(script), CACR_DISABLE_EXTENSION="1").stdout)
    assert found["imported"] == 0
    assert found["first"] == found["count"] == 1
    category, message, filename = found["warnings"][0]
    assert category == "RuntimeWarning"
    assert "PyTorch" in message
    assert "CACR_DISABLE_EXTENSION" in message
    assert Path(filename) == script  # the line of the user, not one of the package
    assert found["finite"]
    assert found["named"][0] == found["named"][1] == pytest.approx(found["named"][2], rel=1e-5)
    assert found["backends"]["torch"] is None
    assert "CACR_DISABLE_EXTENSION" in found["backends"]["cpu"]
    assert len(found["refusals"]) == 2
    for refusal in found["refusals"]:
        assert "backend='cpu'" in refusal
        assert "CACR_DISABLE_EXTENSION" in refusal


def test_nothing_is_said_that_was_not_asked_for() -> None:
    """No warning at import, nor by a backend that was named."""
    code = "import torch, cacr_kernels as c; c.cacr_loss(torch.randn(2, 4, 3), backend='torch')"
    for disabled in ("0", "1"):
        result = python("-W", "error", "-c", code, CACR_DISABLE_EXTENSION=disabled)
        assert result.stdout == result.stderr == ""


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_command_with_json(disabled: str) -> None:
    data = json.loads(python("-m", "cacr_kernels", "--json", CACR_DISABLE_EXTENSION=disabled).stdout)
    assert data["cacr_kernels"] == cacr_kernels.__version__
    expected = cacr_kernels.backends()
    assert data["backends"].keys() == expected.keys()
    assert (data["cpu_library"]["error"] is None) == (data["backends"]["cpu"] is None)
    if disabled == "1":
        assert "CACR_DISABLE_EXTENSION" in data["backends"]["cpu"]
        assert "CACR_DISABLE_EXTENSION" in data["cpu_library"]["error"]
        assert data["cpu_library"]["active_isa"] is None
    else:
        assert data["backends"] == expected


def test_command() -> None:
    text = python("-m", "cacr_kernels").stdout
    assert cacr_kernels.__version__ in text
    for name, reason in cacr_kernels.backends().items():
        line = next(line for line in text.splitlines() if line.startswith(f'backend "{name}"'))
        assert (reason or "can run") in line


def test_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("cacr_kernels.__main__").main(["--yaml"])
    assert caught.value.code == 2
    assert "--yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".functional", ".modules", ".backends"])
def test_examples_of_the_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"cacr_kernels{name}"))
    assert result.failed == 0
    assert result.attempted > 0


def test_everything_public_is_there_and_documented() -> None:
    for name in cacr_kernels.__all__:
        value = getattr(cacr_kernels, name)
        assert name.startswith("__") or value.__doc__, name
    losses = {"cacr_loss", "cacr_queue_loss", "cacr_momentum_loss", "supervised_cacr_loss", "CACRParts", "backends"}
    modules = {"CACRLoss", "CACRQueueLoss", "CACRMomentumLoss", "SupervisedCACRLoss"}
    assert losses | modules <= set(cacr_kernels.__all__)
