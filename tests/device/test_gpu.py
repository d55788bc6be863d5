"""What only a GPU can show of the backends "triton" and "cuda": streams, capture, synchronisation, devices.

That they compute what they should is shown by the tests of the losses, which take every backend that can run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cacr_kernels
from tests.agreement import LOSSES, cast, each_loss, small_inputs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.parametrize("backend", ["triton", "cuda"])


@pytest.fixture(autouse=True)
def usable(backend: str) -> None:
    if (reason := cacr_kernels.available_backends()[backend]) is not None:
        pytest.skip(reason)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


def step(loss: str, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The loss and the gradients of all embeddings; kernels are launched, nothing is read."""
    leaves = {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    value = LOSSES[loss](**leaves, backend=backend)
    wanted = [t for t in leaves.values() if t.requires_grad]
    return [value, *(g for g in torch.autograd.grad(value, wanted, allow_unused=True) if g is not None)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.cuda.synchronize()  # whatever stream they are made on
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def on_gpu(loss: str, device: str = "cuda") -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in cast(small_inputs(loss), torch.float32).items()}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # which torch says once
@each_loss
def test_the_host_never_waits(loss: str, backend: str, no_synchronisation: None) -> None:
    tensors = on_gpu(loss)
    step(loss, tensors, backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step(loss, tensors, backend)


@each_loss
def test_in_a_captured_graph(loss: str, backend: str) -> None:
    tensors = on_gpu(loss)
    expected = [t.clone() for t in step(loss, tensors, backend)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = step(loss, tensors, backend)
    for t in found:
        t.zero_()
    for _ in range(2):
        graph.replay()
    assert_same_bits(found, expected)


@each_loss
def test_on_the_current_stream(loss: str, backend: str) -> None:
    """Inputs that another stream is still making are read when they are there."""
    tensors = on_gpu(loss)
    expected = step(loss, tensors, backend)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(t) for name, t in tensors.items()}
        torch.cuda._sleep(50_000_000)
        for name, t in late.items():
            t.copy_(tensors[name])
        found = step(loss, late, backend)
    assert_same_bits(found, expected)


@each_loss
def test_same_bits_every_time(loss: str, backend: str) -> None:
    tensors = on_gpu(loss)
    first = step(loss, tensors, backend)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            assert_same_bits(step(loss, tensors, backend), first)
    finally:
        torch.use_deterministic_algorithms(False)


@each_loss
def test_on_another_device_than_the_current_one(loss: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a CUDA device more")
    expected = step(loss, on_gpu(loss, "cuda:0"), backend)
    with torch.cuda.device(0):
        found = step(loss, on_gpu(loss, "cuda:1"), backend)
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())
