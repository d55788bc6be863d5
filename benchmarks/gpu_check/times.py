"""Times of loss and gradients, V = 2 and D = 128, beside eager and compiled PyTorch, and their share of the peak.

Before a row is timed it is compared, at the size that is timed, with ``backend="torch"`` in float64. A wrong row of
ours is a failure. A wrong baseline, or one that does not fit into the memory, is dropped and named.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cacr_kernels
from benchmarks.host import quantile
from benchmarks.suite import eager
from cacr_kernels import testing

from . import child, devices
from .child import Context, DroppedError, Task
from .problems import TIMED_BATCHES, TIMED_DTYPES, timed

SECONDS = 45
BUDGET = 0.4  # seconds of calls that are timed
CALLS = (5, 200)
PEAK_SIZE = 8192
ROUGH = {"bfloat16": 3e-2, "float32": 1e-3}  # error of a gradient, in its largest entry; of the loss 1e-3
Step = Callable[[], tuple[Tensor, Tensor]]


def seconds_of(call: Callable[[], Any], device: str, budget: float = BUDGET) -> list[float]:
    """Of single calls in a row, sorted, after three that do not count. On a GPU by its own clock."""
    for _ in range(3):
        call()
    devices.wait()
    begin = time.perf_counter()
    call()
    devices.wait()
    count = max(CALLS[0], min(CALLS[1], int(budget / max(time.perf_counter() - begin, 1e-6))))
    if device == "cpu":
        return sorted(_timed(call) for _ in range(count))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    devices.wait()
    return sorted(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@functools.cache
def peak(dtype: str, device: str, n: int = PEAK_SIZE) -> float:
    """FLOP/s of ``torch.mm`` of n x n arrays; float32 as PyTorch is set, IEEE unless somebody changed that."""
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / seconds_of(lambda: torch.mm(a, b, out=out), device)[0]


def flop(B: int, D: int) -> float:
    """Of the three products of a loss of two views and its gradients."""
    return 3 * 2.0 * B * B * D


def views(B: int, dtype: str, device: str) -> Tensor:
    (found,) = testing.rounded(testing.make_inputs(timed(B)), getattr(torch, dtype), device).values()
    return found


@functools.lru_cache(maxsize=1)
def expected(B: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, in blocks."""
    return library_step(views(B, dtype, device).double(), "torch")()


def library_step(z: Tensor, backend: str) -> Step:
    z = z.detach().requires_grad_()
    options = timed(z.shape[1]).options

    def step() -> tuple[Tensor, Tensor]:
        loss = cacr_kernels.cacr_loss(z, **options, backend=backend)
        (gradient,) = torch.autograd.grad(loss, z)
        return loss, gradient

    return step


def baseline_step(z: Tensor, function: Callable[..., Tensor]) -> Step:
    """The views as PyTorch likes them best, each a tensor of its own."""
    leaves = [view.detach().clone().requires_grad_() for view in z]
    options = timed(z.shape[1]).options

    def step() -> tuple[Tensor, Tensor]:
        loss = function(leaves, **options)
        return loss, torch.stack(torch.autograd.grad(loss, leaves))

    return step


def make_step(row: str, z: Tensor) -> Step:
    if row == "eager":
        return baseline_step(z, eager.cacr_loss)
    if row == "compiled":
        torch._dynamo.reset()
        return baseline_step(z, torch.compile(eager.cacr_loss, fullgraph=True, dynamic=False))
    return library_step(z, row)


def wrong(row: str, B: int, dtype: str, device: str, step: Step) -> str | None:
    """What of a row disagrees with float64."""
    loss, gradient = step()
    true_loss, true_gradient = expected(B, dtype, device)
    loss_error = abs(loss.double() - true_loss).item() / max(1.0, abs(true_loss.item()))
    largest = true_gradient.abs().max().item()
    gradient_error = (gradient.double() - true_gradient).abs().max().item() / largest
    if loss_error <= 1e-3 and gradient_error <= ROUGH[dtype]:
        return None
    return f"{row} is wrong: error of the loss {loss_error:.1e}, of the gradient {gradient_error:.1e}"


def measure(row: str, B: int, dtype: str, device: str, baseline: bool) -> dict[str, Any]:
    """One row at one size."""
    try:
        z = views(B, dtype, device)
        step = make_step(row, z)
        if (problem := wrong(row, B, dtype, device, step)) is not None:
            raise ValueError(problem)
        found = seconds_of(step, device)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip()[:300]}"
        if baseline and not child.is_sticky(said):
            raise DroppedError(said) from error
        raise
    finally:
        if device != "cpu":
            torch.cuda.empty_cache()
    rate = flop(B, z.shape[-1]) / quantile(found, 0.5)
    figures = {f"p{100 * q:.0f} ms": 1e3 * quantile(found, q) for q in (0.2, 0.5, 0.8)}
    return {
        "row": row,
        "B": B,
        "dtype": dtype,
        **figures,
        "TFLOP/s": rate / 1e12,
        "of peak": rate / peak(dtype, device),
    }


def show_peak(dtype: str, device: str) -> dict[str, Any]:
    return {"row": f"torch.mm {PEAK_SIZE}", "dtype": dtype, "TFLOP/s": peak(dtype, device) / 1e12}


def tasks(backends: list[str], device: str) -> Iterator[Task]:
    """Ours and eager PyTorch at all sizes before what takes long to compile."""
    for dtype in TIMED_DTYPES:
        yield Task(f"peak {dtype}", partial(show_peak, dtype, device))
    for rows in ((*backends, "eager"), ("compiled",)):
        for B in TIMED_BATCHES:
            for dtype in TIMED_DTYPES:
                for row in rows:
                    baseline = row in ("eager", "compiled")
                    yield Task(
                        f"{row} {dtype} B={B}", partial(measure, row, B, dtype, device, baseline), optional=baseline
                    )


def run(context: Context) -> None:
    if (reason := devices.why_none()) is not None:
        return context.skip(reason)
    child.run(context, tasks(devices.usable(), "cuda"), SECONDS)
    return None
