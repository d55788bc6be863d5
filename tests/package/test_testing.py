"""The measure of error: what it finds, what it forgives, what it never forgives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cacr_kernels import functional, testing
from cacr_kernels.testing import Case

ODD = Case("cacr_loss", {"V": 3, "B": 7, "D": 5}, {"tau_pos": 1.0, "tau_neg": 2.0})
PLANTED = 1e-4


def only(results: list[testing.Result], quantity: str) -> testing.Result:
    return next(result for result in results if result.quantity == quantity)


# Cases and inputs


def test_names_are_unique():
    names = [case.name for case in testing.cases()]
    assert len(set(names)) == len(names)


def test_quick_cases_cover_every_loss_and_are_a_part():
    quick, every = testing.cases(quick=True), testing.cases()
    assert {case.loss for case in quick} == {case.loss for case in every} == set(testing.DEFINITIONS)
    assert {case.name for case in quick} < {case.name for case in every}


@pytest.mark.parametrize("case", testing.cases(quick=True), ids=lambda case: case.name)
def test_inputs_are_reproducible_and_differ_by_seed(case: Case):
    first, again, other = testing.make_inputs(case), testing.make_inputs(case), testing.make_inputs(case, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if first[name].is_floating_point() and first[name].numel()]
    assert not any(torch.equal(first[name], other[name]) for name in changed)


def test_near_equal_views_are_near_and_queue_entries_are_not():
    case = Case("cacr_queue_loss", {"V": 2, "B": 5, "D": 9, "K": 7}, {"tau_pos": 1.0, "tau_neg": 1.0}, "near-equal")
    inputs = testing.make_inputs(case)
    near = (inputs["queries"] - inputs["keys"]).norm(dim=-1)
    assert 0 < near.max() < 5 * testing.NEAR
    assert torch.cdist(inputs["queries"].flatten(0, 1), inputs["queue"]).min() > 100 * testing.NEAR


def test_positive_of_a_query_is_its_key():
    options = {"temperature": 0.5, "key_offset": 3}
    inputs = testing.make_inputs(Case("cacr_momentum_loss", {"V": 1, "B": 5, "D": 9, "M": 11}, options, "near-equal"))
    nearest = torch.cdist(inputs["queries"][0], inputs["keys"]).argmin(-1)
    assert nearest.tolist() == [3, 4, 5, 6, 7]


# Distance and error


@pytest.mark.parametrize("dtype", testing.HALF)
def test_rounding_to_a_half_type_costs_nothing(dtype: torch.dtype):
    exact = torch.randn(4001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.cat([exact, 2.0 ** torch.arange(-30, 15), torch.tensor([0.0, 1e-9, -1e-9])]).double()
    assert testing.distance(exact.to(dtype), exact).max() == 0


@pytest.mark.parametrize("dtype", testing.HALF)
@pytest.mark.parametrize("steps", [-2, -1, 1, 2])
def test_a_neighbour_of_the_rounded_value_is_an_error(dtype: torch.dtype, steps: int):
    exact = torch.tensor([0.7, -0.7, 3.1, 0.3, 11.3], dtype=torch.float64)
    beside = (exact.to(dtype).view(torch.int16) + steps).view(dtype)
    step = (beside.double() - exact).abs()
    found = testing.distance(beside, exact)
    assert (found > 0).all()
    assert (found < step).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_an_infinite_error(bad: float):
    exact = torch.ones(3, dtype=torch.float64)
    actual = torch.tensor([1.0, bad, 1.0])
    assert testing.error(actual, exact, 1.0) == testing.error(exact, actual.double(), 1.0) == math.inf


def test_where_the_scale_is_zero_only_zero_is_right():
    zero = torch.zeros(2, dtype=torch.float64)
    assert testing.error(torch.zeros(2), zero, 0.0) == 0
    assert testing.error(torch.tensor([0.0, 1e-30]), zero, 0.0) == math.inf


def test_wrong_shape_is_an_infinite_error():
    assert testing.error(torch.ones(2), torch.ones(2, 1, dtype=torch.float64), 1.0) == math.inf


def test_error_is_relative_to_the_scale():
    exact = torch.tensor([2.0, -4.0], dtype=torch.float64)
    assert testing.error(exact + 0.5, exact) == 0.125
    assert testing.error(exact + 0.5, exact, 10.0) == 0.05


def test_nan_error_is_not_ok():
    assert not testing.Result("loss", math.nan, 0.0, 1.0).ok


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [(torch.float64, 2**-52), (torch.float32, 2**-23), (torch.bfloat16, 2**-23), (torch.float16, 2**-23)],
)
def test_tolerance_is_that_of_the_specification(dtype: torch.dtype, eps: float):
    assert testing.tolerance(3e-5, dtype) == 2 * 3e-5 + 8 * eps


# Comparisons


def test_scale_is_that_of_the_terms_not_of_their_difference():
    inputs = testing.make_inputs(ODD)
    _, scale = testing.true_quantities(ODD, inputs)
    tau_pos, tau_neg = ODD.options["tau_pos"], ODD.options["tau_neg"]
    parts = functional.cacr_loss(**inputs, tau_pos=tau_pos, tau_neg=tau_neg, backend="reference", return_parts=True)
    assert scale["loss"] == pytest.approx(max(abs(parts.attraction.item()), abs(parts.repulsion.item())))


def test_derivative_of_a_temperature_is_measured_against_what_the_queries_contribute():
    options = {"tau_pos": 0.0, "tau_neg": 10.0}
    case = Case("cacr_queue_loss", {"V": 2, "B": 7, "D": 5, "K": 11}, options)
    values, scale = testing.true_quantities(case, testing.make_inputs(case))
    tensors = testing.make_inputs(case)
    each = []
    for v in range(2):
        for b in range(7):  # each query alone, by the definition
            tau = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
            loss = functional.cacr_queue_loss(
                **tensors, tau_pos=0.0, tau_neg=tau, reduction="none", backend="reference"
            )
            each.append(torch.autograd.grad(loss[v, b], tau)[0].item())
    assert min(each) < 0 < max(each)
    assert values["tau_neg"].item() == pytest.approx(sum(each))
    assert scale["tau_neg"] == pytest.approx(sum(abs(x) for x in each))


def test_temperatures_that_are_numbers_are_not_measured():
    assert {r.quantity for r in testing.compare(ODD._replace(learnable=False), "torch", torch.float32)} == {
        "loss",
        "gradient of views",
    }


def test_inputs_of_a_tests_own_are_measured():
    def make(seed: int) -> dict[str, Tensor]:
        return {"views": torch.full((2, 3, 2), float(seed), dtype=torch.float64) + torch.eye(3, 2).double()}

    case = Case("cacr_loss", {}, {"tau_pos": 1.0, "tau_neg": 1.0}, make)
    expected = testing.expect(case, torch.float32)
    assert [draw.inputs["views"][0, 0, 1].item() for draw in expected.draws] == [0.0, 1.0, 2.0, 3.0]
    assert all(r.ok for r in testing.compare(case, "torch", torch.float32))


# Chance: a miss on few draws is looked at again on more


def planted_misses(monkeypatch: pytest.MonkeyPatch, errors: dict[int, float]) -> list[int]:
    """The error found on each number of draws, in tolerances; returns the numbers that were asked for."""
    asked: list[int] = []

    def measure(case, expected, backend, dtype):
        asked.append(len(expected.draws))
        return [testing.Result("loss", errors[asked[-1]], 0.0, 1.0)]

    monkeypatch.setattr(testing, "measure", measure)
    return asked


@pytest.mark.parametrize(
    ("errors", "asked", "ok"),
    [
        ({4: 0.9}, [4], True),
        ({4: 1.1, 16: 0.9}, [4, 16], True),
        ({4: 1.1, 16: 1.2, 64: 0.9}, [4, 16, 64], True),
        ({4: 1.1, 16: 1.2, 64: 1.1}, [4, 16, 64], False),
        ({4: 9.0, 16: 0.9}, [4, 16], True),
        ({4: math.inf}, [4], False),
        ({4: math.nan}, [4], False),
    ],
)
def test_a_miss_is_confirmed(monkeypatch: pytest.MonkeyPatch, errors: dict[int, float], asked: list[int], ok: bool):
    seen = planted_misses(monkeypatch, errors)
    assert [r.ok for r in testing.compare(ODD, "torch", torch.float32)] == [ok]
    assert seen == asked


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.cases(quick=True)[::5], ids=lambda case: case.name)
def test_the_definition_is_within_its_own_yardstick(case: Case, dtype: torch.dtype):
    results = testing.compare(case, "reference", dtype)
    assert results[0].quantity == "loss"
    assert all(result.ok for result in results), results


def test_compare_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    testing.expect.cache_clear()
    testing.compare(ODD, "torch", torch.float32)
    assert torch.get_num_threads() == before


class _Off(torch.autograd.Function):
    """Identity with a wrong gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1 + PLANTED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_finds_an_error_of_the_loss(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    right = functional.cacr_loss
    monkeypatch.setattr(functional, "cacr_loss", lambda **kw: right(**kw) * (1 + PLANTED))
    assert not only(testing.compare(ODD, "torch", dtype), "loss").ok


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("argument", ["tau_pos", "tau_neg"])
def test_finds_an_error_of_one_temperature(monkeypatch: pytest.MonkeyPatch, argument: str, dtype: torch.dtype):
    # tau_neg is small beside tau_pos, and the other way round: the error must show in the one it is in.
    right = functional.cacr_loss
    monkeypatch.setattr(functional, "cacr_loss", lambda **kw: right(**kw | {argument: _Off.apply(kw[argument])}))
    wrong = {result.quantity for result in testing.compare(ODD, "torch", dtype) if not result.ok}
    assert wrong == {f"gradient of {argument}"}


def test_finds_an_error_of_the_input_gradient_in_float32(monkeypatch: pytest.MonkeyPatch):
    right = functional.cacr_loss
    monkeypatch.setattr(functional, "cacr_loss", lambda **kw: right(**kw | {"views": _Off.apply(kw["views"])}))
    wrong = {result.quantity for result in testing.compare(ODD, "torch", torch.float32) if not result.ok}
    assert wrong == {"gradient of views"}


@pytest.mark.parametrize("dtype", testing.HALF, ids=str)
def test_finds_half_gradients_that_were_rounded_before_they_were_scaled(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    class EarlyCast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return (grad / 3).to(dtype) * 3

    right = functional.cacr_loss
    monkeypatch.setattr(functional, "cacr_loss", lambda **kw: right(**kw | {"views": EarlyCast.apply(kw["views"])}))
    wrong = {result.quantity for result in testing.compare(ODD, "torch", dtype) if not result.ok}
    assert wrong == {"gradient of views"}


def test_rows_that_are_mixed_up_are_found(monkeypatch: pytest.MonkeyPatch):
    """Losses per query: the gradients that flow into them differ, so that those of two queries cannot change places."""
    case = testing.Case("cacr_loss", {"V": 2, "B": 6, "D": 3}, {"tau_pos": 1.0, "tau_neg": 2.0, "reduction": "none"})
    assert all(result.ok for result in testing.compare(case, "torch", torch.float64))
    right = functional.cacr_loss

    def wrong(*args, **kw):
        loss = right(*args, **kw).clone()
        if kw["backend"] == "torch":
            loss.register_hook(lambda grad: grad.roll(1, -1))
        return loss

    monkeypatch.setattr(functional, "cacr_loss", wrong)
    assert not all(result.ok for result in testing.compare(case, "torch", torch.float64))
