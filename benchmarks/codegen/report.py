"""``python -m benchmarks.codegen``: what the compilers make of the GPU kernels, on a machine without a GPU.

It counts, it does not time. Every kernel is compiled for every processor, dtype and number of features, with the launch
configuration that would be used there. The machine code says how many registers, spills and bytes of shared memory that
takes, and how many instructions of each kind a similarity costs. What the units of a processor execute per clock then
bounds how fast the kernel can be: the slowest unit sets the bound, a real run is slower. With the bytes and launches of
a whole loss that makes a predicted time (``predict.py``): ``predicted.csv``, and a table of ``docs/backends.md``.

    python -m benchmarks.codegen [--only TEXT] [--jobs N] [--out benchmarks/results/codegen]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import cuda_kernels, predicted, triton_kernels
from .rows import CODE, DEVICES, OUT, KernelCase, Row, describe, load, problems

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backends.md"
PREDICTED = "predicted.csv"
START, END = "<!-- codegen: made by `python -m benchmarks.codegen --docs` -->", "<!-- codegen: end -->"


class Source(NamedTuple):
    """Where the rows of a backend come from: the matrix, and what compiles cases that differ in kernel or D alone."""

    cases: Callable[[], Iterator[KernelCase]]
    build: Callable[[list[KernelCase]], list[Row]]
    together: Callable[[KernelCase], object]  # cases with the same are built by one call
    why_not: Callable[[], str | None] = lambda: None  # a sentence if nothing can be compiled here
    note: str = ""  # what a reader of its rows should know


SOURCES = (
    Source(triton_kernels.cases, triton_kernels.build, lambda case: case[:4]),
    Source(cuda_kernels.cases, cuda_kernels.build, lambda case: case[2:4], cuda_kernels.why_not, cuda_kernels.NOTE),
)


def picture(rows: list[Row], path: Path) -> None:
    """Clocks per similarity by unit, Triton kernels, bfloat16."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = CODE["triton"].principal
    rows = [row for row in rows if row.code.pictured]
    devices = [d for d in DEVICES if any(r.device == d.name for r in rows)]
    figure, axes = plt.subplots(len(names), len(devices), figsize=(3.2 * len(devices), 7), sharey="row", squeeze=False)
    colours = {"tensor": "#4c72b0", "issue": "#dd8452", "fp32": "#55a868", "ex2": "#c44e52"}
    for y, name in enumerate(names):
        for x, device in enumerate(devices):
            axis = axes[y][x]
            here = [r for r in rows if (r.kernel, r.device, r.dtype) == (name, device.name, "bf16")]
            for i, (unit, colour) in enumerate(colours.items()):
                at = [j + 0.2 * (i - 1.5) for j in range(len(here))]
                axis.bar(at, [r.cycles.get(unit, 0) for r in here], 0.2, color=colour, label=unit)
            axis.set_xticks(range(len(here)), [str(r.D) for r in here])
            axis.set_title(f"{name}, {device.name}", fontsize=8)
    axes[0][0].legend(fontsize=7)
    for row in axes:
        row[0].set_ylabel("clocks per similarity", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("D", fontsize=8)
    figure.suptitle("Counted from compiled code (bfloat16), not timed: the longest bar bounds the speed", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def save(rows: dict[str, Row], path: Path) -> None:
    """The report, a row on a line."""
    import triton

    about = {"triton": triton.__version__, "nvcc": cuda_kernels.version(), "timed": False}
    lines = []
    for name, row in rows.items():
        found = row._asdict() | {"limit": row.limit, "problems": problems(row)}
        found |= {key: {unit: round(n, 4) for unit, n in found[key].items()} for key in ("per_similarity", "cycles")}
        lines.append(f"{json.dumps(name)}: {json.dumps(found)}")
    text = json.dumps(about)[:-1] + ', "rows": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


def matrix() -> dict[str, KernelCase]:
    """All cases by the names of their rows."""
    return {case.name: case for source in SOURCES for case in source.cases()}


Work = tuple[Callable[[list[KernelCase]], list[Row]], list[KernelCase]]


def jobs(wanted: set[str]) -> list[Work]:
    """What to call with which cases: those that share compiled code at once."""
    found = []
    for source in SOURCES:
        groups: dict[object, list[KernelCase]] = {}
        for case in source.cases():
            if case.name in wanted:
                groups.setdefault(source.together(case), []).append(case)
        found += [(source.build, group) for group in groups.values()]
    return found


def compile_all(wanted: set[str], workers: int, console: Console) -> Iterator[list[Row]]:
    """Rows as they become ready, from as many processes."""
    work = jobs(wanted)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(wanted))
        for rows in in_processes(work, workers) if workers > 1 else (build(group) for build, group in work):
            yield rows
            progress.advance(bar, len(rows))


def in_processes(work: list[Work], workers: int) -> Iterator[list[Row]]:
    """Rows from as many processes, in the order in which they become ready."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(build, group) for build, group in work]):
            yield future.result()


def summary(rows: list[Row], console: Console) -> None:
    """A table per processor: the principal kernels at D = 128."""
    for device in DEVICES:
        here = [r for r in rows if (r.device, r.D) == (device.name, 128) and r.kernel in r.code.principal]
        if not here:
            continue
        table = Table(title=f"{device.name}, D = 128", title_justify="left", show_edge=False, pad_edge=False)
        for heading in ("", "kernel", "dtype"):
            table.add_column(heading)
        for heading in ("registers", "shared, KiB", "clocks per similarity", "limit"):
            table.add_column(heading, justify="left" if "limit" in heading else "right")
        for row in here:
            clocks = f"{row.cycles[row.limit]:.3f}" if row.cycles else "–"
            numbers = str(row.registers), f"{row.shared / 1024:.1f}", clocks
            table.add_row(row.backend, row.kernel, row.dtype, *numbers, row.limit)
        console.print(table, "")
    names = {KernelCase(*row[:5]).name for row in rows}
    for source in SOURCES:
        if source.note and any(case.name in names for case in source.cases()):
            console.print(source.note, soft_wrap=True)


UNITS = {
    "tensor": "the tensor cores",
    "issue": "the issue of instructions",
    "ex2": "the exponentials",
    "fp32": "the arithmetic units",
    "fp64": "the float64 units",
}


def sentences(rows: list[Row]) -> str:
    """What the report says, in short."""
    limits: set[str] = set()

    def clocks(backend: str, kernel: str) -> str:
        found = []
        for device in ("A100", "H100", "B200"):
            case = KernelCase(backend, kernel, device, "bf16", 128)
            for row in rows:
                if row[:5] == case and row.cycles:
                    limits.add(UNITS[row.limit])
                    found.append(f"{row.cycles[row.limit]:.2f}")
                elif row[:5] == case:
                    found.append("–")
        return " / ".join(found)

    spilling = sum(bool(row.stack or row.spills) for row in rows)
    triton = clocks("triton", "statistics"), clocks("triton", "gradient of queries")
    cuda = clocks("cuda", "statistics"), clocks("cuda", "gradients")
    return (
        f"Of {len(rows):,} compiled kernels, for {len({row.device for row in rows})} processors, {spilling or 'none'} "
        f"spill{'s' * (spilling < 2)} registers. In bfloat16 at D = 128 a similarity takes a multiprocessor of A100 / "
        "H100 / B200 "
        f"at least {triton[0]} clocks in the first sweep (statistics) and {triton[1]} in that of one gradient with the "
        f"Triton kernels, and {cuda[0]} and {cuda[1]} with the CUDA kernels (–: a loop that the count does not "
        f"understand); the limit is set by {' or '.join(sorted(limits))}."
    )


def write_page(rows: dict[str, Row]) -> None:
    """Writes the sentences and the table of predicted times between their marks in docs/backends.md."""
    text = PAGE.read_text(encoding="utf-8")
    for start, end, block in (
        (START, END, wrapped(rows)),
        (predicted.START, predicted.END, predicted.page(rows)),
    ):
        before, rest = text.split(start)
        text = before + start + "\n" + block + "\n" + end + rest.split(end)[1]
    PAGE.write_text(text, encoding="utf-8")


def wrapped(rows: dict[str, Row]) -> str:
    """The sentences as an item of a list."""
    text = sentences(list(rows.values()))
    return textwrap.fill(text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def predict(options: argparse.Namespace, console: Console) -> None:
    """Times from a report that there is, for the file beside it and, with ``--docs``, for the page."""
    rows = load(options.out / "codegen.json")
    predicted.write(rows, options.out / PREDICTED)
    if options.docs:
        write_page(rows)
    predicted.show(rows, console)


def main(argv: list[str] | None = None) -> int:
    """Compiles, writes JSON and picture, prints tables and what is wrong; exit status 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with all words of TEXT, others are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that compile")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for codegen.json and codegen.png")
    parser.add_argument(
        "--docs", action="store_true", help="compile nothing, put what the report says into docs/backends.md"
    )
    parser.add_argument("--predict", action="store_true", help="compile nothing, predict times from the report")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    report = options.out / "codegen.json"
    if options.docs or options.predict:
        predict(options, console)
        return 0
    console.print("Compiled and inspected, not timed: there is no GPU in this.")
    known = matrix()
    wanted = {name for name in known if all(word in name for word in options.only.split())}
    for source in SOURCES:
        if (reason := source.why_not()) is not None:
            wanted -= {case.name for case in source.cases()}
            console.print(reason)
    options.out.mkdir(parents=True, exist_ok=True)
    old = load(report) if options.only else {}
    rows = {name: row for name, row in old.items() if name in known}
    wrong = 0
    for found in compile_all(wanted, options.jobs, console):
        rows |= {KernelCase(*row[:5]).name: row for row in found}
        rows = {name: rows[name] for name in known if name in rows}
        save(rows, report)
        for row in found:
            if bad := problems(row):
                wrong += 1
                console.print(f"{KernelCase(*row[:5]).name}: {describe(row)}: {'; '.join(bad)}", soft_wrap=True)
    if any(row.code.pictured for row in rows.values()):
        picture(list(rows.values()), options.out / "codegen.png")
    predicted.write(rows, options.out / PREDICTED)
    summary([row for name, row in rows.items() if name in wanted], console)
    if len(rows) == len(known):
        predicted.show(rows, console)
        console.print(sentences(list(rows.values())), soft_wrap=True)
    console.print(
        f"{len(rows)} rows in {report}; {wrong} of {len(wanted)} compiled now are not as they should be", soft_wrap=True
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
