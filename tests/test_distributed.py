"""``DistributedDataParallel`` with local negatives: the gradients are the mean of those of the single processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cacr_kernels import CACRLoss, CACRMomentumLoss, SupervisedCACRLoss

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


def work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    try:
        found = {loss: gradients(DistributedDataParallel(Model(loss)), batch(rank)) for loss in LOSSES}
        torch.save(found, f"{directory}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    directory = tmp_path_factory.mktemp("ddp")
    mp.spawn(work, (str(directory),), nprocs=RANKS)
    return [torch.load(Path(directory) / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_averaged(averaged: list[dict[str, list[Tensor]]], loss: str) -> None:
    single = [gradients(Model(loss), batch(rank)) for rank in range(RANKS)]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(*single, strict=True))  # the ranks differ
    for found in averaged:
        for mine, *each in zip(found[loss], *single, strict=True):
            torch.testing.assert_close(mine, torch.stack(each).mean(0), rtol=1e-12, atol=1e-14)
            assert mine.abs().max() > 0
