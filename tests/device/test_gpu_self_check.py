"""The self-check of ``"auto"`` on a GPU, or on one of ``tests/fake_cuda``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cacr_kernels
from cacr_kernels.backends import self_check
from cacr_kernels.functional import backend_for
from tests.agreement import LOSSES, cast, each_loss, small_inputs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("CACR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CACR_SELF_CHECK", raising=False)
    self_check.forget()
    yield
    self_check.forget()


def there(loss: str, device: str = "cuda") -> dict[str, Any]:
    return {name: t.to(device) for name, t in cast(small_inputs(loss), torch.float32).items()}


@each_loss
def test_good(loss: str, tmp_path: Path) -> None:
    tensors = there(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOSSES[loss](**tensors)
    name = backend_for(LOSSES[loss].__name__, [t for t in tensors.values() if t.is_floating_point()])
    assert list(tmp_path.glob(f"self-check-{name}-*.json"))
    assert self_check._verdicts
    assert all(self_check._verdicts.values())


def test_each_device(tmp_path: Path) -> None:
    """A verdict is one of a device; two of a kind share what is kept."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a CUDA device more")
    for device in ("cuda:0", "cuda:1"):
        cacr_kernels.cacr_loss(**there("cacr", device))
    assert {subject.device.index for subject in self_check._verdicts} == {0, 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACR_SELF_CHECK", "0")
    tensors = there("cacr")
    expected = cacr_kernels.cacr_loss(**tensors).clone()  # compiles
    monkeypatch.delenv("CACR_SELF_CHECK")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = cacr_kernels.cacr_loss(**tensors)
    graph.replay()
    assert torch.equal(found, expected)
    assert not self_check._verdicts


def test_rows_that_another_stream_is_making() -> None:
    """They are looked at when they are there: the memory they lie in holds other numbers until then."""
    if os.environ.get("FAKE_CUDA") == "1":
        from tests.fake_cuda import runtime

        runtime.set_order("late")  # as the wait below makes it on a real one
    tensors = there("cacr")
    stream, seen = torch.cuda.Stream(), []
    small = self_check.small
    torch.cuda.synchronize()
    with pytest.MonkeyPatch.context() as patch, torch.cuda.stream(stream):
        patch.setattr(self_check, "small", lambda *given: seen.append(small(*given)) or seen[-1])
        late = {name: torch.zeros_like(t) for name, t in tensors.items()}
        torch.cuda._sleep(50_000_000)
        for name, t in late.items():
            t.copy_(tensors[name])
        cacr_kernels.cacr_loss(**late)
    torch.cuda.synchronize()
    (_, (q, _)) = seen
    assert torch.equal(q, tensors["views"].to(q.dtype)[: q.shape[0], : q.shape[1]])


@pytest.mark.skipif(os.environ.get("FAKE_CUDA") != "1", reason="needs a CUDA device that heals: tests.fake_cuda")
def test_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access stays: no other backend could serve, and the message says what leaves the kernels out."""
    from tests.fake_cuda import runtime

    tensors = there("cacr")
    torch.cuda.synchronize()

    def crash(*arguments: Any) -> Any:
        runtime.set_sticky(runtime.ILLEGAL_ADDRESS)
        torch.cuda.synchronize()

    monkeypatch.setattr(self_check, "by_backend", crash)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)cannot use cuda:0 any more.*Start it again with backend='torch'"):
            cacr_kernels.cacr_loss(**tensors)
    finally:
        runtime.set_sticky(0)
        torch.cuda.synchronize()
    assert not self_check._verdicts
