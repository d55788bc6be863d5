"""What can be shown of the CUDA library under a CUDA build of torch where there is no GPU: it loads, and it refuses."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

import cacr_kernels
from cacr_kernels.backends.library import cuda_library

OPERATORS = torch.ops.cacr_kernels


def refused(call: Callable[[], Any], words: str) -> None:
    """``call`` raises, and says ``words``."""
    said = "nothing"
    try:
        call()
    except (RuntimeError, ValueError) as error:
        said = str(error)
    assert words in said, f"{words!r} expected, {said!r} raised"


def check_library() -> None:
    """Loaded, all operators registered, and what it takes from libtorch_cuda is there."""
    assert torch.version.cuda, "this is about a CUDA build of torch"
    assert not torch.cuda.is_available(), "this is about a machine without a GPU"
    assert "site-packages" in cacr_kernels.__file__, cacr_kernels.__file__
    assert cuda_library().loaded, cuda_library()
    for name in ("contrast", "contrast_backward", "cacr"):
        for operator in (f"cacr_kernels::{name}_cuda", f"cacr_kernels_cuda::{name}"):
            found = torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
            assert found, f"{operator} has no kernel for CUDA"
    assert ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD).aoti_torch_get_current_cuda_stream


def check_shapes() -> None:
    """Fake tensors on a GPU."""
    with torch._subclasses.FakeTensorMode():
        views = torch.empty(2, 5, 3, device="cuda", dtype=torch.bfloat16)
        loss, _, grad, _ = OPERATORS.cacr_cuda(views, None, 1, 1, 1, 1, 0, False, 2, False, True, False)
        assert loss.dtype == grad.dtype == torch.float32
        assert grad.device.type == "cuda"


def check_selection() -> None:
    """No device, in words, from the table, from the selection and from CUDA itself."""
    select = importlib.import_module("cacr_kernels.backends.table").select
    refused(lambda: cacr_kernels.cacr_loss(torch.randn(2, 5, 3), backend="cuda"), "CUDA tensors, not on cpu")
    refused(lambda: select("cuda", torch.device("cuda")), "backend='cuda' cannot run here: no CUDA device")
    reason = cacr_kernels.available_backends()["cuda"]
    assert reason is not None
    assert reason.startswith("no CUDA device"), reason
    said = cuda_library().text("cacr_cuda_error", 0)
    assert said, "the probe finds nothing wrong"
    print(f'loaded and registered; refuses with "{reason}"; asked about device 0, CUDA says "{said}"')


def directly(name: str, *arguments: Any) -> Any:
    """The compiled operator, called with CPU tensors as if they were on a GPU."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.cacr_kernels_cuda, name).default.redispatch(cuda, *arguments)


def check_binding() -> None:
    """Arguments that the kernels would trust."""
    q, ids = torch.zeros(2, 5, 3), torch.zeros(5, dtype=torch.int32)
    tau, rows = torch.ones(1, dtype=torch.float64), torch.zeros(1, 1, 5, dtype=torch.float64)
    contrast: dict[str, Any] = {"q": q, "k": None, "q_id": ids, "k_id": None, "tau": tau, "kinds": [2]}
    contrast |= {"q_index": [0], "k_index": [1], "inner": False, "detach_weights": False, "q_self": None}
    contrast["normalize"] = True
    products = {"float_products": 0}
    backward = contrast | {"value": rows, "row_state": torch.zeros(3, *rows.shape, dtype=torch.float64)}
    backward |= {"grad_value": rows, "grad_lse": rows, "want_q": True, "want_k": False, "want_tau": True}
    numbers = dict.fromkeys(("tau_pos", "tau_neg", "alpha", "beta"), 1.0)
    loss = {"views": q, "numbers": None, **numbers, "pairing": 0, "rbf": False, "rbf_scale": 2.0, "normalize": True}
    loss |= {"want_grad": True, "want_grad_numbers": False}
    given = {"contrast": contrast | products, "contrast_backward": backward | products, "cacr": loss | products}
    for name, arguments in given.items():
        refused(lambda n=name, a=arguments: directly(n, *a.values()), "CUDA tensors expected")
    wrong: list[tuple[str, str, Any, str]] = [
        ("contrast", "q", q[0], "q [Vq, N, D]"),
        ("contrast", "k", q.double(), "of one dtype"),
        ("contrast", "tau", tau.float(), "tau [softmaxes] of float64"),
        ("contrast", "q_id", ids.long(), "of int32"),
        ("contrast", "q_id", ids[:4], "q_id [N]"),
        ("contrast", "q_self", ids.long(), "q_self [N] of int32"),
        ("contrast", "kinds", [5], "kind of a softmax"),
        ("contrast", "kinds", [-1], "kind of a softmax"),
        ("contrast", "kinds", [], "one or two softmaxes"),
        ("contrast", "k_index", [2], "view index out of range"),
        ("contrast", "k_index", [0, 1], "of one length"),
        ("contrast", "float_products", 3, "products of float32"),
        *(("contrast_backward", n, rows.float(), n) for n in ("value", "grad_value", "grad_lse")),
        *(("contrast_backward", n, rows[..., :4], n) for n in ("value", "row_state", "grad_value", "grad_lse")),
        ("cacr", "views", q[0], "views [V, B, D]"),
        ("cacr", "views", q[:0], "empty dimension"),
        ("cacr", "views", torch.zeros(12, 5, 3), "too many views"),
        ("cacr", "numbers", torch.ones(4, dtype=torch.float64), "numbers [5]"),
        ("cacr", "pairing", 3, "pairing"),
        ("cacr", "float_products", -1, "products of float32"),
    ]
    for name, argument, value, words in wrong:
        changed = given[name] | {argument: value}
        refused(lambda n=name, a=changed: directly(n, *a.values()), words)


check_library()
check_shapes()
check_selection()
check_binding()
