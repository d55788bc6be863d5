"""The operator ``repulsion``: the mean cost of negatives that are not the queries, with its gradients, in one go.

``views`` [V, B, D]; ``keys`` [V, M, D], the views of all processes, of which those of ``views`` come first; ``tau`` [1]
signed, in the widest dtype. The result is the mean of F over all queries: what flows into a query is known before it
has met its keys, and nothing has to be computed again for the gradients. They are found in forward and scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import entropy_of, view_pairs
from ..types import OTHER, PAIRINGS, ContrastSpec, Pairing, arithmetic_dtype
from . import _torch_private
from .contrast import plain_contrast, unpack
from .registry import (
    SingleProblem,
    Target,
    apply_of,
    declare,
    differentiate,
    in_graphs,
    opaque,
    own_precision,
    place,
    traced,
    vjp,
)

SCHEMA = (
    "(Tensor views, Tensor keys, Tensor tau, int pairing, bool normalize, bool want_views, bool want_keys,"
    " bool want_tau) -> (Tensor value, Tensor entropy, Tensor grad_views, Tensor grad_keys, Tensor grad_tau)"
)
SCHEMAS = {"repulsion": SCHEMA}
DIFFERENTIABLE = (0, 1, 2)  # views, keys, tau
Options = tuple[int, bool]  # index into PAIRINGS, and whether the rows are raw
Wanted = tuple[bool, ...]  # whether the gradients of views, keys and tau are wanted
Gradients = tuple[Tensor | None, ...]


def fake(views: Tensor, keys: Tensor, tau: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Shapes: value and entropy [] in the dtype of tau, gradients in that of the arithmetic, [0] where not wanted."""
    dtype = arithmetic_dtype(views)
    *grads, grad_tau = (
        x.new_empty(x.shape if wanted else 0, dtype=dtype if x is not tau else tau.dtype)
        for x, wanted in zip((views, keys, tau), rest[-3:], strict=True)
    )
    return tau.new_empty(()), tau.new_empty(()), *grads, grad_tau


@in_graphs
class Call(NamedTuple):
    """The arguments of :class:`RepulsionFunction` beside the tensors."""

    options: Options
    wanted: Wanted
    on: Target


# ---- by the definition -----------------------------------------------------------------------------------------------
def as_contrast(
    views: Tensor, keys: Tensor, pairing: Pairing, normalize: bool, kinds: Sequence[int] = (OTHER,)
) -> tuple[Tensor, Tensor, ContrastSpec]:
    """Queries, keys and sets of the operator ``contrast``, whose values [S, P, B] are those of the queries.

    Pooled: every view of the queries meets the rows of all views of the keys, as if they were one.
    """
    num_views, batch, dim = views.shape
    ids = torch.arange(keys.shape[1], dtype=torch.int32, device=views.device)
    if pairing == "pooled":
        index = list(range(num_views)), [0] * num_views
        q_id, k_id, keys = ids[:batch], ids.repeat(num_views), keys.reshape(1, -1, dim)
    else:
        pairs = view_pairs(num_views, pairing)
        index = [x for x, _ in pairs], [y for _, y in pairs]
        q_id, k_id = ids[:batch], ids
    return views, keys, ContrastSpec(q_id, k_id, list(kinds), *index, normalize=normalize)


