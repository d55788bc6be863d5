"""What the training demo prints and what it writes as JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .config import LOSSES, Config
from .data import Split
from .evaluation import (
    MEASURES,
    NEIGHBOURS,
    PROBES,
    REPRESENTATIONS,
    Scores,
    paired_difference,
    sampling_error,
    spread,
    summary,
    verdict,
)
from .training import Run

HEADINGS = {"overall": "overall", "balanced": "balanced", "tail": "rarest 3", "worst_class": "worst class"}


def print_setting(console: Console, config: Config, split: Split, backend: str) -> None:
    """What is trained on what, before it starts."""
    threads = torch.get_num_threads()
    published = (config.tau_pos, config.tau_neg) == (Config.tau_pos, Config.tau_neg)
    console.print(
        "[bold]CACR and NT-Xent on scikit-learn's digits[/bold]\n"
        f"  torch {torch.__version__} with {threads} thread{'s' * (threads > 1)}, CACR backend [bold]{backend}[/bold]\n"
        f"  training images per digit 0-9: {split.train_counts}\n"
        f"  scored on the {config.scored_on}, per digit: {split.test_counts}\n"
        f"  {config.epochs} epochs for each of {config.seeds} seed{'s' * (config.seeds > 1)}, "
        f"batch {config.batch}, {config.views} views\n"
        f"  CACR tau_pos {config.tau_pos:g}, tau_neg {config.tau_neg:g}"
        f"{' (as published for small image sets)' if published else ''}; NT-Xent temperature {config.temperature:g}"
        f"{', which matches' if abs(2 * config.tau_neg * config.temperature - 1) < 1e-9 else ''}",
        soft_wrap=True,
    )


def print_results(console: Console, scores: Scores, config: Config, split: Split) -> None:
    """One table per probe and what to make of it."""
    for probe in PROBES:
        console.print(_table(scores, probe))
    images = len(split.test_images)
    typical = spread(scores, "CACR", "linear", "overall").mean
    notes = [
        f"Mean ± standard deviation over {config.seeds} seeds; the last row is the difference seed by seed."
        if config.seeds > 1
        else "One seed says nothing about the spread.",
        f"One image of {images} is {100 / images:.2f} points; the sampling error of an accuracy of "
        f"{100 * typical:.1f} % is {100 * sampling_error(typical, images):.1f} points: smaller differences say little.",
    ]
    if len(set(split.test_counts)) == 1:
        notes.append("Every class has the same number of scored images: overall and balanced accuracy are one number.")
    else:
        notes.append("The scored images are imbalanced like the training part: read the balanced accuracy.")
    for probe, name in (("linear", "Linear probe"), ("kNN", "Nearest neighbours")):
        console.print(f"  [bold]{name}, CACR minus NT-Xent: {verdict(scores, probe)}[/bold]", soft_wrap=True)
    for note in notes:
        console.print(f"  {note}", style="dim", soft_wrap=True)


def _table(scores: Scores, probe: str) -> Table:
    title = {"kNN": f"k nearest neighbours (k = {NEIGHBOURS}, cosine)", "linear": "Linear probe (logistic regression)"}
    table = Table(title=f"{title[probe]}, accuracy in %", title_justify="left")
    table.add_column("features")
    for measure in MEASURES:
        table.add_column(HEADINGS[measure], justify="right")
    for name in REPRESENTATIONS:
        table.add_row(
            name,
            *(spread(scores, name, probe, measure).percent() for measure in MEASURES),
            style="bold" if name in LOSSES else None,
            end_section=name == REPRESENTATIONS[-1],
        )
    table.add_row(
        " - ".join(LOSSES), *(paired_difference(scores, probe, measure).percent(signed=True) for measure in MEASURES)
    )
    return table


def print_timing(console: Console, runs: list[Run], seconds: float) -> None:
    """Prints how long a step and the loss in it take, and the total time."""
    for loss, timing in timings(runs).items():
        console.print(
            f"  {loss}: {timing['step_ms']:.1f} ms per step, {timing['loss_ms']:.2f} ms of it in the loss "
            f"(forward and backward): {100 * timing['loss_share']:.1f} % (medians)",
            soft_wrap=True,
        )
    console.print(f"  total: {seconds:.0f} s")


def timings(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step and of the loss in it, and the median share of the latter."""
    result: dict[str, dict[str, float]] = {}
    for loss in LOSSES:
        pairs = [
            pair for run in runs if run.loss == loss for pair in zip(run.step_seconds, run.loss_seconds, strict=True)
        ]
        result[loss] = {
            "step_ms": 1e3 * median(step for step, _ in pairs),
            "loss_ms": 1e3 * median(inside for _, inside in pairs),
            "loss_share": median(inside / step for step, inside in pairs),
        }
    return result


def to_json(
    runs: list[Run], scores: Scores, config: Config, split: Split, backend: str, seconds: float
) -> dict[str, Any]:
    """All figures of the demo."""
    return {
        "config": asdict(config),
        "scored_on": config.scored_on,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "backend": backend,
        },
        "train_counts": split.train_counts,
        "scored_counts": split.test_counts,
        "accuracy": summary(scores),
        "recall_per_class": {
            name: {probe: [per_probe[probe].per_class for per_probe in scores[name]] for probe in PROBES}
            for name in REPRESENTATIONS
        },
        "history": [{"loss": run.loss, "seed": run.seed, "per_epoch": run.history} for run in runs],
        "timing": timings(runs),
        "seconds": seconds,
    }
