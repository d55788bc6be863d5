"""Times of loss and gradients with both backends, beside PyTorch and others, and their share of the peak.

Before a row is timed it is compared, at the size that is timed, with ``backend="torch"`` in float64 (float32 where that
is too much work). A wrong row of ours is a failure. A wrong baseline, or one that cannot run or does not fit into the
memory, is dropped and named. Rows that compute another function only have to be finite.

The problems of ``problems.FIRST`` come first, then as many others as there is time for. Half types leave PyTorch TF32
products, so that its float32 arithmetic of them has tensor cores, too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cacr_kernels
from benchmarks.host import quantile
from benchmarks.suite import eager, predicted
from benchmarks.suite.cases import BenchmarkCase
from cacr_kernels.backends import cuda
from cacr_kernels.backends.entry import Size

from . import child, devices
from .child import Context, DroppedError, Task
from .lines import NOTE
from .problems import COMPARED, FIRST, PRODUCTS, TAUS, TINY, Timed, further

SECONDS = 45
BUDGET = 0.4  # seconds of calls that are timed
CALLS = (5, 200)
HOST_CALLS = 10  # whose time on the host is taken, each with an idle GPU
PEAK_SIZE = 8192
TINY_PEAK_SIZE = 64
EXACT = 1 << 37  # B B D up to which what is expected is computed in float64
ROUGH = {"bf16": 3e-2, "fp16": 1e-2, "tf32": 1e-2, "ieee": 1e-3}  # error of a gradient, in its largest entry
ROUGH_LOSS = 1e-3
BASELINES = ("torch", "eager", "compiled", "inf_cl")
ANOTHER_FUNCTION = ("inf_cl",)
Step = Callable[[], tuple[Tensor, Tensor]]


# ---- clocks ----------------------------------------------------------------------------------------------------------
def seconds_of(call: Callable[[], Any], device: str, budget: float = BUDGET) -> list[float]:
    """Of single calls in a row, sorted, after some that do not count. On a GPU by its own clock."""
    few = devices.interprets()
    for _ in range(1 if few else 3):
        call()
    devices.wait()
    begin = time.perf_counter()
    call()
    devices.wait()
    count = 2 if few else max(CALLS[0], min(CALLS[1], int(budget / max(time.perf_counter() - begin, 1e-6))))
    if device == "cpu":
        return sorted(_timed(call) for _ in range(count))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    devices.wait()
    return sorted(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))


def host_seconds(call: Callable[[], Any]) -> float:
    """Until a call returns, which need not wait for a GPU that has nothing else to do: the median."""
    found = []
    for _ in range(1 if devices.interprets() else HOST_CALLS):
        devices.wait()
        found.append(_timed(call))
    devices.wait()
    return quantile(found, 0.5)


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@contextlib.contextmanager
def multiplying(products: str) -> Iterator[None]:
    """Inside, PyTorch multiplies float32 so; half types become float32 without loss, and TF32 holds them."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee" if products == "ieee" else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def peak(products: str, device: str) -> float:
    """FLOP/s of ``torch.mm`` of large square arrays."""
    n = TINY_PEAK_SIZE if devices.interprets() else PEAK_SIZE
    dtype = getattr(torch, Timed(0, 0, products).dtype)
    with multiplying(products):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2.0 * n**3 / seconds_of(lambda: torch.mm(a, b, out=out), device)[0]


# ---- rows ------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def views(problem: Timed, device: str) -> Tensor:
    """The rows of both views, made on the device."""
    generator = torch.Generator(device).manual_seed(problem.B)
    z = torch.randn(2, problem.B, problem.D, device=device, generator=generator)
    if not problem.raw:
        z = torch.nn.functional.normalize(z, dim=-1)
    return z.to(getattr(torch, problem.dtype))


