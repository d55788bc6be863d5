"""How far it is from a public loss to its operator: the frames of this package on the stack."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cacr_kernels
from cacr_kernels.backends import table
from cacr_kernels.operators.registry import NAMESPACE
from tests.agreement import LOSSES, each_loss, small_inputs

PACKAGE = str(Path(cacr_kernels.__file__).parent)
MOST = 5
WITH_OPERATORS = [backend.name for backend in table.TABLE if backend.operators]


def ours() -> list[str]:
    """The functions of the package that are running, the innermost first."""
    frames, frame = [], sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            frames.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return frames


class Depth(TorchDispatchMode):
    """Notes the frames at every operator of the package and answers with its fake: nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: dict[str, list[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        self.stacks[func._opname] = ours()
        fakes = func(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), fakes)


class Asked(TorchDispatchMode):
    """Notes whether operators were asked for gradients: the last arguments of ``cacr``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.found.append(args[-2:])
        return func(*args, **(kwargs or {}))


def test_gradients_are_computed_where_they_can_be_asked_for() -> None:
    z, tau = small_inputs("cacr")["views"].requires_grad_(), torch.tensor(1.0, requires_grad=True)
    with Asked() as asked:
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode:
                cacr_kernels.cacr_loss(z, backend="cpu")
                cacr_kernels.cacr_loss(z.detach(), tau_neg=tau, backend="cpu")
    assert asked.found == [(True, False), (False, True), (False, False), (False, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", WITH_OPERATORS)
@each_loss
def test_at_most_five(loss: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    able = tuple(entry._replace(why_not=lambda device: None) for entry in table.TABLE)
    monkeypatch.setattr(table, "TABLE", able)
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in small_inputs(loss).items()}
    for t in tensors.values():
        t.requires_grad_(t.is_floating_point())
    for reduction in ("mean", "none"):
        with Depth() as depth:
            LOSSES[loss](**tensors, backend=backend, reduction=reduction)
        assert depth.stacks, "no operator was called"
        names = tuple(f"_{backend}{variant}" for variant in ("", *table.named(backend).variants))
        assert all(name.endswith(names) for name in depth.stacks)
        for name, stack in depth.stacks.items():
            assert stack[-1] == f"functional.{LOSSES[loss].__name__}", (name, stack)
            assert len(stack) <= MOST, (name, stack)
