"""Entropies of the weights: never negative, and right where one key has nearly all the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.agreement import LOSSES, ON_CPU, cast, each_loss, small_inputs


@pytest.mark.parametrize("tau", [1.0, 20.0, 300.0])
@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
@each_loss
def test_entropies(loss: str, backend: str, tau: float) -> None:
    taus = {"temperature": 1 / tau} if loss == "momentum" else {"tau_pos": tau, "tau_neg": tau}
    calls: list[dict[str, Any]] = [{}, {"reduction": "none"}]
    for seed in range(4):
        tensors = small_inputs(loss, seed=seed)
        for options in calls:
            call = {**taus, **options, "return_parts": True}
            exact = LOSSES[loss](**tensors, **call, backend="reference")
            found = LOSSES[loss](**cast(tensors, torch.float32), **call, backend=backend)
            for name in ("attraction_entropy", "repulsion_entropy"):
                value, truth = getattr(found, name).item(), getattr(exact, name).item()
                assert value >= 0, (name, options)
                assert abs(value - truth) <= 1e-5 * (1 + tau), (name, options)
