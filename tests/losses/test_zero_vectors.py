"""Rows too short to have a direction: normalised as by PyTorch, but their gradient is zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad
from torch.nn.functional import normalize

from cacr_kernels import cacr_momentum_loss
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


@pytest.mark.parametrize("zeros", [1, 4, 11], ids=["a dead unit", "a bank that is partly filled", "an empty bank"])
@pytest.mark.parametrize("temperature", [2.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_zero_keys_of_the_momentum_loss(backend: str, dtype: torch.dtype, temperature: float, zeros: int) -> None:
    """Their inner products are 0, as if they were unit vectors at a right angle, but their costs are |q|^2."""
    g = torch.Generator().manual_seed(zeros)
    q, k = (torch.randn(shape, dtype=torch.float64, generator=g) for shape in ((2, 5, 7), (11, 7)))
    k[torch.randperm(11, generator=g)[:zeros]] = 0.0
    found = {}
    for name, precision in ((backend, dtype), ("reference", torch.float64)):
        x = q.to(precision).requires_grad_()
        parts = cacr_momentum_loss(
            x, k.to(precision), temperature=temperature, cost="sqeuclidean", key_offset=3,
            normalize=True, return_parts=True, backend=name,
        )  # fmt: skip
        found[name] = torch.stack(parts).detach().double(), grad(parts.loss, x)[0].double()
    eps = torch.finfo(dtype).eps / temperature
    torch.testing.assert_close(found[backend], found["reference"], rtol=20 * eps, atol=20 * eps)
