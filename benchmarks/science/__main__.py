"""What the loss does to representations, an experiment that could fail: ``python -m benchmarks.science``.

Long-tailed and balanced training parts of one size, CACR, its variants and NT-Xent with temperatures chosen on
validation images, fresh seeds, paired differences with intervals: docs/experiment.md says it in full. Each run is kept
at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import host

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .data import Data
    from .design import Setting
    from .runs import Results

EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
RESULTS, PICTURE = "results.jsonl", "experiment.png"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, as they were given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=None, help="folder of results and picture (science, science-NAME)")
    parser.add_argument("--data", default=None, help="a folder: IDX, CIFAR, or images in one folder a class")
    parser.add_argument("--size", type=int, default=None, help="side of images by class (32)")
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits, a few steps: does it run?")
    parser.add_argument("--budget", type=float, default=None, help="minutes of this call (25 for MNIST, else no limit)")
    parser.add_argument("--workers", type=int, default=None, help="processes (cores; on a GPU 0: this one)")
    parser.add_argument("--steps", type=int, default=None, help="steps of a run")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds after the choice of temperatures")
    parser.add_argument("--encoder", choices=("auto", "small", "resnet18"), default="auto", help="(%(default)s)")
    parser.add_argument("--device", default=None, help="cpu or cuda (a GPU if there is one)")
    parser.add_argument("--load", type=Path, default=None, help="print these results, run nothing")
    parser.add_argument("--docs", action="store_true", help="with --load: write them into docs/experiment.md")
    return parser.parse_args(arguments)


def configure(options: argparse.Namespace, data: Data) -> Setting:
    """The setting that options and images ask for."""
    from .design import FOLDER, MNIST, PHOTOS, QUICK

    setting = QUICK if options.quick else MNIST
    if options.data is not None:
        setting = PHOTOS if data.images.shape[1] == 3 else FOLDER
        if options.quick:
            setting = replace(QUICK, name=setting.name)
    encoder = options.encoder
    if encoder == "auto":
        large = data.images.shape[1] == 3 and not options.quick
        encoder = "resnet18" if large and importlib.util.find_spec("torchvision") else "small"
    setting = replace(setting, encoder=encoder, steps=options.steps or setting.steps)
    if options.seeds is not None:
        setting = replace(setting, seeds=tuple(range(options.seeds)))
    return replace(setting, minutes=options.budget) if options.budget is not None else setting


def run(setting: Setting, data: Data, results: Results, workers: int, device: torch.device, console: Console) -> bool:
    """All runs that fit into the budget, under a progress bar; whether all are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .design import FINAL, Run, expected_runs
    from .runs import Budget, Record, carry_out_all

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("runs"),
        TimeElapsedColumn(),
    )  # fmt: skip
    start, before = time.perf_counter(), len(results.done)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=expected_runs(setting), completed=before)

        def finished(done: Run, record: Record) -> None:
            stage = "final" if done.stage == FINAL else done.stage
            text = f"{stage}  {done.arm}  {done.kind}  seed {done.seed}"
            total = max(expected_runs(setting), len(results.done))
            progress.update(task, completed=len(results.done), total=total, description=f"{text:<58}")
            here = len(results.done) - before
            if not console.is_terminal and here % 20 == 0:
                seconds = time.perf_counter() - start
                left = seconds / here * (total - len(results.done))
                console.print(
                    f"  {len(results.done)}/{total} runs, {seconds:.0f} s, about {left:.0f} s left", soft_wrap=True
                )

        budget = Budget(None if setting.minutes is None else 60.0 * setting.minutes)
        return carry_out_all(setting, data, results, workers=workers, device=device, budget=budget, finished=finished)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is left, prints tables, draws the picture."""
    options = parse_arguments(arguments)
    host.require(EXTRAS, "the experiment", "science")
    if options.docs and options.load is None:
        raise SystemExit("--docs writes committed results into the page: it needs --load FILE")
    import torch
    from rich.console import Console

    from benchmarks.host import cores
    from benchmarks.suite.machine import environment

    from .analysis import Analysis
    from .data import load
    from .plot import draw
    from .report import print_results, print_setting, write_docs
    from .runs import Results, header

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)  # of a file
    if options.load is not None:
        analysis = Analysis(Results(options.load))
        print_results(console, analysis)
        if options.docs:
            console.print(f"  {write_docs(options.load, analysis)} stands in docs/experiment.md")
        return
    start = time.perf_counter()
    data = load("digits" if options.quick and options.data is None else options.data or "mnist", options.size)
    setting = configure(options, data)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    workers = options.workers if options.workers is not None else (cores() if device.type == "cpu" else 0)
    out = options.out or Path("science" if setting.name == "mnist" else f"science-{setting.name}")
    results = Results(out / RESULTS, header(setting, data, environment(str(device))))
    print_setting(console, setting, results.header, len(results.done), workers)
    whole = run(setting, data, results, workers, device, console)
    analysis = Analysis(results)
    print_results(console, analysis)
    if len(analysis.seeds) > 1:
        draw(out / PICTURE, analysis, data)
        console.print(f"  picture: {(out / PICTURE).resolve()}", soft_wrap=True)
    console.print(f"  results: {results.path.resolve()}", soft_wrap=True)
    console.print(
        f"  {'whole' if whole else 'stopped by the budget'}, {time.perf_counter() - start:.0f} s", soft_wrap=True
    )


if __name__ == "__main__":
    main()
