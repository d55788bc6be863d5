"""Tensors that the public losses refuse: types, dtypes, shapes, devices and layouts; functions and modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.agreement import each_loss, randn, small_inputs
from tests.losses.test_refusals import ALL, FIRST, VIEWS, Refusal, call_function, call_module, check, each_call, refuse

Z, X = randn(2, 7, 5), randn(7, 5)
LABELS = torch.arange(7)
TENSORS = {  # name: loss, shape
    "views": ("cacr", "[V, B, D]"),
    "queries": ("queue", "[V, B, D]"),
    "keys": ("queue", "[V, B, D]"),
    "queue": ("queue", "[K, D]"),
    "embeddings": ("supervised", "[N, D]"),
    "ref_embeddings": ("supervised", "[M, D]"),
}
PLACES = [(loss, name, shape) for name, (loss, shape) in TENSORS.items()]
PLACES += [("momentum", "queries", "[V, B, D]"), ("momentum", "keys", "[M, D]")]


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that strided ones are a prototype
        return torch.nested.nested_tensor([X, X[:4]], layout=layout)


def of_any_tensor() -> list[Refusal]:
    found = []
    for loss, name, shape in PLACES:

        def add(value: Any, error: type[Exception], *words: str, loss: str = loss, name: str = name) -> None:
            found.append(Refusal((loss,), {name: value}, error, (name, *words)))

        good = small_inputs(loss)[name]
        for value in (3.0, "views", {"a": good}, np.ones((3, 7, 5)), (good for _ in range(1))):
            add(value, TypeError, "tensor", shape, type(value).__name__)
        if name not in ("ref_embeddings", "queue"):  # where None stands for a tensor that is not given
            add(None, TypeError, "tensor", shape, "None")
        for dtype in (torch.int64, torch.int32, torch.bool, torch.complex64, torch.complex128, torch.uint8):
            add(good.to(dtype), TypeError, str(dtype), "float16", "bfloat16", "float32", "float64")
        for bad in (good[0], good[None], good.sum()):
            if (loss, name) == ("momentum", "queries") and bad.dim() == 2:
                continue  # one view
            add(bad, ValueError, shape, str(list(bad.shape)))
        add(good[..., :0], ValueError, "0")
        if name != "queue":  # which may have no entries
            bad = good.narrow(good.dim() - 2, 0, 0)
            add(bad, ValueError, "empty dimension", str(list(bad.shape)))
        add(good.to_sparse(), TypeError, "sparse", "dense")
        for layout in (torch.strided, torch.jagged):
            add(nested(layout), TypeError, "dense", "nested", str(layout))
    return found


@each_call
@check(of_any_tensor())
def test_any_tensor(refusal: Refusal, loss: str, call: Callable[..., Any]) -> None:
    refuse(refusal, loss, call)


def of_views() -> list[Refusal]:
    found = []
    places = [("cacr", "views"), ("queue", "queries"), ("queue", "keys"), ("momentum", "queries")]
    for loss, name in places:

        def add(value: Any, error: type[Exception], *words: str, loss: str = loss, name: str = name) -> None:
            found.append(Refusal((loss,), {name: value}, error, (name, *words)))

        at_least = "at least 1" if loss == "momentum" else "at least 2"
        add([], ValueError, at_least, "list")
        add((), ValueError, at_least, "tuple")
        if loss == "momentum":
            add(Z[:0], ValueError, at_least, "0")
        else:
            add(Z[:1], ValueError, at_least, "V = 1")
            add(Z[:0], ValueError, at_least, "V = 0")
            add([X], ValueError, at_least, "V = 1")
        at = f"{name}[1]"
        add([X, X[:6]], ValueError, at, "[7, 5]", "[6, 5]")
        add([X, X[:, :4]], ValueError, at, "[7, 5]", "[7, 4]")
        add([X, X[0]], ValueError, at, "[B, D]", "[5]")
        add([Z, Z], ValueError, f"{name}[0]", "[B, D]", "[2, 7, 5]")
        add([X, X.to("meta")], ValueError, at, "device", "cpu", "meta")
        add([X, None], TypeError, at, "tensor", "None")
        add([X, X.tolist()], TypeError, at, "tensor", "list")
        add([X, "x"], TypeError, at, "tensor", "str 'x'")
        add([X, X.long()], TypeError, at, "int64", "float32")
        add([X, nested(torch.strided)], TypeError, at, "dense", "nested")
        add([1.0, 2.0], TypeError, f"{name}[0]", "tensor", "float")
        add(b"ab", TypeError, "tensor", "bytes")
    return found


@each_call
@check(of_views())
def test_views(refusal: Refusal, loss: str, call: Callable[..., Any]) -> None:
    refuse(refusal, loss, call)


def of_several() -> list[Refusal]:
    """Tensors that do not fit to each other; views [3, 7, 5], queue [11, 5], 13 keys, 9 references."""
    q, refs, ref_labels = randn(3, 7, 5), randn(9, 5), torch.arange(9)

    def one(loss: str, change: dict[str, Any], *words: str, error: type[Exception] = ValueError) -> Refusal:
        return Refusal((loss,), change, error, words)

    return [
        one("queue", {"keys": q[:2]}, "keys", "[3, 7, 5]", "[2, 7, 5]"),
        one("queue", {"keys": q[:, :6]}, "keys", "[3, 7, 5]", "[3, 6, 5]"),
        one("queue", {"keys": q[..., :4]}, "keys", "[3, 7, 5]", "[3, 7, 4]"),
        one("queue", {"keys": q.to("meta")}, "keys", "queries", "device", "cpu", "meta"),
        one("queue", {"queue": X[:, :4]}, "queue", "D = 5", "4"),
        one("queue", {"queue": torch.zeros(0, 4)}, "queue", "D = 5", "4"),
        one("queue", {"queue": X.to("meta")}, "queue", "device", "cpu", "meta"),
        one("momentum", {"keys": X[:, :4]}, "keys", "D = 5", "4"),
        one("momentum", {"keys": X[:6]}, "keys", "B = 7", "M = 6"),
        one("momentum", {"keys": X.to("meta")}, "keys", "device", "cpu", "meta"),
        one("supervised", {"labels": LABELS[:6]}, "labels", "[7]", "[6]"),
        one("supervised", {"labels": LABELS[:, None]}, "labels", "[7]", "[7, 1]; pass labels.squeeze(1)"),
        one("supervised", {"labels": LABELS[:1]}, "[1]; if the rows are 7 views one after another", "labels.repeat(7)"),
        one(
            "supervised",
            {"labels": randn(7, 5)},
            "torch.float64; views are rows of one tensor: torch.cat([z0, z1]), with labels.repeat(2)",
            error=TypeError,
        ),
        one("supervised", {"labels": LABELS[0]}, "labels", "[7]", "[]"),
        one("supervised", {"labels": LABELS.to("meta")}, "labels", "device", "cpu", "meta"),
        one("supervised", {"labels": LABELS.tolist()}, "labels", "integer tensor", "list", error=TypeError),
        one("supervised", {"labels": None}, "labels", "integer tensor", "None", error=TypeError),
        one("supervised", {"labels": LABELS.numpy()}, "labels", "integer tensor", "ndarray", error=TypeError),
        *(
            one("supervised", {name: y.to(dtype)}, name, "integer", str(dtype), error=TypeError)
            for dtype in (torch.float32, torch.float16, torch.bool, torch.complex64)
            for name, y in (("labels", LABELS), ("ref_labels", ref_labels))
        ),
        *(
            one("supervised", {name: y.to(dtype)}, f"pass {name}.long()", error=TypeError)
            for dtype in (torch.float32, torch.bool)
            for name, y in (("labels", LABELS), ("ref_labels", ref_labels))
        ),
        one("supervised", {"labels": nested(torch.strided)}, "labels", "dense", "nested", error=TypeError),
        one(
            "supervised",
            {"embeddings": q},
            "embeddings must have shape [N, D], got [3, 7, 5]; pass embeddings.flatten(0, 1) with labels.repeat(3)",
            "with labels.repeat_interleave(7) if it is [B, V, D]",
        ),
        one("supervised", {"ref_embeddings": q}, "pass ref_embeddings.flatten(0, 1) with ref_labels.repeat(3)"),
        one("supervised", {"ref_labels": None}, "ref_labels must be given", "ref_embeddings", "None"),
        one("supervised", {"ref_embeddings": None}, "ref_embeddings must be given", "ref_labels", "None"),
        one("supervised", {"ref_labels": ref_labels[:8]}, "ref_labels", "[9]", "[8]"),
        one("supervised", {"ref_labels": ref_labels.tolist()}, "ref_labels", "integer tensor", "list", error=TypeError),
        one("supervised", {"ref_labels": ref_labels.to("meta")}, "ref_labels", "device", "cpu", "meta"),
        one("supervised", {"ref_embeddings": refs[:, :4]}, "ref_embeddings", "D = 5", "4"),
        one("supervised", {"ref_embeddings": refs.to("meta")}, "ref_embeddings", "device", "cpu", "meta"),
    ]


@each_call
@check(of_several())
def test_tensors_that_do_not_fit(refusal: Refusal, loss: str, call: Callable[..., Any]) -> None:
    refuse(refusal, loss, call)


def test_rows_of_several_views() -> None:
    """What the refusal of [V, B, D] and [B, V, D] says to do."""
    z, labels = randn(3, 7, 5), LABELS % 2
    loss = call_function("supervised", {"embeddings": z.flatten(0, 1), "labels": labels.repeat(3)})
    instances = {"embeddings": z.transpose(0, 1).flatten(0, 1), "labels": labels.repeat_interleave(3)}
    torch.testing.assert_close(call_function("supervised", instances), loss)


@each_loss
def test_accepted_dtypes(loss: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in small_inputs(loss).items()}
        for call in (call_function, call_module):
            assert call(loss, tensors).isfinite()


@each_loss
@pytest.mark.parametrize("call", [call_function, call_module])
def test_other_layouts_and_kinds_of_tensors_are_no_views(loss: str, call: Callable[..., Any]) -> None:
    """A sequence of numbers is no tensor; a subclass of one is."""
    tensors: dict[str, Any] = small_inputs(loss)
    name = FIRST[loss]
    with pytest.raises(TypeError, match=name):
        call(loss, tensors | {name: tensors[name].tolist()})
    parameter = torch.nn.Parameter(tensors[name])
    torch.testing.assert_close(call(loss, tensors | {name: parameter}).detach(), call(loss, tensors))


def test_queue_that_is_not_given() -> None:
    refuse(Refusal(("queue",), {"queue": None}, TypeError, ("queue", "[K, D]", "None")), "queue", call_function)
    refuse(Refusal(("queue",), {"queue": None}, ValueError, ("queue", "[K, D]", "None")), "queue", call_module)


def test_what_is_accepted_is_stated() -> None:
    """One view for momentum queries, no queue entries, one key per query."""
    assert VIEWS
    assert set(ALL) == {"cacr", "queue", "momentum", "supervised"}
    z: Tensor = randn(1, 7, 5)
    assert call_function("momentum", {"queries": z, "keys": z[0]}).isfinite()
    assert call_function("momentum", {"queries": [z[0]], "keys": z[0]}).isfinite()
    assert call_function("momentum", {"queries": z[0], "keys": z[0]}).isfinite()
    assert call_function("queue", {"queries": Z, "keys": Z, "queue": z[0, :0]}).isfinite()
