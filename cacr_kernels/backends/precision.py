"""How products of float32 are made: on a GPU by both of its backends, and on a CPU with tiles of bfloat16."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from ..operators.registry import constant_while_compiling

Products = Literal["ieee", "tf32", "tf32x3"]
VARIABLE = "CACR_TF32X3"


def fp32_products() -> Products:
    """As PyTorch makes its own, ``torch.backends.cuda.matmul.fp32_precision``: IEEE unless TF32 was allowed.

    With ``CACR_TF32X3=1`` in the environment three TF32 products stand in for IEEE, on tensor cores. Those cut off what
    they add up: with backend "triton" the error grows with the number of keys (docs/precision.md).
    """
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if os.environ.get(VARIABLE, "") not in ("", "0") else "ieee"


@constant_while_compiling
def cpu_products(dtype: torch.dtype) -> str:
    """``"_bf16"`` for bfloat16, and for float32 where PyTorch may make its own products of bfloat16.

    That is ``torch.backends.mkldnn.matmul.fp32_precision``.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    rounds = dtype == torch.bfloat16 or (dtype == torch.float32 and matmul.fp32_precision == "bf16")
    return "_bf16" if rounds else ""
