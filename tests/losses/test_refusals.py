"""What the public losses refuse, as functions and as modules: the type of the error, and what its message says.

``TypeError`` for a wrong type or dtype, ``ValueError`` for everything else; the message names the argument, what was
given and what is accepted.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import cacr_kernels
from cacr_kernels.backends.entry import Backend
from tests.agreement import LOSSES, each_loss, randn, small_inputs

MODULES: dict[str, Callable[..., nn.Module]] = {
    "cacr": cacr_kernels.CACRLoss,
    "queue": cacr_kernels.CACRQueueLoss,
    "momentum": cacr_kernels.CACRMomentumLoss,
    "supervised": cacr_kernels.SupervisedCACRLoss,
}
AT_CALL = ("views", "queries", "keys", "queue", "key_offset", "embeddings", "labels", "ref_embeddings", "ref_labels")
ALL, TAUS, VIEWS = tuple(LOSSES), ("cacr", "queue", "supervised"), ("cacr", "queue", "momentum")
FIRST = {"cacr": "views", "queue": "queries", "momentum": "queries", "supervised": "embeddings"}
Z, X = randn(2, 7, 5), randn(7, 5)
META = {"device": "meta"}


class Refusal(NamedTuple):
    """``change`` of the arguments of ``losses`` is an ``error`` with all ``words`` in its message, in any order."""

    losses: tuple[str, ...]
    change: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]


def call_function(loss: str, arguments: dict[str, Any]) -> Any:
    return LOSSES[loss](**arguments)


def call_module(loss: str, arguments: dict[str, Any]) -> Any:
    options = {name: value for name, value in arguments.items() if name not in AT_CALL}
    inputs = {name: value for name, value in arguments.items() if name in AT_CALL}
    module = MODULES[loss](**options)
    return module(inputs["views"]) if loss == "cacr" else module(**inputs)


def refuse(refusal: Refusal, loss: str, call: Callable[..., Any]) -> None:
    arguments = small_inputs(loss) | {"backend": "torch"} | refusal.change
    with pytest.raises(refusal.error) as caught:
        call(loss, arguments)
    assert type(caught.value) is refusal.error
    for word in refusal.words:
        assert word in str(caught.value), (word, str(caught.value))


def check(refusals: list[Refusal]) -> Any:
    """Parametrises a test over all losses of all refusals."""
    rows = [(r, loss) for r in refusals for loss in r.losses]
    ids = [f"{loss}-{next(iter(r.change))}-{i}" for i, (r, loss) in enumerate(rows)]
    return pytest.mark.parametrize(("refusal", "loss"), rows, ids=ids)


each_call = pytest.mark.parametrize("call", [call_function, call_module])


# Temperatures and numbers


def of_temperatures() -> list[Refusal]:
    found = []
    names = [(TAUS, "tau_pos", ">= 0"), (TAUS, "tau_neg", ">= 0"), (("momentum",), "temperature", "> 0")]
    for losses, name, accepted in names:

        def add(value: Any, error: type[Exception], *words: str, losses: Any = losses, name: str = name) -> None:
            found.append(Refusal(losses, {name: value}, error, (name, *words)))

        add(-1.0, ValueError, "-1.0", accepted)
        add(-1e-300, ValueError, "-1e-300", accepted)
        add(-3, ValueError, "-3", accepted)
        add(math.nan, ValueError, "nan", "finite")
        add(math.inf, ValueError, "inf", "finite")
        add(-math.inf, ValueError, "-inf", "finite")
        for value in (True, "1.0", None, 1j, [1.0], np.ones(1), Decimal(1)):
            add(value, TypeError, "number", f"{type(value).__name__} {value!r}")
        add(10**400, ValueError, "finite")
        add(2e30, ValueError, "at most 1e+30", "2e+30")
        if name == "temperature":
            add(1e-39, ValueError, "at least 1e-30", "1e-39")
        add(torch.ones(0), ValueError, "0-dim", "[0]")
        add(torch.ones(2, 3), ValueError, "0-dim", "[2, 3]")
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
            add(torch.ones((), dtype=dtype), TypeError, "floating", str(dtype))
        add(torch.ones((), **META), ValueError, f"{name} must be on cpu, got meta")
        add(nn.Parameter(torch.ones(3)), ValueError, "0-dim", "[3]")
    found += [
        Refusal(("momentum",), {"temperature": zero}, ValueError, ("temperature", "> 0")) for zero in (0, 0.0, -0.0)
    ]
    return found


@each_call
@check(of_temperatures())
def test_temperatures(refusal: Refusal, loss: str, call: Callable[..., Any]) -> None:
    refuse(refusal, loss, call)


def of_numbers() -> list[Refusal]:
    found = []
    for losses, name in ((TAUS, "alpha"), (TAUS, "beta"), (("cacr",), "rbf_scale"), (("cacr",), "tau_plus")):
        for value in ("1", None, True, 1j, [1.0], torch.tensor(1.0)):
            words = (name, "number", "float32 tensor" if isinstance(value, torch.Tensor) else repr(value))
            found.append(Refusal(losses, {name: value}, TypeError, words))
        for value in (math.nan, math.inf, -math.inf):
            found.append(Refusal(losses, {name: value}, ValueError, (name, "finite", repr(value))))
        found.append(Refusal(losses, {name: -(10**400)}, ValueError, (name, "finite")))
    for share in (-0.1, 1.0, 1.5):
        found.append(Refusal(("cacr",), {"tau_plus": share}, ValueError, ("tau_plus", "[0, 1)", repr(share))))
    for other in ({"pairing": "pooled"}, {"cost": "rbf"}):
        words = ("tau_plus", "must be 0", *other.values(), "0.1")
        found.append(Refusal(("cacr",), {"tau_plus": 0.1, **other}, ValueError, words))
    for cost in ("rbf", "sqeuclidean"):
        found.append(Refusal(("cacr",), {"rbf_scale": 1e39, "cost": cost}, ValueError, ("rbf_scale", "1e+30", "1e+39")))
        found.append(Refusal(("cacr",), {"rbf_scale": -0.5, "cost": cost}, ValueError, ("rbf_scale", ">= 0", "-0.5")))
    return found


@each_call
@check(of_numbers())
def test_numbers(refusal: Refusal, loss: str, call: Callable[..., Any]) -> None:
    refuse(refusal, loss, call)


# Options


def of_options() -> list[Refusal]:
    accepted = {
        "pairing": (("cacr",), ("unordered", "ordered", "pooled")),
        "cost": (("cacr", "momentum"), ("sqeuclidean", "rbf")),
        "weight_grad": (("queue",), ("in_batch", "full", "none")),
        "reduction": (ALL, ("mean", "sum", "none")),
        "backend": (ALL, ("auto", "reference", "torch", "triton", "cuda", "cpu")),
    }
    found = []
    for name, (losses, values) in accepted.items():
        for value in ("", "all", values[0].upper(), values[0] + " "):
            found.append(Refusal(losses, {name: value}, ValueError, (name, repr(value), ", ".join(map(repr, values)))))
        for value in (None, 1, True, [values[0]], torch.tensor(1.0)):
            words = (name, "string", "tensor" if isinstance(value, torch.Tensor) else repr(value))
            found.append(Refusal(losses, {name: value}, TypeError, words))
    flags = {"normalize": ALL, "return_parts": ALL, "in_batch": ("queue",)}
    for name, losses in flags.items():
        for value in (0, 1, None, "True", 1.0, torch.tensor(True)):
            words = (name, "True", "False", "tensor" if isinstance(value, torch.Tensor) else repr(value))
            found.append(Refusal(losses, {name: value}, TypeError, words))
    for value in ("none", "sum"):
        words = ("reduction", value, "rbf", "mean")
        found.append(Refusal(("cacr",), {"reduction": value, "cost": "rbf"}, ValueError, words))
    offsets = [(-1, ValueError, "[0, 6]"), (7, ValueError, "[0, 6]"), (10**30, ValueError, "[0, 6]")]
    offsets += [(value, TypeError, "integer") for value in (1.0, True, None, "0", torch.tensor(0))]
    for value, error, accepts in offsets:
        words = ("key_offset", accepts, "tensor" if isinstance(value, torch.Tensor) else repr(value))
        found.append(Refusal(("momentum",), {"key_offset": value}, error, words))
    one_key_per_query = {"key_offset": 1, "keys": X}
    found.append(Refusal(("momentum",), one_key_per_query, ValueError, ("key_offset", "[0, 0]", "1")))
    return found


@each_call
@check(of_options())
def test_options(refusal: Refusal, loss: str, call: Callable[..., Any]) -> None:
    refuse(refusal, loss, call)


@each_loss
@pytest.mark.parametrize("call", [LOSSES, MODULES], ids=["function", "module"])
def test_options_are_keywords(loss: str, call: dict[str, Callable[..., Any]]) -> None:
    """None can be taken for another by its place."""
    with pytest.raises(TypeError):
        call[loss](*([1.0] * (4 if call is LOSSES else 1)))
    with pytest.raises(TypeError, match="temperature_of_the_room"):
        call[loss](**(small_inputs(loss) if call is LOSSES else {}), temperature_of_the_room=1.0)


def message(call: Callable[[], Any]) -> tuple[type[Exception], str] | None:
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return None


@check([r for r in [*of_temperatures(), *of_numbers(), *of_options()] if "key_offset" not in r.change])
def test_modules_refuse_when_they_are_made(refusal: Refusal, loss: str) -> None:
    """In the words of the function; only what depends on the device of the tensors waits for them."""
    refused = message(lambda: MODULES[loss](**refusal.change))
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in refusal.change.values()):
        assert refused is None
        return
    assert refused is not None
    assert refused == message(lambda: call_function(loss, small_inputs(loss) | refusal.change))


# Backends


def test_unusable_backend_is_refused_when_a_module_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    table = importlib.import_module("cacr_kernels.backends.table")
    broken = [b._replace(why_not=lambda _: "it needs a screw") if b.name == "cpu" else b for b in table.TABLE]
    monkeypatch.setattr(table, "TABLE", tuple(broken))
    for loss, module in MODULES.items():
        with pytest.raises(ValueError, match="backend='cpu' cannot run here: it needs a screw"):
            module(backend="cpu")
        assert message(lambda loss=loss: call_function(loss, small_inputs(loss) | {"backend": "cpu"})) == (
            ValueError,
            "backend='cpu' cannot run here: it needs a screw",
        )
        for name in ("auto", "torch", "reference"):
            assert module(backend=name).backend == name


@each_call
@each_loss
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_meta_tensors(loss: str, backend: str, call: Callable[..., Any]) -> None:
    """They hold no data: refused in words, with and without gradients, alone and in lists."""
    tensors: dict[str, Any] = {name: t.to("meta") for name, t in small_inputs(loss).items()}
    words = (f"backend='{backend}'", "meta", "no data")
    refuse(Refusal((loss,), tensors | {"backend": backend}, ValueError, words), loss, call)
    first = FIRST[loss]
    tensors[first] = tensors[first].requires_grad_()
    refuse(Refusal((loss,), tensors | {"backend": backend}, ValueError, words), loss, call)
    if loss != "supervised":
        listed = tensors | {first: list(tensors[first]), "backend": backend}
        refuse(Refusal((loss,), listed, ValueError, words), loss, call)


@each_call
@each_loss
def test_unusable_backend(loss: str, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named explicitly it is refused with its reason, and nothing else runs in its place; "auto" passes it over."""
    table = importlib.import_module("cacr_kernels.backends.table")
    usable = [entry for entry in table.TABLE if entry.name in ("reference", "torch")]
    broken = [Backend(name, "", lambda device, name=name: f"the {name} needs a screw") for name in ("cpu", "triton")]
    monkeypatch.setattr(table, "TABLE", (*usable, *broken))
    monkeypatch.setattr(table, "_warned", set())
    assert cacr_kernels.available_backends()["triton"] == "the triton needs a screw"
    for name in ("cpu", "triton"):
        refuse(
            Refusal((loss,), {"backend": name}, ValueError, ("backend", name, f"the {name} needs a screw")), loss, call
        )
    with pytest.warns(RuntimeWarning, match="the cpu needs a screw; .*the triton needs a screw"):
        value = call(loss, small_inputs(loss) | {"backend": "auto"})
    torch.testing.assert_close(value, call(loss, small_inputs(loss) | {"backend": "torch"}), rtol=0, atol=0)


