"""What the public losses read, and how: layouts, lists, detached inputs, empty sets, labels, NaN and Inf."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import (
    BACKENDS,
    LOSSES,
    Outcome,
    assert_agree,
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

PAIRINGS = ("unordered", "ordered", "pooled")
COSTS = ("sqeuclidean", "rbf")
ZERO = torch.zeros((), dtype=torch.float64)


def value_and_gradients(loss: str, leaves: dict[str, Tensor], make: Callable[[Tensor], Any], **options: Any) -> Any:
    """The loss of ``make(leaf)`` (floating tensors) and the gradients of the leaves."""
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in leaves.items()}
    value = LOSSES[loss](**{n: make(t) if t.requires_grad else t for n, t in leaves.items()}, **options)
    wanted = [t for t in leaves.values() if t.requires_grad]
    return value.detach(), torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)


# Layouts

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed features": lambda t: t.mT.contiguous().mT,
    "transposed views": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed dimensions": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]),
    "every second": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1).flatten(-2)[..., ::2],
    "every second row": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -2).flatten(-3, -2)[..., ::2, :],
    "offset": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 4), value=math.nan)[..., 1:-4, 3:-2],
    "expanded rows": lambda t: t[..., :1, :].expand_as(t),
    "expanded views": lambda t: t[:1].expand_as(t),
    "expanded features": lambda t: t[..., :1].expand_as(t),
    "flipped": lambda t: t.flip(0),
}


@each_backend
@each_loss
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(loss: str, layout: str, backend: str) -> None:
    make = LAYOUTS[layout]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        tensors = there(cast(small_inputs(loss), dtype), backend)
        strided = value_and_gradients(loss, tensors, make, backend=backend)
        dense = value_and_gradients(loss, tensors, lambda t: make(t).contiguous(), backend=backend)
        assert torch.equal(strided[0], dense[0])
        exact = cast(tensors, torch.float64)
        dense = value_and_gradients(loss, exact, lambda t: make(t).contiguous(), backend="reference")
        torch.testing.assert_close(strided[0].double(), dense[0], rtol=tolerance, atol=tolerance)
        for x, y in zip(strided[1], dense[1], strict=True):
            torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@each_backend
def test_inputs_are_left_alone(backend: str) -> None:
    for loss, normalize in itertools.product(LOSSES, (False, True)):
        tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in there(small_inputs(loss), backend).items()}
        before = {n: t.detach().clone() for n, t in tensors.items()}
        LOSSES[loss](**tensors, normalize=normalize, backend=backend).backward()
        assert all(torch.equal(t, before[n]) for n, t in tensors.items()), loss


@each_backend
def test_sequences_of_views(backend: str) -> None:
    for loss in ("cacr", "queue", "momentum"):
        tensors = there(small_inputs(loss), backend)
        name = next(iter(tensors))
        expected = run(loss, tensors, backend)
        for sequence in (list, tuple):
            leaves = sequence(t.clone().requires_grad_() for t in tensors[name])
            value = LOSSES[loss](**(tensors | {name: leaves}), backend=backend)
            torch.testing.assert_close(value.detach().cpu(), expected.parts.loss, rtol=1e-12, atol=1e-12)
            grads = torch.autograd.grad(value, leaves)
            stacked = tensors[name].clone().requires_grad_()
            value = LOSSES[loss](**(tensors | {name: stacked}), backend=backend)
            torch.testing.assert_close(torch.stack(grads), torch.autograd.grad(value, stacked)[0])
    tensors = there(small_inputs("queue"), backend)
    listed = LOSSES["queue"](**(tensors | {"keys": list(tensors["keys"])}), backend=backend)
    torch.testing.assert_close(listed, LOSSES["queue"](**tensors, backend=backend))


@each_backend
def test_keys_and_queue_are_detached(backend: str) -> None:
    for loss in ("queue", "momentum"):
        tensors = there(small_inputs(loss), backend)
        for weight_grad in ("in_batch", "full", "none") if loss == "queue" else ("",):
            options = {"weight_grad": weight_grad} if weight_grad else {}
            gradients = run(loss, tensors, backend, **options).gradients
            assert [n for n, g in gradients.items() if g is not None] == ["queries"]
        frozen = LOSSES[loss](**{n: t.requires_grad_(n != "queries") for n, t in tensors.items()}, backend=backend)
        assert not frozen.requires_grad


@each_backend
def test_reference_set_receives_gradient(backend: str) -> None:
    gradients = run("supervised", small_inputs("supervised"), backend).gradients
    assert gradients["ref_embeddings"].abs().min() > 0


@each_backend
@each_loss
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 33, 513])
def test_normalize_is_that_of_torch(loss: str, dim: int, backend: str) -> None:
    tensors = {n: 3 * randn(*t.shape[:-1], dim) if t.is_floating_point() else t for n, t in small_inputs(loss).items()}
    rows = next(iter(tensors.values())).flatten(0, -2)
    rows[0] = 0.0  # a vector of length 0 stays one, a short one becomes a unit vector, a tiny one is divided by 1e-12
    rows[1] *= 1e-5
    rows[2] *= 1e-14
    unit_vectors = {
        n: torch.nn.functional.normalize(t, dim=-1) if t.is_floating_point() else t for n, t in tensors.items()
    }
    actual, expected = run(loss, tensors, backend, normalize=True), run(loss, unit_vectors, "reference")
    torch.testing.assert_close(actual.parts.loss, expected.parts.loss, rtol=1e-10, atol=1e-10)
    lengths = {n: t.norm(dim=-1, keepdim=True) for n, t in tensors.items() if t.is_floating_point()}
    assert_agree(
        per_length(actual, lengths), per_length(run(loss, tensors, "reference", normalize=True), lengths), 1e-10
    )


def per_length(outcome: Outcome, lengths: dict[str, Tensor]) -> Outcome:
    """Gradients times the lengths of their rows: normalisation divides them, and their rounding, by these."""
    gradients = {n: g if g is None or n not in lengths else g * lengths[n] for n, g in outcome.gradients.items()}
    return outcome._replace(gradients=gradients)


# Empty sets


@each_backend
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dim", [1, 5, 40])
def test_one_instance_is_not_repelled(dim: int, cost: str, pairing: str, backend: str) -> None:
    options = {"pairing": pairing, "cost": cost}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        tensors = {"views": randn(3, 1, dim).to(dtype), "tau_neg": torch.tensor(1.0)}
        outcome = run("cacr", tensors, backend, **options, alpha=0.0)
        assert outcome.parts[0] == outcome.parts[2] == outcome.parts[4] == 0
        assert all(g is None or not g.any() for g in outcome.gradients.values())
        actual = run("cacr", tensors, backend, **options)
        assert actual.parts.repulsion == actual.parts.repulsion_entropy == 0
        assert_agree(actual, run("cacr", cast(tensors, torch.float64), "reference", **options, beta=0.0), tolerance)


@each_backend
def test_one_instance_is_not_repelled_by_its_own_views(backend: str) -> None:
    for reduction in ("none", "sum"):
        for pairing in PAIRINGS:
            options = {"pairing": pairing, "alpha": 0.0, "reduction": reduction}
            outcome = run("cacr", {"views": randn(3, 1, 4)}, backend, **options)
            assert not outcome.parts.loss.any()
            assert not outcome.gradients["views"].any()


@each_backend
@pytest.mark.parametrize("weight_grad", ["in_batch", "full", "none"])
@pytest.mark.parametrize(("batch", "entries", "in_batch"), [(1, 0, True), (7, 0, False), (1, 0, False)])
def test_queue_without_negatives(batch: int, entries: int, in_batch: bool, weight_grad: str, backend: str) -> None:
    tensors = {"queries": randn(2, batch, 5), "keys": randn(2, batch, 5, seed=1), "queue": randn(entries, 5)}
    options = {"in_batch": in_batch, "weight_grad": weight_grad}
    outcome = run("queue", tensors | {"tau_neg": torch.tensor(1.0)}, backend, alpha=0.0, **options)
    assert outcome.parts[0] == outcome.parts[2] == outcome.parts[4] == 0
    assert all(g is None or not g.any() for g in outcome.gradients.values())
    compare("queue", tensors, **options)


@pytest.mark.parametrize("weight_grad", ["in_batch", "full", "none"])
@pytest.mark.parametrize(("batch", "entries", "in_batch"), [(7, 0, True), (1, 1, True), (1, 9, False), (2, 1, True)])
def test_queue_with_few_negatives(batch: int, entries: int, in_batch: bool, weight_grad: str) -> None:
    tensors = {"queries": randn(2, batch, 5), "keys": randn(2, batch, 5, seed=1), "queue": randn(entries, 5)}
    compare("queue", tensors, in_batch=in_batch, weight_grad=weight_grad, tau_neg=3.0)


def test_momentum_without_negatives() -> None:
    tensors = {"queries": unit(3, 1, 5), "keys": unit(1, 5, seed=1)}
    for cost in COSTS:
        compare("momentum", tensors, cost=cost, temperature=0.5)
    for backend in BACKENDS:
        assert run("momentum", tensors, backend, cost="sqeuclidean").parts.repulsion == 0


def test_key_offset_says_which_key_is_the_positive() -> None:
    queries, keys = unit(2, 5, 4), unit(17, 4, seed=1)
    for cost, backend in itertools.product(COSTS, BACKENDS):
        for offset in (0, 1, 6, 12):
            compare("momentum", {"queries": queries, "keys": keys}, cost=cost, key_offset=offset)
        first = run("momentum", {"queries": queries, "keys": keys.roll(-6, 0)}, backend, cost=cost).parts.loss
        sixth = run("momentum", {"queries": queries, "keys": keys}, backend, cost=cost, key_offset=6).parts.loss
        torch.testing.assert_close(first, sixth, rtol=1e-10, atol=1e-10)


# Labels

HUGE = 2**62
LABELS = {
    "all the same": [3] * 9,
    "all different": list(range(9)),
    "single members": [0, 0, 1, 2, 2, 2, 3, 0, 4],
    "two": [0, 1, 1, 1, 1, 1, 1, 1, 1],
    "huge": [HUGE, HUGE + 1, HUGE, -HUGE, HUGE + 2**32, 0, 2**32, -(2**63), 2**63 - 1],
    "negative": [-1, -2, -1, -1, -3, -2, 5, 5, -1],
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("ref_labels", [None, *LABELS])
def test_labels(labels: str, ref_labels: str | None) -> None:
    tensors = {"embeddings": randn(9, 5), "labels": torch.tensor(LABELS[labels])}
    if ref_labels is not None:
        tensors |= {"ref_embeddings": randn(9, 5, seed=1), "ref_labels": torch.tensor(LABELS[ref_labels])}
    compare("supervised", tensors, tau_pos=2.0, tau_neg=3.0)
    compare("supervised", tensors, reduction="none")
    numbers: dict[int, int] = {}  # small ones for the same classes
    small = {
        n: torch.tensor([numbers.setdefault(x, len(numbers)) for x in tensors[n].tolist()])
        for n in tensors
        if "labels" in n
    }
    for backend in BACKENDS:
        found, expected = (run("supervised", given, backend).parts.loss for given in (tensors, tensors | small))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize("labels", ["all the same", "all different"])
def test_supervised_with_one_kind_of_set(labels: str, backend: str) -> None:
    empty = "repulsion" if labels == "all the same" else "attraction"
    tensors = {"embeddings": randn(9, 5), "labels": torch.tensor(LABELS[labels])}
    off = "alpha" if empty == "repulsion" else "beta"
    outcome = run("supervised", tensors, backend, **{off: 0.0})
    assert getattr(outcome.parts, empty) == getattr(outcome.parts, f"{empty}_entropy") == 0
    assert not outcome.gradients["embeddings"].any()
    assert run("supervised", tensors, backend).gradients["embeddings"].all()


@each_backend
@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.05, 0.125, 0.2, 0.3, 0.5, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1], [0, 0, 1, 2]], ids=str)
def test_empty_sets_at_any_temperature(labels: list[int], tau: float, backend: str) -> None:
    """No temperature, small or large, turns a set without members into NaN."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        tensors = {"embeddings": randn(len(labels), 5).to(dtype), "labels": torch.tensor(labels)}
        for taus in ({"tau_pos": tau}, {"tau_neg": tau}):
            expected = run("supervised", cast(tensors, torch.float64), "reference", **taus)
            assert_agree(run("supervised", tensors, backend, **taus), expected, tolerance)


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@each_backend
@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype(dtype: str, backend: str) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 127, 127])
    expected = run("supervised", {"embeddings": randn(7, 5), "labels": labels}, "reference")
    tensors = {"embeddings": randn(7, 5), "labels": labels.to(getattr(torch, dtype))}
    assert_agree(run("supervised", tensors, backend), expected, 1e-10)


