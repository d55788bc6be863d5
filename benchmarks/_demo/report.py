"""What the training demo prints and what it writes as JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict
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
)
from .training import Run

HEADINGS = {"overall": "overall", "balanced": "balanced", "tail": "rarest 3", "worst_class": "worst class"}


def print_setting(console: Console, config: Config, split: Split, backend: str) -> None:
    """What is trained on what, before it starts."""
    console.print(f"[bold]CACR and NT-Xent on scikit-learn's digits[/bold], torch {torch.__version__}, "
                  f"{torch.get_num_threads()} CPU threads, CACR backend [bold]{backend}[/bold]")  # fmt: skip
    console.print(f"  training images per digit 0-9: {split.train_counts} (the published linear imbalance)")
    console.print(f"  scored on the {config.scored_on}, images per digit: {split.test_counts}")
    console.print(
        f"  {config.seeds} seeds x {config.epochs} epochs, {config.views} views, batch {config.batch}; "
        f"tau_pos {config.tau_pos:g}, tau_neg {config.tau_neg:g} (published for small image sets); "
        f"NT-Xent temperature {config.temperature:g}"
    )


def print_results(console: Console, scores: Scores, config: Config, split: Split) -> None:
    """One table per probe and what to make of it."""
    for probe in PROBES:
        console.print(_table(scores, probe))
    images = len(split.test_images)
    typical = spread(scores, "CACR", "linear", "overall").mean
    notes = [
        f"Mean ± standard deviation over {config.seeds} seeds; the last row is the difference seed by seed.",
        f"One image of {images} is {100 / images:.2f} points; the sampling error of an accuracy of "
        f"{100 * typical:.1f} % is {100 * sampling_error(typical, images):.1f} points: smaller differences say little.",
    ]
    if len(set(split.test_counts)) == 1:
        notes.append("Every class has the same number of scored images: overall and balanced accuracy are one number.")
    else:
        notes.append("The scored images are imbalanced like the training part: read the balanced accuracy.")
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False)


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
    """Where the time went."""
    for loss in LOSSES:
        timing = timings(runs)[loss]
        console.print(
            f"  {loss}: {timing['step_ms']:.1f} ms per step, {timing['loss_ms']:.2f} ms of it in the loss "
            f"(forward and backward): {100 * timing['loss_share']:.1f} %"
        )
    console.print(f"  total: {seconds:.0f} s")


def timings(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Milliseconds per step and per loss, and the share of the latter."""
    result = {}
    for loss in LOSSES:
        own = [run for run in runs if run.loss == loss]
        steps, step, inside = (sum(getattr(r, k) for r in own) for k in ("steps", "step_seconds", "loss_seconds"))
        result[loss] = {"step_ms": 1e3 * step / steps, "loss_ms": 1e3 * inside / steps, "loss_share": inside / step}
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
