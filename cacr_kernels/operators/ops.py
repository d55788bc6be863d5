"""The operators ``torch.ops.cacr_kernels.*``: schema, fake and autograd formula of each, once for all backends.

    cacr_<backend>               cacr_loss of all views with its gradients, in one go (the fused path)
    contrast_<backend>           row statistics of one or two softmaxes (the general path)
    contrast_backward_<backend>  their gradients
    contrast_frozen_...          both in one go, for keys without a gradient: frozen.py

C++ implements, this file declares: the package works without the compiled libraries. Formulas point to
``reference.py``; derivatives of derivatives are taken from the reference itself, which any user of a gradient penalty
gets in eager mode and under ``torch.compile`` alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .. import reference
from ..backends import torch as _blocks
from ..types import Cost, Pairing

_vjp: Any = torch.func.vjp  # its annotations leave out how many values it returns
F = TypeVar("F", bound=Callable[..., Any])


def own_precision(second_order: F) -> F:
    """A second derivative is taken from the reference in its own dtype, also where ``backward`` runs under autocast."""

    @functools.wraps(second_order)
    def wrapped(*args: Any) -> Any:
        device = next(t for t in (*args, *getattr(args[0], "saved_tensors", ())) if isinstance(t, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return second_order(*args)

    return cast("F", wrapped)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What is computed in, and what gradients come in: half types are accumulated in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


PAIRINGS: tuple[Pairing, ...] = ("unordered", "ordered", "pooled")
NAMESPACE = "cacr_kernels"

CACR_SCHEMA = (
    "(Tensor views, Tensor? numbers, float tau_pos, float tau_neg, float alpha, float beta, int pairing, bool rbf,"
    " float rbf_scale, bool want_grad, bool want_grad_numbers)"
    " -> (Tensor loss, Tensor parts, Tensor grad_views, Tensor grad_numbers)"
)
CONTRAST_SCHEMA = (
    "(Tensor q, Tensor? k, Tensor? q_id, Tensor? k_id, Tensor tau, int[] kinds, int[] q_index, int[] k_index,"
    " bool inner, bool detach_weights) -> (Tensor value, Tensor lse, Tensor weights)"
)
CONTRAST_BACKWARD_SCHEMA = (
    "(Tensor q, Tensor? k, Tensor? q_id, Tensor? k_id, Tensor tau, int[] kinds, int[] q_index, int[] k_index,"
    " bool inner, bool detach_weights, Tensor value, Tensor weights, Tensor grad_value, Tensor grad_lse,"
    " bool want_q, bool want_k, bool want_tau) -> (Tensor grad_q, Tensor grad_k, Tensor grad_tau)"
)


# ---- cacr: views [V, B, D]; numbers [5] float64 = (tau_pos, tau_neg, alpha, beta, rbf_scale) if one is a tensor ------
class CACROptions(NamedTuple):
    """What is not a tensor among the arguments of ``cacr_<backend>``; its numbers count only without ``numbers``."""

    tau_pos: float
    tau_neg: float
    alpha: float
    beta: float
    pairing: int  # index into PAIRINGS
    rbf: bool
    rbf_scale: float

    @property
    def numbers(self) -> Any:
        """In the order of the tensor."""
        return self.tau_pos, self.tau_neg, self.alpha, self.beta, self.rbf_scale


def cacr_fake(
    views: Tensor,
    numbers: Tensor | None,
    tau_pos: float,
    tau_neg: float,
    alpha: float,
    beta: float,
    pairing: int,
    rbf: bool,
    rbf_scale: float,
    want_grad: bool,
    want_grad_numbers: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes: loss [], parts [4], grad_views [V, B, D] or [0], grad_numbers [5] or [0].

    Only the temperatures have a gradient: the other ``numbers`` are constants, and theirs is 0.
    """
    dtype = arithmetic_dtype(views)
    grad = views.new_empty(views.shape if want_grad else 0, dtype=dtype)
    grad_numbers = views.new_empty(0, dtype=dtype) if numbers is None else numbers.new_empty(5)
    return views.new_empty((), dtype=dtype), views.new_empty(4, dtype=dtype), grad, grad_numbers