@each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8, torch.int16])
@pytest.mark.parametrize("swapped", [False, True])
def test_labels_of_different_dtypes_are_compared_by_value(dtype: torch.dtype, swapped: bool, backend: str) -> None:
    """2^32 is not 0, although its last 32 bits are."""
    narrow, wide = torch.tensor([0, 1, 2, 0], dtype=dtype), torch.tensor([2**32, 1, 2**32 + 2, 0, 256])
    labels, ref_labels = (wide, narrow) if swapped else (narrow, wide)
    tensors = {"embeddings": randn(len(labels), 5), "ref_embeddings": randn(len(ref_labels), 5, seed=1)}
    expected = run("supervised", tensors | {"labels": labels.long(), "ref_labels": ref_labels.long()}, "reference")
    actual = run("supervised", tensors | {"labels": labels, "ref_labels": ref_labels}, backend)
    assert_agree(actual, expected, 1e-10)


@each_backend
def test_strided_and_expanded_labels(backend: str) -> None:
    z, labels = there({"z": randn(7, 5), "labels": torch.arange(14) // 4}, backend).values()
    expected = run("supervised", {"embeddings": z, "labels": labels[::2].contiguous()}, "reference").parts.loss
    for same in (labels[::2], labels.view(7, 2)[:, 0], labels.to(torch.int32)[::2]):
        value = LOSSES["supervised"](z, same, backend=backend)
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-10, atol=1e-10)
    value = LOSSES["supervised"](z, labels.new_tensor(3).expand(7), backend=backend)
    torch.testing.assert_close(value, LOSSES["supervised"](z, labels.new_full((7,), 3), backend="reference"))


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_embedding_in_no_set_is_not_read(bad: float, backend: str) -> None:
    for dtype, normalize in itertools.product((torch.float16, torch.float32, torch.float64), (False, True)):
        tensors = {"embeddings": torch.full((1, 5), bad, dtype=dtype), "labels": torch.tensor([7])}
        outcome = run("supervised", tensors, backend, normalize=normalize)
        assert all(part == 0 for part in outcome.parts)
        if not normalize:
            assert not outcome.gradients["embeddings"].any()
