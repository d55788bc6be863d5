"""Train an encoder on imbalanced digits with CACR and with NT-Xent: ``python -m benchmarks.demo``.

A small convolutional network learns from four augmented views of scikit-learn's digits, of which the training part
is made imbalanced the way the paper does it (class ``i`` keeps the fraction ``(i + 1) / 10``). Its frozen features are
then scored on a balanced held-out part, once, at the end. NT-Xent gets the same weights, batches, views and epochs.
``--validate`` scores on a validation split of the training part instead, which is where options may be tried out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import host

if TYPE_CHECKING:
    from rich.console import Console

    from .config import Config
    from .data import Split
    from .evaluation import Scores
    from .threads import Threads
    from .training import Run

EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def positive_int(text: str) -> int:
    """An option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what is not given keeps the default of ``Config``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the picture goes (%(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="also write every figure here")
    parser.add_argument("--quick", action="store_true", help="a few steps only: does it run?")
    parser.add_argument("--validate", action="store_true", help="score on a validation split of the training part")
    parser.add_argument("--threads", type=positive_int, default=None, help="CPU threads (what PyTorch picks)")
    for name, help_text in (("seeds", "number of seeds (3)"), ("epochs", "epochs per run (60)")):
        parser.add_argument(f"--{name}", type=positive_int, default=None, help=help_text)
    for name, help_text in (
        ("tau-pos", "CACR attraction (1.0)"),
        ("tau-neg", "CACR repulsion (2.0)"),
        ("temperature", "NT-Xent (1 / (2 tau_neg), 0.25)"),
    ):
        parser.add_argument(f"--{name}", type=float, default=None, help=help_text)
    return parser.parse_args(arguments)


def configure(options: argparse.Namespace) -> Config:
    """The experiment that the options ask for."""
    from .config import QUICK, Config, matched

    names = ("seeds", "epochs", "tau_pos", "tau_neg", "temperature")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if ("tau_neg" in given) != ("temperature" in given):  # the other one follows
        known, other = ("tau_neg", "temperature") if "tau_neg" in given else ("temperature", "tau_neg")
        if given[known] > 0.0:
            given[other] = matched(given[known])
    return replace(QUICK if options.quick else Config(), validate=options.validate, **given)


def train_all(config: Config, split: Split, console: Console, threads: Threads) -> list[Run]:
    """Every seed with both losses, in turns, under a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .config import LOSSES
    from .training import train

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("epochs"),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    runs: list[Run] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=2 * config.seeds * config.epochs)

        def on_epoch(run: Run) -> None:
            text = f"seed {run.seed}  {run.loss:<7}  loss {run.history['loss'][-1]:+.4f}"
            progress.update(task, advance=1, description=text)
            if threads.after_epoch(run.step_seconds[-(len(run.step_seconds) // len(run.history["loss"])) :]):
                console.print("  the machine is busy: one thread from here on")

        start = time.perf_counter()
        for seed in range(config.seeds):
            for loss in LOSSES if seed % 2 == 0 else LOSSES[::-1]:
                run = train(loss, seed, split, config, on_epoch)
                runs.append(run)
                left = (time.perf_counter() - start) * (2 * config.seeds / len(runs) - 1)
                first, last = run.history["loss"][0], run.history["loss"][-1]
                console.print(
                    f"  {len(runs)}/{2 * config.seeds}  seed {seed}  {loss:<7}  loss {first:+.4f} -> {last:+.4f}  "
                    f"{len(run.step_seconds)} steps in {sum(run.step_seconds):.1f} s"
                    + (f", about {left:.0f} s left" if left else ""),
                    soft_wrap=True,
                )
        progress.update(task, description="trained")
    return runs


def score_all(config: Config, split: Split, runs: list[Run]) -> Scores:
    """Scores of every representation; the first time that labels are learned from."""
    from .config import LOSSES
    from .evaluation import PIXELS, UNTRAINED, evaluate
    from .training import make_encoder

    scores: Scores = {
        PIXELS: [evaluate(split, None)],
        UNTRAINED: [evaluate(split, make_encoder(config, seed)) for seed in range(config.seeds)],
    }
    for loss in LOSSES:
        scores[loss] = [evaluate(split, run.encoder) for run in runs if run.loss == loss]
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with both losses, scores the encoders, prints tables and draws the picture."""
    start = time.perf_counter()
    options = parse_arguments(arguments)
    host.require(EXTRAS, "the demo", "demo")
    import torch
    from rich.console import Console

    from .data import load_split
    from .plot import draw
    from .report import print_results, print_setting, print_timing, to_json
    from .threads import Threads
    from .training import backend_name

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for path in filter(None, (options.out, options.json)):
        path.parent.mkdir(parents=True, exist_ok=True)
    config = configure(options)
    console = Console(highlight=False)
    split = load_split(config.validate)
    backend = backend_name()
    print_setting(console, config, split, backend)
    chosen = options.threads is not None or config.epochs < 10  # nothing to find out, or too short to find it out
    runs = train_all(config, split, console, Threads(1 if chosen else torch.get_num_threads()))
    scores = score_all(config, split, runs)
    print_results(console, scores, config, split)
    draw(options.out, runs, scores, split, config)
    seconds = time.perf_counter() - start
    print_timing(console, runs, seconds)
    if options.json is not None:
        figures = to_json(runs, scores, config, split, backend, seconds)
        options.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        console.print(f"  figures: {options.json.resolve()}", soft_wrap=True)
    console.print(f"  picture: {options.out.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