@each_call
@each_loss
def test_backend_of_another_device(loss: str, call: Callable[..., Any]) -> None:
    tensors = {name: t.to("meta") for name, t in small_inputs(loss).items()}
    words = ("backend='cpu' cannot run here", "CPU tensors", "meta")
    refuse(Refusal((loss,), tensors | {"backend": "cpu"}, ValueError, words), loss, call)


# What is accepted although it looks odd


@each_loss
def test_values_of_tensor_temperatures_are_not_inspected(loss: str) -> None:
    names = ("temperature",) if loss == "momentum" else ("tau_pos", "tau_neg")
    for value in (-1.0, math.nan, math.inf, 0.0):
        taus = {name: torch.tensor(value) for name in names}
        for call in (call_function, call_module):
            assert call(loss, small_inputs(loss) | taus).shape == ()


@each_loss
def test_numbers_of_numpy_and_integers(loss: str) -> None:
    names = ("temperature",) if loss == "momentum" else ("tau_pos", "tau_neg", "alpha", "beta")
    expected = LOSSES[loss](**small_inputs(loss), **dict.fromkeys(names, 2.0))
    for two in (2, np.float64(2), np.float32(2), np.int64(2), Fraction(2)):
        value = LOSSES[loss](**small_inputs(loss), **dict.fromkeys(names, two))
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_views_as_arguments_of_the_function() -> None:
    """As the module takes them."""
    expected = cacr_kernels.cacr_loss(Z, tau_neg=2.0)
    torch.testing.assert_close(cacr_kernels.cacr_loss(*Z, tau_neg=2.0), expected, rtol=0, atol=0)
    compiled = torch.compile(cacr_kernels.cacr_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*Z, tau_neg=2.0), expected)
    with pytest.raises(TypeError, match=r"views\[1\] must be a tensor \[B, D\], got float 0.5"):
        cacr_kernels.cacr_loss(X, 0.5)


