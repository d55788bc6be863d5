"""How the CPU kernels add up: rows of a mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import grad

from cacr_kernels import cacr_loss


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
