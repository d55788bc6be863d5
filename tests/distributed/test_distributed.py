"""``DistributedDataParallel`` with local negatives: the gradients are the mean of those of the single processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cacr_kernels import CACRLoss, CACRMomentumLoss, CACRQueueLoss, SupervisedCACRLoss

RANKS = 2
LOSSES = ("cacr", "momentum", "supervised")


class Model(nn.Module):
    """An encoder, and a loss with a temperature that is learned with it."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.Linear(6, 4, dtype=torch.float64)
        with torch.no_grad():
            for p in self.encoder.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        tau = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        kinds = {
            "cacr": lambda: CACRLoss(tau_neg=tau),
            "momentum": lambda: CACRMomentumLoss(temperature=tau),
            "supervised": lambda: SupervisedCACRLoss(tau_neg=tau),
        }
        self.kind, self.loss = loss, kinds[loss]()

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        if self.kind == "cacr":
            return self.loss(z)
        if self.kind == "momentum":
            return self.loss(z, z[0].detach().flip(0))
        return self.loss(z.flatten(0, 1), torch.arange(z.shape[0] * z.shape[1]) % 3)


def batch(rank: int) -> Tensor:
    return torch.randn(2, 5 + rank, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank + 1))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).backward()
    return [p.grad.clone() for p in model.parameters()]


class QueueModel(nn.Module):
    """An encoder, a momentum encoder that stays as it is, and a loss that keeps its queue."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Model("cacr").encoder
        self.momentum = Model("cacr").encoder.requires_grad_(False)
        tau = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.loss = CACRQueueLoss(queue_size=17, dim=4, tau_neg=tau, weight_grad="full").double()

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.encoder(x), self.momentum(x.flip(0)))


class Step(NamedTuple):
    """Loss and averaged gradients of a step, and the queue after it."""

    loss: Tensor
    gradients: list[Tensor]
    queue: Tensor
    count: Tensor


def train(model: nn.Module, steps: range, rank: int) -> list[Step]:
    """Each step: one forward, one backward; the weights are not changed."""
    found = []
    for step in steps:
        model.zero_grad()
        loss = model(batch(rank + RANKS * step))
        loss.backward()
        state = model.state_dict()
        prefix = "module." if isinstance(model, DistributedDataParallel) else ""
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        queue, count = state[f"{prefix}loss.queue"].clone(), state[f"{prefix}loss.queue_count"].clone()
        found.append(Step(loss.detach(), gradients, queue, count))
    return found


def train_queue(rank: int) -> dict[str, list[tuple[Tensor, ...]]]:
    """Five steps, and the last two again from a checkpoint of this rank."""
    model = DistributedDataParallel(QueueModel(), broadcast_buffers=False)
    steps = train(model, range(3), rank)
    checkpoint = copy.deepcopy(model.state_dict())
    steps += train(model, range(3, 5), rank)
    resumed = DistributedDataParallel(QueueModel(), broadcast_buffers=False)
    resumed.load_state_dict(checkpoint)
    return {"queue": [tuple(s) for s in steps], "resumed": [tuple(s) for s in train(resumed, range(3, 5), rank)]}


def work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    try:
        found = {loss: gradients(DistributedDataParallel(Model(loss)), batch(rank)) for loss in LOSSES}
        torch.save(found | train_queue(rank), f"{directory}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Any]]]:
    directory = tmp_path_factory.mktemp("ddp")
    mp.spawn(work, (str(directory),), nprocs=RANKS)
    return [torch.load(Path(directory) / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_averaged(averaged: list[dict[str, list[Any]]], loss: str) -> None:
    single = [gradients(Model(loss), batch(rank)) for rank in range(RANKS)]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(*single, strict=True))  # the ranks differ
    for found in averaged:
        for mine, *each in zip(found[loss], *single, strict=True):
            torch.testing.assert_close(mine, torch.stack(each).mean(0), rtol=1e-12, atol=1e-14)
            assert mine.abs().max() > 0


def test_every_rank_keeps_its_own_queue(averaged: list[dict[str, list[Any]]]) -> None:
    """Losses and queues are those of a single process on the data of the rank; gradients are averaged."""
    single = [train(QueueModel(), range(5), rank) for rank in range(RANKS)]
    for rank, found in enumerate(averaged):
        for i, (step, alone) in enumerate(zip(map(Step._make, found["queue"]), single[rank], strict=True)):
            torch.testing.assert_close(step.loss, alone.loss, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(step.queue, alone.queue, rtol=1e-12, atol=1e-14)
            assert step.count == alone.count == sum(min(2 * batch(rank + RANKS * j).shape[1], 17) for j in range(i))
            for mine, *each in zip(step.gradients, *(s[i].gradients for s in single), strict=True):
                torch.testing.assert_close(mine, torch.stack(each).mean(0), rtol=1e-12, atol=1e-14)
    assert not torch.equal(averaged[0]["queue"][-1][2], averaged[1]["queue"][-1][2])


def test_a_resumed_rank_goes_on_exactly(averaged: list[dict[str, list[Any]]]) -> None:
    """Loaded after wrapping; the same bits."""
    for found in averaged:
        for step, again in zip(map(Step._make, found["queue"][3:]), map(Step._make, found["resumed"]), strict=True):
            assert torch.equal(step.loss, again.loss)
            assert torch.equal(step.queue, again.queue)
            assert all(torch.equal(x, y) for x, y in zip(step.gradients, again.gradients, strict=True))
