"""Accuracy and dtypes of the public losses: float32 and half inputs, sharp softmaxes, close views, long vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import steps, testing
from cacr_kernels.backends import table
from cacr_kernels.types import Terms
from tests.agreement import (
    BACKENDS,
    LOSSES,
    assert_within_budget,
    cast,
    compare,
    device_of,
    each_backend,
    each_loss,
    randn,
    run,
    small_inputs,
    there,
    unit,
)
from tests.covering import covering

EPS = torch.finfo(torch.float32).eps
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# The budget: error against float64 <= 2 x error of the eager form in float32 + 8 eps


def test_terms_cancel_before_they_are_rounded() -> None:
    """They come in float64; of a difference below an eps of float32 nothing is lost."""
    rest = 2.0**-30
    terms = Terms(*(torch.tensor([x], dtype=torch.float64) for x in (1.0 + rest, -1.0, 0.0, 0.0)))
    for reduction in ("mean", "sum", "none"):
        for return_parts in (False, True):
            found = steps.reduce(terms, reduction, return_parts, torch.float32)
            assert (found.loss if return_parts else found).item() == rest


def clustered(*shape: int, seed: int = 0) -> Tensor:
    """Unit vectors in narrow groups: similarities close to 1, where the softmaxes have to tell apart."""
    centres = unit(4, shape[-1], seed=seed + 50)[torch.arange(shape[-2]) % 4]
    return torch.nn.functional.normalize(centres + 0.1 * randn(*shape, seed=seed), dim=-1)


def taus(pos: float, neg: float) -> dict[str, float]:
    return {"tau_pos": pos, "tau_neg": neg}


def assert_budget(
    loss: str, make: Callable[[int], dict[str, Tensor]], temperatures: dict[str, float], **options: Any
) -> None:
    """The temperatures are learnable: their derivatives have a budget too."""
    case = testing.Case(LOSSES[loss].__name__, {}, temperatures | options, make)
    for backend in BACKENDS:
        assert_within_budget(case, backend)


PAIRINGS = ("unordered", "ordered", "pooled")
DATA = [(data, t) for data in (unit, clustered) for t in ((1.0, 1.0), (2.0, 20.0), (20.0, 100.0), (0.0, 0.0))]
DATA += [(randn, (1.0, 0.9)), (lambda *shape, seed=0: 3 * randn(*shape, seed=seed), (0.3, 0.5))]
SHAPES = ((2, 37, 19), (3, 23, 64), (2, 67, 129), (3, 2, 1))


@covering({"shape": SHAPES, "pairing": PAIRINGS, "cost": ["sqeuclidean", "rbf"]}, 2)
def test_float32_budget_of_cacr(shape: tuple[int, int, int], pairing: str, cost: str) -> None:
    for data, t in DATA:
        options = {"pairing": pairing, "cost": cost}
        assert_budget("cacr", lambda seed, data=data: {"views": data(*shape, seed=seed)}, taus(*t), **options)


@pytest.mark.parametrize("weight_grad", ["in_batch", "full", "none"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_float32_budget_of_queue(weight_grad: str, in_batch: bool) -> None:
    for data, t in DATA:

        def make(seed: int, data: Callable[..., Tensor] = data) -> dict[str, Tensor]:
            views = {name: data(2, 13, 33, seed=seed) for name in ("queries", "keys")}
            return views | {"queue": data(101, 33, seed=seed + 1)}

        options = {"weight_grad": weight_grad, "in_batch": in_batch}
        assert_budget("queue", make, taus(*t), **options)


@pytest.mark.parametrize("cost", ["sqeuclidean", "rbf"])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.05, 0.01])
def test_float32_budget_of_momentum(cost: str, temperature: float) -> None:
    for data in (unit, clustered):

        def make(seed: int, data: Callable[..., Tensor] = data) -> dict[str, Tensor]:
            return {"queries": data(2, 11, 31, seed=seed), "keys": data(53, 31, seed=seed + 1)}

        options = {"cost": cost, "key_offset": 7}
        assert_budget("momentum", make, {"temperature": temperature}, **options)


@pytest.mark.parametrize("reference_set", [False, True])
def test_float32_budget_of_supervised(reference_set: bool) -> None:
    for data, t in DATA:

        def make(seed: int, data: Callable[..., Tensor] = data) -> dict[str, Tensor]:
            own = {"embeddings": data(67, 29, seed=seed), "labels": torch.arange(67) % 5}
            refs = {"ref_embeddings": data(41, 29, seed=seed + 1), "ref_labels": torch.arange(41) % 6}
            return own | refs if reference_set else own

        assert_budget("supervised", make, taus(*t))


@pytest.mark.parametrize("tau", [20.0, 100.0])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_sharp_softmaxes_in_float64(tau: float, pairing: str) -> None:
    for data in (unit, clustered, randn):
        for cost in ("sqeuclidean", "rbf"):
            compare("cacr", {"views": data(3, 21, 17)}, pairing=pairing, cost=cost, **taus(tau, tau))
        labels = {"labels": torch.arange(21) % 4}
        compare("supervised", {"embeddings": data(21, 17), **labels}, **taus(tau, tau))
    compare("queue", small_inputs("queue"), **taus(tau, tau))
    for cost in ("sqeuclidean", "rbf"):
        compare("momentum", small_inputs("momentum"), cost=cost, temperature=1 / tau)


@each_backend
@pytest.mark.parametrize("tau", [1e-38, 1e-42, 1e-45, 1e-300, 1e-310, 5e-324])
@pytest.mark.parametrize("loss", ["cacr", "queue", "supervised"])
def test_tiny_temperatures_are_like_none(loss: str, tau: float, backend: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        tensors = cast(small_inputs(loss), dtype)
        uniform, tiny = (run(loss, tensors, backend, **taus(t, t)) for t in (0.0, tau))
        for x, y in zip(tiny.parts, uniform.parts, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
        for name, y in uniform.gradients.items():
            if y is not None:
                torch.testing.assert_close(tiny.gradients[name], y, rtol=tolerance, atol=tolerance)


@each_backend
def test_rbf_does_not_underflow(backend: str) -> None:
    for pairing in PAIRINGS:
        tensors = {"views": 40 * randn(2, 9, 3)}
        options = {"pairing": pairing, "cost": "rbf", "rbf_scale": 100.0, "tau_neg": 0.01}
        compare("cacr", tensors, **options)
        actual = run("cacr", cast(tensors, torch.float32), backend, **options)
        assert actual.parts.repulsion.isfinite()
        assert actual.parts.repulsion < -1e3
        assert actual.gradients["views"].abs().max() > 1


# Attraction of nearly equal views


@each_backend
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("length", [1.0, 10.0])
def test_attraction_of_nearly_equal_views(length: float, distance: float, backend: str) -> None:
    z = length * unit(23, 128)
    views = (z + length * distance * randn(3, 23, 128, seed=1)).float()
    keys = (z + length * distance * randn(3, 23, 128, seed=2)).float()
    flat, labels = views.flatten(0, 1), torch.arange(23).repeat(3)
    t = {"tau_pos": 1 / (length * distance) ** 2}
    calls: list[tuple[str, dict[str, Tensor], dict[str, Any]]] = [
        *(("cacr", {"views": views}, {**t, "pairing": pairing}) for pairing in PAIRINGS),
        ("cacr", {"views": views}, {**t, "cost": "rbf"}),
        ("queue", {"queries": views, "keys": keys, "queue": views[0]}, t),
        ("supervised", {"embeddings": flat, "labels": labels}, t),
        ("supervised", {"embeddings": flat, "labels": labels, "ref_embeddings": keys[0], "ref_labels": labels[:23]}, t),
    ]
    if length == 1:
        calls.append(("momentum", {"queries": views, "keys": keys[0]}, {"cost": "sqeuclidean"}))
    for loss, tensors, options in calls:
        parts = run(loss, tensors, backend, **options).parts
        expected = run(loss, cast(tensors, torch.float64), "reference", **options).parts
        torch.testing.assert_close(parts.attraction.double(), expected.attraction, rtol=1e-6, atol=0, msg=loss)


# Dtypes


@each_backend
@each_loss
@pytest.mark.parametrize("dtype", FLOATS)
def test_result_dtype(loss: str, dtype: torch.dtype, backend: str) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = cast(small_inputs(loss), dtype)
    for reduction in ("mean", "sum", "none"):
        outcome = run(loss, tensors, backend, reduction=reduction)
        assert {part.dtype for part in outcome.parts} == {expected}
        for name, g in outcome.gradients.items():
            assert g is None or g.dtype == dtype, name


@each_backend
@each_loss
def test_any_float64_input_makes_the_loss_float64(loss: str, backend: str) -> None:
    tensors = cast(small_inputs(loss), torch.float32)
    floats = [name for name, t in tensors.items() if t.is_floating_point()]
    for name in floats:
        mixed = tensors | {name: tensors[name].double()}
        actual = run(loss, mixed, backend)
        expected = run(loss, cast(tensors, torch.float64), "reference")
        assert {part.dtype for part in actual.parts} == {torch.float64}
        torch.testing.assert_close(actual.parts.loss, expected.parts.loss, rtol=1e-10, atol=1e-10)
        assert all(g is None or g.dtype == mixed[n].dtype for n, g in actual.gradients.items())


@each_backend
@pytest.mark.parametrize("first", FLOATS)
@pytest.mark.parametrize("second", FLOATS)
def test_list_of_mixed_dtypes(first: torch.dtype, second: torch.dtype, backend: str) -> None:
    z = unit(2, 7, 5)
    views = [v.to(device_of(backend), dtype).requires_grad_() for v, dtype in zip(z, (first, second), strict=True)]
    exact = [v.detach().double().requires_grad_() for v in views]
    loss, truth = LOSSES["cacr"](views, backend=backend), LOSSES["cacr"](exact, backend="reference")
    double = torch.float64 in (first, second)
    assert loss.dtype == (torch.float64 if double else torch.float32)
    torch.testing.assert_close(loss.double(), truth, rtol=0, atol=1e-10 if double else 8 * EPS)
    actual, expected = torch.autograd.grad(loss, views), torch.autograd.grad(truth, exact)
    for v, g, t in zip(views, actual, expected, strict=True):
        assert g.dtype == v.dtype
        tolerance = 1e-10 if double and v.dtype == torch.float64 else max(8 * EPS, torch.finfo(v.dtype).eps / 2)
        torch.testing.assert_close(g.double(), t, rtol=tolerance, atol=0.1 * tolerance)


@each_backend
def test_the_widest_of_three_dtypes_counts(backend: str) -> None:
    """Wherever it stands."""
    z = unit(3, 7, 5)
    order = [torch.float16, torch.float64, torch.float32]
    for dtypes in (order[i:] + order[:i] for i in range(3)):
        views = [v.to(device_of(backend), dtype) for v, dtype in zip(z, dtypes, strict=True)]
        loss, truth = LOSSES["cacr"](views, backend=backend), LOSSES["cacr"]([v.double() for v in views])
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, truth, rtol=0, atol=1e-10)


@each_backend
@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(loss: str, dtype: torch.dtype, backend: str) -> None:
    """The loss of the rounded inputs to float32 accuracy; gradients are rounded once, at the end.

    And what multiplies the inputs in them, where the backend says so.
    """
    rounded = torch.finfo(dtype).eps / 2 if dtype in table.named(backend).rounds_coefficients else 16 * EPS
    tensors = cast(small_inputs(loss), dtype)
    for options in ({}, {"normalize": True}):
        exact = run(loss, cast(tensors, torch.float64), "reference", **options)
        actual = run(loss, tensors, backend, **options)
        for x, y in zip(actual.parts, exact.parts, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=16 * EPS, atol=16 * EPS)
        for name, y in exact.gradients.items():
            g = actual.gradients[name]
            assert (g is None) == (y is None), name
            if y is not None:
                once = torch.finfo(dtype).eps / 2 * (1 + 32 * EPS)
                torch.testing.assert_close(g.double(), y, rtol=once, atol=rounded * y.abs().max().item())


@each_backend
@each_loss
def test_scaled_float16_gradients_do_not_underflow(loss: str, backend: str) -> None:
    """Gradients of 1e-9 vanish in float16, those 65536 times larger do not."""
    tensors = cast(small_inputs(loss), torch.float16)
    name = next(iter(tensors))
    small = 2.0**-16
    for b in (backend, "reference"):
        here = there(tensors, b)
        leaves = here | {name: here[name].clone().requires_grad_()}
        value = LOSSES[loss](**leaves, backend=b) * small
        (g,) = torch.autograd.grad(value, leaves[name], torch.tensor(1 / small))
        exact = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        exact[name].requires_grad_()
        (truth,) = torch.autograd.grad(LOSSES[loss](**exact, backend="reference"), exact[name])
        torch.testing.assert_close(g.double().cpu(), truth, rtol=2.0**-10, atol=1e-6)
        assert truth.abs().max() > 1e-3


@each_backend
@each_loss
def test_temperature_does_not_change_the_result_dtype(loss: str, backend: str) -> None:
    """The loss is float64 if embeddings are; a temperature is no embedding, and is not rounded to float32 data."""
    tensors = cast(small_inputs(loss), torch.float32)
    names = ("temperature",) if loss == "momentum" else ("tau_pos", "tau_neg")
    options = {n: torch.tensor(math.pi / 3, dtype=torch.float64) for n in names}
    number = run(loss, tensors, backend, **dict.fromkeys(names, math.pi / 3)).parts.loss
    value = LOSSES[loss](**there(tensors, backend), **options, backend=backend)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.cpu(), number, rtol=4 * EPS, atol=4 * EPS)
