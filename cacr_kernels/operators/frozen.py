"""The operator ``contrast_frozen``: one softmax over keys that carry no gradient, in one sweep.

    contrast_frozen_<backend>  row statistics, and the means of keys that the gradient of a query is made of
    contrast_frozen_backward   that gradient, elementwise

Arguments are those of ``contrast`` (``ops.py``), of kind ALL or OTHER. Second derivatives differentiate the plain
formula, as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.torch import plain_contrast
from .autograd import SingleProblem, _apply, _opaque, _positional, _run
from .ops import NAMESPACE, ContrastSpec, Narrow, _vjp, arithmetic_dtype, operator, own_precision, place

FROZEN_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? q_id, Tensor? k_id, Tensor tau, int[] kinds, int[] q_index, int[] k_index,"
    " bool inner, bool detach_weights, bool detach_value, bool want_q, bool want_tau)"
    " -> (Tensor value, Tensor lse, Tensor means, Tensor variance)"
)
FROZEN_BACKWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? q_id, Tensor? k_id, Tensor tau, int[] kinds, int[] q_index, int[] k_index,"
    " bool inner, bool detach_weights, bool detach_value, Tensor value, Tensor lse, Tensor means, Tensor variance,"
    " Tensor grad_value, Tensor grad_lse, bool want_q, bool want_tau) -> (Tensor grad_q, Tensor grad_tau)"
)


# ---- operators -------------------------------------------------------------------------------------------------------
def frozen_fake(
    q: Tensor,
    k: Tensor,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
    detach_value: bool,
    want_q: bool,
    want_tau: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes: value and lse [1, P, N] float64, means [1 or 2, P, N, D] and variance [1, P, N], [0] if not needed.

    ``detach_weights``: the weights are constants, the lse carries no gradient. ``detach_value``: the value carries
    none, the lse does. Else both do, and the gradient needs the variance and both means of ``frozen_backward``.
    """
    shape = (1, len(q_index), q.shape[1])
    both = (want_q or want_tau) and not detach_weights and not detach_value
    means = q.new_empty((1 + both, *shape[1:], q.shape[2]) if want_q else 0, dtype=arithmetic_dtype(q))
    return tau.new_empty(shape), tau.new_empty(shape), means, tau.new_empty(shape if both else 0)


