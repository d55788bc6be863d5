"""Warnings name a line of the user, wherever in the package they come from, and are given once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import cacr_kernels
from cacr_kernels import (
    CACRLoss,
    CACRMomentumLoss,
    CACRQueueLoss,
    cacr_loss,
    cacr_momentum_loss,
    cacr_queue_loss,
    cacr_weights,
    checks,
    chunked_backward,
)
from cacr_kernels.backends import table

VIEWS = torch.randn(5, 3, 4)  # as many a [B, V, D] would be
KEYS = torch.randn(8, 4)
CALLS: dict[str, Callable[[], object]] = {
    "cacr_loss": lambda: cacr_loss(VIEWS),
    "cacr_momentum_loss": lambda: cacr_momentum_loss(VIEWS, KEYS),
    "cacr_queue_loss": lambda: cacr_queue_loss(VIEWS, VIEWS, KEYS),
    "cacr_weights": lambda: cacr_weights(VIEWS),
    "chunked_backward": lambda: chunked_backward(nn.Linear(4, 4), list(VIEWS), CACRLoss(), chunk_size=2),
    "CACRLoss": lambda: CACRLoss()(VIEWS),
    "CACRLoss in a module": lambda: nn.Sequential(nn.Identity(), CACRLoss())(VIEWS),
    "CACRMomentumLoss": lambda: CACRMomentumLoss()(VIEWS, KEYS),
    "CACRQueueLoss": lambda: CACRQueueLoss()(VIEWS, VIEWS, KEYS),
    "CACRQueueLoss that keeps its queue": lambda: CACRQueueLoss(queue_size=4, dim=4)(VIEWS, VIEWS),
}
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    monkeypatch.setattr(table, "_warned", set())


@pytest.fixture
def said() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def check(said: list[warnings.WarningMessage], text: str) -> None:
    assert [Path(warning.filename) for warning in said] == [Path(__file__)]
    assert text in str(said[0].message)


@each_call
def test_axis_order(name: str, said: list[warnings.WarningMessage]) -> None:
    CALLS[name]()
    CALLS[name]()
    check(said, "if they are [B, V, D]")


def test_keys_that_get_no_gradient(said: list[warnings.WarningMessage]) -> None:
    CACRMomentumLoss()(torch.randn(2, 3, 4), torch.randn(3, 4, requires_grad=True))
    check(said, "get no gradient")


def test_keys_of_a_queue_that_get_no_gradient(said: list[warnings.WarningMessage]) -> None:
    CACRQueueLoss(queue_size=5, dim=4)(torch.randn(3, 4), torch.randn(3, 4, requires_grad=True))
    check(said, "get no gradient")


@pytest.mark.parametrize("name", [name for name in CALLS if name != "cacr_weights"])  # which asks for no backend
def test_only_plain_pytorch(name: str, said: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch) -> None:
    checks._warned.add("axis order")
    slow = tuple(entry for entry in table.TABLE if entry.name in ("reference", "torch"))
    monkeypatch.setattr(table, "TABLE", slow)
    CALLS[name]()
    check(said, "only the plain PyTorch backend can run on cpu")


# ---- the keyword of other losses -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["CACRLoss", "CACRQueueLoss", "SupervisedCACRLoss"])
def test_temperature_is_refused_with_its_inverse(name: str) -> None:
    module = getattr(cacr_kernels, name)
    with pytest.raises(
        TypeError, match=rf"{name} takes no temperature: .* tau_neg = 1 / \(2 \* temperature\), here 5$"
    ):
        module(temperature=0.1)
    with pytest.raises(TypeError, match=r"1 / \(2 \* temperature\)$"):
        module(temperature=torch.tensor(0.1))
    assert CACRMomentumLoss(temperature=0.1).temperature == 0.1


def test_a_subclass_may_take_a_temperature() -> None:
    class ByTemperature(CACRLoss[torch.Tensor]):
        def __init__(self, temperature: float) -> None:
            super().__init__(tau_neg=1 / (2 * temperature))

    class ByKeyword(CACRLoss[torch.Tensor]):
        def __init__(self, **options: float) -> None:
            super().__init__(tau_neg=1 / (2 * options["temperature"]))

    assert ByTemperature(temperature=0.1).tau_neg == ByKeyword(temperature=0.1).tau_neg == 5.0
