"""Costs between the views of the same instances, in plain PyTorch or by the operator ``aligned`` of a backend.

``aligned_<backend>`` gives c[v, u, b] = |q[v, b] - k[u, b]|^2, ``aligned_backward_<backend>`` the gradients. Without
``k`` views are compared with each other. A derivative of the gradient is taken of the plain formula.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import of_raw_rows, unit_rows
from ..types import widest_dtype
from . import _torch_private
from .registry import (
    SingleProblem,
    Target,
    apply_of,
    declare,
    differentiate,
    opaque,
    operator,
    own_precision,
    tracing,
    vjp,
)

DIFFERENCES = 1 << 20  # that live at once: 8 MiB in float64
FEW_VIEWS = 4  # up to which every pair of views once is faster than all at once
SCHEMAS = {
    "aligned": "(Tensor q, Tensor? k, bool normalize) -> Tensor",
    "aligned_backward": "(Tensor q, Tensor? k, Tensor grad, bool normalize, bool want_q, bool want_k)"
    " -> (Tensor grad_q, Tensor grad_k)",
}


def fake(q: Tensor, k: Tensor | None, normalize: bool) -> Tensor:
    """Shape: the costs [V, U, B]."""
    return q.new_empty(q.shape[0], (q if k is None else k).shape[0], q.shape[1])


def backward_fake(
    q: Tensor, k: Tensor | None, grad: Tensor, normalize: bool, want_q: bool, want_k: bool
) -> tuple[Tensor, Tensor]:
    """Shapes: gradients of q and k, [0] where not wanted; without k that of q is the sum of both."""
    return q.new_empty(q.shape if want_q else 0), q.new_empty(0 if k is None or not want_k else k.shape)


def costs(q: Tensor, k: Tensor | None, normalize: bool) -> Tensor:
    """The operator ``aligned`` by form differences, a few instances at a time."""
    if k is None and 1 < q.shape[0] <= FEW_VIEWS:
        cost = q.new_zeros(q.shape[0], q.shape[0], q.shape[1])
        for some in _instances(q, q):
            for v, d in _to_later_views(q[:, some], normalize):
                cost[v, v + 1 :, some] = cost[v + 1 :, v, some] = d.square().sum(-1).to(q.dtype)
        return cost
    k = q if k is None else k
    parts = [_differences(q, k, normalize, some).square().sum(-1).to(q.dtype) for some in _instances(q, k)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def gradients(
    q: Tensor, k: Tensor | None, grad: Tensor, normalize: bool, want_q: bool, want_k: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dq_v = sum_u 2 g_vu (q_v - k_u), dk_u = -sum_v 2 g_vu (q_v - k_u); without k the sum of both.

    Differentiable. Of few views every pair is looked at once, of two a quarter of the differences.
    """
    if k is None:
        grad = grad + grad.transpose(0, 1)
        if 1 < q.shape[0] <= FEW_VIEWS:
            return _gradient_of_few(q, grad, normalize), None
    keys = q if k is None else k
    pulls: list[list[Tensor]] = [[], []]
    for some in _instances(q, keys):
        d = _differences(q, keys, normalize, some)
        weighted = 2 * grad[..., some, None].to(d.dtype) * d
        for needed, to, x, dim in ((want_q, pulls[0], q, 1), (want_k and k is not None, pulls[1], keys, 0)):
            if needed:
                to.append(_to_inputs(weighted.sum(dim) * (1 - 2 * (dim == 0)), x[:, some], normalize))
    found = [None if not some else some[0] if len(some) == 1 else torch.cat(some, 1) for some in pulls]
    return found[0], found[1]


def _gradient_of_few(z: Tensor, grad: Tensor, normalize: bool) -> Tensor:
    """dz_v = sum_u 2 g_vu (z_v - z_u), g symmetric."""
    found = []
    for some in _instances(z, z):
        flows: list[list[Tensor]] = [[] for _ in z]
        for v, d in _to_later_views(z[:, some], normalize):
            weighted = 2 * grad[v, v + 1 :, some, None].to(d.dtype) * d
            flows[v].append(weighted.sum(0))
            for u, x in enumerate(weighted, v + 1):
                flows[u].append(-x)
        rows = torch.stack([functools.reduce(torch.add, parts) for parts in flows])
        found.append(_to_inputs(rows, z[:, some], normalize))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


