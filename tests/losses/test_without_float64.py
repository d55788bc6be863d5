"""float32 in, and no float64 anywhere: what backend "torch" does on a device that has none (MPS)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cacr_kernels import testing, types
from tests.agreement import LOSSES, cast, each_loss, small_inputs

CASES = [
    ("cacr", {}),
    ("cacr", {"cost": "rbf"}),
    ("cacr", {"pairing": "pooled", "reduction": "none"}),
    ("queue", {}),
    ("queue", {"weight_grad": "full"}),
    ("momentum", {}),
    ("momentum", {"cost": "sqeuclidean"}),
    ("supervised", {}),
]


class NoFloat64(TorchDispatchMode):
    """A device without float64: refuses every operator that makes such a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return result


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "WITHOUT_FLOAT64", ["mps", "cpu"])


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(("loss", "options"), CASES, ids=str)
def test_no_float64(loss: str, options: dict[str, Any], learnable: bool, backend: str) -> None:
    tensors = cast(small_inputs(loss), torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    name = "temperature" if loss == "momentum" else "tau_pos"
    tau: Any = torch.tensor(1.5, dtype=torch.float32, requires_grad=True) if learnable else 1.5
    given: dict[str, Any] = {name: tau, **options, "backend": backend, "normalize": True, "return_parts": True}
    with NoFloat64():
        parts = LOSSES[loss](**tensors, **given)
        parts.loss.sum().backward()
    assert all(part.dtype == torch.float32 for part in parts)
    assert all(t.grad is None or t.grad.dtype == torch.float32 for t in [*leaves, *[tau] * learnable])


@each_loss
def test_float64_is_seen(loss: str) -> None:
    """The mode sees what a device with float64 uses."""
    with NoFloat64(), pytest.raises(TypeError, match="makes float64"):
        LOSSES[loss](**cast(small_inputs(loss), torch.float32), backend="torch")


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("case", testing.cases(quick=True), ids=str)
def test_accuracy(case: testing.Case) -> None:
    misses = [result for result in testing.compare(case, "torch", torch.float32) if not result.ok]
    assert not misses