def frozen_backward_fake(
    q: Tensor,
    k: Tensor,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
    detach_value: bool,
    value: Tensor,
    lse: Tensor,
    means: Tensor,
    variance: Tensor,
    grad_value: Tensor,
    grad_lse: Tensor,
    want_q: bool,
    want_tau: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes: gradients of q and tau, [0] where not wanted."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format) if want_q else q.new_empty(0)
    return grad_q, torch.empty_like(tau) if want_tau else tau.new_empty(0)


def frozen_backward(
    q: Tensor,
    k: Tensor,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
    detach_value: bool,
    value: Tensor,
    lse: Tensor,
    means: Tensor,
    variance: Tensor,
    grad_value: Tensor,
    grad_lse: Tensor,
    want_q: bool,
    want_tau: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and tau, with dL/dc_ij = w_ij (a + b (c_ij - F)) as in ``reference.py``.

    dL/dq_i = 2 (a (q_i - sum_j w_ij k_j) - b sum_j w_ij (c_ij - F_i) k_j)    (inner cost: without a q_i)
    """
    empty = lse == -torch.inf
    g_value = torch.where(empty, 0.0, grad_value)
    g_lse = torch.where(empty, 0.0, grad_lse)
    grad_q, grad_tau = q.new_empty(0), torch.zeros_like(tau) if want_tau else tau.new_empty(0)
    if want_tau and not detach_weights:
        moments = g_lse * value if detach_value else g_lse * value + g_value * variance
        grad_tau = moments.sum((1, 2))
    if not want_q:
        return grad_q, grad_tau
    a = g_value if detach_weights else g_lse * tau if detach_value else g_value + g_lse * tau
    a = (2 * a[0, :, :, None]).to(q.dtype)
    every = list(q_index) == list(range(q.shape[0]))
    rows = -a * means[0] if inner else a * ((q if every else q[q_index]) - means[0])
    if not detach_weights and not detach_value:
        rows = rows.sub_((2 * (g_value * tau)[0, :, :, None]).to(q.dtype) * means[1])
    if every:
        return rows, grad_tau
    index = torch.tensor(q_index, dtype=torch.int64, device=q.device)
    return torch.zeros_like(q, memory_format=torch.contiguous_format).index_add_(0, index, rows), grad_tau


def frozen_setup(ctx: Any, op: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what ``frozen_gradient`` needs."""
    *tensors, ctx.want_q, ctx.want_tau = inputs
    ctx.save_for_backward(*tensors[:5], *output)
    ctx.rest, ctx.op = tuple(tensors[5:]), op


def frozen_gradient(
    ctx: Any, grad_value: Tensor | None, grad_lse: Tensor | None, function: Any = None
) -> tuple[Tensor | None, ...]:
    """Gradients of q and tau, by the operator or the ``function`` around it."""
    if grad_value is None and grad_lse is None:
        return None, None
    *tensors, value, lse, means, variance = ctx.saved_tensors
    grad_value = torch.zeros_like(value) if grad_value is None else grad_value
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    want = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    if (want[0] and not ctx.want_q) or (want[1] and not ctx.want_tau):  # not known in forward
        detached = [t if t is None else t.detach() for t in tensors]
        value, lse, means, variance = ctx.op(*detached, *ctx.rest, *want)
    found = (t.detach() for t in (value, lse, means, variance))
    arguments = (*tensors, *ctx.rest, *found, grad_value, grad_lse, *want)
    grads = function.apply(*arguments) if function else operator("contrast_frozen_backward")(*arguments)
    return tuple(g if w else None for g, w in zip(grads, want, strict=True))


def frozen_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what ``frozen_second_order`` needs."""
    q, k, q_id, k_id, tau, kinds, q_index, k_index, inner, detach, ctx.detach_value, *_ = inputs
    *_, grad_value, grad_lse, want_q, want_tau = inputs
    ctx.want = want_q, want_tau
    ctx.save_for_backward(q, k, q_id, k_id, tau, grad_value, grad_lse)
    ctx.rest = kinds, q_index, k_index, inner, detach


@own_precision
def frozen_second_order(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of the gradient w.r.t. q, tau and the incoming gradients, from the plain formula."""
    q, k, q_id, k_id, tau, grad_value, grad_lse = ctx.saved_tensors
    spec = ContrastSpec(q_id, k_id, *ctx.rest)

    def gradient(q: Tensor, tau: Tensor, gv: Tensor, gl: Tensor) -> tuple[Tensor, ...]:
        (_, lse), pull = _vjp(lambda q, tau: plain_contrast(q, k, tau, spec), q, tau)
        gv = torch.zeros_like(gv) if ctx.detach_value else gv
        return tuple(pull((gv.to(lse.dtype), torch.where(lse == -torch.inf, 0.0, gl.to(lse.dtype)))))

    outputs, pull = _vjp(gradient, q, tau, grad_value, grad_lse)
    wanted = [g.to(o.dtype) if w else torch.zeros_like(o) for o, g, w in zip(outputs, grads, ctx.want, strict=True)]
    second: tuple[Tensor, ...] = pull(tuple(wanted))
    return second


FROZEN_DIFFERENTIABLE = (0, 4)  # q, tau
FROZEN_BACKWARD_DIFFERENTIABLE = (0, 4, 15, 16)  # q, tau, grad_value, grad_lse


# ---- registration ----------------------------------------------------------------------------------------------------
def _name(backend: str) -> str:
    return f"detached_keys_{backend}" if backend == "cpu" else f"contrast_frozen_{backend}"


def _register_frozen(backend: str) -> None:
    name = f"{NAMESPACE}::{_name(backend)}"
    torch.library.define(name, FROZEN_SCHEMA)
    torch.library.register_fake(name, frozen_fake)
    op = operator(_name(backend))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        frozen_setup(ctx, op, inputs, output)

    def formula(ctx: Any, grad_value: Tensor, grad_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return place(frozen_gradient(ctx, grad_value, grad_lse), FROZEN_DIFFERENTIABLE, 13)

    torch.library.register_autograd(name, formula, setup_context=setup)


def _register_frozen_backward() -> None:
    name = f"{NAMESPACE}::contrast_frozen_backward"

    def second(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return place(frozen_second_order(ctx, *grads), FROZEN_BACKWARD_DIFFERENTIABLE, 19)

    torch.library.define(name, FROZEN_BACKWARD_SCHEMA)
    torch.library.impl(name, "CompositeExplicitAutograd", frozen_backward)
    torch.library.register_fake(name, frozen_backward_fake)
    torch.library.register_autograd(name, second, setup_context=frozen_backward_setup)


_register_frozen_backward()
for _backend in ("triton", "cpu"):
    _register_frozen(_backend)


# ---- Functions -------------------------------------------------------------------------------------------------------
class FrozenFunction(SingleProblem):
    """``contrast_frozen``: ``apply(*arguments of the operator, op)``.

    Of the four outputs only value and lse are differentiable, as far as they carry a gradient.
    """

    @staticmethod
    @_positional
    def forward(
        q: Tensor,
        k: Tensor,
        q_id: Tensor | None,
        k_id: Tensor | None,
        tau: Tensor,
        kinds: list[int],
        q_index: list[int],
        k_index: list[int],
        inner: bool,
        detach_weights: bool,
        detach_value: bool,
        want_q: bool,
        want_tau: bool,
        op: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs the operator."""
        flags = inner, detach_weights, detach_value, want_q, want_tau
        indices = kinds, q_index, k_index
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _run(op, q, k, q_id, k_id, tau, *indices, *flags)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves inputs, statistics and means."""
        detach_weights, detach_value = inputs[9:11]
        value, lse, means, variance = output
        constants = [means, variance, *[value] * detach_value, *[lse] * detach_weights]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        frozen_setup(ctx, inputs[-1], inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Any, ...]:
        """Calls :class:`FrozenGradient`, or the operator where nobody differentiates the gradient."""
        function = FrozenGradient if torch.is_grad_enabled() else None
        found = frozen_gradient(ctx, grad_value, grad_lse, function)
        return place(found, FROZEN_DIFFERENTIABLE, 14)


class FrozenGradient(SingleProblem):
    """``contrast_frozen_backward``, whose own backward differentiates the plain formula."""

    @staticmethod
    @_positional
    def forward(
        q: Tensor,
        k: Tensor,
        q_id: Tensor | None,
        k_id: Tensor | None,
        tau: Tensor,
        kinds: list[int],
        q_index: list[int],
        k_index: list[int],
        inner: bool,
        detach_weights: bool,
        detach_value: bool,
        value: Tensor,
        lse: Tensor,
        means: Tensor,
        variance: Tensor,
        grad_value: Tensor,
        grad_lse: Tensor,
        want_q: bool,
        want_tau: bool,
    ) -> tuple[Tensor, Tensor]:
        """Runs the operator."""
        indices, flags = (kinds, q_index, k_index), (inner, detach_weights, detach_value)
        given = value, lse, means, variance, grad_value, grad_lse
        op = operator("contrast_frozen_backward")
        outputs: tuple[Tensor, Tensor] = _run(op, q, k, q_id, k_id, tau, *indices, *flags, *given, want_q, want_tau)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs."""
        frozen_backward_setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Second derivatives."""
        return place(frozen_second_order(ctx, *grads), FROZEN_BACKWARD_DIFFERENTIABLE, 19)


@_opaque
def contrast_frozen(
    backend: str,
    q: Tensor,
    k: Tensor,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
    detach_value: bool,
    want_q: bool,
    want_tau: bool,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cost and log-sum-exp [1, P, N], float64, by ``contrast_frozen_<backend>``; ``k`` gets no gradient."""
    op = Narrow(operator(_name(backend)), 2, narrow)
    indices, flags = (list(kinds), list(q_index), list(k_index)), (inner, detach_weights, detach_value)
    value, lse, _, _ = _apply(FrozenFunction, q, k, q_id, k_id, tau, *indices, *flags, want_q, want_tau, op)
    return value, lse