class AlignedCost(SingleProblem):
    """c[v, u, b] = |q[v, b] - k[u, b]|^2 by form differences; q [V, B, D], k [U, B, D]; ``normalize``: of unit vectors.

    No array larger than the inputs is kept: the backward recomputes the differences, a few instances at a time, and is
    differentiable itself. Unit vectors are compared in float64, where a device has that, or as differences of products:
    rounded to float32 they would lose the digits of nearly equal ones.
    """

    @staticmethod
    @_torch_private.positional
    def forward(q: Tensor, k: Tensor | None, normalize: bool, by: str | None) -> Tensor:
        """The costs of all pairs of views, by the backend that has the operator."""
        if by is None:
            return costs(q, k, normalize)
        with _torch_private.below_autograd():
            cost: Tensor = operator(f"aligned_{by}")(q, k, normalize)
        return cost

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, bool, str | None], output: Tensor) -> None:
        """Keeps the features; their differences are formed again."""
        q, k, ctx.normalize, ctx.by = inputs
        ctx.save_for_backward(q, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients of q and k."""
        need_q, need_k = ctx.needs_input_grad[:2]
        return *pulled(ctx.saved_tensors, grad, ctx.normalize, need_q, need_k, ctx.by), None, None


def pulled(
    tensors: tuple[Tensor, Tensor | None], grad: Tensor, normalize: bool, need_q: bool, need_k: bool, by: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of q and k, as far as they are needed; differentiable."""
    if by is None:
        return gradients(*tensors, grad, normalize, need_q, need_k)
    arguments = *tensors, grad, (normalize, need_q, need_k), by
    grads = apply_of(AlignedGradient, *tensors, grad)(*arguments)
    return grads[0] if need_q else None, grads[1] if need_k else None


class AlignedGradient(SingleProblem):
    """``aligned_backward``, whose own backward differentiates the plain formula."""

    @staticmethod
    @_torch_private.positional
    def forward(
        q: Tensor, k: Tensor | None, grad: Tensor, options: tuple[bool, bool, bool], by: str
    ) -> tuple[Tensor, Tensor]:
        """Gradients of q and k."""
        with _torch_private.below_autograd():
            grads: tuple[Tensor, Tensor] = operator(f"aligned_backward_{by}")(q, k, grad, *options)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves what the plain formula is made of."""
        *tensors, ctx.options, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @own_precision
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives w.r.t. q, k and the incoming gradient."""
        q, k, grad = ctx.saved_tensors
        wanted = ctx.options[1], ctx.options[2] and k is not None

        def gradient(grad: Tensor, q: Tensor, *k: Tensor) -> tuple[Tensor, ...]:
            found = gradients(q, k[0] if k else None, grad, *ctx.options)
            return tuple(x for x in found if x is not None)

        _, pull = vjp(gradient, grad, q, *(() if k is None else (k,)))
        of_grad, of_q, *of_k = pull(tuple(g for g, w in zip(grads, wanted, strict=True) if w))
        return of_q, of_k[0] if of_k else None, of_grad, None, None


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


def register(backend: str) -> None:
    """Declares the operator ``aligned_<backend>`` and its gradient."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        AlignedCost.setup_context(ctx, (*inputs, backend), output)

    def formula(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return AlignedCost.backward(ctx, grad)[:3]

    declare(f"aligned_{backend}", SCHEMAS["aligned"], fake)
    declare(f"aligned_backward_{backend}", SCHEMAS["aligned_backward"], backward_fake)
    differentiate(f"aligned_{backend}", formula, setup)


@opaque
def aligned_cost(q: Tensor, k: Tensor, normalize: bool = False, on: Target | None = None) -> Tensor:
    """Costs [V, U, B] between the views of the same instances; ``on``: where the operators run, by default nowhere."""
    keys = None if k is q else k
    if tracing():  # which cannot record a Function
        return costs(q, keys, normalize)
    by = on.backend if on is not None and "aligned" in on.operators else None
    cost: Tensor = apply_of(AlignedCost, q, keys)(q, keys, normalize, by)
    return cost
