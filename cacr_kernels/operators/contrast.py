"""The operator ``contrast``: row statistics of one or two softmaxes over sets of keys, and their gradients.

``q`` [Vq, N, D], ``k`` [Vk, M, D] or ``None``, ``tau`` [S] float64 (float32 where a device has none); what carries no
gradient is a ``ContrastSpec``. Without ``k`` the queries are the keys, too, and their gradient is the sum of both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import pairwise_cost, statistics, unit_rows
from ..types import ALL, OTHER, OTHER_NOT_SELF, SAME_NOT_SELF, ContrastSpec, arithmetic_dtype
from . import _torch_private
from .registry import SingleProblem, Target, apply_of, declare, differentiate, opaque, own_precision, place, traced, vjp

ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? q_id, Tensor? k_id, Tensor tau, int[] kinds, int[] q_index, int[] k_index,"
    " bool inner_product, bool detach_weights, Tensor? q_self, bool normalize"
)
SCHEMAS = {
    "contrast": f"({ARGUMENTS}) -> (Tensor value, Tensor lse, Tensor row_state)",
    "contrast_backward": (
        f"({ARGUMENTS}, Tensor value, Tensor row_state, Tensor grad_value, Tensor grad_lse,"
        " bool want_q, bool want_k, bool want_tau) -> (Tensor grad_q, Tensor grad_k, Tensor grad_tau)"
    ),
}
DIFFERENTIABLE = (0, 1, 4)  # q, k, tau
BACKWARD_DIFFERENTIABLE = (0, 1, 4, 14, 15)  # q, k, tau, grad_value, grad_lse


def pack(q: Tensor, k: Tensor | None, q_id: Tensor | None, k_id: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """The first twelve arguments of a schema as q, k, tau and the spec, followed by all others."""
    tau, *options = rest
    return q, k, tau, ContrastSpec(q_id, k_id, *options[:7]), *options[7:]


def unpack(q: Tensor, k: Tensor | None, tau: Tensor, spec: ContrastSpec) -> tuple[Any, ...]:
    """The first twelve arguments in the order of the schemas."""
    q_id, k_id, kinds, q_index, k_index, *rest = spec
    return q, k, q_id, k_id, tau, list(kinds), list(q_index), list(k_index), *rest


def fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes: value and lse [S, P, N], row_state [3, S, P, N], in the dtype of tau whatever the inputs are.

    ``row_state`` is what a backend's own backward needs to give every pair the weight it had in forward.
    """
    q, _, tau, spec = pack(*arguments)
    shape = (len(spec.kinds), len(spec.q_index), q.shape[1])
    return tau.new_empty(shape), tau.new_empty(shape), tau.new_empty((3, *shape))


def backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes: gradients of q, k and tau, [0] where not wanted."""
    q, k, tau, *_, want_q, want_k, want_tau = pack(*arguments)
    dtype = arithmetic_dtype(q)
    grad_q = q.new_empty(q.shape if want_q else 0, dtype=dtype)
    grad_k = q.new_empty(k.shape if k is not None and want_k else 0, dtype=dtype)
    return grad_q, grad_k, torch.empty_like(tau) if want_tau else tau.new_empty(0)


# ---- by the definition -----------------------------------------------------------------------------------------------
def members(kind: int, spec: ContrastSpec, rows: slice, keys: slice) -> Tensor | None:
    """Mask [rows, keys] of the keys in each query's set; ``None``: all of them."""
    if kind == ALL:
        return None
    assert spec.q_id is not None
    assert spec.k_id is not None
    same = spec.q_id[rows, None] == spec.k_id[None, keys]
    if kind in (OTHER, OTHER_NOT_SELF):
        same = ~same
    if kind in (SAME_NOT_SELF, OTHER_NOT_SELF):
        i = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=same.device)
        i = i if spec.q_self is None else spec.q_self[rows]
        same = same & (i[:, None] != torch.arange(keys.start, keys.stop, dtype=torch.int64, device=same.device))
    if kind == OTHER_NOT_SELF:
        same = same & (spec.q_id[rows, None] >= 0) & (spec.k_id[None, keys] >= 0)
    return same


