"""A user's script for `mypy --strict` (make lint): return_parts decides whether a result is a tensor. It also runs."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

from cacr_kernels import (
    CACRLoss,
    CACRMomentumLoss,
    CACRParts,
    CACRQueueLoss,
    SupervisedCACRLoss,
    cacr_loss,
    cacr_momentum_loss,
    cacr_queue_loss,
    supervised_cacr_loss,
)


def functions(z: Tensor, y: Tensor, wanted: bool) -> None:
    assert_type(cacr_loss(z, tau_pos=2), Tensor)
    assert_type(cacr_loss(z, return_parts=True), CACRParts)
    assert_type(cacr_loss(z, return_parts=wanted), Tensor | CACRParts)
    assert_type(cacr_queue_loss(z, z, z[0], in_batch=False), Tensor)
    assert_type(cacr_queue_loss(z, z, z[0], return_parts=True), CACRParts)
    assert_type(cacr_queue_loss(z, z, z[0], return_parts=wanted), Tensor | CACRParts)
    assert_type(cacr_momentum_loss([z[0]], z[0], key_offset=0), Tensor)
    assert_type(cacr_momentum_loss([z[0]], z[0], return_parts=True), CACRParts)
    assert_type(cacr_momentum_loss([z[0]], z[0], return_parts=wanted), Tensor | CACRParts)
    assert_type(supervised_cacr_loss(z[0], y, ref_embeddings=z[1], ref_labels=y), Tensor)
    assert_type(supervised_cacr_loss(z[0], y, return_parts=True), CACRParts)
    assert_type(supervised_cacr_loss(z[0], y, return_parts=wanted), Tensor | CACRParts)


def modules(z: Tensor, y: Tensor, wanted: bool) -> None:
    assert_type(CACRLoss(tau_neg=2.0)(z[0], z[1]), Tensor)
    assert_type(CACRLoss(return_parts=True)(z), CACRParts)
    assert_type(CACRLoss(return_parts=wanted)(z), Tensor | CACRParts)
    assert_type(CACRQueueLoss(queue_size=8, dim=3)(z, z, update_queue=False), Tensor)
    assert_type(CACRQueueLoss(queue_size=8, dim=3, return_parts=True)(z, z), CACRParts)
    assert_type(CACRQueueLoss(return_parts=wanted)(z, z, z[0]), Tensor | CACRParts)
    assert_type(CACRMomentumLoss()(z, z[0], key_offset=0), Tensor)
    assert_type(CACRMomentumLoss(return_parts=True)(z, z[0]), CACRParts)
    assert_type(CACRMomentumLoss(return_parts=wanted)(z, z[0]), Tensor | CACRParts)
    assert_type(SupervisedCACRLoss()(z[0], y), Tensor)
    assert_type(SupervisedCACRLoss(return_parts=True)(z[0], y), CACRParts)
    assert_type(SupervisedCACRLoss(return_parts=wanted)(z[0], y), Tensor | CACRParts)


def main() -> None:
    z, y = torch.eye(4)[:, :3].repeat(2, 1, 1), torch.tensor([0, 0, 1, 1])
    for wanted in (False, True):
        functions(z, y, wanted)
        modules(z, y, wanted)
