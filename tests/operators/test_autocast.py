"""Derivatives of any order are the same where everything, ``backward`` included, runs inside ``torch.autocast``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from tests.agreement import LOSSES, device_of, each_backend, small_inputs, there

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("cacr", {}),
    ("cacr", {"pairing": "pooled"}),
    ("cacr", {"cost": "rbf"}),
    ("cacr", {"reduction": "none"}),
    ("queue", {}),
    ("queue", {"weight_grad": "full"}),
    ("momentum", {}),
    ("momentum", {"cost": "sqeuclidean"}),
    ("supervised", {}),
]


def penalty(loss: str, options: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in there(small_inputs(loss), backend).items()}
    z = next(iter(tensors.values())).requires_grad_()
    value = LOSSES[loss](**tensors, **options, backend=backend).sum()
    (first,) = grad(value, z, create_graph=True)
    (second,) = grad(value + 100 * first.square().sum(), z)
    return first.detach(), second


@each_backend
@pytest.mark.parametrize(("loss", "options"), VARIANTS, ids=str)
def test_second_derivatives_inside_autocast(loss: str, options: dict[str, Any], backend: str) -> None:
    expected = penalty(loss, options, backend)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        found = penalty(loss, options, backend)
    assert all(map(torch.equal, found, expected))
