"""What holds on every rank of two processes in other libraries; each function runs on both at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from accelerate import Accelerator
from lightly.loss import NTXentLoss
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cacr_kernels import CACRLoss, CACRQueueLoss, supervised_cacr_loss
from cacr_kernels.integrations import pytorch_metric_learning as metric_learning
from cacr_kernels.integrations import sentence_transformers as sentences
from tests.distributed.checks import B, Model, V, close, mean_of_ranks, own, rank, whole, world

from .loops import Place, moco, simclr

CHECKS: dict[str, Callable[[], None]] = {}
LOOSE = 1e-11  # after several steps
PAIRS = {"tau_pos": 0.7, "tau_neg": 2.0, "alpha": 1.5, "beta": 0.8}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def as_torchrun() -> None:
    """The environment of torchrun, by which libraries find out where they are."""
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": str(world())}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world()), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # unused


def same_parameters(found: nn.Module, alone: nn.Module, tolerance: float) -> None:
    for mine, one in zip(found.parameters(), alone.parameters(), strict=True):
        close(mine.detach(), one.detach(), tolerance)


# ---- Lightning and accelerate ----------------------------------------------------------------------------------------
STEPS, ACCUMULATED = 6, 2


class Instances(Dataset[Tensor]):
    """Instances [V, 6], each a batch entry."""

    def __init__(self) -> None:
        self.views = torch.randn(
            STEPS * world() * B, V, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, i: int) -> Tensor:
        return self.views[i]


def batches_of_all(in_turn: bool) -> Iterator[Tensor]:
    """What all ranks see in a step, rank by rank, where the sampler deals instances out ``in_turn`` or in blocks."""
    for x in Instances().views.split(world() * B):
        rows = torch.cat([x[r :: world()] for r in range(world())]) if in_turn else x
        yield rows.transpose(0, 1)


def trained_alone(loss: str, accumulated: int, in_turn: bool) -> Model:
    """By hand: steps with the mean over accumulated batches."""
    model = Model(loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i, x in enumerate(batches_of_all(in_turn)):
        (model(x) / accumulated).backward()
        if (i + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


class Module(lightning.LightningModule):
    """Encoder, loss and temperature in one module, as Lightning wraps it."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.model = Model(loss, gather_distributed=True)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        found: Tensor = self.model(batch.transpose(0, 1))
        return found

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@check
def lightning_ddp() -> None:
    """Its loop, its accumulation; the temperature is a parameter of the wrapped module."""
    as_torchrun()
    for loss, options in (("cacr", {}), ("queue", {}), ("supervised", {"static_graph": True})):
        module = Module(loss)
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo", **options)
        accumulated = 1 if options else ACCUMULATED  # torch has none in the first step of a static graph
        with tempfile.TemporaryDirectory() as folder:
            trainer = lightning.Trainer(
                accelerator="cpu", devices=world(), strategy=strategy, max_epochs=1, logger=False,
                enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                accumulate_grad_batches=accumulated, default_root_dir=folder, use_distributed_sampler=False,
            )  # fmt: skip
            sampler: Any = DistributedSampler(Instances(), shuffle=False)  # Lightning's own shuffles
            trainer.fit(module, DataLoader(Instances(), batch_size=B, sampler=sampler))
        assert trainer.world_size == world()
        same_parameters(module.model, trained_alone(loss, accumulated, in_turn=True), LOOSE)


