"""The fake CUDA itself: what is wrong with a program shows, in every order of work, and what is right does not.

``python -m tests.fake_cuda -m pytest tests/fake_cuda``
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if os.environ.get("FAKE_CUDA") != "1":
    pytest.skip("needs a CUDA device of its own kind: python -m tests.fake_cuda -m pytest", allow_module_level=True)

from . import runtime

ORDERS = [("late", 0), *(("random", seed) for seed in range(1, 9))]
each_order = pytest.mark.parametrize(("order", "seed"), ORDERS)


@pytest.fixture(autouse=True)
def healed() -> Iterator[None]:
    """Errors of a test are its own."""
    yield
    runtime.set_sticky(0)
    runtime.set_order("random", 1)
    torch.cuda.synchronize()


def noticed(result: Tensor, expected: float) -> bool:
    """Whether a program that is wrong raises or finds other numbers."""
    try:
        return not bool((result.cpu() == expected).all())
    except RuntimeError:
        return True


def late(stream: torch.cuda.Stream, value: float) -> Tensor:
    """A tensor that another stream fills."""
    x = torch.zeros(5, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1000)
        x.fill_(value)
    return x


def test_two_devices() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 2
    x = torch.arange(6.0, device="cuda:1").reshape(2, 3)
    assert x.device == torch.device("cuda", 1)
    assert torch.equal((x @ x.T + 1).cpu(), torch.tensor([[6.0, 15.0], [15.0, 51.0]]))
    with pytest.raises(RuntimeError, match="same device"):
        x + x.to("cuda:0")


def test_nothing_is_done_before_somebody_waits() -> None:
    runtime.set_order("late")
    torch.cuda.synchronize()
    before = runtime.items()
    x = torch.zeros(3, device="cuda") + 1
    assert runtime.items() == before
    assert x.sum().item() == 3
    assert runtime.items() > before


@each_order
def test_waiting_for_an_event(order: str, seed: int) -> None:
    runtime.set_order(order, seed)
    stream = torch.cuda.Stream()
    x = late(stream, 3.0)
    done = stream.record_event()
    torch.cuda.current_stream().wait_event(done)
    assert not noticed(x + 1, 4.0)


def test_an_event_left_out() -> None:
    """In the order that CUDA need not avoid, and in one of eight drawn by lot."""
    stream, found = torch.cuda.Stream(), []
    for order, seed in ORDERS:
        runtime.set_order(order, seed)
        x = late(stream, 3.0)
        found.append(noticed(x + 1, 4.0))
        torch.cuda.synchronize()
    assert found[0]
    assert any(found[1:])


def test_memory_is_poisoned() -> None:
    torch.cuda.synchronize()
    assert torch.empty(7, device="cuda").isnan().all()
    assert torch.empty(7, device="cuda", dtype=torch.bfloat16).isnan().all()


def test_memory_freed_while_another_stream_uses_it() -> None:
    """Without ``record_stream`` the next tensor of the first stream gets it."""
    runtime.set_order("late")
    stream = torch.cuda.Stream()
    x = torch.ones(300, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 2
    del x
    torch.zeros(300, device="cuda").sum().item()
    torch.cuda.current_stream().wait_stream(stream)
    assert noticed(y + 0, 2.0)


def test_record_stream() -> None:
    runtime.set_order("late")
    stream = torch.cuda.Stream()
    x = torch.ones(300, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 2
    x.record_stream(stream)
    del x
    torch.zeros(300, device="cuda").sum().item()
    torch.cuda.current_stream().wait_stream(stream)
    assert not noticed(y + 0, 2.0)


def test_errors_stay() -> None:
    """Work on memory of another device is an illegal access, and the process has lost the device."""
    place = runtime.place_of(torch.zeros(3, device="cuda:1"), device=0)
    torch.cuda.synchronize(1)
    runtime.submit(0, lambda: place.check("a kernel"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            torch.cuda.synchronize()


@each_order
def test_pinned_memory_is_read_late(order: str, seed: int) -> None:
    runtime.set_order(order, seed)
    host = torch.ones(5).pin_memory()
    device = host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    host.fill_(2.0)
    assert not noticed(device, 1.0)


def test_pinned_memory_changed_too_early() -> None:
    runtime.set_order("late")
    host = torch.ones(5).pin_memory()
    device = host.to("cuda", non_blocking=True)
    host.fill_(2.0)
    assert noticed(device, 1.0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # which torch says once
def test_who_must_not_wait() -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (x.nonzero, x.cpu, x[0].item):
            with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- graphs ----------------------------------------------------------------------------------------------------------
def test_a_graph_is_replayed() -> None:
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 2
        torch.cuda.current_stream().wait_stream(side)
        z = y + x
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert not noticed(z, 3 * value)


def test_a_branch_nobody_waits_for() -> None:
    x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.mul_(2)

    with pytest.raises(RuntimeError, match="unjoined"):
        capture()


def test_no_waiting_while_a_graph_is_captured() -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


def test_kernels_of_torch_are_refused() -> None:
    """None of them can be run, and so nothing may silently do nothing."""
    with pytest.raises(RuntimeError, match="no kernels of torch"):
        torch._C._cuda_sleep(3)
