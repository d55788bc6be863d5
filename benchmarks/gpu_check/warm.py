"""Compiles the Triton kernels of the next steps, in as many processes as there are cores, and launches none.

Each process makes the calls of its share with ``JITFunction.run`` told to stop before the launch. So every kernel is
compiled for exactly the arguments that the call will have, ends up in Triton's cache on disk, and a kernel that hangs
or faults does so later, in the check that names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from cacr_kernels import testing

from . import child, devices
from .child import Context, Task
from .problems import COMPARED, DTYPES, FIRST, INTERPRETED, SMOKE, TINY, Timed, further
from .times import multiplying

SECONDS = 40


def launch_nothing() -> list[str]:
    """From now on kernels are compiled only; the names of those that were, one for each variant."""
    jit = importlib.import_module("triton.runtime.jit").JITFunction
    run, seen, names = jit.run, set[int](), list[str]()

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        if id(compiled) not in seen:
            seen.add(id(compiled))
            names.append(getattr(self, "__name__", "kernel"))
        return compiled

    jit.run = compile_only
    return names


def compile_case(names: list[str], case: testing.Case, dtype: str) -> dict[str, Any]:
    before = len(names)
    inputs = testing.rounded(testing.make_inputs(case), getattr(torch, dtype), "cuda")
    testing.actual_quantities(case, inputs, "triton")
    return {"kernels": len(names) - before}


def compile_timed(names: list[str], problem: Timed) -> dict[str, Any]:
    with multiplying(problem.products):
        return compile_case(names, problem.case, problem.dtype)


def timed_later() -> Iterator[Timed]:
    """Of the other problems two batches, with and without splits: the kernels are those of all batches."""
    return (problem for problem in further() if problem.B in COMPARED[:2])


def tasks(names: list[str]) -> Iterator[Task]:
    cases, dtypes = (INTERPRETED, DTYPES[:1]) if devices.interprets() else (SMOKE, DTYPES)
    for problem in TINY if devices.interprets() else FIRST:
        yield Task(problem.name, partial(compile_timed, names, problem), optional=True)
    for case in cases:
        for dtype in dtypes:
            yield Task(f"{dtype} {case.name}", partial(compile_case, names, case, dtype), optional=True)
    for problem in () if devices.interprets() else timed_later():
        yield Task(problem.name, partial(compile_timed, names, problem), optional=True)


def run(context: Context) -> None:
    if (reason := devices.why_none() or devices.reasons()["triton"]) is not None:
        return context.skip(reason)
    child.run(context, tasks(launch_nothing()), SECONDS)
    return None