def plain_contrast(q: Tensor, k: Tensor, tau: Tensor, spec: ContrastSpec) -> tuple[Tensor, Tensor]:
    """Value and lse from N x M arrays, differentiable any number of times; only second derivatives use it."""
    if spec.normalize:
        q, k = unit_rows(q), unit_rows(k)
    # not q[list]: Inductor 2.13 miscompiles a batched product of indexed operands (writes out of bounds)
    queries, keys = torch.stack([q[i] for i in spec.q_index]), torch.stack([k[i] for i in spec.k_index])
    c = -2 * queries @ keys.mT if spec.inner_product else pairwise_cost(queries, keys)
    everything = slice(0, q.shape[1]), slice(0, k.shape[1])
    values, lses = [], []
    for s, kind in enumerate(spec.kinds):
        mask = members(kind, spec, *everything)
        logit = tau[s].to(c.dtype) * c
        row = statistics(
            logit.detach() if spec.detach_weights else logit,
            c,
            torch.ones_like(c, dtype=torch.bool) if mask is None else mask,
        )
        values.append(row.value)
        lses.append(row.lse)
    return torch.stack(values), torch.stack(lses)


@own_precision
def second_order(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiates the gradient of the plain formula w.r.t. q, k, tau and the incoming gradients."""
    q, k, q_id, k_id, q_self, tau, grad_value, grad_lse = ctx.saved_tensors
    symmetric = k is None
    k, k_id = (q.new_empty(0), q_id) if symmetric else (k, k_id)
    spec = ctx.spec._replace(q_id=q_id, k_id=k_id, q_self=q_self)

    def gradient(q: Tensor, k: Tensor, tau: Tensor, gv: Tensor, gl: Tensor) -> tuple[Tensor, ...]:
        (_, lse), pull = vjp(lambda q, k, tau: plain_contrast(q, q if symmetric else k, tau, spec), q, k, tau)
        return tuple(pull((gv.to(lse.dtype), gl.to(lse.dtype))))

    outputs, pull = vjp(gradient, q, k, tau, grad_value, grad_lse)
    wanted = [g.to(o.dtype) if w else torch.zeros_like(o) for o, g, w in zip(outputs, grads, ctx.want, strict=True)]
    grad_q, grad_k, *others = pull(tuple(wanted))
    return grad_q, None if symmetric else grad_k, *others


# ---- gradient --------------------------------------------------------------------------------------------------------
class Backward(NamedTuple):
    """The arguments of :class:`ContrastGradient` to which no gradient flows."""

    spec: ContrastSpec
    value: Tensor
    row_state: Tensor
    want: tuple[bool, ...]  # gradients of q, k and tau
    on: Target


def without_tensors(spec: ContrastSpec) -> ContrastSpec:
    """What a context may keep as it is: autograd keeps the tensors."""
    return spec._replace(q_id=None, k_id=None, q_self=None)


def keep(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what ``gradients`` needs; ``arguments``: q, k, tau, the spec, and where the operator runs."""
    q, k, tau, spec, ctx.on = arguments
    value, _, row_state = output
    ctx.spec = without_tensors(spec)
    ctx.save_for_backward(q, k, spec.q_id, spec.k_id, spec.q_self, tau, value, row_state)


def gradients(ctx: Any, grad_value: Tensor, grad_lse: Tensor, want: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The backward of the operator: gradients of q, k and tau, as far as they are wanted."""
    q, k, q_id, k_id, q_self, tau, value, row_state = ctx.saved_tensors
    # The statistics are passed as constants: the second derivative recomputes them from q, k and tau.
    spec = ctx.spec._replace(q_id=q_id, k_id=k_id, q_self=q_self)
    backward = Backward(spec, value.detach(), row_state.detach(), want, ctx.on)
    of = apply_of(ContrastGradient, q, k, tau, grad_value, grad_lse)
    grads = of(q, k, tau, grad_value, grad_lse, backward)
    return tuple(g if w else None for g, w in zip(grads, want, strict=True))


def keep_backward(ctx: Any, arguments: tuple[Any, ...], want: tuple[bool, ...]) -> None:
    """Keeps what ``second_order`` needs; ``arguments``: q, k, tau, grad_value, grad_lse and the spec."""
    q, k, tau, grad_value, grad_lse, spec = arguments
    ctx.spec, ctx.want = without_tensors(spec), want
    ctx.save_for_backward(q, k, spec.q_id, spec.k_id, spec.q_self, tau, grad_value, grad_lse)


class ContrastFunction(SingleProblem):
    """``contrast`` with both sets in one pass; of value, lse and row_state the first two are differentiable."""

    @staticmethod
    @_torch_private.positional
    def forward(
        q: Tensor, k: Tensor | None, tau: Tensor, spec: ContrastSpec, on: Target
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns value, lse and row_state."""
        q, k = on.features(q, k)
        arguments = unpack(q, k, tau, spec)
        with _torch_private.below_autograd():
            outputs: tuple[Tensor, Tensor, Tensor] = on.operator("contrast")(*arguments)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs and outputs that ``gradients`` reads."""
        ctx.mark_non_differentiable(output[2])
        keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of q, k and tau."""
        return *gradients(ctx, grads[0], grads[1], ctx.needs_input_grad[:3]), None, None


class ContrastGradient(SingleProblem):
    """``contrast_backward``, whose own backward differentiates the plain formula."""

    @staticmethod
    @_torch_private.positional
    def forward(
        q: Tensor, k: Tensor | None, tau: Tensor, grad_value: Tensor, grad_lse: Tensor, backward: Backward
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and tau."""
        spec, value, row_state, want, on = backward
        q, k = on.features(q, k)
        arguments = unpack(q, k, tau, spec)
        with _torch_private.below_autograd():
            outputs: tuple[Tensor, Tensor, Tensor] = on.operator("contrast_backward")(
                *arguments, value, row_state, grad_value, grad_lse, *want
            )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs that ``second_order`` reads."""
        *tensors, backward = inputs
        keep_backward(ctx, (*tensors, backward.spec), backward.want)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Derivatives w.r.t. q, k, tau and the incoming gradients."""
        return *second_order(ctx, *grads), None


# ---- registration and entry ------------------------------------------------------------------------------------------
def register(backend: str) -> None:
    """Declares the operators ``contrast_<backend>`` and ``contrast_backward_<backend>``."""
    on = Target(backend)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep(ctx, (*pack(*inputs), on), output)

    def formula(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        want = tuple(ctx.needs_input_grad[i] for i in DIFFERENTIABLE)
        return place(gradients(ctx, grads[0], grads[1], want), DIFFERENTIABLE, 12)

    def backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, tau, spec, _, _, grad_value, grad_lse, *want = pack(*inputs)
        keep_backward(ctx, (q, k, tau, grad_value, grad_lse, spec), tuple(want))

    def backward_formula(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return place(second_order(ctx, *grads), BACKWARD_DIFFERENTIABLE, 19)

    declare(f"contrast_{backend}", SCHEMAS["contrast"], fake)
    declare(f"contrast_backward_{backend}", SCHEMAS["contrast_backward"], backward_fake)
    differentiate(f"contrast_{backend}", formula, setup)
    differentiate(f"contrast_backward_{backend}", backward_formula, backward_setup)


@opaque
def contrast(on: Target, q: Tensor, k: Tensor | None, tau: Tensor, spec: ContrastSpec) -> tuple[Tensor, Tensor]:
    """Mean cost and log-sum-exp [S, P, N], float64, by ``contrast_<backend>``; no ``k``: the queries are the keys."""
    if (where := traced(on)) is not None:
        value, lse, _ = where.operator("contrast")(*unpack(q, k, tau, spec))
        return value, lse
    value, lse, _ = apply_of(ContrastFunction, q, k, tau)(q, k, tau, spec, on)
    return value, lse
