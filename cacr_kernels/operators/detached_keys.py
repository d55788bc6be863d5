"""The operator ``detached_keys``: one softmax over keys that carry no gradient, in one sweep.

``detached_keys_<backend>`` gives row statistics, and the means of keys that the gradient of a query is made of;
``detached_keys_backward`` is that gradient, elementwise. Arguments are those of ``contrast``, of kind ALL or OTHER.
Second derivatives differentiate the plain formula, as there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import of_raw_rows, unit_rows
from ..types import ContrastSpec, arithmetic_dtype
from . import _torch_private
from . import contrast as of_contrast
from .contrast import contrast, plain_contrast
from .registry import (
    SingleProblem,
    Target,
    apply_of,
    declare,
    differentiate,
    implement,
    in_graphs,
    opaque,
    operator,
    own_precision,
    place,
    traced,
    vjp,
)

ARGUMENTS = (
    "Tensor q, Tensor k, Tensor? q_id, Tensor? k_id, Tensor tau, int[] kinds, int[] q_index, int[] k_index,"
    " bool inner_product, bool detach_weights, bool detach_value, bool normalize"
)
SCHEMA = f"({ARGUMENTS}, bool want_q, bool want_tau) -> (Tensor value, Tensor lse, Tensor means, Tensor variance)"
BACKWARD_SCHEMA = (
    f"({ARGUMENTS}, Tensor value, Tensor lse, Tensor means, Tensor variance,"
    " Tensor grad_value, Tensor grad_lse, bool want_q, bool want_tau) -> (Tensor grad_q, Tensor grad_tau)"
)
SCHEMAS = {"detached_keys": SCHEMA}
DIFFERENTIABLE = (0, 4)  # q, tau
BACKWARD_DIFFERENTIABLE = (0, 4, 16, 17)  # q, tau, grad_value, grad_lse
Wanted = tuple[bool, ...]  # whether the gradients of q and tau are wanted


def pack(*arguments: Any) -> tuple[Any, ...]:
    """The first twelve arguments of a schema as q, k, tau, the spec and ``detach_value``, followed by all others."""
    detach_value, normalize, *rest = arguments[10:]
    return of_contrast.pack(*arguments[:10], None, normalize, detach_value, *rest)


def unpack(q: Tensor, k: Tensor, tau: Tensor, spec: ContrastSpec, detach_value: bool) -> tuple[Any, ...]:
    """The first twelve arguments in the order of the schemas."""
    return *of_contrast.unpack(q, k, tau, spec)[:10], detach_value, spec.normalize


def fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes: value and lse [1, P, N] float64, means [1 or 2, P, N, D] and variance [1, P, N], [0] if not needed.

    ``detach_weights``: the weights are constants, the lse carries no gradient. ``detach_value``: the value carries
    none, the lse does. Else both do, and the gradient needs the variance and both means of ``backward``.
    """
    q, _, tau, spec, detach_value, want_q, want_tau = pack(*arguments)
    shape = (1, len(spec.q_index), q.shape[1])
    both = (want_q or want_tau) and not spec.detach_weights and not detach_value
    means = q.new_empty((1 + both, *shape[1:], q.shape[2]) if want_q else 0, dtype=arithmetic_dtype(q))
    return tau.new_empty(shape), tau.new_empty(shape), means, tau.new_empty(shape if both else 0)


def backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Shapes: gradients of q and tau, [0] where not wanted."""
    q, _, tau, *_, want_q, want_tau = pack(*arguments)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format) if want_q else q.new_empty(0)
    return grad_q, torch.empty_like(tau) if want_tau else tau.new_empty(0)


# ---- gradient --------------------------------------------------------------------------------------------------------
def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``detached_keys_backward``: gradients of q and tau; dL/dc_ij = w_ij (a + b (c_ij - F)) as in ``reference.py``.

    dL/dq_i = 2 (a (q_i - sum_j w_ij k_j) - b sum_j w_ij (c_ij - F_i) k_j)    (inner products: without a q_i)
    """
    q, _, tau, spec, detach_value, *found, grad_value, grad_lse, want_q, want_tau = pack(*arguments)
    value, lse, means, variance = found
    empty = lse == -torch.inf
    g_value = torch.where(empty, 0.0, grad_value)
    g_lse = torch.where(empty, 0.0, grad_lse)
    grad_q, grad_tau = q.new_empty(0), torch.zeros_like(tau) if want_tau else tau.new_empty(0)
    if want_tau and not spec.detach_weights:
        moments = g_lse * value if detach_value else g_lse * value + g_value * variance
        grad_tau = moments.sum((1, 2))
    if not want_q:
        return grad_q, grad_tau
    a = g_value if spec.detach_weights else g_lse * tau if detach_value else g_value + g_lse * tau
    a = (2 * a[0, :, :, None]).to(q.dtype)
    raw, q = q, unit_rows(q) if spec.normalize else q
    every = list(spec.q_index) == list(range(q.shape[0]))
    rows = -a * means[0] if spec.inner_product else a * ((q if every else q[spec.q_index]) - means[0])
    if not spec.detach_weights and not detach_value:
        rows = rows.sub_((2 * (g_value * tau)[0, :, :, None]).to(q.dtype) * means[1])
    if not every:
        index = torch.tensor(spec.q_index, dtype=torch.int64, device=q.device)
        rows = torch.zeros_like(q, memory_format=torch.contiguous_format).index_add_(0, index, rows)
    return (of_raw_rows(rows, raw) if spec.normalize else rows), grad_tau


