"""Backend "cuda": the operators of ``ops.py`` on CUDA tensors, by the compiled ones of ``csrc/cuda/binding.cpp``.

Those have one more argument, the kind of products of float32, which torch keeps where its stable ABI does not reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._products import fp32_products
from .ops import CACR_SCHEMA, CONTRAST_BACKWARD_SCHEMA, CONTRAST_SCHEMA, NAMESPACE, operator
from .types import Pairing

SCHEMAS = {"contrast": CONTRAST_SCHEMA, "contrast_backward": CONTRAST_BACKWARD_SCHEMA, "cacr": CACR_SCHEMA}
IEEE, TF32, TF32X3 = range(3)
MAX_PAIRS = 64  # of views in the fused loss, kMaxPairs of csrc/cuda/parameters.h
MAX_ALIGNED = 1 << 24  # costs of views of one instance in the fused loss: B V^2


def float_products() -> int:
    """As ``csrc/cuda/binding.cpp`` numbers them."""
    return {"ieee": IEEE, "tf32": TF32, "tf32x3": TF32X3}[fp32_products()]


def too_many_views(shape: tuple[int, ...], pairing: Pairing) -> bool:
    """Whether views of ``shape`` [V, B, D] are beyond the fused loss, so that it has to be composed of ``contrast``."""
    V, B = shape[:2]
    pairs = {"unordered": V * (V - 1) // 2, "ordered": V * (V - 1), "pooled": 1}[pairing]
    return pairs > MAX_PAIRS or B * V * V > MAX_ALIGNED


def _register(name: str, schema: str) -> None:
    torch.library.define(f"{NAMESPACE}::cuda_{name}", schema.replace(") ->", ", int float_products) ->"))
    compiled: Callable[..., Any] = operator(f"cuda_{name}")
    torch.library.impl(f"{NAMESPACE}::{name}_cuda", "CUDA", lambda *arguments: compiled(*arguments, float_products()))


for _name, _schema in SCHEMAS.items():
    _register(_name, _schema)
