"""The operator ``cacr``: the loss of all views with its gradients, in one go.

``views`` [V, B, D]; ``numbers`` [5] float64 = (tau_pos, tau_neg, alpha, beta, rbf_scale) if one of them is a tensor,
else ``None``, and the numbers are those of ``CACROptions``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..types import COSTS, PAIRINGS, CACROptions, Numbers, arithmetic_dtype
from . import _torch_private
from .registry import SingleProblem, Target, apply_of, declare, differentiate, opaque, own_precision, place, traced, vjp

SCHEMA = (
    "(Tensor views, Tensor? numbers, float tau_pos, float tau_neg, float alpha, float beta, int pairing, bool rbf,"
    " float rbf_scale, bool normalize, bool want_grad, bool want_grad_numbers)"
    " -> (Tensor loss, Tensor parts, Tensor grad_views, Tensor grad_numbers)"
)
SCHEMAS = {"cacr": SCHEMA}
Wanted = tuple[bool, bool]  # whether the gradients of views and numbers are wanted


def fake(views: Tensor, numbers: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes: loss [], parts [4], grad_views [V, B, D] or [0], grad_numbers [5] or [0].

    Only the temperatures have a gradient: the other ``numbers`` are constants, and theirs is 0.
    """
    dtype, want_grad = arithmetic_dtype(views), rest[-2]
    grad = views.new_empty(views.shape if want_grad else 0, dtype=dtype)
    grad_numbers = views.new_empty(0, dtype=dtype) if numbers is None else numbers.new_empty(5)
    return views.new_empty((), dtype=dtype), views.new_empty(4, dtype=dtype), grad, grad_numbers


# ---- by the definition -----------------------------------------------------------------------------------------------
def loss_and_parts(views: Tensor, numbers: Tensor | None, options: CACROptions) -> tuple[Tensor, Tensor]:
    """Loss and parts (attraction, repulsion and their entropies) by the definition; views in float32 or float64."""
    if numbers is None:
        tau_pos, tau_neg, alpha, beta, rbf_scale = options.numbers
    else:
        tau_pos, tau_neg = numbers[:2].to(views.dtype)
        alpha, beta, rbf_scale = numbers[2:].detach().to(views.dtype)
    terms = reference.cacr(
        reference.unit_rows(views) if options.normalize else views,
        Numbers(tau_pos, tau_neg, alpha, beta),
        pairing=PAIRINGS[options.pairing],
        cost=COSTS[options.rbf],
        rbf_scale=rbf_scale,
    )
    attraction, repulsion = terms.attraction.mean(), terms.repulsion.mean()
    parts = torch.stack([attraction, repulsion, *terms.entropies()])
    return attraction + repulsion, parts


