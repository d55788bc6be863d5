"""The loops of lightly's examples: only the criterion is another, and the models may be wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn


def same(x: Tensor) -> Tensor:
    return x


def as_it_is(model: nn.Module) -> nn.Module:
    return model


class Place(NamedTuple):
    """Where a loop runs: what is done with a model before it is trained, and which part of a batch is seen."""

    wrap: Callable[[nn.Module], nn.Module] = as_it_is
    part: Callable[[Tensor], Tensor] = same
    dtype: torch.dtype = torch.float32
    batch_norm: bool = True


HERE = Place()


class Trained(NamedTuple):
    """The losses of the steps, and the parameters after the last."""

    losses: list[float]
    parameters: list[Tensor]


def images(count: int = 32) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))


def noisy(x: Tensor, seed: int) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def falls(losses: list[float]) -> bool:
    return sum(losses[-4:]) < sum(losses[:4])


def simclr(criterion: nn.Module, steps: int = 12, place: Place = HERE) -> Trained:
    model = nn.Sequential(backbone(), SimCLRProjectionHead(16, 16, 8, batch_norm=place.batch_norm))
    model = place.wrap(model.to(place.dtype))
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05)
    losses = []
    for step in range(steps):
        x0, x1 = (place.part(noisy(images(), 2 * step + view).to(place.dtype)) for view in range(2))
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(losses, [p.detach() for group in optimizer.param_groups for p in group["params"]])


def moco(criterion: nn.Module, steps: int = 12, place: Place = HERE) -> Trained:
    query_model = nn.Sequential(backbone(), MoCoProjectionHead(16, 16, 8)).to(place.dtype)
    key_model = copy.deepcopy(query_model)
    deactivate_requires_grad(key_model)
    model = place.wrap(query_model)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05)
    losses = []
    for step in range(steps):
        update_momentum(query_model, key_model, m=0.99)
        query = model(place.part(noisy(images(), 2 * step).to(place.dtype)))
        key = key_model(place.part(noisy(images(), 2 * step + 1).to(place.dtype)))
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(losses, [p.detach() for group in optimizer.param_groups for p in group["params"]])
