"""The encoder, the loss to compare with, and the training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cacr_kernels import CACRLoss
from cacr_kernels.backends.table import select

from .config import Config, LossName
from .data import Split, augment

Objective = Callable[[Tensor], tuple[Tensor, dict[str, float]]]


class Encoder(nn.Module):
    """A body whose features are scored, and a projection head that only training uses."""

    def __init__(self, body: nn.Module, features: int, embedding_dim: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, embedding_dim))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.head(self.body(images))
        return embeddings

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features ``[N, D]`` of images, as in evaluation."""
        training = self.training
        self.eval()
        features = torch.cat([self.body(some) for some in images.split(512)])
        self.train(training)
        return features


def _convolution(channels: int, outputs: int, *, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def make_encoder(config: Config, seed: int) -> Encoder:
    """Three convolutions and a mean, as initialised for a seed, whatever loss will train them."""
    features = config.feature_dim
    narrow, wide = max(features // 4, 8), max(features // 2, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(
            *_convolution(1, narrow, stride=1),
            *_convolution(narrow, wide, stride=2),
            *_convolution(wide, features, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        return Encoder(body, features, config.embedding_dim)


def nt_xent(views: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss for V views ``[V, B, D]``, averaged over all V (V - 1) B ordered positive pairs.

    Every pair competes with all V (B - 1) embeddings of the other instances; further positives of the same
    instance stand in no denominator. With V = 2 this is SimCLR's loss as published.
    """
    v, b, _ = views.shape
    z = F.normalize(views, dim=-1).flatten(0, 1)
    logits = z @ z.T / temperature  # [VB, VB]
    instance = torch.arange(b, device=z.device).repeat(v)
    same = instance[:, None] == instance
    negatives = logits.masked_fill(same, -math.inf).logsumexp(dim=1, keepdim=True)
    itself = torch.eye(v * b, dtype=torch.bool, device=z.device)
    positives = logits[same & ~itself].view(v * b, v - 1)
    return (torch.logaddexp(positives, negatives) - positives).mean()


def make_objective(loss: LossName, config: Config) -> Objective:
    """The loss as a function of embeddings ``[V, B, D]``: its value and what to log."""
    if loss == "NT-Xent":
        return lambda views: (nt_xent(views, config.temperature), {})
    cacr = CACRLoss(tau_pos=config.tau_pos, tau_neg=config.tau_neg, return_parts=True)

    def objective(views: Tensor) -> tuple[Tensor, dict[str, float]]:
        parts = cacr(views)
        return parts.loss, {name: float(value) for name, value in parts._asdict().items() if name != "loss"}

    return objective


def backend_name() -> str:
    """The backend that ``backend="auto"`` takes for the tensors of the demo."""
    return select("auto", torch.device("cpu"))


@dataclass
class Run:
    """One training run: the encoder, the mean of every logged figure per epoch, and where the time went."""

    loss: LossName
    seed: int
    encoder: Encoder
    history: dict[str, list[float]] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)  # one per step, views and optimiser included
    loss_seconds: list[float] = field(default_factory=list)  # the loss alone, forward and backward


def train(loss: LossName, seed: int, split: Split, config: Config, on_epoch: Callable[[Run], None]) -> Run:
    """Train one encoder. A seed fixes initial weights, batches and views, the same for both losses."""
    images = split.train_images
    batch = min(config.batch, len(images))
    steps_per_epoch = len(images) // batch
    generator = torch.Generator().manual_seed(seed)
    run = Run(loss, seed, make_encoder(config, seed))
    objective = make_objective(loss, config)
    optimizer = torch.optim.AdamW(run.encoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps_per_epoch)
    run.encoder.train()
    for _ in range(config.epochs):
        order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * batch]
        logged: dict[str, float] = {}
        for rows in order.split(batch):
            figures = optimiser_step(run, images[rows], objective, optimizer, generator, config.views)
            schedule.step()
            for name, value in figures.items():
                logged[name] = logged.get(name, 0.0) + value / steps_per_epoch
        for name, value in logged.items():
            run.history.setdefault(name, []).append(value)
        on_epoch(run)
    return run


def optimiser_step(
    run: Run,
    images: Tensor,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    views: int,
) -> dict[str, float]:
    """One optimiser step, written so that the time of the loss alone can be read off.

    ``loss.backward()`` stops at the embeddings and ``embeddings.backward(gradient)`` goes on from there: the same
    gradients as one call, with a clock in between.
    """
    start = time.perf_counter()
    batch = augment(images, views, generator)  # [V, B, 1, 8, 8]
    embeddings = run.encoder(batch.flatten(0, 1)).view(views, len(images), -1)
    leaf = embeddings.detach().requires_grad_()
    before_loss = time.perf_counter()
    value, figures = objective(leaf)
    value.backward()
    after_loss = time.perf_counter()
    optimizer.zero_grad()
    embeddings.backward(leaf.grad)
    optimizer.step()
    run.step_seconds.append(time.perf_counter() - start)
    run.loss_seconds.append(after_loss - before_loss)
    return {"loss": value.item(), **figures}
