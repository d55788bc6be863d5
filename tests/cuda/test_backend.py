"""Backend "cuda" where there is no GPU: what it says, when "auto" takes it, what it registers."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cacr_kernels
from cacr_kernels.backends import cuda as backend_cuda
from cacr_kernels.backends import library
from cacr_kernels.backends.entry import Backend, Size
from cacr_kernels.backends.precision import VARIABLE
from tests.cuda_emulation.building import emulated_library

backends: Any = importlib.import_module("cacr_kernels.backends.table")
steps: Any = importlib.import_module("cacr_kernels.steps")
ROOT = library._CUDA.path.parents[1]
CPU = torch.device("cpu")


def test_says_why_it_cannot_run():
    reason = cacr_kernels.available_backends()["cuda"]
    if torch.version.cuda is None:
        assert reason is not None
        assert "is not a CUDA build" in reason
    with pytest.raises(ValueError, match="backend='cuda' cannot run here: "):
        cacr_kernels.cacr_loss(torch.eye(4).repeat(2, 1, 1), backend="cuda")


def with_library(monkeypatch, **cuda):
    """As under a CUDA build of torch with the library loaded."""
    monkeypatch.setattr(library, "_CUDA", library.Extension(library._CUDA.path, None))
    monkeypatch.setattr(library, "_CUDA_ERRORS", {})
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    for name, value in ({"current_device": 0} | cuda).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def with_answers(monkeypatch, *answers):
    """As if the library had these things to say of devices 0, 1, …; gives the devices it is asked about."""
    asked = []

    def text(self, symbol, device):
        assert symbol == "cacr_cuda_error"
        asked.append(device)
        return answers[device]

    monkeypatch.setattr(library.Extension, "text", text)
    return asked


def test_no_device(monkeypatch):
    with_library(monkeypatch, is_available=False)
    assert backend_cuda.why_not(None) == "no CUDA device: torch finds none on this machine"
    assert backend_cuda.why_not(CPU) == "the CUDA kernels work on CUDA tensors, not on cpu"


def test_old_device(monkeypatch):
    with_library(monkeypatch, is_available=True, get_device_capability=(7, 5))
    assert "8.0" in backend_cuda.why_not(None)
    with_library(monkeypatch, is_available=True, get_device_capability=(8, 0))
    with_answers(monkeypatch, "")
    assert backend_cuda.why_not(None) is None


def test_library_for_other_devices(monkeypatch):
    """One compiled for others, or newer than the driver: said once for each device, and "auto" goes elsewhere."""
    with_library(monkeypatch, is_available=True, get_device_capability=(8, 0))
    asked = with_answers(monkeypatch, "", "no kernel image is available for execution on the device")
    for _ in range(2):
        assert backend_cuda.why_not(torch.device("cuda")) is backend_cuda.why_not(torch.device("cuda:0")) is None
        reason = backend_cuda.why_not(torch.device("cuda:1"))
        assert "cuda:1: no kernel image" in reason
        assert "CACR_CUDA_ARCHS" in reason
    assert asked == [0, 1]
    able = [b for b in backends.TABLE if b.name in ("torch", "cuda")]
    monkeypatch.setattr(backends, "TABLE", (*able[:1], Backend("triton", "", lambda _: None), *able[1:]))
    assert backends.select("auto", torch.device("cuda:0")) == "cuda"
    assert backends.select("auto", torch.device("cuda:1")) == "triton"
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run here: .* no kernel image"):
        backends.check("cuda", torch.device("cuda:1"))


def test_the_current_device_is_asked(monkeypatch):
    """Where none is named."""
    with_library(monkeypatch, is_available=True, get_device_capability=(8, 0), current_device=1)
    asked = with_answers(monkeypatch, "", "no kernel image")
    for device in (None, torch.device("cuda")):
        assert "cuda:1: no kernel image" in backend_cuda.why_not(device)
    assert asked == [1]


def test_probe_is_a_constant_of_compiled_code(monkeypatch):
    with_library(monkeypatch)
    with_answers(monkeypatch, "too old")

    @torch.compile(backend="eager", fullgraph=True)
    def shifted(x):
        return x + (1 if backend_cuda.probe(0) is None else 2)

    assert shifted(torch.zeros(())) == 2


def test_auto_goes_by_size(monkeypatch):
    able = tuple(b._replace(why_not=lambda device: None) for b in backends.TABLE if b.name != "cpu")
    gpu = torch.device("cuda")
    size = Size(backend_cuda.UP_TO // 9, 1, torch.bfloat16)  # a similarity of one feature takes 9
    larger = size._replace(similarities=size.similarities + 1)
    assert backend_cuda.work(size) <= backend_cuda.UP_TO < backend_cuda.work(larger)
    monkeypatch.setattr(backends, "TABLE", able)
    assert backends.select("auto", gpu, size) == "cuda"
    assert backends.select("auto", gpu, larger) == "triton"
    monkeypatch.setattr(backends, "TABLE", tuple(b for b in able if b.name != "triton"))
    assert backends.select("auto", gpu, larger) == "cuda"


def work_of(monkeypatch, loss, *shapes, dtype=torch.bfloat16, **options):
    """The work of a loss of tensors on a GPU, from the size by which the backend is chosen."""
    told = []

    def choose(name, device, size):
        told.append(backend_cuda.work(size))
        raise StopIteration

    monkeypatch.setattr(steps, "choose", choose)
    with FakeTensorMode():
        tensors = [torch.empty(s, dtype=torch.int64 if len(s) == 1 else dtype, device="cuda") for s in shapes]
        with pytest.raises(StopIteration):
            loss(*tensors, **options)
    return told[0]


def test_work(monkeypatch):
    """Every similarity once on the way forward; per side once for every group of features, and the gradients."""
    monkeypatch.setattr(backend_cuda, "float_products", lambda: backend_cuda.TF32X3)
    views = cacr_kernels.cacr_loss, (3, 10, 128)
    unordered = 3 * 10 * 10 * 128
    assert work_of(monkeypatch, *views) == unordered * (1 + 2 * (2 + 3))
    assert work_of(monkeypatch, *views, dtype=torch.float16) == unordered * (1 + 2 * (2 + 2))
    assert work_of(monkeypatch, *views, dtype=torch.float32) == unordered * 6 * (1 + 2 * (4 + 1))
    assert work_of(monkeypatch, *views, dtype=torch.float64) == math.inf
    assert work_of(monkeypatch, *views, normalize=True) == unordered * (1 + 2 * (2 + 3))
    assert work_of(monkeypatch, *views, pairing="ordered") == 2 * unordered * 11
    assert work_of(monkeypatch, *views, pairing="pooled") == 3 * unordered * 11
    assert work_of(monkeypatch, cacr_kernels.supervised_cacr_loss, (10, 65), (10,)) == 10 * 10 * 65 * 11

    def with_references(z, y, r, s):
        return cacr_kernels.supervised_cacr_loss(z, y, ref_embeddings=r, ref_labels=s)

    assert work_of(monkeypatch, with_references, (10, 64), (10,), (20, 64), (20,)) == 10 * 20 * 64 * 9
    assert work_of(monkeypatch, cacr_kernels.cacr_queue_loss, (2, 5, 8), (2, 5, 8), (9, 8)) == math.inf
    assert work_of(monkeypatch, cacr_kernels.cacr_momentum_loss, (2, 5, 8), (9, 8)) == math.inf


def test_ieee_products_of_any_size(monkeypatch):
    """But for keys without a gradient."""
    large = Size(2.0**40, 128, torch.float32)
    for products, expected in ((backend_cuda.IEEE, True), (backend_cuda.TF32, False), (backend_cuda.TF32X3, False)):
        monkeypatch.setattr(backend_cuda, "float_products", lambda products=products: products)
        assert backend_cuda.suits(large) == expected
        assert not backend_cuda.suits(large._replace(similarities=math.inf))
        assert not backend_cuda.suits(large._replace(dtype=torch.bfloat16))


@pytest.mark.parametrize(("dtype", "products"), [("bfloat16", 0), ("float32", backend_cuda.TF32X3)])
def test_size_of_the_docs(monkeypatch, dtype, products):
    """The largest batches of two views of 128 features that "auto" gives to "cuda"."""
    text = " ".join((ROOT / "docs" / "backends.md").read_text().split())
    found = re.search(
        r"with V = 2 and D = 128 a batch of (\d+) in bfloat16 and of (\d+) in float32 with three TF32 products", text
    )
    assert found is not None
    B = int(found[1 if dtype == "bfloat16" else 2])
    monkeypatch.setattr(backend_cuda, "float_products", lambda: products)
    largest, beyond = (
        work_of(monkeypatch, cacr_kernels.cacr_loss, (2, batch, 128), dtype=getattr(torch, dtype))
        for batch in (B, B + 1)
    )
    assert largest <= backend_cuda.UP_TO < beyond


@pytest.mark.exhaustive
def test_work_is_that_of_the_kernels():
    """``backend_cuda.ARITHMETIC`` says of the kernels what is so."""
    library = ctypes.CDLL(str(emulated_library("operators.cpp")))
    keys = torch.bfloat16, torch.float16, backend_cuda.TF32, backend_cuda.TF32X3, backend_cuda.IEEE
    assert [backend_cuda.ARITHMETIC[key].owned for key in keys] == [library.cacr_owned_features(i) for i in range(5)]
    assert library.cacr_owned_features(5) == 16  # of float64, which "auto" leaves to "triton"
    source = (ROOT / "csrc/cuda/tile/arithmetic.cuh").read_text()
    pieces = dict(re.findall(r"= HalfArithmetic<(b?f16), (\d),", source))
    assert pieces == {
        name: str(backend_cuda.ARITHMETIC[key].pieces) for name, key in zip(("bf16", "f16"), keys, strict=False)
    }


@pytest.mark.parametrize(
    ("asked", "variable", "products"),
    [
        ("ieee", "", backend_cuda.IEEE),
        ("none", "0", backend_cuda.IEEE),
        ("tf32", "1", backend_cuda.TF32),
        ("none", "1", backend_cuda.TF32X3),
        ("ieee", "1", backend_cuda.TF32X3),
    ],
)
def test_products_of_float32(asked, variable, products, monkeypatch):
    monkeypatch.setenv(VARIABLE, variable)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = asked
        assert backend_cuda.float_products() == products
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("pairing", ["unordered", "ordered", "pooled"])
def test_pairs_of_the_fused_loss(pairing):
    """``MAX_PAIRS`` is that of the kernels, which have no check of their own."""
    source = (ROOT / "csrc/cuda/parameters.h").read_text()
    assert f"constexpr int kMaxPairs = {backend_cuda.MAX_PAIRS};" in source
    most = {"unordered": 11, "ordered": 8, "pooled": 500}[pairing]
    assert backend_cuda.fuses((most, 2, 3), pairing)
    assert not backend_cuda.fuses((most + 1 if pairing != "pooled" else 3000, 2, 3), pairing)


def test_fakes():
    """Shapes and dtypes without a kernel: half types have gradients of float32."""
    with FakeTensorMode():
        views = torch.empty(3, 7, 5, dtype=torch.float16)
        loss, parts, grad, numbers = torch.ops.cacr_kernels.cacr_cuda(
            views, None, *[1.0] * 4, 0, False, 2.0, False, True, False
        )
        assert (loss.shape, parts.shape, grad.shape, numbers.shape) == ((), (4,), views.shape, (0,))
        assert {loss.dtype, parts.dtype, grad.dtype} == {torch.float32}
        tau, ids = torch.ones(2, dtype=torch.float64), torch.zeros(7, dtype=torch.int32)
        arguments = views, None, ids, None, tau, [1, 2], [0, 1], [1, 2], False, False, None, False
        value, lse, row_state = torch.ops.cacr_kernels.contrast_cuda(*arguments)
        assert (value.shape, lse.shape, row_state.shape) == ((2, 2, 7), (2, 2, 7), (3, 2, 2, 7))
