"""The whole training step of the demo, and the share of the loss in it: ``python -m benchmarks.suite.training_step``.

Before: the loss as PyTorch's matmul form. After: ``CACRLoss``, alone and with the parts that the demo logs. Every form
trains an encoder of its own from the same weights on the same views, and the steps take turns. If the losses or their
gradients differ on the first batch, nothing is timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.host import quantile
from cacr_kernels import CACRLoss

from ..demo.config import Config
from ..demo.data import Split, augment, load_split
from ..demo.training import Objective, Run, make_encoder, make_objective, optimiser_step
from . import eager, machine
from .gate import threads

BEFORE, AFTER, LOGGING = "PyTorch, matmul form", "cacr_kernels", "cacr_kernels with parts"
WARM_UP = 3
TOLERANCE = 1e-4  # float32, relative to the largest; both forms meet it by far
Figures = dict[str, Any]


def variants(config: Config) -> dict[str, Objective]:
    """The loss of the demo in every form."""
    alone = CACRLoss(tau_pos=config.tau_pos, tau_neg=config.tau_neg)

    def matmul(views: Tensor) -> Tensor:
        unit = F.normalize(views, dim=-1)
        return eager.cacr_loss(list(unit), tau_pos=config.tau_pos, tau_neg=config.tau_neg)

    def objective(loss: Callable[[Tensor], Tensor]) -> Objective:
        return lambda views: (loss(views), {})

    return {BEFORE: objective(matmul), AFTER: objective(alone), LOGGING: make_objective("CACR", config)}


def disagreement(losses: dict[str, Objective], config: Config, split: Split) -> dict[str, float]:
    """Largest relative difference of loss and gradient to the first variant, on the first batch."""
    generator = torch.Generator().manual_seed(0)
    batch = augment(split.train_images[: config.batch], config.views, generator)
    with torch.no_grad():
        embeddings = make_encoder(config, 0)(batch.flatten(0, 1)).view(config.views, -1, config.embedding_dim)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, loss in losses.items():
        leaf = embeddings.clone().requires_grad_()
        value = loss(leaf)[0]
        found[name] = value.detach(), torch.autograd.grad(value, leaf)[0]
    exact = found[next(iter(losses))]
    return {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(both, exact, strict=True))
        for name, both in found.items()
    }


def measure(losses: dict[str, Objective], config: Config, split: Split, steps: int, console: Console) -> Figures:
    """Milliseconds of the step and of the loss in it: 20 %, median and 80 % of the steps."""
    runs = {name: Run("CACR", 0, make_encoder(config, 0).train()) for name in losses}
    optimisers = {
        name: torch.optim.AdamW(run.encoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        for name, run in runs.items()
    }
    generators = {name: torch.Generator().manual_seed(0) for name in losses}
    names = list(losses)
    for step in track(range(WARM_UP + steps), "training", console=console, disable=not console.is_terminal):
        for name in names if step % 2 == 0 else names[::-1]:
            images = split.train_images.roll(-step * config.batch, 0)[: config.batch]
            optimiser_step(runs[name], images, losses[name], optimisers[name], generators[name], config.views)
    return {name: _figures(run) for name, run in runs.items()}


def _figures(run: Run) -> Figures:
    whole, inside = run.step_seconds[WARM_UP:], run.loss_seconds[WARM_UP:]
    share = [a / b for a, b in zip(inside, whole, strict=True)]
    series = {"step_ms": (whole, 1e3), "loss_ms": (inside, 1e3), "loss_share": (share, 1.0)}
    return {
        f"{name}_{label}": unit * quantile(values, q)
        for name, (values, unit) in series.items()
        for label, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))
    }


def print_table(console: Console, found: Figures, config: Config) -> None:
    """Prints the times of every form of the loss, and how much less the last takes."""
    what = f"V = {config.views}, B = {config.batch}, D = {config.embedding_dim}"
    console.print(f"[bold]A training step of the demo ({what}): milliseconds, median and 20–80 %", soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("loss")
    for heading in ("whole step", "20–80 %", "loss in it", "20–80 %", "share of the loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in found.items():
        cells = [
            cell
            for figure in ("step_ms", "loss_ms")
            for cell in (f"{row[f'{figure}_p50']:.2f}", f"{row[f'{figure}_p20']:.2f}–{row[f'{figure}_p80']:.2f}")
        ]
        table.add_row(name, *cells, f"{100 * row['loss_share_p50']:.1f} %", style="bold green" if name == AFTER else "")
    console.print(table)
    before, after = found[BEFORE], found[AFTER]
    console.print(
        f"The loss takes {before['loss_ms_p50'] / after['loss_ms_p50']:.1f} times less, "
        f"the whole step {before['step_ms_p50'] / after['step_ms_p50']:.2f} times less.",
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares the forms of the loss, times them, prints and writes the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite.training_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=100, help="steps per loss (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.threads < 1:
        parser.error("--steps and --threads have to be positive")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    config, split = Config(), load_split()
    with threads(options.threads):
        losses = variants(config)
        wrong = {name: error for name, error in disagreement(losses, config, split).items() if not error <= TOLERANCE}
        if wrong:
            console.print(f"[bold red]RED: the losses differ, nothing is timed: {wrong}")
            return 1
        environment = machine.environment("cpu")
        found = measure(losses, config, split, options.steps, console)
    print_table(console, found, config)
    if options.json is not None:
        data = {"environment": environment, "threads": options.threads, "steps": options.steps, "losses": found}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
