"""Augmented views: of grey images as the demo draws them, of photographs with crops, mirrors and colours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.demo.data import augment

GREY = (0.299, 0.587, 0.114)


def draw_views(images: Tensor, views: int, generator: torch.Generator) -> Tensor:
    """Views [views, N, channels, H, W] of images [N, channels, H, W] in [0, 1].

    Random numbers are drawn on the CPU, so that a seed means the same views on every device.
    """
    return augment(images, views, generator) if images.shape[1] == 1 else photo_views(images, views, generator)


def photo_views(images: Tensor, views: int, generator: torch.Generator) -> Tensor:
    """Crops of 30 to 100 % of the area, mirrors, brightness, contrast and colours, a fifth without colours."""
    n = views * len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(n, *shape, generator=generator, dtype=images.dtype) * (high - low) + low
        return drawn.to(images.device)

    side = uniform(0.3, 1.0).sqrt()
    mirror = (uniform(0.0, 1.0) < 0.5).to(images.dtype) * 2.0 - 1.0
    shift = uniform(-1.0, 1.0, 2) * (1.0 - side)[:, None]
    zero = torch.zeros_like(side)
    theta = torch.stack((side * mirror, zero, shift[:, 0], zero, side, shift[:, 1]), dim=1).view(n, 2, 3)
    batch = images.expand(views, *images.shape).reshape(n, *images.shape[1:])
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    batch = F.grid_sample(batch, grid, padding_mode="reflection", align_corners=False)
    batch = batch * uniform(0.6, 1.4, 1, 1, 1) * uniform(0.8, 1.2, batch.shape[1], 1, 1)
    mean = batch.mean(dim=(1, 2, 3), keepdim=True)
    batch = (batch - mean) * uniform(0.6, 1.4, 1, 1, 1) + mean
    weights = torch.tensor(GREY, dtype=batch.dtype, device=batch.device).view(1, 3, 1, 1)
    grey = (batch * weights).sum(dim=1, keepdim=True).expand_as(batch)
    batch = torch.where(uniform(0.0, 1.0, 1, 1, 1) < 0.2, grey, batch)
    return batch.clamp(0.0, 1.0).view(views, *images.shape)
