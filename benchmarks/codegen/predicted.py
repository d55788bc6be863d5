"""The table of predicted times: as a file beside the report, as a table to read, as a part of ``docs/backends.md``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .predict import GPUS, LAUNCHES, Gpu, Predicted, Problem, Rows, predict

START, END = "<!-- predicted: made by `python -m benchmarks.codegen --docs` -->", "<!-- predicted: end -->"
BACKENDS = tuple(LAUNCHES)
SHAPES = (
    *((2, B, D) for D in (128, 256, 512, 768) for B in (1024, 4096, 16384, 65536)),
    (5, 1024, 128), (5, 1024, 768),
)  # fmt: skip
DTYPES = ("bf16", "tf32", "ieee")
POOLED = tuple((2, B, D) for D in (512, 768) for B in (2048, 8192, 32768))  # in bf16
GOAL_GPU, GOALS = "H200", {128: 6.5, 768: 38.0}  # milliseconds at V = 2, B = 65536, bf16
SHOWN = ((128, "bf16"), (768, "bf16"), (128, "ieee"))  # of the page, at V = 2, B = 65536
FIELDS = ("backend", "gpu", "V", "B", "D", "dtype", "pairing", "predicted_ms", "share_of_peak", "limit", "launches",
          "code_of")  # fmt: skip
LARGE = (2, 65536)
BOUNDS = {"tensor": "tensor cores", "issue": "issue of instructions", "L2": "L2", "fp32": "arithmetic units"}


class Line(NamedTuple):
    """One prediction and what it is about."""

    backend: str
    gpu: Gpu
    problem: Problem
    found: Predicted

    @property
    def cells(self) -> tuple[object, ...]:
        """In the order of ``FIELDS``; ``code_of``: the processor whose code was counted, where not its own."""
        V, B, D, dtype, _, pairing = self.problem
        milliseconds = f"{1e3 * self.found.seconds:.4g}"
        about = self.found.limit, self.found.launches, "A100" if self.found.stand_in else ""
        sizes = self.backend, self.gpu.name, V, B, D, dtype, pairing
        return *sizes, milliseconds, f"{self.found.share:.3f}", *about


def lines(rows: Rows) -> Iterator[Line]:
    """All of the table that the report has counts for."""
    for problem in problems():
        for gpu in GPUS:
            for backend in BACKENDS:
                found = predict(rows, backend, problem, gpu)
                if found is not None:
                    yield Line(backend, gpu, problem, found)


def problems() -> Iterator[Problem]:
    """Pairs of views, then views that are pooled."""
    yield from (Problem(*shape, dtype) for shape in SHAPES for dtype in DTYPES)
    yield from (Problem(*shape, "bf16", pairing="pooled") for shape in POOLED)


def text(rows: Rows) -> str:
    """The table as comma-separated text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    writer.writerows(line.cells for line in lines(rows))
    return out.getvalue()


def write(rows: Rows, path: Path) -> None:
    """Writes the table as a file."""
    path.write_text(text(rows), encoding="utf-8")


# ---- to read ---------------------------------------------------------------------------------------------------------
def cell(rows: Rows, backend: str, gpu: Gpu, D: int, dtype: str) -> str:
    """Milliseconds and share of the peak of the large loss; a dash where nothing was counted."""
    found = predict(rows, backend, Problem(*LARGE, D, dtype), gpu)
    if found is None:
        return "–"
    time = 1e3 * found.seconds
    shown = f"{time:,.0f}" if time >= 100 else f"{time:.1f}"
    return f"{shown}{'*' if found.stand_in else ''} ({100 * found.share:.0f} %)"


def page(rows: Rows) -> str:
    """The table of the page, and what it says about the goals."""
    found = [
        f"| predicted ms (share of the peak) | {' | '.join(gpu.name for gpu in GPUS)} |",
        "|---|" + "---:|" * len(GPUS),
    ]
    for D, dtype in SHOWN:
        for backend in BACKENDS:
            cells = (cell(rows, backend, gpu, D, dtype) for gpu in GPUS)
            found.append(f"| D = {D}, {dtype}, `{backend}` | {' | '.join(cells)} |")
    return "\n".join([*found, "", *goals(rows)])


def goals(rows: Rows) -> Iterator[str]:
    """What is predicted today where there is a goal."""
    gpu = next(gpu for gpu in GPUS if gpu.name == GOAL_GPU)
    for D, wanted in GOALS.items():
        told: list[str] = []
        for backend in BACKENDS:
            found = predict(rows, backend, Problem(*LARGE, D, "bf16"), gpu)
            if found is not None:
                told.append(f"{1e3 * found.seconds:.1f} ms with `{backend}` ({BOUNDS.get(found.limit, found.limit)})")
        if told:
            yield f"Goal on {GOAL_GPU}, D = {D}, bf16: {wanted:g} ms. Predicted: {' and '.join(told)}."


def show(rows: Rows, console: Console) -> None:
    """The table of the page, on a terminal."""
    console.print("Predicted ms of a loss with gradients, V = 2, B = 65536: reckoned, not timed", soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("share of the peak")
    for gpu in GPUS:
        table.add_column(gpu.name, justify="right", no_wrap=True)
    for D, dtype in SHOWN:
        for backend in BACKENDS:
            cells = (cell(rows, backend, gpu, D, dtype).replace(" %", "%") for gpu in GPUS)
            table.add_row(f"{dtype} D={D} {backend}", *cells)
    console.print(table)
    for line in goals(rows):
        console.print(line, soft_wrap=True)
