"""Where the time of a small problem goes: ``python -m benchmarks.suite.overhead``.

A loss of 64 embeddings takes the kernels microseconds. The rest is what surrounds them: checks of the arguments, the
operator's way through PyTorch's dispatcher, the autograd graph. ``z.sum()`` shows what the graph costs by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.host import quantile
from cacr_kernels import cacr_loss

from .cases import TEMPERATURES, BenchmarkCase, cacr
from .measure import Budget, interleave, ratios

OPERATOR, FORWARD, WHOLE = "operator: loss and gradients", "loss, with its graph", "loss and backward"
SUM_FORWARD, SUM = "z.sum(), with its graph", "z.sum() and backward"


class _Recorder(TorchDispatchMode):
    """Remembers the call of the package's own operator."""

    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cacr_kernels":
            self.call = func, args, kwargs or {}
        return func(*args, **(kwargs or {}))


def steps(z: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, each with everything of the ones before."""

    def loss(views: Tensor) -> Tensor:
        return cacr_loss(views, **TEMPERATURES)

    def whole(function: Callable[[Tensor], Tensor]) -> None:
        z.grad = None
        function(z).backward()

    with _Recorder() as recorder:
        loss(z)
    if recorder.call is None:
        raise SystemExit("the backend that runs here has no operator of its own")
    operator, args, keywords = recorder.call

    def bare() -> Any:
        with torch.no_grad():
            return operator(*args, **keywords)

    return {
        OPERATOR: bare,
        FORWARD: lambda: loss(z),
        WHOLE: lambda: whole(loss),
        SUM_FORWARD: lambda: z.sum(),
        SUM: lambda: whole(torch.sum),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Times the steps and prints a table of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite.overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="in all (%(default)s)")
    options = parser.parse_args(arguments)
    case = BenchmarkCase(cacr(2, 32, 64))
    z = case.inputs()["views"].requires_grad_()
    found = steps(z)
    for step in found.values():
        step()
    times = interleave(found, dict.fromkeys(found, 0.0), Budget(options.seconds), options.threads, "cpu")
    console = Console(highlight=False, width=100)
    console.print("[bold]cacr_loss, V = 2, B = 32, D = 64, float32: microseconds", soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("up to and with")
    for heading in ("p20", "p50", "p80", "× z.sum() and backward"):
        table.add_column(heading, justify="right")
    for name, timing in times.items():
        relative = quantile(ratios(timing, times[SUM]), 0.5)
        table.add_row(name, *(f"{1e6 * timing.quantile(q):.1f}" for q in (0.2, 0.5, 0.8)), f"{relative:.2f}")
    console.print(table)
    middle = {name: 1e6 * timing.quantile(0.5) for name, timing in times.items()}
    console.print(
        f"The operator takes {middle[OPERATOR]:.0f} µs, checks and graph {middle[FORWARD] - middle[OPERATOR]:.0f} µs, "
        f"backward {middle[WHOLE] - middle[FORWARD]:.0f} µs (z.sum(): {middle[SUM] - middle[SUM_FORWARD]:.0f} µs).",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
