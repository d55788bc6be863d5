"""Eager computations as a GPU does them with TF32 products."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .formats import tf32_round


class TF32Products(TorchDispatchMode):
    """Matrix products of float32 with both factors rounded to TF32."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.PRODUCTS:
            args = [self.rounded(x) for x in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return x
        return torch.from_numpy(tf32_round(x.detach().contiguous().numpy()))
