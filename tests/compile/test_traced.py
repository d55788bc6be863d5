"""The modules as programs that run by themselves: traced, compiled ahead of time, and with Inductor's tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export import Dim

from cacr_kernels import CACRLoss, CACRQueueLoss
from tests.agreement import ON_CPU, randn
from tests.compile.test_compiled_modules import MODULES, arguments, assert_same, learning, make, with_gradients
from tests.covering import covering

# What torch itself says while it traces and compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@covering({"name": list(MODULES), "backend": [*ON_CPU, "reference"], "learn": [False, True]})
def test_jit_trace(name: str, backend: str, learn: bool) -> None:
    """It passes torch's check, which traces without gradients, and gives values and gradients of other tensors."""
    module = make(name, backend)
    example = arguments(name, backend)
    traced = torch.jit.trace(module, tuple(learning(example)) if learn else example)
    others = arguments(name, backend, seed=3)
    assert_same(
        with_gradients(traced, traced, learning(others)),
        with_gradients(module, module, learning(others)),
    )


@covering({"weight_grad": ["in_batch", "full", "none"], "backend": ON_CPU})
def test_jit_trace_of_a_kept_queue(weight_grad: str, backend: str) -> None:
    """In ``eval()``; the program has a queue of its own, and reads as many rows as that holds when it runs."""
    module = CACRQueueLoss(queue_size=8, dim=4, weight_grad=weight_grad, backend=backend).double()
    q, k = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    with pytest.raises(ValueError, match=r"CACRQueueLoss that keeps its queue can only be traced in eval\(\)"):
        torch.jit.trace(module, (q, k))
    module.eval()
    traced = torch.jit.trace(module, (q, k))
    empty = module(k, q)
    module.train()
    for seed in range(2):
        module(randn(2, 3, 4, seed=seed), randn(2, 3, 4, seed=seed + 5))
    module.eval()
    torch.testing.assert_close(traced(k, q), empty)
    traced.load_state_dict(module.state_dict())
    torch.testing.assert_close(traced(k, q), module(k, q))


def test_jit_trace_can_be_saved(tmp_path: Path) -> None:
    """The operators it holds are found again where the package was imported."""
    views = arguments("cacr", "cpu")
    torch.jit.trace(CACRLoss(), views).save(tmp_path / "loss.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "loss.pt")(*views), CACRLoss()(*views))


@pytest.mark.exhaustive
def test_ahead_of_time(tmp_path: Path) -> None:
    """By AOTInductor, for any batch size; the program calls the compiled operators."""
    module, batch = CACRLoss(tau_neg=2.0, backend="cpu"), Dim("batch", min=2, max=4096)
    views = tuple(z.float() for z in arguments("cacr", "cpu"))
    program = torch.export.export(module, views, dynamic_shapes=(({0: batch}, {0: batch}),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "loss.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for count in (6, 11):
        others = tuple(z.float() for z in arguments("cacr", "cpu", count, seed=3))
        torch.testing.assert_close(loaded(*others), module(*others))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["cacr", "queue"])
def test_max_autotune(name: str) -> None:
    """Inductor may choose other products, and freezes nothing of the loss."""
    module = make(name, "cpu").double()
    compiled = torch.compile(module, mode="max-autotune", fullgraph=True)
    found = with_gradients(compiled, module, learning(arguments(name, "cpu")))
    assert_same(found, with_gradients(module, module, learning(arguments(name, "cpu"))))
