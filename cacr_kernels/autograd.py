"""Autograd Functions around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops


class CACRFunction(Function):
    """``cacr_loss`` of views [V, B, D] with both gradients found in forward; ``backward`` scales them out of place.

    ``CACRFunction.apply(views, tau, *CACROptions, want_grad, want_grad_tau, op)`` returns loss, parts and the two
    gradients; see ``ops.cacr_gradient`` for derivatives of any order. Under ``torch.compile`` the operator carries the
    same formula itself.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Runs the operator."""
        *rest, op = args
        outputs: tuple[Tensor, ...] = op(*rest)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves inputs and the gradients."""
        *rest, op = inputs
        ops.cacr_setup(ctx, op, tuple(rest), output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Scales the gradients."""
        return *ops.cacr_gradient(ctx, *grads), *[None] * 8


class AlignedCost(Function):
    """c[v, u, b] = |q[v, b] - k[u, b]|^2 by form differences; q [V, B, D], k [U, B, D].

    No array larger than the inputs is kept: the backward recomputes the differences, one pair of views at a time, and
    is differentiable itself.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        """All pairs of views."""
        return torch.stack([torch.stack([(x - y).square().sum(-1) for y in k]) for x in q])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Saves the inputs."""
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


def aligned_cost(q: Tensor, k: Tensor) -> Tensor:
    """Costs [V, U, B] between the views of the same instances."""
    cost: Tensor = AlignedCost.apply(q, k)
    return cost