def with_views(grads: tuple[Tensor, ...], keys: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``contrast`` in the shapes of views, keys and tau."""
    grad_q, grad_k, grad_tau = grads
    return grad_q, grad_k.view(keys.shape) if grad_k.numel() else grad_k, grad_tau


@own_precision
def definition(options: Options, views: Tensor, keys: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
    """All outputs of the operator by the plain formula, in the dtype of the arithmetic; differentiable."""
    dtype = arithmetic_dtype(views)

    def mean(views: Tensor, keys: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        q, k, spec = as_contrast(views, keys, PAIRINGS[options[0]], options[1])
        value, lse = plain_contrast(q, k, tau, spec)
        return value.mean().to(tau.dtype), entropy_of(value, lse, tau).to(tau.dtype)

    (value, entropy), pull = vjp(mean, views.to(dtype), keys.to(dtype), tau)
    return value, entropy, *pull((torch.ones_like(value), torch.zeros_like(entropy)))


@own_precision
def second_order(options: Options, grads: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of <grads, g_value grad(value)> w.r.t. g_value, views, keys and tau, by the plain formula."""

    def gradient(g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.to(x.dtype) * x for x in definition(options, *inputs)[2:])

    found, pull = vjp(gradient, *inputs)
    second: tuple[Tensor, ...] = pull(tuple(g.to(x.dtype) for g, x in zip(grads, found, strict=True)))
    return second


def in_two_sweeps(contrast: Callable[..., Any], contrast_backward: Callable[..., Any]) -> Callable[..., Any]:
    """What computes the operator with the two of ``contrast``: statistics first, then the gradients."""

    def compute(*arguments: Any) -> tuple[Tensor, ...]:
        views, keys, tau, pairing, normalize, *want = arguments
        q, k, spec = as_contrast(views, keys, PAIRINGS[pairing], normalize)
        given = unpack(q, k, tau, spec)
        value, lse, row_state = contrast(*given)
        nothing = views.new_empty(0, dtype=arithmetic_dtype(views))
        grads = nothing, torch.empty_like(nothing), tau.new_empty(0)
        if any(want):
            g_value = torch.full_like(value, 1 / value.numel())
            grads = contrast_backward(*given, value, row_state, g_value, torch.zeros_like(value), *want)
        return value.mean(), entropy_of(value, lse, tau), *with_views(grads, keys)

    return compute


# ---- gradient --------------------------------------------------------------------------------------------------------
def keep(ctx: Any, call: Call, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what ``gradients`` needs of a call."""
    ctx.call = call
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, need: Wanted, grads: Gradients) -> Gradients:
    """The backward of the operator: gradients of views, keys and tau for those of its five outputs.

    Those found in forward are scaled. They are outputs, too: what arrives for them is answered by the definition.
    """
    inputs, found, (options, wanted, _) = ctx.saved_tensors[:3], ctx.saved_tensors[3:], ctx.call
    g_value, _, *g_found = grads
    if any(g is not None and w for g, w in zip(g_found, wanted, strict=True)):
        outputs, pull = vjp(partial(definition, options), *inputs)
        known = True, True, *wanted
        arrived = (
            torch.zeros_like(x) if g is None or not k else g for x, g, k in zip(outputs, grads, known, strict=True)
        )
        pulled: Gradients = pull(tuple(arrived))
        return pulled
    if g_value is None:
        return None, None, None
    if any(n and not w for n, w in zip(need, wanted, strict=True)):  # not known in forward
        found = RepulsionFunction.apply(*inputs, ctx.call._replace(wanted=need))[2:]  # type: ignore[no-untyped-call]
    if not torch.is_grad_enabled():  # nobody differentiates the gradient
        return tuple(g_value.to(x.dtype) * x if n else None for x, n in zip(found, need, strict=True))
    constants = (x.detach() if n else torch.zeros_like(y) for x, y, n in zip(found, inputs, need, strict=True))
    scaled: tuple[Tensor, ...] = RepulsionGradient.apply(g_value, *inputs, *constants, options)  # type: ignore[no-untyped-call]
    return tuple(x if n else None for x, n in zip(scaled, need, strict=True))


class RepulsionFunction(SingleProblem):
    """``repulsion``; of its five outputs the first is differentiable."""

    @staticmethod
    @_torch_private.positional
    def forward(views: Tensor, keys: Tensor, tau: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Value, entropy and gradients, as far as they are wanted."""
        views, keys = call.on.features(views, keys)
        with _torch_private.below_autograd():
            outputs: tuple[Tensor, ...] = call.on.operator("repulsion")(views, keys, tau, *call.options, *call.wanted)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs and outputs that ``gradients`` reads."""
        ctx.mark_non_differentiable(*output[1:])
        keep(ctx, inputs[-1], inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, g_value: Tensor | None, *_: None) -> tuple[Any, ...]:
        """The gradients of views, keys and tau."""
        return *gradients(ctx, ctx.needs_input_grad[:3], (g_value, None, None, None, None)), None


class RepulsionGradient(SingleProblem):
    """The gradients of the value times ``g_value``; its backward differentiates the gradient of the plain formula."""

    @staticmethod
    @_torch_private.positional
    def forward(
        g_value: Tensor,
        views: Tensor,
        keys: Tensor,
        tau: Tensor,
        grad_views: Tensor,
        grad_keys: Tensor,
        grad_tau: Tensor,
        options: Options,
    ) -> tuple[Tensor, ...]:
        """Returns the three gradients, scaled by ``g_value``."""
        return tuple(g_value.to(x.dtype) * x for x in (grad_views, grad_keys, grad_tau))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what the second derivative needs."""
        *_, ctx.options = inputs
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Derivatives w.r.t. g_value, views, keys and tau."""
        return *second_order(ctx.options, grads, *ctx.saved_tensors), None, None, None, None


# ---- registration and entry ------------------------------------------------------------------------------------------
def register(backend: str) -> None:
    """Declares the operator ``repulsion_<backend>`` and its gradient."""
    on = Target(backend)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep(ctx, Call(inputs[3:5], inputs[5:], on), inputs[:3], output)

    def formula(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        need = tuple(ctx.needs_input_grad[i] for i in DIFFERENTIABLE)
        return place(gradients(ctx, need, grads), DIFFERENTIABLE, 8)

    declare(f"repulsion_{backend}", SCHEMA, fake)
    differentiate(f"repulsion_{backend}", formula, setup)


def repulsion(on: Target, views: Tensor, keys: Tensor, tau: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Mean cost and entropy [] of the negatives of all queries, by ``repulsion_<backend>``."""
    grad = torch.is_grad_enabled()
    wanted = tuple(grad and x.requires_grad for x in (views, keys, tau))
    return one_sweep(views, keys, tau, Call((PAIRINGS.index(pairing), on.normalize), wanted, on))


@opaque
def one_sweep(views: Tensor, keys: Tensor, tau: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The same with the options of the operator."""
    if (where := traced(call.on)) is not None:
        views, keys = views.to(arithmetic_dtype(views)), keys.to(arithmetic_dtype(keys))
        value, entropy, *_ = where.operator("repulsion")(views, keys, tau, *call.options, True, True, True)
        return value, entropy
    value, entropy, *_ = apply_of(RepulsionFunction, views, keys, tau)(views, keys, tau, call)
    return value, entropy
