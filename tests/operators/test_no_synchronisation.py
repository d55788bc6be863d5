"""On an accelerator nothing waits for the device: tensors without data get through, and nothing may look at any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import steps
from cacr_kernels.backends import table
from cacr_kernels.backends import torch as blocks
from cacr_kernels.types import OTHER, OTHER_NOT_SELF, SAME, SAME_NOT_SELF
from tests.agreement import LOSSES, each_loss, randn, small_inputs


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@each_loss
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_losses(loss: str, learnable: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(entry for entry in table.TABLE if entry.name == backend)
    monkeypatch.setattr(steps, "choose", lambda *_: entry)
    tensors = {name: on_meta(t) for name, t in small_inputs(loss).items()}
    leaves = [t.requires_grad_() for name, t in tensors.items() if name in ("views", "queries", "embeddings")]
    options: dict[str, Any] = {}
    if learnable:
        names = ["temperature"] if loss == "momentum" else ["tau_pos", "tau_neg"]
        options = {n: torch.ones((), device="meta", requires_grad=True) for n in names}
        leaves += options.values()
    for normalize in (False, True):
        parts = LOSSES[loss](**tensors, **options, normalize=normalize, return_parts=True)
        gradients = torch.autograd.grad(parts.loss, leaves, materialize_grads=True)
        assert [g.shape for g in gradients] == [t.shape for t in leaves]
        assert {x.device.type for x in (*parts, *gradients)} == {"meta"}


@pytest.mark.parametrize("own", [False, True])
def test_blocks_of_the_torch_backend(own: bool) -> None:
    """With positives, whose close pairs are taken from differences."""
    q, k, tau = randn(1, 5, 3), None if own else randn(1, 7, 3), torch.ones(2, dtype=torch.float64)
    q_id, k_id = torch.arange(5, dtype=torch.int32) % 3, None if own else torch.arange(7, dtype=torch.int32) % 3
    for kinds, q_self, normalize in (
        ([SAME_NOT_SELF if own else SAME, OTHER], None, True),
        ([SAME_NOT_SELF, OTHER_NOT_SELF], torch.arange(-1, 4, dtype=torch.int32), False),
    ):
        arguments = [on_meta(x) for x in (q, k, q_id, k_id, tau, kinds, [0], [0], False, False, q_self, normalize)]
        value, lse, row_state = blocks.contrast(*arguments)
        found = blocks.gradients(*arguments, value, row_state, value, lse, True, not own, True)
        assert [g.shape for g in found] == [q.shape, torch.Size([0]) if k is None else k.shape, tau.shape]
        assert {t.device.type for t in (value, lse, row_state, *found)} == {"meta"}


def test_differences_of_close_positives_without_counting_them() -> None:
    """What is done on an accelerator, done here: as exact as what is done on the CPU."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(6, 9, generator=g)
    k = torch.cat([q + 1e-3 * torch.randn(6, 9, generator=g), torch.randn(4, 9, generator=g)])
    positives = torch.eye(6, 10, dtype=torch.bool)
    truth = (q.double()[:, None] - k.double()).square().sum(-1)
    for differences in (blocks.close_by_index, blocks.close_by_mask):
        c = blocks.block_cost(q, k, False, None)
        found = differences(c.clone(), q, k, positives)
        torch.testing.assert_close(found[positives].double(), truth.diagonal(), rtol=1e-5, atol=0)
        torch.testing.assert_close(found[~positives], c[~positives], rtol=0, atol=0)
