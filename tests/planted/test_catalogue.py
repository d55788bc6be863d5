"""The catalogue fits the code, and what a run of it concludes: without planting anything."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .__main__ import can_run, sample
from .catalogue import faults, layers
from .fault import ROOT, Fault
from .scratch import Run, Scratch, covers, judge

CATALOGUE = faults()


@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.id)
def test_fault_can_be_planted(fault: Fault) -> None:
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    faulty = fault.apply(source)
    assert faulty != source
    if fault.file.endswith(".py"):
        compile(faulty, fault.file, "exec")
    assert fault.layer in layers()
    assert fault.why
    assert "\n" not in fault.why
    for run in fault.runs:
        paths = [word.partition("::")[0] for word in shlex.split(run) if word.startswith("tests/")]
        assert paths
        assert all((ROOT / path).exists() for path in paths)


def test_ids_are_unique() -> None:
    assert [name for name, count in Counter(fault.id for fault in CATALOGUE).items() if count > 1] == []


def test_samples_go_through_the_catalogue() -> None:
    count = -(-len(CATALOGUE) // 6)
    seen = {fault.id for seed in range(7, 7 + count) for fault in sample(CATALOGUE, 6, seed)}
    assert len(seen) == len(CATALOGUE)


FAULT = Fault("cpu-x", "f", "a", "b", "why", "tests/f.py")


def test_a_text_has_to_be_where_it_should_be() -> None:
    assert FAULT.apply("xay") == "xby"
    assert FAULT._replace(occurrence=1).apply("a a a") == "a b a"
    with pytest.raises(ValueError, match="2 times"):
        FAULT.apply("a a")
    with pytest.raises(ValueError, match="0 times"):
        FAULT.apply("x")
    with pytest.raises(ValueError, match="3 times in f, not 4"):
        FAULT._replace(occurrence=3).apply("a a a")


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "2 passed", ("NOT CAUGHT", "", "")),
        (
            1,
            "FAILED torch: it said\nFAILED tests/a.py::b[c, d] - E: e - f",
            ("caught", "tests/a.py::b[c, d]", "E: e - f"),
        ),
        (2, "ERROR tests/a.py - NameError: d", ("caught", "tests/a.py", "NameError: d")),
        (None, "", ("time-out", "", "the tests did not come to an end")),
        (-11, "", ("caught", "the process", "ended by signal 11")),
        (1, "x.h:3: error: no\nFAILED tests/a.py::b", ("error", "tests/a.py::b", "does not compile: x.h:3: error: no")),
        (5, "no tests ran", ("error", "", "pytest ended with status 5: no tests ran")),
    ],
)
def test_verdicts(status: int | None, output: str, expected: tuple[str, str, str]) -> None:
    assert judge(status, output)[:3] == expected


# ---- which tests run, and what they prove ----------------------------------------------------------------------------
FAULTY = Fault("toy-fault", "toy.py", "good", "bad", "", ("tests/a.py", "tests/folder"))
Says = Callable[[str, bool], tuple[int | None, str]]


class Toy(Scratch):
    """A tree of one file; ``says`` is pytest: what it is asked to run, and whether the fault is there."""

    def __init__(self, folder: Path, says: Says) -> None:
        self.tree, self.passing, self.says = folder, set(), says
        self.ran: list[str] = []
        (folder / "toy.py").write_text("good", encoding="utf-8")

    def pytest(self, run: Run) -> tuple[int | None, str]:
        self.ran.append(run.arguments[0])
        return self.says(run.arguments[0], (self.tree / "toy.py").read_text(encoding="utf-8") == "bad")


def failed(test: str) -> tuple[int, str]:
    return 1, f"FAILED {test} - it said"


def test_the_test_that_noticed_before_runs_first(tmp_path: Path) -> None:
    toy = Toy(tmp_path, lambda asked, faulty: failed(asked) if faulty else (0, ""))
    assert toy.plant(FAULTY, "tests/folder/b.py::c")[:2] == ("caught", "tests/folder/b.py::c")
    assert toy.ran == ["tests/folder/b.py::c"] * 2  # with the fault and without


def test_a_test_that_the_fault_does_not_name_proves_nothing(tmp_path: Path) -> None:
    toy = Toy(tmp_path, lambda asked, faulty: failed(asked) if faulty and "elsewhere" in asked else (0, ""))
    assert toy.plant(FAULTY, "tests/elsewhere.py::c").verdict == "NOT CAUGHT"
    assert not covers(FAULTY, "tests/a.py.old::c")


def test_a_guess_that_fails_in_any_case_is_passed_over(tmp_path: Path) -> None:
    def says(asked: str, faulty: bool) -> tuple[int, str]:
        if asked == "tests/a.py::broken":
            return failed(asked)
        return failed("tests/folder/b.py::c") if faulty else (0, "")

    assert Toy(tmp_path, says).plant(FAULTY, "tests/a.py::broken")[:2] == ("caught", "tests/folder/b.py::c")


@pytest.mark.parametrize(
    "answer", [(2, "ERROR tests/a.py - ModuleNotFoundError"), (-9, ""), (None, ""), failed("tests/a.py::b")]
)
def test_what_fails_without_the_fault_proves_nothing(tmp_path: Path, answer: tuple[int | None, str]) -> None:
    outcome = Toy(tmp_path, lambda asked, faulty: answer).plant(FAULTY)
    assert (outcome.verdict, outcome.said) == ("error", "fails, or takes too long, without the fault, too")
    assert (tmp_path / "toy.py").read_text(encoding="utf-8") == "good"


def test_faults_that_this_python_cannot_plant_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = FAULTY._replace(tests=("tests/a.py", "tests/device/test_gpu.py -k b"))
    for version, able in ((None, False), ("13.0", True)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert can_run(FAULTY)
        assert can_run(on_gpu) is able
