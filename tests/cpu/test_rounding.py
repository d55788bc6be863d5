"""How the CPU kernels add up: rows of a mean, exponents at the edge of their range, positives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import normalize

from cacr_kernels import cacr_loss, supervised_cacr_loss
from cacr_kernels.operators.registry import operator

ALL, OTHER = 0, 2


# ---- means over rows -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"pairing": "pooled"}, {"cost": "rbf"}], ids=str)
def test_means_of_many_rows(options: dict[str, Any]) -> None:
    """float64: all rows have the same value but for its last bits, so that one chain of additions drifts."""
    angle = torch.arange(1000, dtype=torch.float64) * (2 * torch.pi / 1000)
    views = torch.stack([torch.stack([(angle + x).cos(), (angle + x).sin()], dim=-1) for x in (0.0, 0.4, 1.1)])
    found = {}
    for backend in ("cpu", "torch"):
        taus = [torch.tensor(tau, dtype=torch.float64, requires_grad=True) for tau in (1.3, 0.7)]
        parts = cacr_loss(views, tau_pos=taus[0], tau_neg=taus[1], return_parts=True, backend=backend, **options)
        found[backend] = torch.stack([*parts[1:], *grad(parts.loss, taus)]).detach()
    assert ((found["cpu"] - found["torch"]) / found["torch"]).abs().max() <= 50 * torch.finfo(torch.float64).eps


# ---- exponents at the edge of the range of 2^x -----------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_below_the_range_of_float32(dtype: torch.dtype) -> None:
    """Costs of 4 at tau = 23: exponents of -133 are no longer bounded. Weights of 1e-40 may be flushed to 0."""
    z = torch.tensor([1.0, 1, -1, -1], dtype=dtype)[:, None].repeat(2, 1, 1).requires_grad_()
    loss = cacr_loss(z, tau_neg=23.0, backend="cpu")
    (gradient,) = grad(loss, z)
    assert loss.item() == pytest.approx(-8 * math.exp(-92), rel=1e-12, abs=torch.finfo(dtype).tiny)
    assert gradient.abs().max() <= 100 * torch.finfo(torch.float32).tiny


# ---- products of many features --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dims", [(257, 300, 541), (700, 769, 1001), (16001, 20000)], ids=str)
def test_costs_of_equal_rows_of_one_size(dims: tuple[int, ...]) -> None:
    """Codes: all products of two features are alike, so that one long chain of additions errs to one side."""
    mine, eager = [], []
    for dim in dims:
        g = torch.Generator().manual_seed(dim)
        signs = torch.randn(dim, generator=g).sign()
        for size in torch.rand(4, generator=g) + 0.5:
            row = signs * (size / dim**0.5)
            z = row.repeat(1, 40, 1)
            cost = row.square().sum() + row.square().sum() - 2 * (z[0] @ z[0].T)[0, 0]
            eager.append(cost.abs() / size**2)
            tau = torch.tensor([-1.0], dtype=torch.float64)
            (((value,),),), *_ = operator("contrast_cpu")(
                z[:, :1], z, None, None, tau, [ALL], [0], [0], False, False, None, False
            )
            mine.append(value.abs() / size**2)
    assert max(mine) <= 2 * max(eager) + 8 * torch.finfo(torch.float32).eps


# ---- near positives --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("noise", [0.3, 0.1, 0.05, 0.01])
def test_positives_of_tight_classes(noise: float) -> None:
    """Their costs come from differences: the product form would lose digits."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    z = torch.randn(4, 32, dtype=torch.float64, generator=g)[labels]
    z = normalize(z + noise * torch.randn(64, 32, dtype=torch.float64, generator=g), dim=-1).float()
    expected = supervised_cacr_loss(z.double(), labels, beta=0.0, backend="reference")
    found = supervised_cacr_loss(z, labels, beta=0.0, backend="cpu")
    assert abs(found - expected) <= 2e-7 * expected


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("noise", [0.3, 0.1, 0.05, 0.001])
@pytest.mark.parametrize("beta", [0.0, 0.01])
@pytest.mark.parametrize(
    ("rows", "references"), [(64, 0), (230, 0), (64, 47)], ids=["few", "symmetric sweeps", "reference set"]
)
def test_gradients_of_tight_classes(rows: int, references: int, beta: float, noise: float, backend: str) -> None:
    """As exact as those of eager mode, which takes them from differences."""
    error = {backend: 0.0, "reference": 0.0}
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(rows + references) % 4
        z = torch.randn(4, 32, dtype=torch.float64, generator=g)[labels]
        z = z + noise * torch.randn(len(labels), 32, dtype=torch.float64, generator=g)
        z = normalize(z, dim=-1).float()

        def gradients(name: str, dtype: torch.dtype, z: Tensor = z, labels: Tensor = labels) -> Tensor:
            x = z.to(dtype).requires_grad_()
            ref = {"ref_embeddings": x[rows:], "ref_labels": labels[rows:]} if references else {}
            loss = supervised_cacr_loss(x[:rows], labels[:rows], beta=beta, **ref, backend=name)
            return grad(loss, x)[0].double()

        truth = gradients("reference", torch.float64)
        for name in error:
            difference = (gradients(name, torch.float32) - truth).abs().max() / truth.abs().max()
            error[name] = max(error[name], difference.item())
    assert error[backend] <= 2 * error["reference"] + 8 * torch.finfo(torch.float32).eps


# ---- ids that are nearly periodic ------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_period_that_breaks_at_the_last_row(side: str) -> None:
    """Keys off the diagonals need their mask again: the last row has the id of a row in another panel."""
    period = 101
    ids = {"queries": torch.arange(period) % period, "keys": torch.arange(2 * period + 1) % period}
    ids[side][-1] = 60
    q_id, k_id = (ids[name].int() for name in ("queries", "keys"))
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, len(rows), 5, dtype=torch.float64, generator=g) for rows in (q_id, k_id))
    tau = torch.tensor([-0.5], dtype=torch.float64)
    found, expected = (
        operator(f"contrast_{backend}")(q, k, q_id, k_id, tau, [OTHER], [0], [0], False, False, None, False)[:2]
        for backend in ("cpu", "torch")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
