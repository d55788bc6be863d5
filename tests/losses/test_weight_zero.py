"""``alpha=0`` and ``beta=0``: the term is 0, and its operators are not called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.agreement import LOSSES, small_inputs
from tests.covering import covering

WEIGHTED = ["cacr", "queue", "supervised"]
SKIPPED = {  # without attraction, and without repulsion
    "cacr": (set(), {"cacr", "contrast"}),
    "queue": ({"aligned"}, {"contrast", "detached_keys"}),
    "supervised": (set(), set()),
}


class Recorder(TorchDispatchMode):
    """The operators of the package that are called, with how many softmaxes those of ``contrast`` have."""

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cacr_kernels":
            name = func._opname.rsplit("_", 1)[0]
            self.called[name] = len(args[5]) if name == "contrast" else 1
        return func(*args, **(kwargs or {}))


def gradients(loss: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
    tensors = small_inputs(loss)
    wanted = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    taus = [torch.tensor(0.7, requires_grad=True), torch.tensor(1.3, requires_grad=True)]
    value = LOSSES[loss](**tensors, tau_pos=taus[0], tau_neg=taus[1], **options)
    found = torch.autograd.grad(value.sum(), wanted + taus, allow_unused=True)
    return value.detach(), [torch.zeros(()) if g is None else g for g in found]


@covering(
    {
        "loss": WEIGHTED,
        "weights": {"repulsion": (0.0, 1.5), "attraction": (0.8, 0), "neither": (0, 0.0)},
        "reduction": ["mean", "sum", "none"],
        "backend": ["reference", "torch", "cpu"],
    },
    2,
)
def test_what_is_left(loss: str, weights: tuple[float, float], reduction: str, backend: str) -> None:
    """Value and gradients are those of both terms with a weight as good as none."""
    options = {"reduction": reduction, "backend": backend}
    value, found = gradients(loss, alpha=weights[0], beta=weights[1], **options)
    almost, expected = gradients(loss, alpha=weights[0] or 1e-30, beta=weights[1] or 1e-30, **options)
    torch.testing.assert_close(value, almost)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.expand_as(y), y, check_dtype=False, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", WEIGHTED)
def test_operators_of_a_term_that_nobody_asks_for(loss: str) -> None:
    def called(**options: Any) -> dict[str, int]:
        with Recorder() as recorder:
            LOSSES[loss](**small_inputs(loss), backend="cpu", reduction="none", **options)
        return recorder.called

    both = called()
    for weight, skipped in zip(("alpha", "beta"), SKIPPED[loss], strict=True):
        one = called(**{weight: 0.0})
        assert skipped.isdisjoint(one)
        assert set(one) | skipped >= set(both) - {"aligned"}
        if loss == "supervised":
            assert (both["contrast"], one["contrast"]) == (2, 1)
        assert called(**{weight: 0.0}, return_parts=True) == both
    assert not called(alpha=0, beta=0)


def test_no_pass_over_the_similarities_of_views() -> None:
    with Recorder() as recorder:
        LOSSES["cacr"](**small_inputs("cacr"), backend="cpu", beta=0)
    assert set(recorder.called) == {"aligned"}


def test_what_is_not_asked_for_is_not_read() -> None:
    """An embedding that only the repulsion would meet: infinity times 0 would be NaN."""
    tensors = small_inputs("queue")
    tensors["queue"] = torch.full_like(tensors["queue"], torch.inf)
    for backend in ("reference", "torch", "cpu"):
        assert LOSSES["queue"](**tensors, beta=0.0, backend=backend).isfinite()
        parts = LOSSES["queue"](**tensors, beta=0.0, backend=backend, return_parts=True)
        assert parts.loss.isfinite()
        assert parts.repulsion == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_tau_plus_adds_is_no_part_of_beta(reduction: str) -> None:
    tensors, options = small_inputs("cacr"), {"tau_plus": 0.2, "alpha": 0.0, "beta": 0.0, "reduction": reduction}
    found = [LOSSES["cacr"](**tensors, **options, backend=backend) for backend in ("reference", "torch", "cpu")]
    assert found[0].sum() < 0
    for value in found[1:]:
        torch.testing.assert_close(value, found[0])


def test_positives_alone_at_large_exponents() -> None:
    """Weights of long rows: off by less than twice what plain PyTorch in float32 is."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(300, 33, generator=generator, dtype=torch.float64)
    labels = torch.arange(300) % 4

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        x = (5 * torch.nn.functional.normalize(z, dim=-1)).to(dtype).requires_grad_()
        LOSSES["supervised"](x, labels, tau_pos=30.0, beta=0.0, backend=backend).backward()
        assert x.grad is not None
        return x.grad.double()

    exact = gradient("reference", torch.float64)
    errors = [(gradient(name, torch.float32) - exact).norm() / exact.norm() for name in ("cpu", "reference")]
    assert errors[0] <= 2 * errors[1] + 8 * torch.finfo(torch.float32).eps
