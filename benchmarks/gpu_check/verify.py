"""The checks of ``python -m cacr_kernels.verify`` on the GPU, spread over as many processes as there are cores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from cacr_kernels import testing
from cacr_kernels.verify import DTYPES, Gradcheck, check_group, gradchecks, group_of, run_gradcheck

from . import child, devices
from .child import Context, Task
from .lines import NOTE

SECONDS = 30


def check(backend: str, dtype: str, case: testing.Case) -> dict[str, Any]:
    row = check_group(backend, dtype, group_of(case), [case], devices.device_of(backend), lambda: None)
    if not row.failures:
        return {"checks": row.checks}
    problem = f"{row.failures} of {row.checks}; {row.quantity}: error {row.error:.2e} > {row.tolerance:.2e}"
    return {"ok": False, "checks": row.checks, "problem": problem}


def check_numeric(backend: str, numeric: Gradcheck) -> dict[str, Any]:
    found = run_gradcheck(backend, numeric, devices.device_of(backend))
    return {"ok": found["ok"]} | ({} if found["ok"] else {"problem": found["problem"]})


def smallest(cases: Iterable[testing.Case]) -> list[testing.Case]:
    """Of every loss the case with the least work, where kernels are interpreted."""
    several = [case for case in cases if case.shape["B"] > 1]  # there are negatives
    by_size = sorted(several, key=lambda case: (math.prod(max(1, n) for n in case.shape.values()), case.name))
    return list({case.loss: case for case in reversed(by_size)}.values())


def tasks(backends: list[str]) -> Iterator[Task]:
    """The quick cases first, then the gradients, then the rest; a case with all backends and dtypes in one process."""
    few = devices.interprets()
    quick = set(testing.cases(quick=True))
    cases = smallest(quick) if few else sorted(testing.cases(), key=lambda case: case not in quick)
    for number, case in enumerate(cases):
        if number == len(quick):
            for numeric in gradchecks():
                for backend in backends:
                    yield Task(
                        f"{backend} gradcheck {numeric.label}", partial(check_numeric, backend, numeric), numeric.label
                    )
        for dtype in ("float32",) if few else DTYPES:
            for backend in backends:
                yield Task(f"{backend} {dtype} {case.name}", partial(check, backend, dtype, case), case.name)


def run(context: Context) -> None:
    if (reason := devices.why_none()) is not None:
        return context.skip(reason)
    if devices.interprets():
        context.lines.write(
            NOTE, text="kernels are interpreted: one small case of each loss, in one dtype, no gradcheck"
        )
    child.run(context, tasks(devices.usable()), SECONDS)
    return None
