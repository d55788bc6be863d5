"""Costs between the views of the same instances, the few positives that need no kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _torch_private
from .registry import SingleProblem, opaque, tracing


class AlignedCost(SingleProblem):
    """c[v, u, b] = |q[v, b] - k[u, b]|^2 by form differences; q [V, B, D], k [U, B, D].

    No array larger than the inputs is kept: the backward recomputes the differences, one pair of views at a time, and
    is differentiable itself.
    """

    @staticmethod
    @_torch_private.positional
    def forward(q: Tensor, k: Tensor) -> Tensor:
        """The costs of all pairs of views."""
        return torch.stack([torch.stack([(x - y).square().sum(-1) for y in k]) for x in q])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keeps the features; their differences are formed again."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """dq_v = sum_u 2 g_vu (q_v - k_u) = -dk_u."""
        q, k = ctx.saved_tensors
        need_q, need_k = ctx.needs_input_grad
        grad_q = torch.stack([_pull(grad[v], q[v], k) for v in range(len(q))]) if need_q else None
        grad_k = torch.stack([_pull(grad[:, u], k[u], q) for u in range(len(k))]) if need_k else None
        return grad_q, grad_k


def _pull(grad: Tensor, x: Tensor, others: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for g, y in zip(grad, others, strict=True):
        total = total + 2 * g[:, None] * (x - y)
    return total


@opaque
def aligned_cost(q: Tensor, k: Tensor) -> Tensor:
    """Costs [V, U, B] between the views of the same instances."""
    if tracing():  # which cannot record a Function
        return AlignedCost.forward(q, k)
    cost: Tensor = AlignedCost.apply(q, k)  # type: ignore[no-untyped-call]
    return cost