@functools.lru_cache(maxsize=1)
def expected(problem: Timed, device: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient, in blocks."""
    exact = problem.B * problem.B * problem.D <= EXACT
    with multiplying("ieee"):
        z = views(problem, device).to(torch.float64 if exact else torch.float32)
        return library_step(problem, z, "torch")()


def library_step(problem: Timed, z: Tensor, backend: str) -> Step:
    z = z.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = cacr_kernels.cacr_loss(z, **problem.case.options, backend=backend)
        (gradient,) = torch.autograd.grad(loss, z)
        return loss, gradient

    return step


def baseline_step(problem: Timed, z: Tensor, loss_of: Callable[..., Tensor]) -> Step:
    """The views as PyTorch likes them best, each a tensor of its own."""
    leaves = [view.detach().clone().requires_grad_() for view in z]

    def step() -> tuple[Tensor, Tensor]:
        loss = loss_of(leaves)
        return loss, torch.stack(torch.autograd.grad(loss, leaves))

    return step


def in_pytorch(problem: Timed) -> Callable[..., Tensor]:
    """The matmul form as a function of the views."""
    loss = partial(eager.cacr_loss, **TAUS)
    return eager.normalized(loss) if problem.raw else loss


def flash_loss(problem: Timed) -> Callable[..., Tensor]:
    """InfoNCE of two towers by the chunked kernels of inf_cl: what CLIP minimises, in products of TF32."""
    if importlib.util.find_spec("inf_cl") is None:
        raise DroppedError("inf_cl is not installed (pip install inf-cl)")
    cross_entropies = importlib.import_module("inf_cl").cal_flash_loss
    scale = 2 * TAUS["tau_neg"]

    def loss(pair: list[Tensor]) -> Tensor:
        a, b = (torch.nn.functional.normalize(view.float(), dim=-1) if problem.raw else view for view in pair)
        both = [cross_entropies(x, y, scale=scale, head_dim=min(problem.D, 256)) for x, y in ((a, b), (b, a))]
        return torch.cat(both).mean()

    return loss


def make_step(row: str, problem: Timed, z: Tensor) -> Step:
    if row == "eager":
        return baseline_step(problem, z, in_pytorch(problem))
    if row == "compiled":
        if devices.interprets():
            raise DroppedError("torch.compile makes kernels of its own, which need a GPU that is there")
        torch._dynamo.reset()
        return baseline_step(problem, z, torch.compile(in_pytorch(problem), fullgraph=True, dynamic=False))
    if row == "inf_cl":
        return baseline_step(problem, z, flash_loss(problem))
    return library_step(problem, z, row)


def wrong(row: str, problem: Timed, device: str, step: Step) -> str | None:
    """What of a row disagrees with what is expected."""
    loss, gradient = step()
    if row in ANOTHER_FUNCTION:
        finite = loss.isfinite().all() & gradient.isfinite().all()
        return None if finite.item() else f"{row} is wrong: not finite"
    true_loss, true_gradient = (x.double() for x in expected(problem, device))
    loss_error = abs(loss.double() - true_loss).item() / max(1.0, abs(true_loss.item()))
    largest = true_gradient.abs().max().item()
    gradient_error = (gradient.double() - true_gradient).abs().max().item() / largest
    if loss_error <= ROUGH_LOSS and gradient_error <= ROUGH[problem.products]:
        return None
    return f"{row} is wrong: error of the loss {loss_error:.1e}, of the gradient {gradient_error:.1e}"


# ---- tasks -----------------------------------------------------------------------------------------------------------
def measure(row: str, problem: Timed, device: str) -> dict[str, Any]:
    """One row of one problem."""
    with multiplying(problem.products):
        try:
            step = make_step(row, problem, views(problem, device))
            if (reason := wrong(row, problem, device, step)) is not None:
                raise ValueError(reason)
            found = figures(problem, device, seconds_of(step, device), host_seconds(step))
        except DroppedError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).strip()[:300]}"
            if row in BASELINES and not child.is_sticky(said):
                raise DroppedError(said) from error
            raise
        finally:
            if device != "cpu":
                torch.cuda.empty_cache()
        sizes = {"products": problem.products, "B": problem.B, "D": problem.D, "rows": problem.rows}
        about = {"row": row, **sizes, "problem name": problem.name}
        return about | found | (rule(problem, device, row) if row in devices.GPU_BACKENDS else {})


def figures(problem: Timed, device: str, seconds: list[float], host: float) -> dict[str, Any]:
    """What the report shows of times."""
    rate = problem.flop / max(quantile(seconds, 0.5), 1e-9)
    found: dict[str, Any] = {f"p{100 * q:.0f} ms": 1e3 * quantile(seconds, q) for q in (0.2, 0.5, 0.8)}
    found |= {"host µs": 1e6 * host, "TFLOP/s": rate / 1e12, "of peak": rate / peak(problem.products, device)}
    return dict.fromkeys(found) if devices.interprets() else found


def rule(problem: Timed, device: str, row: str) -> dict[str, Any]:
    """What the choice of ``"auto"`` is made of, and the time that was predicted."""
    case = BenchmarkCase(problem.case, dtype=problem.dtype, device=device)
    found: dict[str, Any] = {"ours": True, "predicted ms": predicted.milliseconds(case, row)}
    if row == cuda.BACKEND.name:
        size = Size(float(problem.B) ** 2, problem.D, getattr(torch, problem.dtype))
        limit = None if problem.products == "ieee" else cuda.UP_TO  # without one it is taken whatever the work
        found |= {"work": cuda.work(size), "limit": limit}
    return found


def show_peak(products: str, device: str) -> dict[str, Any]:
    rate = peak(products, device) / 1e12
    return {"row": "torch.mm", "products": products, "TFLOP/s": None if devices.interprets() else rate}


def tasks(backends: list[str], device: str) -> Iterator[Task]:
    """Peaks, ours and eager PyTorch where it matters most, then all else; last what takes long to compile."""
    for products in PRODUCTS:
        yield Task(f"peak {products}", partial(show_peak, products, device))
    first, others = (TINY, ()) if devices.interprets() else (FIRST, tuple(further()))
    for problem in first:
        yield from _rows(problem, (*backends, "eager"), device)
    for problem in (*first, *others):
        compared = problem in first or problem.B in COMPARED
        rows = ("torch", "inf_cl") if problem in first else (*backends, *(("torch", "eager", "inf_cl") * compared))
        yield from _rows(problem, rows, device, optional=True)
    for problem in (*first, *others):
        if problem in first or problem.B in COMPARED:
            yield from _rows(problem, ("compiled",), device, optional=True)


def _rows(problem: Timed, rows: tuple[str, ...], device: str, optional: bool = False) -> Iterator[Task]:
    for row in rows:
        call = partial(measure, row, problem, device)
        yield Task(f"{row} {problem.name}", call, optional=optional or row in BASELINES)


def run(context: Context) -> None:
    if (reason := devices.why_none()) is not None:
        return context.skip(reason)
    if devices.absent() and not devices.interprets():
        return context.skip("kernels are counted, none is run")
    if devices.interprets():
        context.lines.write(NOTE, text="kernels are interpreted: every row runs on small problems, and has no time")
    child.run(context, tasks(devices.usable(), devices.GPU), SECONDS)
    return None
