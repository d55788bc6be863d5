"""What the tests themselves promise: which of them run, and what a failure says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import testing
from tests import agreement
from tests.covering import covering, covering_set

pytest_plugins = ["pytester"]

CASE = testing.Case("cacr_loss", {"V": 2, "B": 5, "D": 3}, {"tau_pos": 2.0, "tau_neg": 5.0})


def off(by: float) -> Callable[..., dict[str, Tensor]]:
    """``testing.actual_quantities`` with an error in one entry for the inputs of seed 2."""
    right, third = testing.actual_quantities, testing.make_inputs(CASE, 2)["views"].float()

    def wrong(case: testing.Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        found = right(case, inputs, backend)
        if torch.equal(inputs["views"], third):
            found["views"][1, 4, 0] += by
        return found

    return wrong


def test_a_failure_says_all_that_is_needed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(testing, "actual_quantities", off(0.25))
    monkeypatch.setenv("CACR_CPU_ISA", "portable")
    with pytest.raises(AssertionError) as caught:
        agreement.assert_within_budget(CASE, "torch", torch.float32, testing.DRAWS)
    first, second, third = str(caught.value).splitlines()
    assert first == f"{CASE.name}, torch.float32, backend 'torch':"
    draw = testing.expect(CASE, torch.float32).draws[2]
    true = draw.truth["views"][1, 4, 0].item()
    assert second.startswith("gradient of views: error ")
    assert "of seeds 0 to 3 seed 2 is worst: entry [1, 4, 0] is " in second
    assert second.endswith(f"should be {true:.9g}")
    assert float(second.split("error ")[1].split(",")[0]) == pytest.approx(0.25 / draw.scale["views"], rel=1e-2)
    assert 0 < float(second.split("tolerance ")[1].split()[0]) < 1e-4
    assert third == f"again: CACR_CPU_ISA=portable python -m pytest {request.node.nodeid}"


def test_fewer_draws_are_enough_where_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of seed 2 are not among them; where they miss, the usual number decides."""
    monkeypatch.setattr(testing, "actual_quantities", off(0.25))
    agreement.assert_within_budget(CASE, "torch", draws=2)
    with pytest.raises(AssertionError, match="seed 2 is worst"):
        agreement.assert_within_budget(CASE, "torch", draws=3)


@pytest.mark.parametrize(
    ("actual", "says"),
    [
        ([1.0, 2.5, torch.inf], r"entry \[1\] is 2.5, should be 2; error 0.25 of 2, tolerance 0.1"),
        ([1.0, torch.nan, torch.inf], r"entry \[1\] is nan, should be 2; error nan"),
        ([1.0, 2.0, 3.0], r"entry \[2\] is 3, should be inf"),
        ([1.0, 2.0], r"shape \[2\], should be \[3\]"),
    ],
)
def test_the_worst_entry(actual: list[float], says: str) -> None:
    expected = torch.tensor([1.0, 2.0, torch.inf], dtype=torch.float64)
    agreement.assert_within(expected.float() + 0.01, expected, 0.1, 2.0, "x")
    with pytest.raises(AssertionError, match=rf"^x: {says}.*\nagain: .*python -m pytest "):
        agreement.assert_within(torch.tensor(actual), expected, 0.1, 2.0, "x")


@pytest.mark.parametrize(("strength", "most"), [(1, 5), (2, 20), (3, 60)])
def test_a_covering_set_holds_every_part(strength: int, most: int) -> None:
    sizes = (5, 3, 4)
    few = covering_set(sizes, strength)
    assert len(few) <= most
    for axes in itertools.combinations(range(3), strength):
        held = {tuple(combination[i] for i in axes) for combination in few}
        assert held == set(itertools.product(*(range(sizes[i]) for i in axes)))


def test_the_other_combinations_are_exhaustive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mark = covering({"letter": list("abcd"), "number": {"one": 1, "two": 2}})
    names, parameters = mark.args
    assert names == ("letter", "number")
    assert [p.id for p in parameters] == [f"{letter}-{number}" for letter in "abcd" for number in ("one", "two")]
    assert [p.id for p in parameters if not p.marks] == ["a-one", "b-two", "c-one", "d-two"]


TESTS = """
import pytest

@pytest.mark.exhaustive
def test_long():
    pass

def test_short():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "variable", "run"),
    [(["test_x.py"], "", 1), (["test_x.py"], "1", 2), (["test_x.py::test_long"], "", 1)],
)
def test_what_runs(
    arguments: list[str], variable: str, run: int, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exhaustive tests with CACR_TEST_ALL=1, or by name."""
    monkeypatch.setenv("CACR_TEST_ALL", variable)
    pytester.makeconftest("from tests.conftest import pytest_collection_modifyitems")
    pytester.makeini("[pytest]\nmarkers = exhaustive")
    pytester.makepyfile(test_x=TESTS)
    found: dict[str, Any] = pytester.inline_run(*arguments, "-p", "no:cacheprovider").listoutcomes()[0]
    assert len(found) == run
