"""Backend "cuda" where there is no GPU: what it says, when "auto" takes it, what it registers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cacr_kernels
from cacr_kernels import _cuda, _extension
from cacr_kernels._products import VARIABLE

backends: Any = importlib.import_module("cacr_kernels.backends")
CPU = torch.device("cpu")


def test_says_why_it_cannot_run():
    reason = cacr_kernels.backends()["cuda"]
    if torch.version.cuda is None:
        assert reason is not None
        assert "is not a CUDA build" in reason
    with pytest.raises(ValueError, match="backend='cuda' cannot run here: "):
        cacr_kernels.cacr_loss(torch.eye(4).repeat(2, 1, 1), backend="cuda")


def with_library(monkeypatch, **cuda):
    """As under a CUDA build of torch with the library loaded."""
    monkeypatch.setattr(_extension, "_CUDA", _extension.Extension(_extension._CUDA.path, None))
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def test_no_device(monkeypatch):
    with_library(monkeypatch, is_available=False)
    assert backends._cuda(None) == "no CUDA device: torch finds none on this machine"
    assert backends._cuda(CPU) == "the CUDA kernels work on CUDA tensors, not on cpu"


def test_old_device(monkeypatch):
    with_library(monkeypatch, is_available=True, get_device_capability=(7, 5))
    assert "8.0" in backends._cuda(None)
    with_library(monkeypatch, is_available=True, get_device_capability=(8, 0))
    assert backends._cuda(None) is None


def test_auto_goes_by_size(monkeypatch):
    able = tuple(b._replace(why_not=lambda device: None) for b in backends.TABLE if b.name != "cpu")
    gpu = torch.device("cuda")
    monkeypatch.setattr(backends, "TABLE", able)
    assert backends.select("auto", gpu, backends.CUDA_UP_TO) == "cuda"
    assert backends.select("auto", gpu, backends.CUDA_UP_TO + 1) == "triton"
    monkeypatch.setattr(backends, "TABLE", tuple(b for b in able if b.name != "triton"))
    assert backends.select("auto", gpu, backends.CUDA_UP_TO + 1) == "cuda"


@pytest.mark.parametrize(
    ("asked", "variable", "products"),
    [
        ("ieee", "", _cuda.IEEE),
        ("none", "0", _cuda.IEEE),
        ("tf32", "1", _cuda.TF32),
        ("none", "1", _cuda.TF32X3),
        ("ieee", "1", _cuda.TF32X3),
    ],
)
def test_products_of_float32(asked, variable, products, monkeypatch):
    monkeypatch.setenv(VARIABLE, variable)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = asked
        assert _cuda.float_products() == products
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("pairing", ["unordered", "ordered", "pooled"])
def test_pairs_of_the_fused_loss(pairing):
    """``MAX_PAIRS`` is that of the kernels, which have no check of their own."""
    source = (_extension._CUDA.path.parents[1] / "csrc/cuda/parameters.h").read_text()
    assert f"constexpr int kMaxPairs = {_cuda.MAX_PAIRS};" in source
    most = {"unordered": 11, "ordered": 8, "pooled": 500}[pairing]
    assert not _cuda.too_many_views((most, 2, 3), pairing)
    assert _cuda.too_many_views((most + 1 if pairing != "pooled" else 3000, 2, 3), pairing)


def test_fakes():
    """Shapes and dtypes without a kernel: half types have gradients of float32."""
    with FakeTensorMode():
        views = torch.empty(3, 7, 5, dtype=torch.float16)
        loss, parts, grad, numbers = torch.ops.cacr_kernels.cacr_cuda(
            views, None, *[1.0] * 4, 0, False, 2.0, True, False
        )
        assert (loss.shape, parts.shape, grad.shape, numbers.shape) == ((), (4,), views.shape, (0,))
        assert {loss.dtype, parts.dtype, grad.dtype} == {torch.float32}
        tau, ids = torch.ones(2, dtype=torch.float64), torch.zeros(7, dtype=torch.int32)
        arguments = views, None, ids, None, tau, [1, 2], [0, 1], [1, 2], False, False
        value, lse, weights = torch.ops.cacr_kernels.contrast_cuda(*arguments)
        assert (value.shape, lse.shape, weights.shape) == ((2, 2, 7), (2, 2, 7), (3, 2, 2, 7))
