"""The modules: the same numbers as the functions, options, state, and their life inside a training loop."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cacr_kernels
from cacr_kernels import CACRLoss, CACRMomentumLoss, CACRParts, CACRQueueLoss, SupervisedCACRLoss
from tests.agreement import LOSSES, device_of, each_backend, each_loss, randn, run, small_inputs, there

MODULES: dict[str, Callable[..., nn.Module]] = {
    "cacr": CACRLoss,
    "queue": CACRQueueLoss,
    "momentum": CACRMomentumLoss,
    "supervised": SupervisedCACRLoss,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cacr": {"tau_pos": 2.0, "tau_neg": 3.0, "alpha": 0.5, "beta": 4.0, "pairing": "pooled"},
    "queue": {"tau_pos": 2.0, "tau_neg": 3.0, "alpha": 0.5, "beta": 4.0, "in_batch": False, "weight_grad": "full"},
    "momentum": {"temperature": 0.3, "cost": "sqeuclidean"},
    "supervised": {"tau_pos": 2.0, "tau_neg": 3.0, "alpha": 0.5, "beta": 4.0},
}


def inputs(loss: str, seed: int = 0) -> dict[str, Tensor]:
    """Not of length 1: a module normalises."""
    return {n: 3 * t if t.is_floating_point() else t for n, t in small_inputs(loss, seed).items()}


def call(module: nn.Module, tensors: dict[str, Any]) -> Any:
    return module(tensors["views"]) if "views" in tensors else module(**tensors)


def temperatures(loss: str) -> list[str]:
    return [name for name in OPTIONS[loss] if name.startswith(("tau", "temp"))]


# Modules are the functions


@each_backend
@each_loss
def test_module_is_the_function_with_normalize(loss: str, backend: str) -> None:
    tensors, norm = there(inputs(loss), backend), {"normalize": True}
    for options in ({}, OPTIONS[loss], OPTIONS[loss] | {"reduction": "none"}):
        expected = LOSSES[loss](**tensors, **options, **norm, backend=backend)
        torch.testing.assert_close(call(MODULES[loss](**options, backend=backend), tensors), expected, rtol=0, atol=0)
    expected = LOSSES[loss](**tensors, backend=backend)
    assert call(MODULES[loss](normalize=False, backend=backend), tensors) == expected
    assert call(MODULES[loss](backend=backend), tensors) != expected


@each_loss
def test_modules_have_the_keywords_of_the_functions(loss: str) -> None:
    mine, theirs = (inspect.signature(f).parameters for f in (MODULES[loss], LOSSES[loss]))
    at_call = {
        "views",
        "more",
        "queries",
        "keys",
        "queue",
        "key_offset",
        "embeddings",
        "labels",
        "ref_embeddings",
        "ref_labels",
        "ref_index",
    }
    for name in theirs.keys() - at_call:
        assert mine[name].kind is theirs[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert mine[name].default == (True if name == "normalize" else theirs[name].default), name
    assert mine.keys() - {"queue_size", "dim", "enqueue"} == theirs.keys() - at_call


@each_loss
def test_module_returns_parts(loss: str) -> None:
    parts = call(MODULES[loss](return_parts=True), inputs(loss))
    assert isinstance(parts, CACRParts)
    expected = LOSSES[loss](**inputs(loss), normalize=True, return_parts=True)
    torch.testing.assert_close(tuple(parts), tuple(expected), rtol=0, atol=0)


def test_views_as_arguments_as_a_list_or_as_one_tensor() -> None:
    z = randn(3, 7, 5)
    for options in ({}, OPTIONS["cacr"]):
        module = CACRLoss(**options)
        expected = cacr_kernels.cacr_loss(z, normalize=True, **options)
        for views in (list(z), [z], [list(z)], [tuple(z)]):
            torch.testing.assert_close(module(*views), expected, rtol=0, atol=0)


def test_key_offset_belongs_to_the_call() -> None:
    tensors, module = inputs("momentum"), CACRMomentumLoss()
    values = [module(**tensors, key_offset=offset) for offset in (0, 3, 6)]
    expected = [LOSSES["momentum"](**tensors, key_offset=offset, normalize=True) for offset in (0, 3, 6)]
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    assert len(set(values)) == 3


def test_supervised_with_and_without_reference_set() -> None:
    tensors, module = inputs("supervised"), SupervisedCACRLoss()
    own = {name: tensors[name] for name in ("embeddings", "labels")}
    for given in (tensors, own):
        expected = LOSSES["supervised"](**given, normalize=True)
        torch.testing.assert_close(module(*given.values()), expected, rtol=0, atol=0)


# Options and state


@each_loss
def test_options_show_in_repr_and_can_be_changed(loss: str) -> None:
    module = MODULES[loss](**OPTIONS[loss])
    for name, value in OPTIONS[loss].items():
        assert f"{name}={value!r}" in repr(module)
        assert getattr(module, name) == value
    assert repr(module).startswith(type(module).__name__ + "(")
    assert "normalize=True" in repr(module)
    name = temperatures(loss)[-1]
    setattr(module, name, 0.7)
    expected = LOSSES[loss](**inputs(loss), **(OPTIONS[loss] | {name: 0.7}), normalize=True)
    assert call(module, inputs(loss)) == expected


@each_loss
def test_learnable_temperatures_are_parameters(loss: str) -> None:
    names = temperatures(loss)
    taus = {name: nn.Parameter(torch.tensor(0.5 + i)) for i, name in enumerate(names)}
    module = MODULES[loss](**taus)
    assert dict(module.named_parameters()).keys() == set(names)
    call(module, inputs(loss)).backward()
    expected = run(loss, inputs(loss) | {n: t.detach() for n, t in taus.items()}, "reference", normalize=True)
    for name, tau in taus.items():
        truth = expected.gradients[name]
        assert tau.grad.dtype == torch.float32
        if truth == 0:  # a temperature without effect
            assert tau.grad == 0
        else:
            count = next(iter(inputs(loss).values()))[..., 0].numel()
            ratio = truth / tau.grad / count
            assert 0.5 <= ratio <= 1.5  # the random incoming gradient of ``run``
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = {name: tau.item() for name, tau in taus.items()}
    optimizer.step()
    assert all((taus[name].item() != x) == (expected.gradients[name] != 0) for name, x in before.items())


@each_loss
def test_state_dict_holds_the_tensor_temperatures(loss: str) -> None:
    names = temperatures(loss)
    assert MODULES[loss](**OPTIONS[loss]).state_dict() == {}
    for make in (nn.Parameter, torch.clone):
        first = MODULES[loss](**{name: make(torch.tensor(0.25 + i)) for i, name in enumerate(names)})
        second = MODULES[loss](**{name: make(torch.tensor(9.0)) for name in names})
        assert first.state_dict().keys() == set(names)
        second.load_state_dict(first.state_dict())
        assert call(first, inputs(loss)) == call(second, inputs(loss))
        assert first.double().state_dict()[names[0]].dtype == torch.float64


@each_loss
def test_a_computed_temperature_is_refused(loss: str) -> None:
    """A module could neither copy nor train it."""
    log_tau = nn.Parameter(torch.tensor(0.0))
    with pytest.raises(ValueError, match="number or a leaf tensor"):
        MODULES[loss](**{temperatures(loss)[-1]: log_tau.exp()})


@each_loss
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(loss: str, again: Callable[[Any], Any]) -> None:
    names = temperatures(loss)
    for taus in ({}, {name: nn.Parameter(torch.tensor(0.5)) for name in names}):
        module = MODULES[loss](**(OPTIONS[loss] | taus))
        twin = again(module)
        assert call(twin, inputs(loss)) == call(module, inputs(loss))
        assert repr(twin) == repr(module)
        if taus:
            getattr(twin, names[-1]).data.fill_(3.0)
            assert getattr(module, names[-1]).item() == 0.5
            assert call(twin, inputs(loss)) != call(module, inputs(loss))


# Training


@each_loss
def test_frozen_inputs_give_a_constant(loss: str) -> None:
    assert not call(MODULES[loss](), inputs(loss)).requires_grad


@each_backend
@each_loss
def test_no_grad_gives_the_same_number(loss: str, backend: str) -> None:
    tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in there(inputs(loss), backend).items()}
    module = MODULES[loss](backend=backend)
    expected = call(module, tensors)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            value = call(module, tensors)
        assert not value.requires_grad
        assert value == expected.detach()


@each_backend
@each_loss
def test_hooks_on_inputs_see_the_gradient_once(loss: str, backend: str) -> None:
    tensors = there(inputs(loss), backend)
    name = next(iter(tensors))
    leaf = tensors[name].clone().requires_grad_()
    seen: list[Tensor] = []
    through = leaf * 1.0
    through.register_hook(seen.append)
    leaf.register_hook(lambda grad: 2 * grad)
    call(MODULES[loss](backend=backend), tensors | {name: through}).backward()
    assert len(seen) == 1
    torch.testing.assert_close(leaf.grad, 2 * seen[0], rtol=0, atol=0)
    assert seen[0].any()


@each_backend
@each_loss
def test_second_backward_with_retain_graph(loss: str, backend: str) -> None:
    tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in there(inputs(loss), backend).items()}
    leaf = next(iter(tensors.values()))
    value = call(MODULES[loss](backend=backend), tensors)
    value.backward(retain_graph=True)
    first = leaf.grad.clone()
    value.backward(torch.tensor(3.0, dtype=value.dtype))
    torch.testing.assert_close(leaf.grad, 4 * first, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@each_backend
@each_loss
@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
def test_autocast_changes_nothing(loss: str, inside: bool, backend: str) -> None:
    """float32 inputs inside ``torch.autocast``: no product is rounded to bfloat16, forward and backward."""
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in there(inputs(loss), backend).items()}
    name = next(iter(tensors))
    variants: list[dict[str, Any]] = [{}, OPTIONS[loss]]
    variants += [{"cost": "rbf"}, {"reduction": "none"}] if loss == "cacr" else []
    for options in variants:
        module = MODULES[loss](**options, backend=backend)
        plain, cast = (tensors[name].clone().requires_grad_() for _ in range(2))
        expected = call(module, tensors | {name: plain})
        expected.sum().backward()
        with torch.autocast(device_of(backend), dtype=torch.bfloat16):
            value = call(module, tensors | {name: cast})
            if inside:
                value.sum().backward()
        if not inside:
            value.sum().backward()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        torch.testing.assert_close(cast.grad, plain.grad, rtol=0, atol=0)


def test_autocast_with_a_list_of_bfloat16_features() -> None:
    """The output of a layer under autocast goes in as it is."""
    layer = nn.Linear(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = [layer(randn(7, 5, seed=i).float()) for i in range(2)]
        assert views[0].dtype == torch.bfloat16
        value = CACRLoss()(*views)
        listed = CACRQueueLoss()(views, views, randn(4, 6).float())
    assert value.dtype == listed.dtype == torch.float32
    expected = cacr_kernels.cacr_loss([v.detach().double() for v in views], normalize=True)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    value.backward()
    assert layer.weight.grad.abs().max() > 0


# Backends


def test_backends_are_an_ordered_table_of_reasons() -> None:
    found = cacr_kernels.available_backends()
    assert list(found)[:3] == ["reference", "torch", "triton"]
    assert found["reference"] is None
    assert found["torch"] is None
    assert all(reason is None or (isinstance(reason, str) and len(reason.split()) > 3) for reason in found.values())
    found["torch"] = "changed"
    assert cacr_kernels.available_backends()["torch"] is None


@each_loss
def test_auto_is_the_fastest_that_can_run(loss: str) -> None:
    last = [
        name
        for name, reason in cacr_kernels.available_backends().items()
        if reason is None and name in ("torch", "cpu")
    ][-1]
    if last == "cpu":
        torch.testing.assert_close(
            LOSSES[loss](**inputs(loss)), LOSSES[loss](**inputs(loss), backend="cpu"), rtol=0, atol=0
        )


def test_auto_is_never_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    table = importlib.import_module("cacr_kernels.backends.table")
    monkeypatch.setattr(table, "_warned", {"cpu"})
    monkeypatch.setattr(table, "TABLE", table.TABLE[:2])
    assert table.select("auto", torch.device("cpu")) == "torch"
