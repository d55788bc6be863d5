"""What users do with losses on a GPU: ``"auto"``, other devices and threads, compilers, DDP, wrong devices.

Run on a GPU or, without one, by ``python -m tests.fake_cuda -m pytest``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cacr_kernels
from cacr_kernels import CACRLoss, CACRQueueLoss
from cacr_kernels.backends.table import select
from cacr_kernels.functional import backend_for
from tests.agreement import LOSSES, cast, each_loss, small_inputs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GPU_BACKENDS = [name for name in ("triton", "cuda") if cacr_kernels.available_backends()[name] is None]
each_gpu_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a CUDA device more")


def on(device: str, loss: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in cast(small_inputs(loss), dtype).items()}


def step(loss: str, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The loss and the gradients of all embeddings."""
    leaves = {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    value = LOSSES[loss](**leaves, **options)
    wanted = [t for t in leaves.values() if t.requires_grad]
    return [value.detach(), *(g for g in torch.autograd.grad(value, wanted, allow_unused=True) if g is not None)]


def assert_like_cpu(found: list[Tensor], loss: str, dtype: torch.dtype, **options: Any) -> None:
    expected = step(loss, cast(small_inputs(loss), dtype), **options | {"backend": "reference"})
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(a.dtype, 1e-4 if dtype != torch.float64 else 1e-10)
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


# ---- "auto" ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normalize", [False, True])
@each_dtype
@each_loss
def test_auto(loss: str, dtype: torch.dtype, normalize: bool) -> None:
    tensors = on("cuda", loss, dtype)
    floats = [t for t in tensors.values() if t.is_floating_point()]
    assert backend_for(LOSSES[loss].__name__, floats) in GPU_BACKENDS
    assert_like_cpu(step(loss, tensors, normalize=normalize), loss, dtype, normalize=normalize)


def test_the_device_decides() -> None:
    assert select("auto", torch.device("cpu")) == "cpu"
    assert select("auto", torch.device("cuda")) in GPU_BACKENDS


# ---- devices and threads ---------------------------------------------------------------------------------------------
@pytest.fixture
def gpu_by_default() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@each_loss
def test_default_device(loss: str, gpu_by_default: None) -> None:
    """It makes no difference to tensors of the CPU, nor to those that are there."""
    with torch.device("cpu"):
        tensors = cast(small_inputs(loss), torch.float32)
        for device in ("cpu", "cuda"):
            found = step(loss, {n: t.to(device) for n, t in tensors.items()})
            assert all(t.device.type == device for t in found)
            assert_like_cpu(found, loss, torch.float32)


def test_module_of_the_default_device(gpu_by_default: None) -> None:
    loss = CACRQueueLoss(queue_size=11, dim=5)
    assert loss.queue.device.type == "cuda"
    queries, keys = (torch.randn(2, 7, 5) for _ in range(2))
    loss(queries, keys)
    assert torch.isfinite(loss(queries, keys))


@two_devices
@each_gpu_backend
@each_loss
def test_devices_take_turns(loss: str, backend: str) -> None:
    """What is kept for one device is not used on the other."""
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        found = step(loss, on(device, loss), backend=backend)
        assert all(str(t.device) == device for t in found)
        assert_like_cpu(found, loss, torch.float32)
        assert torch.cuda.current_device() == 0


@two_devices
@each_gpu_backend
@each_loss
def test_a_thread_of_its_own(loss: str, backend: str) -> None:
    """The current device of a new thread is the first one, whatever device the tensors are on."""
    tensors, found = on("cuda:1", loss), []
    with torch.cuda.device(1):
        torch.cuda.synchronize()
        thread = threading.Thread(target=lambda: found.append(step(loss, tensors, backend=backend)))
        thread.start()
        thread.join()
    (result,) = found
    torch.cuda.synchronize(1)
    assert_like_cpu(result, loss, torch.float32)


@two_devices
@each_gpu_backend
@each_loss
def test_backward_on_another_current_device(loss: str, backend: str) -> None:
    tensors = on("cuda:1", loss)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    value = LOSSES[loss](**leaves, backend=backend)
    with torch.cuda.device(0):
        value.backward()
    first = next(iter(leaves.values()))
    expected = step(loss, cast(small_inputs(loss), torch.float32), backend="reference")[1]
    torch.testing.assert_close(first.grad.cpu(), expected, rtol=1e-4, atol=1e-5)


@each_gpu_backend
@each_loss
def test_two_streams(loss: str, backend: str) -> None:
    """What one stream has made and kept is there when another one uses it."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    tensors = on("cuda", loss)
    torch.cuda.synchronize()
    found = []
    for _ in range(2):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(step(loss, tensors, backend=backend))
    torch.cuda.synchronize()
    for result in found:
        assert_like_cpu(result, loss, torch.float32)


@two_devices
@each_gpu_backend
@each_loss
def test_a_stream_of_another_device(loss: str, backend: str) -> None:
    """Inputs that it is still making are read when they are there."""
    tensors, stream = on("cuda:1", loss), torch.cuda.Stream(device=1)
    torch.cuda.synchronize(1)
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(t) for name, t in tensors.items()}
        torch.cuda._sleep(50_000_000)
        for name, t in late.items():
            t.copy_(tensors[name])
        found = step(loss, late, backend=backend)
    torch.cuda.synchronize(1)
    assert_like_cpu(found, loss, torch.float32)


@each_gpu_backend
def test_many_pairs(backend: str) -> None:
    """More than one launch takes, with a workspace for each."""
    views = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0))

    def found(x: Tensor, backend: str) -> list[Tensor]:
        x = x.detach().requires_grad_()
        value = cacr_kernels.cacr_loss(x, reduction="none", normalize=True, backend=backend).sum()
        return [value, *torch.autograd.grad(value, x)]

    for a, b in zip(found(views.cuda(), backend), found(views, "reference"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


# ---- compilers -------------------------------------------------------------------------------------------------------
# What torch itself says while it compiles.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("normalize", [False, True])
@each_dtype
@each_loss
def test_compiled(loss: str, dtype: torch.dtype, normalize: bool) -> None:
    """One graph, run as it was traced; of losses whose tensors are on a GPU."""
    whole: Callable[..., Tensor] = torch.compile(
        lambda **tensors: LOSSES[loss](**tensors, normalize=normalize), fullgraph=True, backend="aot_eager"
    )
    tensors = on("cuda", loss, dtype)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    value = whole(**leaves)
    wanted = [t for t in leaves.values() if t.requires_grad]
    grads = [g for g in torch.autograd.grad(value, wanted, allow_unused=True) if g is not None]
    expected = step(loss, cast(small_inputs(loss), dtype), normalize=normalize, backend="reference")
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}.get(dtype, 1e-10)
    torch.testing.assert_close(value.detach().cpu(), expected[0], rtol=tolerance, atol=tolerance)
    assert len(grads) >= 1
    torch.testing.assert_close(
        grads[0].cpu(), expected[1], rtol=tolerance, atol=tolerance * float(expected[1].abs().max())
    )


# ---- DDP -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=two_devices)])
def test_ddp(device: str, one_process: None) -> None:
    index = torch.device(device).index
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5).to(device)
    ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[index])
    x = torch.randn(2, 7, 6)
    loss = CACRLoss(gather_distributed=True)(ddp(x.to(device)))
    loss.backward()
    plain = torch.nn.Linear(6, 5)
    plain.load_state_dict({n: t.cpu() for n, t in model.state_dict().items()})
    CACRLoss(backend="reference")(plain(x)).backward()
    torch.testing.assert_close(model.weight.grad.cpu(), plain.weight.grad, rtol=1e-3, atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_a_backend_for_another_device() -> None:
    views = torch.randn(2, 5, 3)
    for backend in GPU_BACKENDS:
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run here"):
            cacr_kernels.cacr_loss(views, backend=backend)
    with pytest.raises(ValueError, match="backend='cpu' cannot run here"):
        cacr_kernels.cacr_loss(views.cuda(), backend="cpu")


@two_devices
def test_tensors_of_two_devices() -> None:
    tensors = on("cuda:0", "momentum")
    with pytest.raises(ValueError, match="device"):
        cacr_kernels.cacr_momentum_loss(tensors["queries"], tensors["keys"].to("cuda:1"))
    with pytest.raises(ValueError, match="device"):
        cacr_kernels.cacr_momentum_loss(tensors["queries"], tensors["keys"].cpu())
