"""The operators of ``csrc/cuda`` on CPU tensors: the kernels' own headers in the emulation of ``tests/cuda_emulation``.

``operators(library)`` gives Python functions with the schemas of ``cacr_kernels/operators``, for tensors of any type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARITHMETIC = ("bf16", "f16", "tf32", "tf32x3", "float", "double")  # as operators.cpp numbers them
OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "float", torch.float64: "double"}
_Pointer, _Int64, _Int32, _Bool = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_bool


class Call(ctypes.Structure):
    """csrc/cuda/call.h."""

    _fields_ = (
        ("operation", _Int32),
        *((name, _Pointer) for name in ("q", "k")),
        *((name, _Int64) for name in ("q_views", "k_views", "N", "M", "D", "pairs")),
        *((name, _Pointer) for name in ("q_index", "k_index", "q_id", "k_id", "q_self", "tau")),
        ("softmaxes", _Int32),
        ("kind", _Int32 * 2),
        *((name, _Bool) for name in ("keys_are_queries", "inner_product", "detach_weights", "normalize")),
        *((name, _Pointer) for name in ("value", "lse", "row_state", "grad_value", "grad_lse")),
        *((name, _Pointer) for name in ("grad_q", "grad_k", "grad_tau")),
        ("pairing", _Int32),
        ("rbf", _Bool),
        ("numbers", _Pointer),
        ("given", ctypes.c_double * 5),
        *((name, _Pointer) for name in ("loss", "parts", "grad_numbers")),
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None or not x.numel() else x.data_ptr()


def _indices(index: Sequence[int]) -> Any:
    return (ctypes.c_int64 * max(1, len(index)))(*index)


def _nan(like: Tensor, *shape: int) -> Tensor:
    """Memory that has to be written."""
    return torch.full(shape, torch.nan, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


@dataclass
class Emulation:
    """One way to run the kernels.

    Attributes:
        library: the emulation.
        seed: of the schedule.
        resident_blocks: how many blocks are resident; 0: no cooperative launch.
        room: how many blocks of a cooperative launch there is room for when it comes to it; -1: for all.
        float32: the arithmetic of float32: float, tf32, tf32x3.
        nearest: tensor cores round sums to nearest instead of truncating them (``tensor_cores.h``).
    """

    library: Path
    seed: int = 0
    resident_blocks: int = 3
    room: int = -1
    float32: str = "float"
    nearest: bool = False

    def __post_init__(self) -> None:
        self.code = ctypes.CDLL(str(self.library))
        self.code.cacr_emulate.restype = ctypes.c_char_p
        self.code.cacr_call_bytes.restype = ctypes.c_size_t
        assert self.code.cacr_call_bytes() == ctypes.sizeof(Call)

    def run(self, call: Call, dtype: torch.dtype) -> None:
        """Raises RuntimeError if the emulation finds something wrong."""
        name = self.float32 if dtype == torch.float32 else OF_DTYPE[dtype]
        how = ctypes.c_uint64(self.seed), self.resident_blocks, self.room, ctypes.c_bool(self.nearest)
        error = self.code.cacr_emulate(ARITHMETIC.index(name), ctypes.byref(call), *how)
        if error is not None:
            raise RuntimeError(error.decode())

    def problem(
        self,
        operation: int,
        tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor],
        lists: tuple[Sequence[int], Sequence[int], Sequence[int]],
        flags: tuple[bool, bool, bool],
    ) -> tuple[Call, Any]:
        """A call, and what has to stay alive for it. flags: inner_product, detach_weights, normalize."""
        (q, k, q_id, k_id, q_self, tau), (kinds, *index) = tensors, lists
        q, k = q.contiguous(), None if k is None else k.contiguous()
        keys, masked = q if k is None else k, any(kinds)
        q_id, k_id, q_self = (q_id, q_id if k is None else k_id, q_self) if masked else (None, None, None)
        tau, arrays = tau.contiguous(), [_indices(i) for i in index]
        call = Call(operation=operation, q=_pointer(q), k=_pointer(keys), q_views=q.shape[0], k_views=keys.shape[0])
        call.N, call.M, call.D, call.pairs = q.shape[1], keys.shape[1], q.shape[2], len(index[0])
        call.q_index, call.k_index = (ctypes.cast(a, ctypes.c_void_p) for a in arrays)
        call.q_id, call.k_id, call.q_self, call.tau = map(_pointer, (q_id, k_id, q_self, tau))
        call.softmaxes, call.kind = len(kinds), (ctypes.c_int32 * 2)(*kinds)
        call.keys_are_queries, (call.inner_product, call.detach_weights, call.normalize) = k is None, flags
        return call, (q, k, q_id, k_id, q_self, tau, arrays)

    def contrast(
        self,
        q: Tensor,
        k: Tensor | None,
        q_id: Tensor | None,
        k_id: Tensor | None,
        tau: Tensor,
        kinds: list[int],
        q_index: list[int],
        k_index: list[int],
        inner_product: bool,
        detach_weights: bool,
        q_self: Tensor | None,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``contrast_cuda``."""
        lists, flags = (kinds, q_index, k_index), (inner_product, detach_weights, normalize)
        call, keep = self.problem(0, (q, k, q_id, k_id, q_self, tau), lists, flags)
        shape = (len(kinds), len(q_index), q.shape[1])
        value, lse, row_state = (torch.full((*n, *shape), torch.nan, dtype=torch.float64) for n in ((), (), (3,)))
        call.value, call.lse, call.row_state = map(_pointer, (value, lse, row_state))
        self.run(call, q.dtype)
        del keep
        return value, lse, row_state

    def contrast_backward(
        self,
        q: Tensor,
        k: Tensor | None,
        q_id: Tensor | None,
        k_id: Tensor | None,
        tau: Tensor,
        kinds: list[int],
        q_index: list[int],
        k_index: list[int],
        inner_product: bool,
        detach_weights: bool,
        q_self: Tensor | None,
        normalize: bool,
        value: Tensor,
        row_state: Tensor,
        grad_value: Tensor,
        grad_lse: Tensor,
        want_q: bool,
        want_k: bool,
        want_tau: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``contrast_backward_cuda``."""
        lists, flags = (kinds, q_index, k_index), (inner_product, detach_weights, normalize)
        call, keep = self.problem(1, (q, k, q_id, k_id, q_self, tau), lists, flags)
        grad_q = _nan(q, *q.shape) if want_q else _nan(q, 0)
        grad_k = _nan(q, *k.shape) if k is not None and want_k else _nan(q, 0)
        grad_tau = torch.full((len(kinds) if want_tau else 0,), torch.nan, dtype=torch.float64)
        rows = [x.contiguous() for x in (value, row_state, grad_value, grad_lse)]
        call.value, call.row_state, call.grad_value, call.grad_lse = map(_pointer, rows)
        call.grad_q, call.grad_k, call.grad_tau = map(_pointer, (grad_q, grad_k, grad_tau))
        self.run(call, q.dtype)
        del keep
        return grad_q, grad_k, grad_tau

    def cacr(
        self,
        views: Tensor,
        numbers: Tensor | None,
        tau_pos: float,
        tau_neg: float,
        alpha: float,
        beta: float,
        pairing: int,
        rbf: bool,
        rbf_scale: float,
        normalize: bool,
        want_grad: bool,
        want_grad_numbers: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``cacr_cuda``."""
        views = views.contiguous()
        (V, B, D), given = views.shape, (tau_pos, tau_neg, alpha, beta, rbf_scale)
        call = Call(operation=2, q=_pointer(views), q_views=V, N=B, D=D, normalize=normalize, pairing=pairing, rbf=rbf)
        call.numbers, call.given = _pointer(numbers), (ctypes.c_double * 5)(*given)
        loss, parts, grad = _nan(views), _nan(views, 4), _nan(views, *(views.shape if want_grad else (0,)))
        grad_numbers = torch.zeros(0 if numbers is None else 5, dtype=torch.float64)
        call.loss, call.parts, call.grad_q = map(_pointer, (loss, parts, grad))
        call.grad_numbers = _pointer(grad_numbers) if want_grad_numbers else None
        self.run(call, views.dtype)
        return loss, parts, grad, grad_numbers