@own_precision
def second_order(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of the gradient w.r.t. q, tau and the incoming gradients, from the plain formula."""
    q, k, q_id, k_id, tau, grad_value, grad_lse = ctx.saved_tensors
    spec = ctx.spec._replace(q_id=q_id, k_id=k_id)

    def gradient(q: Tensor, tau: Tensor, gv: Tensor, gl: Tensor) -> tuple[Tensor, ...]:
        (_, lse), pull = vjp(lambda q, tau: plain_contrast(q, k, tau, spec), q, tau)
        gv = torch.zeros_like(gv) if ctx.detach_value else gv
        return tuple(pull((gv.to(lse.dtype), torch.where(lse == -torch.inf, 0.0, gl.to(lse.dtype)))))

    outputs, pull = vjp(gradient, q, tau, grad_value, grad_lse)
    wanted = [g.to(o.dtype) if w else torch.zeros_like(o) for o, g, w in zip(outputs, grads, ctx.want, strict=True)]
    second: tuple[Tensor, ...] = pull(tuple(wanted))
    return second


class Backward(NamedTuple):
    """The arguments of :class:`DetachedKeysGradient` to which no gradient flows."""

    spec: ContrastSpec
    detach_value: bool
    found: tuple[Tensor, ...]  # value, lse, means, variance
    want: Wanted


@in_graphs
class Call(NamedTuple):
    """The arguments of :class:`DetachedKeysFunction` beside the tensors and the spec."""

    detach_value: bool
    want: Wanted
    on: Target


def keep(ctx: Any, arguments: tuple[Any, ...], call: Call, output: tuple[Tensor, ...]) -> None:
    """Keeps what ``gradients`` needs; ``arguments``: q, k, tau and the spec."""
    q, k, tau, spec = arguments
    ctx.spec = of_contrast.without_tensors(spec)
    ctx.save_for_backward(q, k, spec.q_id, spec.k_id, tau, *output)
    ctx.call = call
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, grad_value: Tensor | None, grad_lse: Tensor | None, want: Wanted) -> tuple[Tensor | None, ...]:
    """The backward of the operator: gradients of q and tau, as far as they are wanted."""
    if grad_value is None and grad_lse is None:
        return None, None
    q, k, q_id, k_id, tau, *found = ctx.saved_tensors
    detach_value, known, on = ctx.call
    spec = ctx.spec._replace(q_id=q_id, k_id=k_id)
    grad_value = torch.zeros_like(found[0]) if grad_value is None else grad_value
    grad_lse = torch.zeros_like(found[1]) if grad_lse is None else grad_lse
    if (want[0] and not known[0]) or (want[1] and not known[1]):  # not known in forward
        constant = spec._replace(q_id=_detached(q_id), k_id=_detached(k_id))
        features = on.features(q.detach(), k.detach())
        arguments = unpack(features[0], features[1], tau.detach(), constant, detach_value)
        found = on.operator("detached_keys")(*arguments, *want)
    backward = Backward(spec, detach_value, tuple(t.detach() for t in found), want)
    of = apply_of(DetachedKeysGradient, q, k, tau, grad_value, grad_lse)
    grads = of(q, k, tau, grad_value, grad_lse, backward)
    return tuple(g if w else None for g, w in zip(grads, want, strict=True))


def _detached(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.detach()


def keep_backward(ctx: Any, arguments: tuple[Any, ...], detach_value: bool, want: Wanted) -> None:
    """Keeps what ``second_order`` needs; ``arguments``: q, k, tau, grad_value, grad_lse and the spec."""
    q, k, tau, grad_value, grad_lse, spec = arguments
    ctx.spec, ctx.detach_value, ctx.want = of_contrast.without_tensors(spec), detach_value, want
    ctx.save_for_backward(q, k, spec.q_id, spec.k_id, tau, grad_value, grad_lse)


class DetachedKeysFunction(SingleProblem):
    """``detached_keys``; of its four outputs only value and lse are differentiable, as far as they carry a gradient."""

    @staticmethod
    @_torch_private.positional
    def forward(
        q: Tensor, k: Tensor, tau: Tensor, spec: ContrastSpec, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value, lse, means of keys and variance."""
        q, k = call.on.features(q, k)
        arguments = unpack(q, k, tau, spec, call.detach_value)
        with _torch_private.below_autograd():
            outputs: tuple[Tensor, Tensor, Tensor, Tensor] = call.on.operator("detached_keys")(*arguments, *call.want)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs and outputs that ``gradients`` reads."""
        *arguments, call = inputs
        value, lse, means, variance = output
        constants = [means, variance, *[value] * call.detach_value, *[lse] * arguments[-1].detach_weights]
        ctx.mark_non_differentiable(*constants)
        keep(ctx, tuple(arguments), call, output)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Any, ...]:
        """The gradients of q and tau."""
        needed = ctx.needs_input_grad
        grad_q, grad_tau = gradients(ctx, grad_value, grad_lse, (needed[0], needed[2]))
        return grad_q, None, grad_tau, None, None


class DetachedKeysGradient(SingleProblem):
    """``detached_keys_backward``, whose own backward differentiates the plain formula."""

    @staticmethod
    @_torch_private.positional
    def forward(
        q: Tensor, k: Tensor, tau: Tensor, grad_value: Tensor, grad_lse: Tensor, backward: Backward
    ) -> tuple[Tensor, Tensor]:
        """Gradients of q and tau."""
        spec, detach_value, found, want = backward
        arguments = unpack(q, k, tau, spec, detach_value)
        with _torch_private.below_autograd():
            outputs: tuple[Tensor, Tensor] = operator("detached_keys_backward")(
                *arguments, *found, grad_value, grad_lse, *want
            )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs that ``second_order`` reads."""
        *tensors, backward = inputs
        keep_backward(ctx, (*tensors, backward.spec), backward.detach_value, backward.want)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Derivatives w.r.t. q, tau and the incoming gradients."""
        grad_q, grad_tau, *incoming = second_order(ctx, *grads)
        return grad_q, None, grad_tau, *incoming, None


# ---- registration and entry ------------------------------------------------------------------------------------------
def register(backend: str) -> None:
    """Declares the operator ``detached_keys_<backend>`` and its gradient."""
    on = Target(backend)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *arguments, detach_value, want_q, want_tau = pack(*inputs)
        keep(ctx, tuple(arguments), Call(detach_value, (want_q, want_tau), on), output)

    def formula(ctx: Any, grad_value: Tensor | None, grad_lse: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        want = tuple(ctx.needs_input_grad[i] for i in DIFFERENTIABLE)
        return place(gradients(ctx, grad_value, grad_lse, want), DIFFERENTIABLE, 14)

    declare(f"detached_keys_{backend}", SCHEMA, fake)
    differentiate(f"detached_keys_{backend}", formula, setup)


def _register_backward() -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, tau, spec, detach_value, *_, grad_value, grad_lse, want_q, want_tau = pack(*inputs)
        keep_backward(ctx, (q, k, tau, grad_value, grad_lse, spec), detach_value, (want_q, want_tau))

    def formula(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return place(second_order(ctx, *grads), BACKWARD_DIFFERENTIABLE, 20)

    declare("detached_keys_backward", BACKWARD_SCHEMA, backward_fake)
    implement("detached_keys_backward", backward)
    differentiate("detached_keys_backward", formula, setup)


_register_backward()


def detached_keys(
    on: Target, q: Tensor, k: Tensor, tau: Tensor, spec: ContrastSpec, *, detach_value: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean cost and log-sum-exp [1, P, N], float64, of one softmax over keys ``k`` that get no gradient.

    ``spec.detach_weights``: only the value carries a gradient, by the costs; ``detach_value``: only the lse does.
    Backends without an operator of their own use ``contrast``.
    """
    tau = tau.detach() if spec.detach_weights else tau
    if "detached_keys" in on.operators:
        grad = torch.is_grad_enabled()
        want = grad and q.requires_grad, grad and tau.requires_grad
        value, lse = one_sweep(q, k, tau, spec, Call(detach_value, want, on))
    else:
        value, lse = contrast(on, q, k, tau, spec)
    return value.detach() if detach_value else value, lse.detach() if spec.detach_weights else lse


@opaque
def one_sweep(q: Tensor, k: Tensor, tau: Tensor, spec: ContrastSpec, call: Call) -> tuple[Tensor, Tensor]:
    """Mean cost and log-sum-exp [1, P, N], float64, by ``detached_keys_<backend>``."""
    if (where := traced(call.on)) is not None:
        want = True, not spec.detach_weights
        value, lse, _, _ = where.operator("detached_keys")(*unpack(q, k, tau, spec, call.detach_value), *want)
        return value, lse
    value, lse, _, _ = apply_of(DetachedKeysFunction, q, k, tau)(q, k, tau, spec, call)
    return value, lse
