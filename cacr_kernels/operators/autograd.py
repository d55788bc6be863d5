"""Autograd Functions around the operators."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends.table import no_vmap
from . import ops

F = TypeVar("F", bound=Callable[..., Any])


class _Bound(NamedTuple):
    """Positional arguments as ``inspect.BoundArguments`` gives them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _Positional(inspect.Signature):
    """The signature of a function without defaults, whose ``bind`` takes positional arguments as they are."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """All arguments, trusted where they are positional."""
        return super().bind(*args, **kwargs) if kwargs else _Bound(args, {})


def _positional(forward: F) -> F:
    """``Function.apply`` inspects that of ``forward`` in every call, 0.1 ms; this one costs next to nothing."""
    signature = _Positional(list(inspect.signature(forward).parameters.values()))
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)  # saves 36 us if there


def _run(op: Any, *args: Any) -> Any:
    """The operator itself: below a Function there is no graph to record, and its own autograd formula has no part."""
    with _below_autograd():
        return op(*args)


class SingleProblem(Function):
    """A Function without a rule for batches, which says so in words of the public losses (``jacrev`` gets here)."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refused."""
        raise ValueError(no_vmap("this backend"))


# Whether the backward at hand keeps its graph for another one. Not public: where it is missing, it might.
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: True)


def _scaled(g_loss: Tensor, grad: Tensor) -> Tensor:
    """``g_loss * grad``; ``grad`` itself after ``loss.backward()``, where nobody will ask for it a second time."""
    last = type(g_loss) is Tensor and g_loss.device.type == "cpu" and not _keeps_graph()
    known = last and not _transforms_active() and not _batched(g_loss)
    return grad if known and g_loss.item() == 1 else g_loss * grad


class CACRFunction(SingleProblem):
    """``cacr_loss`` of views [V, B, D], numbers [5] or ``None``, with both gradients found in forward.

    Returns loss, parts and the two gradients, of which only the loss is differentiable. ``backward`` never writes to
    them; where it is differentiated it calls :class:`CACRGradient`, so that a second derivative, also inside a larger
    graph, is that of the reference.
    """

    @staticmethod
    @_positional
    def forward(
        views: Tensor,
        numbers: Tensor | None,
        options: ops.CACROptions,
        want_grad: bool,
        want_grad_numbers: bool,
        op: Any,
    ) -> tuple[Tensor, ...]:
        """Runs the operator."""
        outputs: tuple[Tensor, ...] = _run(op, views, numbers, *options, want_grad, want_grad_numbers)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves inputs and the gradients."""
        views, numbers, ctx.options, ctx.want_grad, ctx.want_grad_numbers, ctx.op = inputs
        _, parts, grad_views, grad_numbers = output
        ctx.mark_non_differentiable(parts, grad_views, grad_numbers)
        ctx.save_for_backward(views, numbers, grad_views, grad_numbers)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        """Scales the gradients, in their own dtype."""
        if g_loss is None:
            return (None,) * 6
        views, numbers, grad_views, grad_numbers = ctx.saved_tensors
        need_views, need_numbers, *_ = ctx.needs_input_grad
        if (need_views and not ctx.want_grad) or (need_numbers and not ctx.want_grad_numbers):
            wanted = ctx.options, need_views, need_numbers, ctx.op
            _, _, grad_views, grad_numbers = _apply(CACRFunction, views, numbers, *wanted)
        if not torch.is_grad_enabled():  # nobody differentiates the gradient
            out_numbers = g_loss.to(grad_numbers.dtype) * grad_numbers if need_numbers else None
            return _scaled(g_loss, grad_views) if need_views else None, out_numbers, None, None, None, None
        if not need_views:
            grad_views = torch.zeros_like(views)
        out_views, out_numbers = _apply(CACRGradient, g_loss, views, numbers, grad_views, grad_numbers, ctx.options)
        return out_views if need_views else None, out_numbers if need_numbers else None, None, None, None, None


class CACRGradient(SingleProblem):
    """The gradients of the loss times ``g_loss``; its backward differentiates the gradient of the reference."""

    @staticmethod
    @_positional
    def forward(
        g_loss: Tensor,
        views: Tensor,
        numbers: Tensor | None,
        grad_views: Tensor,
        grad_numbers: Tensor,
        options: ops.CACROptions,
    ) -> tuple[Tensor, Tensor]:
        """Scales."""
        return g_loss * grad_views, g_loss.to(grad_numbers.dtype) * grad_numbers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Saves the inputs."""
        g_loss, views, numbers, _, _, ctx.options = inputs
        ctx.save_for_backward(g_loss, views, numbers)

    @staticmethod
    def backward(ctx: Any, gg_views: Tensor, gg_numbers: Tensor) -> tuple[Any, ...]:
        """Derivatives w.r.t. g_loss, views and numbers."""
        g_loss, views, numbers = ctx.saved_tensors
        g, v, t = ops.cacr_second_order(g_loss, views, numbers, gg_views, gg_numbers, ctx.options)
        return g, v, t, None, None, None


