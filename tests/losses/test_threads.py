"""Every loss from two Python threads at once: each gets what it gets alone, to the bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import (
    CACRLoss,
    CACRMomentumLoss,
    CACRQueueLoss,
    SupervisedCACRLoss,
    available_backends,
    cacr_loss,
    cacr_momentum_loss,
    cacr_queue_loss,
    cacr_weights,
    supervised_cacr_loss,
)
from tests.agreement import device_of

THREADS, CALLS = 2, 6
BACKENDS = [name for name, why_not in available_backends().items() if why_not is None]
Loss = Callable[[Tensor], Tensor]


def labels(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1], device=z.device) % 3


def filled_queue(z: Tensor, backend: str) -> Tensor:
    """Two steps of a module of the thread's own."""
    loss_fn = CACRQueueLoss(queue_size=29, dim=z.shape[-1], backend=backend)
    return loss_fn(z, z.detach()) + loss_fn(z, z.detach().flip(1))


LOSSES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "cacr_loss": lambda z, backend: cacr_loss(z, tau_neg=2.0, backend=backend),
    "pooled": lambda z, backend: cacr_loss(z, pairing="pooled", backend=backend),
    "none": lambda z, backend: cacr_loss(z, reduction="none", backend=backend).mean(),
    "rbf": lambda z, backend: cacr_loss(z, cost="rbf", backend=backend),
    "cacr_queue_loss": lambda z, backend: cacr_queue_loss(z, z.detach(), z[0].detach(), backend=backend),
    "cacr_momentum_loss": lambda z, backend: cacr_momentum_loss(z, z[0].detach(), normalize=True, backend=backend),
    "supervised_cacr_loss": lambda z, backend: supervised_cacr_loss(z[0], labels(z), backend=backend),
    "CACRQueueLoss": filled_queue,
}
SHARED_MODULES: dict[str, Callable[[], Any]] = {
    "CACRLoss": CACRLoss,
    "CACRQueueLoss": CACRQueueLoss,
    "CACRMomentumLoss": CACRMomentumLoss,
    "SupervisedCACRLoss": SupervisedCACRLoss,
}


def inputs(thread: int, device: str) -> Tensor:
    """Views of sizes that differ between threads."""
    return torch.randn(3, 67 + 10 * thread, 19, generator=torch.Generator().manual_seed(thread)).to(device)


def step(loss: Loss, thread: int, device: str) -> list[Tensor]:
    """Value and gradient."""
    z = inputs(thread, device).requires_grad_()
    value = loss(z)
    return [value.detach(), *torch.autograd.grad(value, z)]


def check(loss: Loss, device: str = "cpu") -> None:
    alone = [step(loss, thread, device) for thread in range(THREADS)]
    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[list[Tensor]]:
        torch.set_num_threads(1)
        start.wait(60)
        return [step(loss, thread, device) for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    for thread, calls in enumerate(found):
        for call in calls:
            assert all(torch.equal(a, b) for a, b in zip(call, alone[thread], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_functions(name: str, backend: str) -> None:
    check(lambda z: LOSSES[name](z, backend), device_of(backend))


@pytest.mark.parametrize("name", SHARED_MODULES)
def test_one_module_for_all_threads(name: str) -> None:
    module = SHARED_MODULES[name]()
    more = {
        "CACRLoss": lambda z: (z,),
        "CACRQueueLoss": lambda z: (z, z.detach(), z[0].detach()),
        "CACRMomentumLoss": lambda z: (z, z[0].detach()),
        "SupervisedCACRLoss": lambda z: (z[0], labels(z)),
    }
    check(lambda z: module(*more[name](z)))


def test_weights() -> None:
    check(lambda z: (cacr_weights(z.detach()).repulsion.sum() + z * 0.0).sum())
