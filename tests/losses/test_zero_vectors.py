"""Rows too short to have a direction: normalised as by PyTorch, but their gradient is zero."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.agreement import LOSSES, ON_CPU, cast, each_loss, small_inputs

FIRST = {"cacr": "views", "queue": "queries", "momentum": "queries", "supervised": "embeddings"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
@each_loss
def test_gradient_is_zero(loss: str, backend: str, dtype: torch.dtype) -> None:
    tensors = cast(small_inputs(loss), dtype)
    x = 3 * tensors[FIRST[loss]]
    rows = x.reshape(-1, x.shape[-1])
    rows[1] = 0.0
    rows[4] = 2e-13  # 0 in float16
    x.requires_grad_()
    value = LOSSES[loss](**tensors | {FIRST[loss]: x}, normalize=True, backend=backend)
    (grad,) = torch.autograd.grad(value, x)
    assert value.isfinite()
    assert grad.isfinite().all()
    per_row = grad.reshape(rows.shape).abs().sum(-1)
    assert not per_row[[1, 4]].any()
    assert (per_row > 0).sum() == len(rows) - 2

    unit = tensors | {n: normalize(t.double(), dim=-1) for n, t in tensors.items() if t.is_floating_point()}
    unit[FIRST[loss]] = normalize(x.detach().double(), dim=-1)
    torch.testing.assert_close(value.double(), LOSSES[loss](**unit, backend="reference").double(), rtol=1e-4, atol=1e-4)