def cacr_reference(views: Tensor, numbers: Tensor | None, options: CACROptions) -> tuple[Tensor, Tensor]:
    """Loss and parts (attraction, repulsion and their entropies) by the definition."""
    cost: Cost = "rbf" if options.rbf else "sqeuclidean"
    if numbers is None:
        tau_pos, tau_neg, alpha, beta, rbf_scale = options.numbers
    else:
        tau_pos, tau_neg = numbers[:2].to(views.dtype)
        alpha, beta, rbf_scale = numbers[2:].detach().to(views.dtype)
    terms = reference.cacr(
        views,
        tau_pos,
        tau_neg,
        alpha=alpha,
        beta=beta,
        pairing=PAIRINGS[options.pairing],
        cost=cost,
        rbf_scale=rbf_scale,
    )
    attraction, repulsion = terms.attraction.mean(), terms.repulsion.mean()
    parts = torch.stack([attraction, repulsion, terms.attraction_entropy, terms.repulsion_entropy])
    return attraction + repulsion, parts


@own_precision
def cacr_second_order(
    g_loss: Tensor, views: Tensor, numbers: Tensor | None, gg_views: Tensor, gg_numbers: Tensor, options: CACROptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives of <gg, g_loss grad(loss)> w.r.t. g_loss, views and numbers, from the reference."""
    fixed = numbers is None
    numbers = views.new_empty(0) if numbers is None else numbers

    def gradient(g: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        loss, pull = _vjp(lambda v, t: cacr_reference(v, None if fixed else t, options)[0], v, t)
        grad_views, grad_numbers = pull(g.to(loss.dtype))
        return grad_views, grad_numbers

    _, pull = _vjp(gradient, g_loss, views, numbers)
    g, v, t = pull((gg_views.to(views.dtype), gg_numbers.to(numbers.dtype)))
    return g, v, None if fixed else t


def cacr_setup(ctx: Any, op: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what ``cacr_gradient`` needs."""
    views, numbers, *options, ctx.want_grad, ctx.want_grad_numbers = inputs
    ctx.op, ctx.options = op, CACROptions(*options)
    _, _, grad_views, grad_numbers = output
    ctx.save_for_backward(views, numbers, grad_views, grad_numbers)
    ctx.set_materialize_grads(False)


def cacr_gradient(
    ctx: Any, g_loss: Tensor | None, g_parts: Tensor | None, g_views: Tensor | None, g_numbers: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients found in forward, scaled out of place.

    They are outputs of the operator and saved as such, so that a second derivative arrives as ``g_views`` and
    ``g_numbers``: those, like gradients of the parts, are answered by differentiating the reference.
    """
    views, numbers, grad_views, grad_numbers = ctx.saved_tensors
    need_views, need_numbers = ctx.needs_input_grad[:2]
    out_views, out_numbers = torch.zeros_like(views), torch.zeros_like(grad_numbers)
    if g_loss is not None:
        if (need_views and not ctx.want_grad) or (need_numbers and not ctx.want_grad_numbers):
            _, _, grad_views, grad_numbers = ctx.op(views, numbers, *ctx.options, need_views, need_numbers)
        out_views = g_loss * grad_views if need_views else out_views
        out_numbers = g_loss.to(grad_numbers.dtype) * grad_numbers if need_numbers else out_numbers
    if g_parts is not None:
        fixed = numbers is None
        _, pull = _vjp(
            lambda v, t: cacr_reference(v, None if fixed else t, ctx.options)[1],
            views,
            out_numbers if fixed else numbers,
        )
        more_views, more_numbers = pull(g_parts)
        out_views, out_numbers = out_views + more_views, out_numbers + more_numbers
    g_views, g_numbers = g_views if ctx.want_grad else None, g_numbers if ctx.want_grad_numbers else None
    if g_views is not None or g_numbers is not None:
        g_views = torch.zeros_like(views) if g_views is None else g_views
        g_numbers = torch.zeros_like(grad_numbers) if g_numbers is None else g_numbers
        _, more_views, more_numbers = cacr_second_order(
            views.new_ones(()), views, numbers, g_views, g_numbers, ctx.options
        )
        out_views, out_numbers = (
            out_views + more_views,
            out_numbers if more_numbers is None else out_numbers + more_numbers,
        )
    return out_views if need_views else None, out_numbers if need_numbers else None


# ---- contrast --------------------------------------------------------------------------------------------------------
def contrast_fake(
    q: Tensor,
    k: Tensor | None,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes: value and lse [S, P, N], weights [3, S, P, N], float64 whatever the inputs are.

    Without ``k`` the queries are the keys, too, and their gradient is the sum of both.

    ``weights`` is what a backend's own backward needs to give every pair the weight it had in forward.
    """
    shape = (len(kinds), len(q_index), q.shape[1])
    return tau.new_empty(shape), tau.new_empty(shape), tau.new_empty((3, *shape))


def contrast_backward_fake(
    q: Tensor,
    k: Tensor | None,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
    value: Tensor,
    weights: Tensor,
    grad_value: Tensor,
    grad_lse: Tensor,
    want_q: bool,
    want_k: bool,
    want_tau: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes: gradients of q, k and tau, [0] where not wanted."""
    dtype = arithmetic_dtype(q)
    grad_q = q.new_empty(q.shape if want_q else 0, dtype=dtype)
    grad_k = q.new_empty(k.shape if k is not None and want_k else 0, dtype=dtype)
    return grad_q, grad_k, torch.empty_like(tau) if want_tau else tau.new_empty(0)


class ContrastSpec(NamedTuple):
    """What the gradient does not flow to among the arguments of ``contrast_<backend>``."""

    q_id: Tensor | None
    k_id: Tensor | None
    kinds: list[int]
    q_index: list[int]
    k_index: list[int]
    inner: bool
    detach_weights: bool


def contrast_setup(ctx: Any, backward_op: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what ``contrast_gradient`` needs."""
    q, k, q_id, k_id, tau, *rest = inputs
    value, _, weights = output
    ctx.save_for_backward(q, k, q_id, k_id, tau, value, weights)
    ctx.rest, ctx.backward_op = tuple(rest), backward_op


def contrast_gradient(
    ctx: Any, grad_value: Tensor, grad_lse: Tensor, function: Any = None
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and tau, by the operator or the ``function`` around it."""
    q, k, q_id, k_id, tau, value, weights = ctx.saved_tensors
    want = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
    # The statistics are passed as constants: the second derivative recomputes them from q, k and tau.
    arguments = (q, k, q_id, k_id, tau, *ctx.rest, value.detach(), weights.detach(), grad_value, grad_lse, *want)
    grads = function.apply(*arguments, ctx.backward_op) if function else ctx.backward_op(*arguments)
    return tuple(g if w else None for g, w in zip(grads, want, strict=True))


def contrast_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what ``contrast_second_order`` needs."""
    q, k, q_id, k_id, tau, kinds, q_index, k_index, inner, detach, _, _, grad_value, grad_lse, *ctx.want = inputs
    ctx.save_for_backward(q, k, q_id, k_id, tau, grad_value, grad_lse)
    ctx.rest = kinds, q_index, k_index, inner, detach


@own_precision
def contrast_second_order(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiates the gradient of the plain formula w.r.t. q, k, tau and the incoming gradients."""
    q, k, q_id, k_id, tau, grad_value, grad_lse = ctx.saved_tensors
    own = k is None
    k, k_id = (q.new_empty(0), q_id) if own else (k, k_id)
    spec = ContrastSpec(q_id, k_id, *ctx.rest)

    def gradient(q: Tensor, k: Tensor, tau: Tensor, gv: Tensor, gl: Tensor) -> tuple[Tensor, ...]:
        (_, lse), pull = _vjp(lambda q, k, tau: _blocks.plain_contrast(q, q if own else k, tau, spec), q, k, tau)
        return tuple(pull((gv.to(lse.dtype), torch.where(lse == -torch.inf, 0.0, gl.to(lse.dtype)))))

    outputs, pull = _vjp(gradient, q, k, tau, grad_value, grad_lse)
    wanted = [g.to(o.dtype) if w else torch.zeros_like(o) for o, g, w in zip(outputs, grads, ctx.want, strict=True)]
    grad_q, grad_k, *others = pull(tuple(wanted))
    return grad_q, None if own else grad_k, *others


class Narrow:
    """An operator whose first ``count`` arguments come as float32, but were of a half type before (or ``None``).

    The operator takes them as they were, which is exact; Functions see float32, so that the gradients of several
    operators are added in float32, and a derivative of a derivative is taken in float32.
    """

    def __init__(self, op: Any, count: int, dtype: torch.dtype | None) -> None:
        self.op, self.count, self.dtype = op, count, dtype

    def __call__(self, *args: Any) -> Any:
        """Calls the operator."""
        if self.dtype is None:
            return self.op(*args)
        narrow = [x if x is None else x.to(self.dtype) for x in args[: self.count]]
        return self.op(*narrow, *args[self.count :])


def place(grads: tuple[Tensor | None, ...], at: tuple[int, ...], count: int) -> tuple[Tensor | None, ...]:
    """``count`` gradients, of which those of the inputs ``at`` are given."""
    result: list[Tensor | None] = [None] * count
    for i, grad in zip(at, grads, strict=True):
        result[i] = grad
    return tuple(result)


CONTRAST_DIFFERENTIABLE = (0, 1, 4)  # q, k, tau
CONTRAST_BACKWARD_DIFFERENTIABLE = (0, 1, 4, 12, 13)  # q, k, tau, grad_value, grad_lse


# ---- registration ----------------------------------------------------------------------------------------------------
def operator(name: str) -> Any:
    """``torch.ops.cacr_kernels.<name>``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _register_contrast(backend: str) -> None:
    forward, backward = f"{NAMESPACE}::contrast_{backend}", f"{NAMESPACE}::contrast_backward_{backend}"
    torch.library.define(forward, CONTRAST_SCHEMA)
    torch.library.define(backward, CONTRAST_BACKWARD_SCHEMA)
    torch.library.register_fake(forward, contrast_fake)
    torch.library.register_fake(backward, contrast_backward_fake)
    backward_op = operator(f"contrast_backward_{backend}")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        contrast_setup(ctx, backward_op, inputs, output)

    def formula(ctx: Any, grad_value: Tensor, grad_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return place(contrast_gradient(ctx, grad_value, grad_lse), CONTRAST_DIFFERENTIABLE, 10)

    def second(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return place(contrast_second_order(ctx, *grads), CONTRAST_BACKWARD_DIFFERENTIABLE, 17)

    torch.library.register_autograd(forward, formula, setup_context=setup)
    torch.library.register_autograd(backward, second, setup_context=contrast_backward_setup)


def _register_cacr(backend: str) -> None:
    name = f"{NAMESPACE}::cacr_{backend}"
    torch.library.define(name, CACR_SCHEMA)
    torch.library.register_fake(name, cacr_fake)
    op = operator(f"cacr_{backend}")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cacr_setup(ctx, op, inputs, output)

    def formula(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *cacr_gradient(ctx, *grads), *[None] * 9

    torch.library.register_autograd(name, formula, setup_context=setup)


for _backend in ("triton", "cuda", "cpu"):
    _register_cacr(_backend)
for _backend in ("torch", "triton", "cuda", "cpu"):
    _register_contrast(_backend)
torch.library.impl(f"{NAMESPACE}::contrast_torch", "CompositeExplicitAutograd", _blocks.contrast)
torch.library.impl(f"{NAMESPACE}::contrast_backward_torch", "CompositeExplicitAutograd", _blocks.contrast_backward)

# The gradient, unchanged; ``x`` is what it is the gradient of. See ``autograd.witness``.
torch.library.define(f"{NAMESPACE}::witness", "(Tensor grad, Tensor x) -> Tensor")
torch.library.impl(f"{NAMESPACE}::witness", "CompositeExplicitAutograd", lambda grad, x: grad.clone())
torch.library.register_fake(f"{NAMESPACE}::witness", lambda grad, x: torch.empty_like(grad))
torch.library.register_autograd(f"{NAMESPACE}::witness", lambda ctx, grad: (grad, None))
