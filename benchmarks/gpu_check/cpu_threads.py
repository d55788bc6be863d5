"""One loss and its gradients on 1, 2, 4, 8, 16 threads of the CPU, as far as there are cores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.host import cores, quantile
from cacr_kernels.backends.table import select

from . import child
from .child import Context, Task
from .problems import Timed
from .times import library_step, seconds_of, views

THREADS = (1, 2, 4, 8, 16)
PROBLEM = Timed(2048, 128, "ieee")
SECONDS = 15


def measure(count: int) -> dict[str, Any]:
    """The fastest backend of the CPU with so many threads."""
    backend = select("auto", torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = seconds_of(library_step(PROBLEM, views(PROBLEM, "cpu"), backend), "cpu", budget=2.0)
    finally:
        torch.set_num_threads(before)
    middle = quantile(found, 0.5)
    return {
        "backend": backend,
        "threads": count,
        "B": PROBLEM.B,
        "p50 ms": 1e3 * middle,
        "GFLOP/s": PROBLEM.flop / middle / 1e9,
    }


def tasks() -> Iterator[Task]:
    for count in THREADS:
        if count <= cores():
            yield Task(f"threads {count}", partial(measure, count))


def run(context: Context) -> None:
    child.run(context, tasks(), SECONDS)
