"""Registers the kernels for the operators of ``cacr_kernels/operators/ops.py``, which has schemas, fakes and gradients.

This is what ``torch.library.triton_op`` consists of, without its wrapper, which adds 40 us to a call: an implementation
that launches, and a decomposition under ``FunctionalTensorMode``, by which ``torch.compile`` sees the kernels
themselves (``torch.library.wrap_triton``) instead of an opaque operator. Exported programs keep the operator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from ...operators.ops import NAMESPACE
from . import table
from .launch import tracing

WHERE = {
    "contrast_triton": ("contrast", "contrast"),
    "contrast_backward_triton": ("contrast", "contrast_backward"),
    "contrast_frozen_triton": ("detached_keys", "detached_keys"),
    "cacr_triton": ("cacr", "cacr"),
}


def implementation(name: str) -> Callable[..., Any]:
    """The function that launches, which imports Triton."""
    module, function = WHERE[name]
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    return found


def _register(name: str) -> None:
    qualified = f"{NAMESPACE}::{name}"
    loaded: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not loaded:
            loaded.append(implementation(name))
        return loaded[0](*args)

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        interpreted = table.processor_of(args[0].device).family == "interpreter"
        if interpreted or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, tracing():
            return implementation(name)(*args, **kwargs)

    torch.library.impl(qualified, ("CPU", "CUDA"), launch)
    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, decompose)


for _name in WHERE:
    _register(_name)
