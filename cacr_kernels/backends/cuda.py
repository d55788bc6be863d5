"""Backend "cuda": the operators of ``ops.py`` on CUDA tensors, by the compiled ones of ``csrc/cuda/binding.cpp``.

Those have one more argument, the kind of products of float32, which torch keeps where its stable ABI does not reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..operators.ops import CACR_SCHEMA, CONTRAST_BACKWARD_SCHEMA, CONTRAST_SCHEMA, NAMESPACE
from ..types import Pairing
from .precision import fp32_products

SCHEMAS = {"contrast": CONTRAST_SCHEMA, "contrast_backward": CONTRAST_BACKWARD_SCHEMA, "cacr": CACR_SCHEMA}
COMPILED = "cacr_kernels_cuda"  # namespace of the compiled operators
IEEE, TF32, TF32X3 = range(3)
MAX_PAIRS = 64  # of views in the fused loss, kMaxPairs of csrc/cuda/parameters.h
MAX_ALIGNED = 1 << 24  # costs of views of one instance in the fused loss: B V^2


def float_products() -> int:
    """As ``csrc/cuda/binding.cpp`` numbers them."""
    return {"ieee": IEEE, "tf32": TF32, "tf32x3": TF32X3}[fp32_products()]


def pairs_of_views(V: int, pairing: Pairing) -> int:
    """How many times queries of a view meet negatives of a view."""
    return {"unordered": V * (V - 1) // 2, "ordered": V * (V - 1), "pooled": 1}[pairing]


def too_many_views(shape: tuple[int, ...], pairing: Pairing) -> bool:
    """Whether views of ``shape`` [V, B, D] are beyond the fused loss, so that it has to be composed of ``contrast``."""
    V, B = shape[:2]
    return pairs_of_views(V, pairing) > MAX_PAIRS or B * V * V > MAX_ALIGNED


class Arithmetic(NamedTuple):
    """What the kernels do per product of two features (csrc/cuda/tile/arithmetic.cuh)."""

    owned: int  # features whose gradient a block adds up; for every such group similarities are computed again
    pieces: int  # multiply-adds that one product of a gradient takes
    cost: int  # of a multiply-add, in those of bfloat16: peaks of A100 and H100, three products for each of TF32X3


ARITHMETIC: dict[torch.dtype | int, Arithmetic] = {
    torch.bfloat16: Arithmetic(64, 3, 1),
    torch.float16: Arithmetic(64, 2, 1),
    TF32: Arithmetic(64, 1, 2),
    TF32X3: Arithmetic(32, 1, 6),
    IEEE: Arithmetic(64, 1, 16),
}


def work(similarities: int, D: int, dtype: torch.dtype) -> float:
    """Multiply-adds of bfloat16 that take as long as a loss of so many similarities (P N M) and both its gradients.

    Infinite for float64, which the kernels compute on ordinary units in groups of 16 features.
    """
    if dtype == torch.float64:
        return math.inf
    owned, pieces, cost = ARITHMETIC[float_products() if dtype == torch.float32 else dtype]
    groups = -(-D // owned)
    return similarities * D * cost * (1 + 2 * (groups + pieces))


def _register(name: str, schema: str) -> None:
    torch.library.define(f"{COMPILED}::{name}", schema.replace(") ->", ", int float_products) ->"))
    compiled: Callable[..., Any] = getattr(getattr(torch.ops, COMPILED), name).default
    torch.library.impl(f"{NAMESPACE}::{name}_cuda", "CUDA", lambda *arguments: compiled(*arguments, float_products()))


for _name, _schema in SCHEMAS.items():
    _register(_name, _schema)
