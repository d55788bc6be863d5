"""Checks of what wraps a model in several processes: DDP, FSDP2, and gradients that are added by hand."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from .checks import LOSSES, B, Model, Outside, V, check, close, full, own, train_as_one_process, whole, world

FEATURES = 6


def batches(count: int) -> list[Tensor]:
    return [whole(V, B, FEATURES, seed=seed) for seed in range(count)]


def same_gradients(model: nn.Module, alone: nn.Module) -> None:
    for mine, one in zip(model.parameters(), alone.parameters(), strict=True):
        close(full(mine.grad), full(one.grad))


# ---- DDP -------------------------------------------------------------------------------------------------------------
def accumulate(model: nn.Module, no_sync: Any, parts: list[Tensor]) -> None:
    """A backward for each part; the ranks meet in the last."""
    for x in parts[:-1]:
        with no_sync():
            model(x).backward()
    model(parts[-1]).backward()


@check
def accumulated_gradients_outside_ddp() -> None:
    """A temperature that DDP does not know has its mean from every backward."""
    for loss in LOSSES:
        alone, model = Model(loss), Outside(Model(loss, gather_distributed=True))
        for x in batches(3):
            alone(x).backward()
        accumulate(model, model.wrapped.no_sync, [own(x) for x in batches(3)])
        same_gradients(model.model, alone)


@check
def accumulated_gradients_of_a_static_graph() -> None:
    """Twice: DDP learns the graph in the first step, where it allows no accumulation."""
    alone = Model("cacr")
    model = DistributedDataParallel(Model("cacr", gather_distributed=True), static_graph=True)
    model(own(batches(1)[0])).backward()
    for _ in range(2):
        alone.zero_grad()
        model.zero_grad()
        for x in batches(3):
            alone(x).backward()
        accumulate(model, model.no_sync, [own(x) for x in batches(3)])
        same_gradients(model, alone)


class TwoHeads(nn.Module):
    """A model of which every step uses one head, in turn, and one parameter is never used."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Model("cacr", **options), Model("supervised", **options)])
        self.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        found: Tensor = self.heads[self.step % 2](x)
        return found


@check
def parameters_that_no_rank_uses() -> None:
    alone = TwoHeads()
    inner = TwoHeads(gather_distributed=True)
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    for x in batches(2):
        alone(x).backward()
        model(own(x)).backward()
    same_gradients(inner.heads, alone.heads)
    assert alone.spare.grad is None
    assert inner.spare.grad is None or not inner.spare.grad.any()


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------
def sharded(model: Model) -> nn.Module:
    """The encoder and what is around it, the temperature with it."""
    fully_shard(model.encoder)
    fully_shard(model)
    return model


def sharded_encoder(model: Model) -> nn.Module:
    """The encoder alone; the temperature stays with every rank."""
    fully_shard(model.encoder)
    return model


@check
def trained_inside_fully_shard() -> None:
    train_as_one_process(sharded)


@check
def trained_outside_fully_shard() -> None:
    train_as_one_process(sharded_encoder)


@check
def accumulated_gradients_of_fully_shard() -> None:
    for wrap in (sharded, sharded_encoder):
        alone, model = Model("cacr"), Model("cacr", gather_distributed=True)
        wrap(model)
        for i, x in enumerate(batches(3)):
            alone(x).backward()
            model.encoder.set_requires_gradient_sync(i == 2)  # type: ignore[operator]
            if wrap is sharded:
                model.set_requires_gradient_sync(i == 2)  # type: ignore[operator]
            model(own(x)).backward()
        same_gradients(model, alone)


# ---- who adds gradients over the ranks -------------------------------------------------------------------------------
def add_over_ranks(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)


def add_in_fully_shard(model: nn.Module) -> None:
    """The reduce-scatter of FSDP2 adds; a temperature inside is a parameter as others are."""
    fully_shard(model)
    model.set_gradient_divide_factor(1.0)  # type: ignore[operator]


@check
def gradients_that_are_added() -> None:
    """The loss is divided by the number of ranks."""
    _added({}, world(), LOSSES)


@check
def gradients_of_sums_that_are_added() -> None:
    """Nothing is divided: the sum over the ranks is that of one process."""
    _added({"reduction": "sum"}, 1, tuple(loss for loss in LOSSES if loss != "rbf"))


def _added(options: dict[str, Any], divisor: int, losses: tuple[str, ...]) -> None:
    warnings.filterwarnings("ignore", "cacr_kernels: each rank keeps a queue of its own keys")
    x = batches(1)[0]
    for loss in losses:
        for by_hand in (True, False):
            alone, model = Model(loss, **options), Model(loss, gather_distributed=True, **options)
            if not by_hand:
                add_in_fully_shard(model)
            alone(x).backward()
            (model(own(x)) / divisor).backward()
            if by_hand:
                add_over_ranks(model)
            same_gradients(model, alone)
