"""Encoders, the losses of the arms, and one training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.demo.training import Encoder, nt_xent
from cacr_kernels import CACRLoss, SupervisedCACRLoss

from .data import Data, Part, training_part
from .design import ARM, SCHEDULE, Run, Setting, schedule, tau_neg
from .views import draw_views

Objective = Callable[[Tensor, Tensor, int], Tensor]  # embeddings [V, B, D], labels [B], the step
CURVE = 10  # points of a loss curve that are kept


def make_encoder(setting: Setting, channels: int, seed: int) -> Encoder:
    """The encoder with the initial weights of a seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if setting.encoder == "resnet18":
            return Encoder(_resnet18(channels), 512, setting.embedding_dim)
        layers: list[nn.Module] = []
        before = channels
        for i, width in enumerate(setting.widths):
            stride = 1 if i == 1 and len(setting.widths) > 2 else 2
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Encoder(body, before, setting.embedding_dim)


def _resnet18(channels: int) -> nn.Module:
    """That of torchvision in the form that is usual for images of 32 pixels."""
    try:
        from torchvision.models import resnet18
    except ImportError as error:
        raise SystemExit("--encoder resnet18 needs torchvision") from error
    body: nn.Module = resnet18()
    body.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    body.maxpool = nn.Identity()
    body.fc = nn.Identity()
    return body


def supcon(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of embeddings [N, D]: the mean over positives outside of the logarithm."""
    z = F.normalize(embeddings, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -math.inf)
    positive = (labels[:, None] == labels) & ~itself
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    counts = positive.sum(dim=1)
    of_query = -log_p.masked_fill(~positive, 0.0).sum(dim=1) / counts.clamp(min=1)
    return of_query[counts > 0].mean()


def make_objective(run: Run, setting: Setting, device: torch.device, backend: str = "auto") -> Objective:
    """The loss of an arm at a temperature."""
    arm = ARM[run.arm]
    if arm.loss in ("nt_xent", "supcon"):
        assert run.temperature is not None
        t = run.temperature
        if arm.loss == "nt_xent":
            return lambda views, labels, step: nt_xent(views, t)
        return lambda views, labels, step: supcon(views.flatten(0, 1), labels.repeat(len(views)), t)
    tau = tau_neg(run.temperature)
    if arm.loss == "supervised_cacr":
        supervised = SupervisedCACRLoss(tau_pos=arm.tau_pos, tau_neg=tau, backend=backend)  # type: ignore[arg-type]
        return lambda views, labels, step: supervised(views.flatten(0, 1), labels.repeat(len(views)))
    if arm.name != SCHEDULE:
        cacr = CACRLoss(tau_pos=arm.tau_pos, tau_neg=tau, backend=backend)  # type: ignore[arg-type]
        return lambda views, labels, step: cacr(views)
    varied = torch.tensor(tau, device=device)  # a temperature is a tensor: it changes without a new loss
    loss = CACRLoss(tau_pos=arm.tau_pos, tau_neg=varied, backend=backend)  # type: ignore[arg-type]
    at = schedule(setting, tau)

    def objective(views: Tensor, labels: Tensor, step: int) -> Tensor:
        varied.fill_(at(step))
        return loss(views)

    return objective


def batches(data: Data, part: Part, setting: Setting, seed: int) -> Iterator[Tensor]:
    """Rows of every step: permutations of the training part, the incomplete last batch of each left out."""
    generator = torch.Generator().manual_seed(2 * seed + 1_000_000)
    size = min(setting.batch, len(part.rows))
    while True:
        yield from part.rows[torch.randperm(len(part.rows), generator=generator)][
            : len(part.rows) // size * size
        ].split(size)


def view_generator(seed: int) -> torch.Generator:
    """Where the views of a seed come from."""
    return torch.Generator().manual_seed(2 * seed + 1_000_001)


def paired_views(data: Data, run: Run, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """Views [V, B, channels, H, W] and labels [B] of every step; neither arm nor temperature has a say in them."""
    generator = view_generator(run.seed)
    part = training_part(data, run.kind, run.seed, setting.ratio)
    for _, rows in zip(range(setting.steps), batches(data, part, setting, run.seed), strict=False):
        yield draw_views(data.floats(rows), run.views, generator), data.labels[rows]


@dataclass
class Trained:
    """An encoder and the loss of every step."""

    encoder: Encoder
    losses: list[float]


def train(
    run: Run, setting: Setting, data: Data, *, device: torch.device, backend: str = "auto", dtype: torch.dtype
) -> Trained:
    """Trains the encoder of a run in ``dtype``."""
    encoder = make_encoder(setting, data.images.shape[1], run.seed).to(device, dtype)
    encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = make_objective(run, setting, device, backend)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    encoder.train()
    losses = []
    for step, (views, labels) in enumerate(paired_views(data, run, setting)):
        images = views.flatten(0, 1).to(device, dtype)
        embeddings = encoder(images).view(*views.shape[:2], -1)
        loss = objective(embeddings, labels.to(device), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        losses.append(loss.detach())
    return Trained(encoder, torch.stack(losses).tolist())


def curve(losses: list[float]) -> list[float]:
    """A loss curve in a few means."""
    points = min(CURVE, len(losses))
    cuts = [round(i * len(losses) / points) for i in range(points + 1)]
    return [round(sum(losses[a:b]) / (b - a), 5) for a, b in pairwise(cuts)]