class ContrastFunction(SingleProblem):
    """``contrast`` with both sets in one pass: ``apply(*arguments of the operator, op, backward_op)``."""

    @staticmethod
    @_positional
    def forward(
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
        op: Any,
        backward_op: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the operator."""
        outputs: tuple[Tensor, Tensor, Tensor] = _run(
            op, q, k, q_id, k_id, tau, kinds, q_index, k_index, inner, detach_weights
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves inputs and statistics."""
        ctx.mark_non_differentiable(output[2])
        ops.contrast_setup(ctx, inputs[-1], inputs[:-2], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Calls :class:`ContrastGradient`."""
        grad_value, grad_lse, _ = grads
        found = ops.contrast_gradient(ctx, grad_value, grad_lse, ContrastGradient)
        return ops.place(found, ops.CONTRAST_DIFFERENTIABLE, 12)


class ContrastGradient(SingleProblem):
    """``contrast_backward``, whose own backward differentiates the plain formula."""

    @staticmethod
    @_positional
    def forward(
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
        op: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the operator."""
        indices = kinds, q_index, k_index
        given = value, weights, grad_value, grad_lse
        outputs: tuple[Tensor, Tensor, Tensor] = _run(
            op, q, k, q_id, k_id, tau, *indices, inner, detach_weights, *given, want_q, want_k, want_tau
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the inputs."""
        ops.contrast_backward_setup(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Second derivatives."""
        return ops.place(ops.contrast_second_order(ctx, *grads), ops.CONTRAST_BACKWARD_DIFFERENTIABLE, 18)


class AlignedCost(SingleProblem):
    """c[v, u, b] = |q[v, b] - k[u, b]|^2 by form differences; q [V, B, D], k [U, B, D].

    No array larger than the inputs is kept: the backward recomputes the differences, one pair of views at a time, and
    is differentiable itself.
    """

    @staticmethod
    @_positional
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


class Witness(SingleProblem):
    """The identity, whose backward holds on to its input."""

    @staticmethod
    @_positional
    def forward(x: Tensor) -> Tensor:
        """A view."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Saves the input."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The identity."""
        passed: Tensor = _apply(WitnessGradient, grad, *ctx.saved_tensors)
        return passed


class WitnessGradient(SingleProblem):
    """The identity of its first argument, opaque to a compiler."""

    @staticmethod
    @_positional
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        """Runs the operator."""
        passed: Tensor = ops.operator("witness")(grad, x)
        return passed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The identity."""
        return grad, None


def _opaque(function: F) -> F:
    return cast("F", torch.compiler.allow_in_graph(function))


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


# Without a transform of torch.func, Function.apply adds 15 us to a small loss and nothing else. What tells whether
# there is one is not public: where it is missing, Function.apply it is.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda x: True)


def _needs_functorch(x: Tensor, y: Tensor | None) -> bool:
    return _transforms_active() or _wrapped(x) or (y is not None and _wrapped(y))


def _plain_apply(function: type[Function]) -> Any:
    return super(Function, function).apply  # type: ignore[misc]


# torch.compile takes these calls whole and traces below them: what it would make of the Functions itself is wrong for
# derivatives of derivatives (a gradient of torch.func.grad would be zero).
@_opaque
def fused_cacr(
    backend: str,
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
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [] and parts [4] by ``cacr_<backend>``; ``narrow``: see ``ops.Narrow``."""
    options = ops.CACROptions(tau_pos, tau_neg, alpha, beta, pairing, rbf, rbf_scale)
    op = ops.Narrow(ops.operator(f"cacr_{backend}"), 1, narrow)
    apply = CACRFunction.apply if _needs_functorch(views, numbers) else _plain_apply(CACRFunction)
    loss, parts, _, _ = apply(views, numbers, options, want_grad, want_grad_numbers, op)
    return loss, parts


@_opaque
def contrast(
    backend: str,
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
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cost and log-sum-exp [S, P, N], float64, by ``contrast_<backend>``; no ``k``: the queries are the keys.

    ``narrow``: see ``ops.Narrow``.
    """
    functions = [ops.Narrow(ops.operator(f"{name}_{backend}"), 2, narrow) for name in ("contrast", "contrast_backward")]
    arguments = q, k, q_id, k_id, tau, list(kinds), list(q_index), list(k_index), inner, detach_weights
    value, lse, _ = _apply(ContrastFunction, *arguments, *functions)
    return value, lse


@_opaque
def aligned_cost(q: Tensor, k: Tensor) -> Tensor:
    """Costs [V, U, B] between the views of the same instances."""
    cost: Tensor = _apply(AlignedCost, q, k)
    return cost


@_opaque
def _witness(x: Tensor) -> Tensor:
    passed: Tensor = _apply(Witness, x)
    return passed


def witness(x: Tensor) -> Tensor:
    """``x``; under ``torch.compile`` such that a second derivative taken outside the compiled code is refused.

    AOTAutograd refuses to differentiate a compiled backward only if that reads a tensor which requires grad. Ours may
    read nothing but gradients found in forward, and the second-order term would be missing without a word. Where the
    loss is of an intermediate result of the compiled function, ``backward()`` of the penalty is still refused, but
    ``autograd.grad(penalty, inputs)`` is out of reach here.
    """
    return _witness(x) if torch.compiler.is_compiling() and x.requires_grad else x