@check
def accelerate_with_two_processes() -> None:
    """Its loader, its ``accumulate``; once with the temperature in the prepared model, once outside."""
    as_torchrun()
    for inside in (True, False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        assert accelerator.num_processes == world()
        model = Model("cacr", gather_distributed=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(Instances(), batch_size=B)
        prepared, optimizer, loader = accelerator.prepare(model if inside else model.encoder, optimizer, loader)
        for batch in loader:
            x = batch.transpose(0, 1)
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(x) if inside else model.loss_of(x, prepared(x)))
                optimizer.step()
                optimizer.zero_grad()
        same_parameters(model, trained_alone("cacr", ACCUMULATED, in_turn=False), LOOSE)


# ---- lightly: its loops, with another criterion ----------------------------------------------------------------------
def in_parts(batch_norm: bool) -> Place:
    return Place(DistributedDataParallel, lambda x: own(x, 0), torch.float64, batch_norm)


def compare_loops(loop: Callable[..., Any], criterion: Callable[..., nn.Module]) -> None:
    """A batch of all processes, and of one."""
    alone = loop(criterion().double(), 5, Place(dtype=torch.float64, batch_norm=False))
    found = loop(criterion(gather_distributed=True).double(), 5, in_parts(batch_norm=False))
    for mine, one in zip(found.parameters, alone.parameters, strict=True):
        close(mine, one, LOOSE)
    close(mean_of_ranks(torch.tensor(found.losses)), torch.tensor(alone.losses), 1e-6)  # a tensor of float32


@check
def lightly_simclr() -> None:
    """Without batch normalisation, which knows its rank's instances only."""
    compare_loops(simclr, lambda **options: NTXentLoss(temperature=0.5, **options))
    compare_loops(simclr, lambda **options: CACRLoss(tau_neg=nn.Parameter(torch.tensor(1.0)), **options))


@check
def lightly_moco() -> None:
    compare_loops(moco, lambda **options: CACRQueueLoss(queue_size=64, dim=8, in_batch=False, tau_neg=5.0, **options))


# ---- pytorch-metric-learning: its wrapper gathers --------------------------------------------------------------------
N = 6  # of a rank


def embedded() -> tuple[nn.Module, Tensor, Tensor]:
    """A model that maps to embeddings, instances of all ranks and their labels."""
    return Model("cacr").encoder, whole(N, 6), torch.arange(world() * N) % 4


def wrapped_gradients(loss: nn.Module, *lists: Any) -> list[Tensor]:
    """Of the model under DDP, with the loss outside."""
    model, x, labels = embedded()
    model = DistributedDataParallel(model)
    z, mine = model(own(x)), own(labels[:, None])[:, 0]
    loss(z, mine, *(miner(z, mine) for miner in lists)).backward()
    return [p.grad for p in model.parameters()]


def gradients_alone(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    model, x, labels = embedded()
    loss(model(x), labels).backward()
    return [p.grad for p in model.parameters()]


@check
def a_wrapper_of_all_pairs() -> None:
    """``efficient=False``: every rank computes the whole loss; what DDP averages is its gradient."""
    found = wrapped_gradients(DistributedLossWrapper(metric_learning.CACRLoss(**PAIRS)))
    expected = gradients_alone(lambda z, y: supervised_cacr_loss(z, y, **PAIRS, normalize=True))
    for mine, one in zip(found, expected, strict=True):
        close(mine, one)


@check
def a_wrapper_with_a_miner() -> None:
    """The order of the ranks differs, the pairs do not."""
    miner, loss = miners.MultiSimilarityMiner(), metric_learning.CACRLoss(**PAIRS)
    found = wrapped_gradients(DistributedLossWrapper(loss), DistributedMinerWrapper(miner))
    expected = gradients_alone(lambda z, y: loss(z, y, miner(z, y)))
    for mine, one in zip(found, expected, strict=True):
        close(mine, one)


@check
def an_efficient_wrapper() -> None:
    """Own anchors against the rows of all ranks, which are constants unless they are its own."""
    found = wrapped_gradients(DistributedLossWrapper(metric_learning.CACRLoss(**PAIRS), efficient=True))

    def of_ranks(z: Tensor, labels: Tensor) -> Tensor:
        total = z.new_zeros(())
        for r in range(world()):
            part = torch.arange(r * N, (r + 1) * N)
            keys = z.detach().index_put((part,), z[part])
            total = total + supervised_cacr_loss(
                z[part], labels[part], ref_embeddings=keys, ref_labels=labels, ref_index=part, **PAIRS,
                normalize=True, backend="reference",
            )  # fmt: skip
        return total

    for mine, one in zip(found, gradients_alone(of_ranks), strict=True):
        close(mine, one)


@check
def an_efficient_wrapper_is_no_whole_batch() -> None:
    """Neither for a loss of the library: the anchors of other ranks are missed."""
    for loss in (metric_learning.CACRLoss(**PAIRS), losses.NTXentLoss(temperature=0.5)):
        found = wrapped_gradients(DistributedLossWrapper(loss, efficient=True))
        expected = gradients_alone(loss)
        ratio = found[0] / expected[0]
        if world() > 1:
            assert (ratio / ratio.mean() - 1).abs().max() > 1e-3


@check
def a_wrapped_memory() -> None:
    """The memory holds the keys of all ranks, and leaves the batch out of its own sets."""

    def memory() -> nn.Module:
        return metric_learning.CrossBatchMemory(metric_learning.CACRLoss(**PAIRS), 3, memory_size=2 * world() * N)

    alone, wrapped, compared = memory(), DistributedLossWrapper(memory()), []
    for seed in range(3):  # the third batch takes the place of the first
        z, labels = whole(N, 3, seed=seed).requires_grad_(), torch.arange(world() * N) % 4
        alone(z, labels).backward()
        mine = own(z.detach()).clone().requires_grad_()
        wrapped(mine, own(labels[:, None])[:, 0]).backward()
        assert z.grad is not None
        compared.append((mine.grad, own(z.grad) * world()))
    for found, one in compared:
        close(found, one)


@check
def a_temperature_in_a_wrapper() -> None:
    """It gets the number of ranks times its gradient, as what a loss of the library learns does."""
    tau = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    wrapped_gradients(DistributedLossWrapper(metric_learning.CACRLoss(tau_neg=tau)))
    one = nn.Parameter(tau.detach().clone())
    gradients_alone(metric_learning.CACRLoss(tau_neg=one))
    assert one.grad is not None
    close(tau.grad, one.grad * world())


# ---- sentence-transformers -------------------------------------------------------------------------------------------
@check
def sentences_of_all_devices() -> None:
    """Anchors, positives and hard negatives."""
    columns = [whole(N, 5, seed=seed).requires_grad_() for seed in range(3)]
    mine = [own(x.detach()).clone().requires_grad_() for x in columns]
    nothing: Any = None  # a model, which embeds
    sentences.CACRLoss(nothing).compute_loss_from_embeddings(columns).backward()
    sentences.CACRLoss(nothing, gather_across_devices=True).compute_loss_from_embeddings(mine).backward()
    for part, one in zip(mine, columns, strict=True):
        assert one.grad is not None
        close(part.grad, own(one.grad) * world())
