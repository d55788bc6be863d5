"""The tables of the README say what the code does: they are made from it, and made again here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import __main__ as main
from cacr_kernels import cacr_loss, support

README = Path(__file__).parents[2] / "README.md"
CACR, *_ = support.CASES
SUM = support.FEATURES['`reduction="sum"`']


def test_the_readme_is_what_the_code_does(tmp_path: Path) -> None:
    """If not: ``python -m cacr_kernels --table README.md``."""
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    main.main(["--table", str(copy)])
    assert copy.read_text(encoding="utf-8") == README.read_text(encoding="utf-8")


def test_every_loss_and_backend_has_its_place() -> None:
    import cacr_kernels

    table = README.read_text(encoding="utf-8").partition(support.BEGIN)[2].partition(support.END)[0]
    for name in cacr_kernels.available_backends():
        assert f"`{name}`" in table
    for name in (name for name in cacr_kernels.__all__ if name.endswith("_loss")):
        assert f"| `{name}` |" in table


def loses_its_gradient(views: Tensor, **options: Any) -> Tensor:
    return cacr_loss(views.detach(), **options)


def squares(views: Tensor, **options: Any) -> Tensor:
    z = views.flatten(0, 1)
    return cacr_loss(views, **options) + (z @ z.T).mean()


def refuses_the_sum(views: Tensor, **options: Any) -> Tensor:
    if options.get("reduction") == "sum":
        raise ValueError("no sum")
    return cacr_loss(views, **options)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_what_is_missing_shows(backend: str) -> None:
    assert support.gradients(CACR, backend) == ("views", "tau_pos", "tau_neg")
    assert support.gradients(CACR._replace(function=loses_its_gradient), backend) == ("tau_pos", "tau_neg")
    assert support.way(CACR._replace(function=squares), backend) == f"{support.way(CACR, backend)}, N × M"
    assert support.way(CACR, "reference") == "plain, N × M"


def test_what_is_refused_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = CACR._replace(text="`bad`", function=refuses_the_sum)
    assert _supported(monkeypatch, CACR) == "yes"
    assert _supported(monkeypatch, bad) == "no"
    assert _supported(monkeypatch, CACR, bad) == "not `bad`"


def _supported(monkeypatch: pytest.MonkeyPatch, *cases: support.Case) -> str:
    monkeypatch.setattr(support, "CASES", cases)
    return support.supported(SUM, "cpu")


def test_the_table_does_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot run here has its column, and still cannot run afterwards."""
    table = importlib.import_module("cacr_kernels.backends.table")
    broken = tuple(b._replace(why_not=lambda _: "it is broken") if b.name == "cpu" else b for b in table.TABLE)
    expected = support.way(CACR, "cpu")
    monkeypatch.setattr(table, "TABLE", broken)
    assert support.way(CACR, "cpu") == expected
    with pytest.raises(ValueError, match="it is broken"):
        cacr_loss(torch.ones(2, 3, 4), backend="cpu")


def test_markers_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "file.md"
    file.write_text("nothing here")
    with pytest.raises(ValueError, match=r"file\.md must hold the lines"):
        support.update(file)
    assert file.read_text() == "nothing here"
