"""Costs between the views of the same instances, the few positives that need no kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import of_raw_rows, unit_rows
from ..types import widest_dtype
from . import _torch_private
from .registry import SingleProblem, opaque, tracing

DIFFERENCES = 1 << 20  # that live at once: 8 MiB in float64


class AlignedCost(SingleProblem):
    """c[v, u, b] = |q[v, b] - k[u, b]|^2 by form differences; q [V, B, D], k [U, B, D]; ``normalize``: of unit vectors.

    No array larger than the inputs is kept: the backward recomputes the differences, a few instances at a time, and is
    differentiable itself. Unit vectors are compared in float64, where a device has that: rounded to float32 they would
    lose the digits of nearly equal ones.
    """

    @staticmethod
    @_torch_private.positional
    def forward(q: Tensor, k: Tensor, normalize: bool) -> Tensor:
        """The costs of all pairs of views."""
        parts = [_differences(q, k, normalize, some).square().sum(-1).to(q.dtype) for some in _instances(q, k)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        """Keeps the features; their differences are formed again."""
        *tensors, ctx.normalize = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dq_v = sum_u 2 g_vu (q_v - k_u), dk_u = -sum_v 2 g_vu (q_v - k_u)."""
        q, k = ctx.saved_tensors
        need_q, need_k, _ = ctx.needs_input_grad
        pulls: list[list[Tensor]] = [[], []]
        for some in _instances(q, k):
            d = _differences(q, k, ctx.normalize, some)
            weighted = 2 * grad[..., some, None].to(d.dtype) * d
            for needed, to, x, dim in ((need_q, pulls[0], q, 1), (need_k, pulls[1], k, 0)):
                if needed:
                    to.append(_to_inputs(weighted.sum(dim) * (1 - 2 * (dim == 0)), x[:, some], ctx.normalize))
        found = [None if not some else some[0] if len(some) == 1 else torch.cat(some, 1) for some in pulls]
        return found[0], found[1], None


class AlignedViews(SingleProblem):
    """c[v, u, b] = |z[v, b] - z[u, b]|^2 of views [V, B, D] with each other, otherwise as :class:`AlignedCost`.

    Every pair of views once, and no view with itself: of two views a quarter of the differences.
    """

    @staticmethod
    @_torch_private.positional
    def forward(z: Tensor, normalize: bool) -> Tensor:
        """The costs of all pairs of views."""
        cost = z.new_zeros(z.shape[0], z.shape[0], z.shape[1])
        for some in _instances(z, z):
            for v, d in _to_later_views(z[:, some], normalize):
                cost[v, v + 1 :, some] = cost[v + 1 :, v, some] = d.square().sum(-1).to(z.dtype)
        return cost

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        """Keeps the features; their differences are formed again."""
        z, ctx.normalize = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        """dz_v = sum_u 2 (g_vu + g_uv) (z_v - z_u)."""
        (z,) = ctx.saved_tensors
        grad, found = 2 * (grad + grad.transpose(0, 1)), []
        for some in _instances(z, z):
            flows: list[list[Tensor]] = [[] for _ in z]
            for v, d in _to_later_views(z[:, some], ctx.normalize):
                weighted = grad[v, v + 1 :, some, None].to(d.dtype) * d
                flows[v].append(weighted.sum(0))
                for u, x in enumerate(weighted, v + 1):
                    flows[u].append(-x)
            rows = torch.stack([functools.reduce(torch.add, parts) for parts in flows])
            found.append(_to_inputs(rows, z[:, some], ctx.normalize))
        return found[0] if len(found) == 1 else torch.cat(found, 1), None


def _instances(q: Tensor, k: Tensor) -> Iterator[slice]:
    """All instances, so many at a time that their differences have a bounded size; a compiler sees them at once."""
    batch = q.shape[1]
    if _torch_private.is_traced(q):
        return iter([slice(0, batch)])
    step = max(1, DIFFERENCES // max(1, q.shape[0] * k.shape[0] * q.shape[2]))
    return (slice(b, min(batch, b + step)) for b in range(0, max(1, batch), step))


def _differences(q: Tensor, k: Tensor, normalize: bool, some: slice) -> Tensor:
    """q_v - k_u of some instances, [V, U, b, D]."""
    return _compared(q[:, some], normalize)[:, None] - _compared(k[:, some], normalize)[None]


def _to_later_views(z: Tensor, normalize: bool) -> Iterator[tuple[int, Tensor]]:
    """Every v with z_v - z_u for all u > v, [U, b, D]."""
    x = _compared(z, normalize)
    return ((v, x[v] - x[v + 1 :]) for v in range(len(x) - 1))


def _compared(x: Tensor, normalize: bool) -> Tensor:
    return unit_rows(x.to(widest_dtype(x.device))) if normalize else x


def _to_inputs(grad: Tensor, x: Tensor, normalize: bool) -> Tensor:
    return of_raw_rows(grad, x.to(grad.dtype)).to(x.dtype) if normalize else grad


@opaque
def aligned_cost(q: Tensor, k: Tensor, normalize: bool = False) -> Tensor:
    """Costs [V, U, B] between the views of the same instances."""
    if tracing():  # which cannot record a Function
        return AlignedCost.forward(q, k, normalize)
    cost: Tensor = AlignedViews.apply(q, normalize) if k is q else AlignedCost.apply(q, k, normalize)  # type: ignore[no-untyped-call]
    return cost
