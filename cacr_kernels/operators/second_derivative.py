"""Lets a second derivative that is taken outside compiled code be refused instead of being wrong.

AOTAutograd refuses to differentiate a compiled backward only if that reads a tensor which requires grad. Ours may read
nothing but gradients found in forward, and the second-order term would be missing without a word. So the inputs pass
through an identity whose backward reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch_private
from .registry import SingleProblem, declare, differentiate, implement, opaque, operator, prepare_compilers

# The gradient, unchanged; ``x`` is what it is the gradient of. To a compiler the operator reads both.
declare("gradient_of", "(Tensor grad, Tensor x) -> Tensor", lambda grad, x: torch.empty_like(grad))
implement("gradient_of", lambda grad, x: grad.clone())
differentiate("gradient_of", lambda ctx, grad: (grad, None))


class ReadInBackward(SingleProblem):
    """The identity, whose backward reads the input."""

    @staticmethod
    @_torch_private.positional
    def forward(x: Tensor) -> Tensor:
        """A view of the input."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps the input for the backward to read."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient as it is."""
        passed: Tensor = GradientOf.apply(grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return passed


class GradientOf(SingleProblem):
    """The identity of its first argument, by an operator that a compiler cannot look into."""

    @staticmethod
    @_torch_private.positional
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        """The gradient as it is."""
        passed: Tensor = operator("gradient_of")(grad, x)
        return passed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """The backward of an identity needs nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        return grad, None


@opaque
def _read_in_backward(x: Tensor) -> Tensor:
    passed: Tensor = ReadInBackward.apply(x)  # type: ignore[no-untyped-call]
    return passed


def _guarded(value: Any) -> Any:
    if isinstance(value, Sequence) and value and not isinstance(value, str | bytes):
        return [_guarded(x) for x in value]
    return _read_in_backward(value) if isinstance(value, Tensor) and value.requires_grad else value


def refuse_second_derivative_of_compiled(*arguments: Any) -> tuple[Any, ...]:
    """The arguments; under ``torch.compile`` such that a second derivative taken outside the compiled code is refused.

    Tensors that require grad count, also those in a list. Where the loss is of an intermediate result of the compiled
    function, ``backward()`` of the penalty is still refused, but ``autograd.grad(penalty, inputs)`` is out of reach.
    """
    if not torch.compiler.is_compiling():
        return arguments
    prepare_compilers()
    return tuple(_guarded(x) for x in arguments)
