"""The public losses on every backend: any shape and option, reductions, parts, temperatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.agreement import (
    BACKENDS,
    LOSSES,
    cast,
    compare,
    each_backend,
    each_loss,
    randn,
    run,
    small_inputs,
    there,
    unit,
)

TOLERANCE = 1e-10


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected.detach().cpu(), rtol=TOLERANCE, atol=TOLERANCE)


def test_there_is_something_to_test() -> None:
    assert "torch" in BACKENDS


# Any shape and option

TAUS = st.sampled_from([0, 0.0, 1, 20.0]) | st.floats(0, 6, allow_subnormal=False)
WEIGHTS = st.sampled_from([0, 1]) | st.floats(-2, 3)
DIMS = st.integers(1, 300) | st.sampled_from([1, 2, 15, 16, 17, 31, 257])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
SEEDS = st.integers(0, 2**20)


@st.composite
def common(draw: st.DrawFn) -> dict[str, Any]:
    """Options that all losses but the momentum loss share."""
    taus = {"tau_pos": draw(TAUS), "tau_neg": draw(TAUS)}
    weights = {"alpha": draw(WEIGHTS), "beta": draw(WEIGHTS)}
    return {**taus, **weights, "normalize": draw(st.booleans()), "reduction": draw(REDUCTIONS)}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 70), DIMS, common(), SEEDS, st.data())
def test_cacr_any_shape(v: int, b: int, d: int, options: dict[str, Any], seed: int, data: st.DataObject) -> None:
    options["pairing"] = data.draw(st.sampled_from(["unordered", "ordered", "pooled"]))
    if data.draw(st.booleans()):
        options |= {"cost": "rbf", "rbf_scale": data.draw(TAUS), "reduction": "mean"}
    tensors = {"views": 1.5 * randn(v, b, d, seed=seed)}
    if data.draw(st.booleans()):
        tensors["tau_neg"] = torch.tensor(options.pop("tau_neg"), dtype=torch.float64)
    compare("cacr", tensors, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 40), DIMS, st.integers(0, 90), common(), SEEDS, st.data())
def test_queue_any_shape(
    v: int, b: int, d: int, k: int, options: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    options["in_batch"] = data.draw(st.booleans())
    options["weight_grad"] = data.draw(st.sampled_from(["in_batch", "full", "none"]))
    tensors = {"queries": randn(v, b, d, seed=seed), "keys": randn(v, b, d, seed=seed + 1)}
    compare("queue", tensors | {"queue": 1.5 * randn(k, d, seed=seed + 2)}, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), DIMS, st.integers(0, 50), REDUCTIONS, SEEDS, st.data())
def test_momentum_any_shape(v: int, b: int, d: int, more: int, reduction: str, seed: int, data: st.DataObject) -> None:
    options: dict[str, Any] = {
        "temperature": data.draw(st.sampled_from([1, 0.05]) | st.floats(0.1, 3)),
        "cost": data.draw(st.sampled_from(["rbf", "sqeuclidean"])),
        "key_offset": data.draw(st.integers(0, more)),
        "normalize": data.draw(st.booleans()),
    }
    make = randn if options["normalize"] else unit
    tensors = {"queries": make(v, b, d, seed=seed), "keys": make(b + more, d, seed=seed + 1)}
    compare("momentum", tensors, **options, reduction=reduction)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), DIMS, st.integers(1, 9), st.integers(0, 50), common(), SEEDS)
def test_supervised_any_shape(n: int, d: int, classes: int, m: int, options: dict[str, Any], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tensors = {"embeddings": 1.5 * randn(n, d, seed=seed), "labels": torch.randint(classes, (n,), generator=g)}
    if m:
        tensors["ref_embeddings"] = randn(m, d, seed=seed + 1)
        tensors["ref_labels"] = torch.randint(classes + 1, (m,), generator=g)
    compare("supervised", tensors, **options)


# How the labels of queries and references lie to each other: sets full, empty, and of one
LABELLINGS: dict[str, Any] = {
    "random": lambda size, own, g: torch.randint(4, (size,), generator=g),
    "all the same": lambda size, own, g: torch.full((size,), 7),
    "all different": lambda size, own, g: torch.randperm(size, generator=g),
    "disjoint": lambda size, own, g: torch.randint(3, (size,), generator=g) + (0 if own else 100),
    "one apart": lambda size, own, g: (torch.arange(size) == 0).long(),
    "sorted blocks": lambda size, own, g: torch.arange(size) // 3,
    "far apart": lambda size, own, g: torch.randint(3, (size,), generator=g) * 2**61 - 2**62,
}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), DIMS, st.integers(0, 30), st.sampled_from(list(LABELLINGS)), common(), SEEDS)
def test_supervised_any_labels(n: int, d: int, m: int, labelling: str, options: dict[str, Any], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    label = LABELLINGS[labelling]
    tensors = {"embeddings": 1.5 * randn(n, d, seed=seed), "labels": label(n, True, g)}
    if m:
        tensors |= {"ref_embeddings": randn(m, d, seed=seed + 1), "ref_labels": label(m, False, g)}
    compare("supervised", tensors, **options)


# Reductions and parts

ROWS = {"cacr": (3, 7), "queue": (3, 7), "momentum": (7,), "supervised": (7,)}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cacr": [{"pairing": pairing, "alpha": 2.0, "beta": 3.0} for pairing in ("unordered", "ordered", "pooled")],
    "queue": [{"in_batch": flag, "alpha": 2.0, "beta": 3.0} for flag in (True, False)],
    "momentum": [{"cost": cost, "temperature": 0.5, "key_offset": 4} for cost in ("rbf", "sqeuclidean")],
    "supervised": [{"alpha": 2.0, "beta": 3.0}],
}
VARIANTS = [(loss, options) for loss, variants in OPTIONS.items() for options in variants]
each_variant = pytest.mark.parametrize(("loss", "options"), VARIANTS, ids=str)


@each_backend
@each_variant
def test_reductions_belong_together(loss: str, options: dict[str, Any], backend: str) -> None:
    tensors = small_inputs(loss)
    found = {r: run(loss, tensors, backend, **options, reduction=r).parts for r in ("mean", "sum", "none")}
    assert found["none"].loss.shape == ROWS[loss]
    assert_close(found["none"].loss.mean(), found["mean"].loss)
    assert_close(found["none"].loss.sum(), found["sum"].loss)
    for parts in found.values():
        for part, mean in zip(parts[1:], found["mean"][1:], strict=True):
            assert_close(part, mean)


@each_backend
@each_variant
def test_parts(loss: str, options: dict[str, Any], backend: str) -> None:
    tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in there(small_inputs(loss), backend).items()}
    alone = LOSSES[loss](**tensors, **options, backend=backend)
    for reduction in ("mean", "sum", "none"):
        parts = LOSSES[loss](**tensors, **options, backend=backend, return_parts=True, reduction=reduction)
        assert parts._fields == ("loss", "attraction", "repulsion", "attraction_entropy", "repulsion_entropy")
        assert [x.requires_grad for x in parts] == [True, False, False, False, False]
        assert all(x.shape == () and x.dtype == parts.loss.dtype for x in parts[1:])
        assert_close(parts.attraction + parts.repulsion, alone.detach())
    assert isinstance(alone, Tensor)
    assert alone.requires_grad
    expected = LOSSES[loss](**tensors, **options, backend="reference", return_parts=True)
    for x, y in zip(parts[1:], expected[1:], strict=True):
        assert_close(x, y)


@each_backend
def test_parts_of_rbf(backend: str) -> None:
    tensors = small_inputs("cacr")
    for pairing in ("unordered", "ordered", "pooled"):
        options = {"pairing": pairing, "cost": "rbf", "alpha": 2.0, "beta": 3.0}
        parts, expected = (run("cacr", tensors, name, **options).parts for name in (backend, "reference"))
        assert_close(parts.attraction + parts.repulsion, parts.loss)
        for x, y in zip(parts, expected, strict=True):
            assert_close(x, y)


@each_backend
def test_alpha_and_beta_scale_their_terms(backend: str) -> None:
    for loss in ("cacr", "queue", "supervised"):
        tensors = small_inputs(loss)
        one = run(loss, tensors, backend).parts
        many = run(loss, tensors, backend, alpha=-2, beta=3).parts
        assert_close(many.attraction, -2 * one.attraction)
        assert_close(many.repulsion, 3 * one.repulsion)
        assert_close(many.loss, -2 * one.attraction + 3 * one.repulsion)
        assert one.attraction > 0 > one.repulsion


# Temperatures as tensors


def temperature_names(loss: str) -> tuple[str, ...]:
    return ("temperature",) if loss == "momentum" else ("tau_pos", "tau_neg")


RBF = [("cacr", {"cost": "rbf", "pairing": pairing}) for pairing in ("unordered", "ordered", "pooled")]
QUEUES = [("queue", {"weight_grad": w, "in_batch": i}) for w in ("in_batch", "full", "none") for i in (True, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("loss", "options"), [*VARIANTS, *RBF, *QUEUES], ids=str)
def test_learnable_temperatures(loss: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    values = {name: 0.75 + 0.5 * i for i, name in enumerate(temperature_names(loss))}
    options = {name: value for name, value in options.items() if name not in values}
    tensors = small_inputs(loss)
    expected = run(loss, tensors | {n: torch.tensor(v).double() for n, v in values.items()}, "reference", **options)
    for backend in BACKENDS:
        taus = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
        actual = run(loss, tensors | taus, backend, **options)
        assert actual.parts.loss.dtype == torch.float64
        for name in values:
            grad, truth = actual.gradients[name], expected.gradients[name]
            truth = torch.zeros((), dtype=torch.float64) if truth is None else truth
            grad = torch.zeros((), dtype=dtype) if grad is None else grad
            assert grad.dtype == dtype
            assert grad.shape == ()
            tolerance = TOLERANCE if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(grad.double(), truth, rtol=tolerance, atol=TOLERANCE)


@each_backend
@each_loss
def test_temperatures_alone_learn(loss: str, backend: str) -> None:
    """Frozen embeddings, and one temperature a number."""
    for name in temperature_names(loss):
        grads = []
        for b in (backend, "reference"):
            tau = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
            value = LOSSES[loss](**there(small_inputs(loss), b), **{name: tau}, backend=b)
            assert value.requires_grad or (loss, name) == ("queue", "tau_pos")
            if value.requires_grad:
                grads.append(torch.autograd.grad(value, tau)[0])
        assert_close(*grads or (torch.zeros(1), torch.zeros(1)))
        assert (loss, name) == ("queue", "tau_pos") or grads[0] != 0


@each_backend
@each_loss
def test_tensor_temperature_is_its_number(loss: str, backend: str) -> None:
    tensors = small_inputs(loss)
    options = dict.fromkeys(temperature_names(loss), 0.75)
    expected = run(loss, tensors, backend, **options)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        taus = {name: torch.tensor(value, dtype=dtype) for name, value in options.items()}
        actual = LOSSES[loss](**there(tensors, backend), **taus, backend=backend)
        assert_close(actual, expected.parts.loss)


@each_backend
@each_loss
def test_same_inputs_same_bits(loss: str, backend: str) -> None:
    tensors = cast(small_inputs(loss), torch.float32)
    first, second = (run(loss, tensors, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.parts, second.parts, strict=True))
    for name, grad in first.gradients.items():
        other = second.gradients[name]
        assert (grad is None and other is None) or torch.equal(grad, other)
