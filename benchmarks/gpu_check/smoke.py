"""Every loss in every dtype on each backend of the GPU, against float64 computed on the host.

Tolerance and measure are those of ``cacr_kernels.testing``. The backends take turns, and small shapes come first, so
that whatever is wrong shows early and on a small problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from cacr_kernels import testing

from . import child, devices
from .child import Context, Task
from .problems import DTYPES, INTERPRETED, SMOKE

SECONDS = 20  # a check that takes longer hangs
CONFIRM = 16  # draws by which a miss is looked at again


def errors(case: testing.Case, backend: str, dtype: torch.dtype, draws: int) -> list[testing.Result]:
    """Every quantity, the worst of all draws."""
    expected = testing.expect(case, dtype, "cpu", draws)
    found: list[dict[str, float]] = []
    for draw in expected.draws:
        inputs = {name: t.to(devices.device_of(backend)) for name, t in draw.inputs.items()}
        actual = testing.actual_quantities(case, inputs, backend)
        found.append(draw.errors({name: t.cpu() for name, t in actual.items()}))
    return [
        testing.Result(name, max(draw[name] for draw in found), yardstick, testing.tolerance(yardstick, dtype))
        for name, yardstick in expected.yardstick.items()
    ]


def check(case: testing.Case, backend: str, dtype_name: str) -> dict[str, Any]:
    """The quantity whose error is the largest share of its tolerance."""
    dtype = getattr(torch, dtype_name)
    results = errors(case, backend, dtype, 1 if devices.interprets() else testing.DRAWS)
    if not all(r.ok for r in results) and all(math.isfinite(r.error) for r in results):
        results = errors(case, backend, dtype, CONFIRM)
    worst = max(results, key=lambda r: r.error / r.tolerance if math.isfinite(r.error) else math.inf)
    wrong = [f"{r.quantity}: error {r.error:.2e} > {r.tolerance:.2e}" for r in results if not r.ok]
    shown = {"ok": not wrong, "error": worst.error, "tolerance": worst.tolerance, "of": worst.quantity}
    return shown | ({"problem": ", ".join(wrong)} if wrong else {})


def tasks(backends: list[str]) -> Iterator[Task]:
    cases, dtypes = (INTERPRETED, DTYPES[:1]) if devices.interprets() else (SMOKE, DTYPES)
    for case in cases:
        for dtype in dtypes:
            for backend in backends:
                yield Task(f"{backend} {dtype} {case.name}", partial(check, case, backend, dtype))


def run(context: Context) -> None:
    if (reason := devices.why_none(interpreter=True)) is not None:
        return context.skip(reason)
    child.run(context, tasks(devices.usable()), SECONDS)
    return None