@own_precision
def second_order(
    g_loss: Tensor, views: Tensor, numbers: Tensor | None, gg_views: Tensor, gg_numbers: Tensor, options: CACROptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives of <gg, g_loss grad(loss)> w.r.t. g_loss, views and numbers, from the reference."""
    fixed, views = numbers is None, views.to(arithmetic_dtype(views))
    numbers = views.new_empty(0) if numbers is None else numbers

    def gradient(g: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        loss, pull = vjp(lambda v, t: loss_and_parts(v, None if fixed else t, options)[0], v, t)
        grad_views, grad_numbers = pull(g.to(loss.dtype))
        return grad_views, grad_numbers

    _, pull = vjp(gradient, g_loss, views, numbers)
    g, v, t = pull((gg_views.to(views.dtype), gg_numbers.to(numbers.dtype)))
    return g, v, None if fixed else t


# ---- gradient --------------------------------------------------------------------------------------------------------
def gradients(
    ctx: Any, g_loss: Tensor | None, g_parts: Tensor | None, g_views: Tensor | None, g_numbers: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The backward of the operator: gradients of views and numbers for those of its four outputs.

    The gradients found in forward are scaled. They are outputs of the operator, too: what arrives for them, and for the
    parts, is answered by differentiating the reference.
    """
    need = ctx.needs_input_grad[:2]
    found = (None, None) if g_loss is None else _scaled_gradients(ctx, g_loss, need)
    if g_parts is not None:
        found = _add(found, _gradients_of_parts(ctx, g_parts))
    g_views, g_numbers = g_views if ctx.wanted[0] else None, g_numbers if ctx.wanted[1] else None
    if g_views is not None or g_numbers is not None:
        found = _add(found, _gradients_of_gradients(ctx, g_views, g_numbers))
    return found[0] if need[0] else None, found[1] if need[1] else None


def _add(a: tuple[Tensor | None, ...], b: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The sums of two pairs of gradients, of which ``None`` stands for zero."""
    return tuple(y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True))


def _scaled_gradients(ctx: Any, g_loss: Tensor, need: Wanted) -> tuple[Any, Any]:
    """``g_loss`` times the gradients of the loss, out of place."""
    views, numbers, grad_views, grad_numbers = ctx.saved_tensors
    if (need[0] and not ctx.wanted[0]) or (need[1] and not ctx.wanted[1]):  # not known in forward
        _, _, grad_views, grad_numbers = CACRFunction.apply(views, numbers, ctx.options, need, ctx.on)  # type: ignore[no-untyped-call]
    if not torch.is_grad_enabled():  # nobody differentiates the gradient
        out_numbers = g_loss.to(grad_numbers.dtype) * grad_numbers if need[1] else None
        if not need[0]:
            return None, out_numbers
        return grad_views if ctx.owns_gradients and _is_last_of_one(g_loss) else g_loss * grad_views, out_numbers
    grad_views = grad_views.detach() if need[0] else torch.zeros_like(views)
    arguments = g_loss, views, numbers, grad_views, grad_numbers.detach(), ctx.options
    found: tuple[Tensor, Tensor] = CACRGradient.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


def _is_last_of_one(g_loss: Tensor) -> bool:
    """Whether the loss was the end of the graph, ``loss.backward()``, and its backward will not run a second time."""
    if torch.compiler.is_compiling():  # compiled autograd traces the backward
        return False
    last = type(g_loss) is Tensor and g_loss.device.type == "cpu" and not _torch_private.backward_keeps_graph()
    known = last and not _torch_private.transforms_are_active() and not _torch_private.is_batched(g_loss)
    return known and g_loss.item() == 1


def _gradients_of_parts(ctx: Any, g_parts: Tensor) -> tuple[Tensor, Tensor]:
    views, numbers, _, grad_numbers = ctx.saved_tensors
    fixed = numbers is None
    _, pull = vjp(
        lambda v, t: loss_and_parts(v, None if fixed else t, ctx.options)[1],
        views.to(arithmetic_dtype(views)),
        torch.zeros_like(grad_numbers) if fixed else numbers,
    )
    found: tuple[Tensor, Tensor] = pull(g_parts)
    return found


def _gradients_of_gradients(ctx: Any, g_views: Tensor | None, g_numbers: Tensor | None) -> tuple[Tensor, Tensor | None]:
    views, numbers, _, grad_numbers = ctx.saved_tensors
    views = views.to(arithmetic_dtype(views))
    g_views = torch.zeros_like(views) if g_views is None else g_views
    g_numbers = torch.zeros_like(grad_numbers) if g_numbers is None else g_numbers
    _, more_views, more_numbers = second_order(views.new_ones(()), views, numbers, g_views, g_numbers, ctx.options)
    return more_views, more_numbers


class CACRFunction(SingleProblem):
    """``cacr_loss`` of views [V, B, D], numbers [5] or ``None``, with both gradients found in forward.

    Returns loss, parts and the two gradients, of which only the loss is differentiable. ``backward`` never writes to
    them; where it is differentiated it calls :class:`CACRGradient`, so that a second derivative, also inside a larger
    graph, is that of the reference.
    """

    @staticmethod
    @_torch_private.positional
    def forward(
        views: Tensor, numbers: Tensor | None, options: CACROptions, wanted: Wanted, on: Target
    ) -> tuple[Tensor, ...]:
        """Loss, parts and gradients, as far as they are wanted."""
        (features,) = on.features(views)
        with _torch_private.below_autograd():
            outputs: tuple[Tensor, ...] = on.operator("cacr")(features, numbers, *options, *wanted)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs and outputs that ``gradients`` reads."""
        views, numbers, ctx.options, ctx.wanted, ctx.on = inputs
        _, parts, grad_views, grad_numbers = output
        ctx.mark_non_differentiable(parts, grad_views, grad_numbers)
        ctx.save_for_backward(views, numbers, grad_views, grad_numbers)
        ctx.set_materialize_grads(False)
        ctx.owns_gradients = True

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """The gradients of views and numbers."""
        return *gradients(ctx, grads[0], None, None, None), None, None, None


class CACRGradient(SingleProblem):
    """The gradients of the loss times ``g_loss``; its backward differentiates the gradient of the reference."""

    @staticmethod
    @_torch_private.positional
    def forward(
        g_loss: Tensor,
        views: Tensor,
        numbers: Tensor | None,
        grad_views: Tensor,
        grad_numbers: Tensor,
        options: CACROptions,
    ) -> tuple[Tensor, Tensor]:
        """Returns both gradients, scaled by ``g_loss``."""
        return g_loss * grad_views, g_loss.to(grad_numbers.dtype) * grad_numbers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps what the second derivative needs."""
        g_loss, views, numbers, _, _, ctx.options = inputs
        ctx.save_for_backward(g_loss, views, numbers)

    @staticmethod
    def backward(ctx: Any, gg_views: Tensor, gg_numbers: Tensor) -> tuple[Any, ...]:
        """Derivatives w.r.t. g_loss, views and numbers."""
        g_loss, views, numbers = ctx.saved_tensors
        return *second_order(g_loss, views, numbers, gg_views, gg_numbers, ctx.options), None, None, None


# ---- registration and entry ------------------------------------------------------------------------------------------
def register(backend: str) -> None:
    """Declares the operator ``cacr_<backend>`` and its gradient."""
    on = Target(backend)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        views, numbers, *options = inputs
        ctx.wanted, ctx.options, ctx.on = tuple(options[-2:]), CACROptions(*options[:-2]), on
        ctx.save_for_backward(views, numbers, *output[2:])
        ctx.set_materialize_grads(False)
        ctx.owns_gradients = False  # the caller has them, too

    def formula(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return place(gradients(ctx, *grads), (0, 1), 12)

    declare(f"cacr_{backend}", SCHEMA, fake)
    differentiate(f"cacr_{backend}", formula, setup)


@opaque
def cacr(
    on: Target, views: Tensor, numbers: Tensor | None, options: CACROptions, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """Loss [] and parts [4] by ``cacr_<backend>``."""
    if (where := traced(on)) is not None:
        views = views.to(arithmetic_dtype(views))
        loss, parts, _, _ = where.operator("cacr")(views, numbers, *options, True, numbers is not None)
        return loss, parts
    loss, parts, _, _ = apply_of(CACRFunction, views, numbers)(views, numbers, options, wanted, on)
    return loss, parts
