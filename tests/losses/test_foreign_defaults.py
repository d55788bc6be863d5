"""Results have the device and dtype of the inputs, whatever the defaults of the process are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import cacr_kernels
from tests.agreement import LOSSES, ON_CPU, cast, each_loss, small_inputs

DEFAULTS = ["device context", "device", "float64", "float16"]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cacr": [{}, {"cost": "rbf"}, {"reduction": "none"}, {"pairing": "pooled"}],
    "queue": [{}, {"weight_grad": "none"}],
    "momentum": [{}, {"cost": "sqeuclidean"}],
    "supervised": [{}],
}


@contextmanager
def defaults(which: str) -> Iterator[None]:
    """Another default device, by either of the two ways, or another default dtype."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    try:
        if which == "device context":
            with torch.device("meta"):
                yield
            return
        if which == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, which))
        yield
    finally:
        torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_default_dtype(dtype)


def results(loss: str, tensors: dict[str, Tensor], learnable: bool, **options: Any) -> list[Tensor]:
    """The parts, then the gradients of all features and of the temperatures."""
    leaves = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    name = "temperature" if loss == "momentum" else "tau_neg"
    tau: Any = tensors[next(iter(tensors))].new_full((), 1.5).requires_grad_() if learnable else 1.5
    parts = LOSSES[loss](**leaves, **{name: tau}, **options, return_parts=True)
    wanted = [t for t in leaves.values() if t.requires_grad] + [tau] * learnable
    found = torch.autograd.grad(parts.loss.sum(), wanted, allow_unused=True)
    return [*parts, *(g for g in found if g is not None)]


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
@pytest.mark.parametrize("which", DEFAULTS)
@each_loss
def test_same_results(loss: str, which: str, backend: str) -> None:
    tensors = cast(small_inputs(loss), torch.float32)
    for options in OPTIONS[loss]:
        for given in ({"normalize": True}, {"learnable": True}):
            call: dict[str, Any] = {"learnable": False, **options, **given, "backend": backend}
            expected = results(loss, tensors, **call)
            with defaults(which):
                found = results(loss, tensors, **call)
            for x, y in zip(found, expected, strict=True):
                assert (x.dtype, x.device) == (y.dtype, y.device), call
                assert torch.equal(x, y), call


@pytest.mark.parametrize("which", DEFAULTS)
def test_weights(which: str) -> None:
    views = small_inputs("cacr")["views"]
    for pairing in ("unordered", "pooled"):
        for queries in (None, [2, 0]):
            expected = cacr_kernels.cacr_weights(views, queries=queries, pairing=pairing, tau_neg=2.0)
            with defaults(which):
                found = cacr_kernels.cacr_weights(views, queries=queries, pairing=pairing, tau_neg=2.0)
            assert all(torch.equal(x, y) for x, y in zip(found[:3], expected[:3], strict=True))
