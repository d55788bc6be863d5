"""The catalogue fits the code: without running anything."""

from __future__ import annotations

import shlex
from collections import Counter

import pytest

from .__main__ import sample
from .catalogue import faults, layers
from .fault import ROOT, Fault
from .scratch import judge

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
