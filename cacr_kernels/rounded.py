"""The definition as kernels differentiate it that round what multiplies half features in a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import reference


class _RoundedGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded to a half type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A view of the input."""
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """What the type can hold."""
        return grad.to(ctx.dtype).to(grad.dtype), None


@contextlib.contextmanager
def rounded_coefficients(dtype: torch.dtype, positives: bool) -> Iterator[None]:
    """Inside, the definition rounds gradients of costs to ``dtype``; with ``positives`` those of positives, too."""
    names = ["pairwise_cost", "inner_product"] + ["difference_cost"] * positives

    def rounding(exact: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: _RoundedGradient.apply(exact(q, k), dtype)  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(reference, name, rounding(getattr(reference, name))))
        yield