@each_call
def test_integers_and_flags_of_numpy(call: Callable[..., Any]) -> None:
    for loss in ALL:
        for name in ("normalize", "return_parts"):
            for value in (True, False):
                found = call(loss, small_inputs(loss) | {name: np.bool_(value)})
                torch.testing.assert_close(found, call(loss, small_inputs(loss) | {name: value}), rtol=0, atol=0)
    assert call("queue", small_inputs("queue") | {"in_batch": np.bool_(False)}) == call(
        "queue", small_inputs("queue") | {"in_batch": False}
    )
    for four in (np.int64(4), np.uint8(4)):
        found = call("momentum", small_inputs("momentum") | {"key_offset": four})
        assert found == call("momentum", small_inputs("momentum") | {"key_offset": 4})
    for value, error in ((np.int64(7), ValueError), (np.bool_(True), TypeError), (np.float64(1), TypeError)):
        refuse(Refusal(("momentum",), {"key_offset": value}, error, ("key_offset", str(value))), "momentum", call)


def test_integers_of_numpy_in_a_queue_and_in_weights() -> None:
    module = cacr_kernels.CACRQueueLoss(queue_size=np.int64(8), dim=np.int32(5), normalize=np.bool_(False))
    assert (type(module.queue_size), type(module.dim), module.normalize) == (int, int, False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert compiled(X.float(), X.float()).isfinite()
    assert module(X.float(), X.float(), update_queue=np.bool_(True)).isfinite()
    found = cacr_kernels.cacr_weights(Z, queries=[np.int64(1), 2], top_k=np.int64(3))
    assert found.repulsion.shape == (1, 2, 3)


def test_a_message_does_not_print_all_the_data() -> None:
    for views in (np.ones((100, 100)), [[1.0] * 100] * 100, "x" * 10000):
        with pytest.raises(TypeError) as error:
            cacr_kernels.cacr_loss(views)
        assert len(str(error.value)) < 300
