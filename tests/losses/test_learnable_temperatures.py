"""Learnable temperatures: of no effect, a gradient of zero and never ``None`` (DDP stops at that); of one element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cacr_kernels
from tests.agreement import LOSSES, ON_CPU, each_loss, small_inputs, unit

Call = Callable[..., Any]
EVERY = ["reference", *ON_CPU]
MODULES: dict[str, Call] = {
    "cacr": cacr_kernels.CACRLoss,
    "queue": cacr_kernels.CACRQueueLoss,
    "momentum": cacr_kernels.CACRMomentumLoss,
    "supervised": cacr_kernels.SupervisedCACRLoss,
}
LABELS = torch.tensor([0, 0, 1, 1, 1], dtype=torch.int64)


def views(count: int, batch: int) -> Tensor:
    return unit(count, batch, 3).float()


def queue(batch: int, entries: int, **options: Any) -> Call:
    tensors = views(2, batch), views(2, batch), unit(max(entries, 1), 3).float()[:entries]
    return lambda **given: cacr_kernels.cacr_queue_loss(*tensors, **options, **given)


def supervised(labels: Tensor) -> Call:
    return lambda **given: cacr_kernels.supervised_cacr_loss(unit(len(labels), 3).float(), labels, **given)


BOTH = ("tau_pos", "tau_neg")
BATCHES: dict[str, tuple[Call, tuple[str, ...]]] = {
    "one instance": (lambda **given: cacr_kernels.cacr_loss(views(2, 1), **given), BOTH),
    "one instance of three views": (lambda **given: cacr_kernels.cacr_loss(views(3, 1), **given), ("tau_neg",)),
    "one instance, pooled": (lambda **given: cacr_kernels.cacr_loss(views(2, 1), pairing="pooled", **given), BOTH),
    "two views": (lambda **given: cacr_kernels.cacr_loss(views(2, 4), **given), ("tau_pos",)),
    "queue and one instance": (queue(1, 0), BOTH),
    "empty queue alone": (queue(4, 0, in_batch=False), BOTH),
    "queue with constant weights": (queue(4, 5, weight_grad="none"), BOTH),
    "queue alone, its logits constant": (queue(4, 5, in_batch=False), BOTH),
    "one embedding": (supervised(LABELS[:1]), BOTH),
    "no positive": (supervised(LABELS[1:3]), BOTH),
    "no negative": (supervised(LABELS[2:]), ("tau_neg",)),
    "momentum": (
        lambda **given: cacr_kernels.cacr_momentum_loss(views(2, 4), views(1, 4)[0], cost="sqeuclidean", **given),
        ("temperature",),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("batch", BATCHES)
def test_zero(batch: str, backend: str, reduction: str) -> None:
    call, unused = BATCHES[batch]
    names = ("temperature",) if unused == ("temperature",) else BOTH
    taus = {name: torch.tensor(1.5, requires_grad=True) for name in names}
    call(**taus, backend=backend, reduction=reduction).sum().backward()
    for name, tau in taus.items():
        assert tau.grad is not None, name
        assert name not in unused or tau.grad == 0, name


@pytest.mark.parametrize("backend", EVERY)
def test_not_read(backend: str) -> None:
    """A temperature of no set is not read: NaN stays out of the loss."""
    loss = queue(4, 0, in_batch=False)
    tau = torch.tensor(torch.nan, requires_grad=True)
    assert loss(tau_neg=tau, backend=backend).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", EVERY)
@each_loss
def test_one_element(loss: str, backend: str, reduction: str) -> None:
    """``Parameter(torch.ones(1))`` is as good as a 0-dim one; the gradient has its shape."""
    names = ("temperature",) if loss == "momentum" else BOTH
    found: list[list[Tensor]] = []
    for shape in ((), (1,)):
        taus = {name: nn.Parameter(torch.full(shape, 1.5)) for name in names}
        value = LOSSES[loss](**small_inputs(loss), **taus, backend=backend, reduction=reduction)
        module = MODULES[loss](**taus, backend=backend, reduction=reduction, normalize=False)
        assert torch.equal(module(*small_inputs(loss).values()), value)
        gradients = torch.autograd.grad(value.sum(), list(taus.values()))
        assert all(g.shape == shape for g in gradients)
        found.append([value.detach(), *(g.reshape(()) for g in gradients)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
