"""The picture of the training demo: losses, weight entropies, accuracies."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from .config import LOSSES, Config
from .data import CLASSES, Split
from .evaluation import PROBES, REPRESENTATIONS, Scores, spread
from .training import Run

COLOURS = {"raw pixels": "#c7ccd1", "untrained encoder": "#8b949e", "CACR": "#0b6bcb", "NT-Xent": "#e07b00"}
ATTRACTION, REPULSION = "#2a9d5c", "#c2334d"
GROUPS = (("balanced", "balanced"), ("tail", "three rarest\nclasses"), ("worst_class", "worst\nclass"))


def draw(path: Path, runs: list[Run], scores: Scores, split: Split, config: Config) -> None:
    """Write the picture as PNG."""
    layout = ConstrainedLayoutEngine(hspace=0.06, wspace=0.04)
    figure = Figure(figsize=(13.5, 8.2), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 12, height_ratios=(1.0, 1.15))
    cacr, nt_xent = ([run for run in runs if run.loss == name] for name in LOSSES)
    _draw_cacr_loss(figure.add_subplot(grid[0, 0:3]), cacr)
    axes = figure.add_subplot(grid[0, 3:6])
    _curves(axes, nt_xent, "loss", COLOURS["NT-Xent"], None)
    _finish(axes, "NT-Xent loss")
    _draw_entropy(figure.add_subplot(grid[0, 6:9]), cacr, "attraction", ATTRACTION, config.views - 1, "views")
    batch = min(config.batch, len(split.train_images))
    _draw_entropy(figure.add_subplot(grid[0, 9:12]), cacr, "repulsion", REPULSION, batch - 1, "instances")
    lowest = min(min(spread(scores, name, p, m).values) for name in REPRESENTATIONS for p in PROBES for m, _ in GROUPS)
    bottom = max(0.0, 10 * math.floor(10 * lowest - 0.5))  # one axis for both probes
    for column, probe in enumerate(PROBES):
        _draw_accuracies(figure.add_subplot(grid[1, 4 * column : 4 * column + 4]), scores, probe, bottom)
    _draw_classes(figure.add_subplot(grid[1, 8:12]), scores, split)
    figure.suptitle(
        f"Digits, trained on {len(split.train_images)} imbalanced images, scored on the {config.scored_on} "
        f"({len(split.test_images)} images); {config.seeds} seed{'s' * (config.seeds > 1)}, {config.epochs} epochs",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _curves(axes: Axes, runs: list[Run], figure_name: str, colour: str, label: str | None) -> None:
    """Every seed as a thin line, their mean as a thick one."""
    series = [run.history[figure_name] for run in runs]
    epochs = range(1, len(series[0]) + 1)
    for values in series:
        axes.plot(epochs, values, color=colour, linewidth=0.8, alpha=0.45)
    axes.plot(epochs, [fmean(column) for column in zip(*series, strict=True)], color=colour, linewidth=1.8, label=label)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    if not axes.get_xlabel():
        axes.set_xlabel("epoch", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _draw_cacr_loss(axes: Axes, runs: list[Run]) -> None:
    _curves(axes, runs, "loss", COLOURS["CACR"], "loss")
    _curves(axes, runs, "attraction", ATTRACTION, "attraction")
    _curves(axes, runs, "repulsion", REPULSION, "repulsion")
    axes.axhline(0.0, color="#c7ccd1", linewidth=0.8, zorder=0)
    axes.legend(fontsize=8.5, frameon=False)
    _finish(axes, "CACR loss and its two terms")


def _draw_entropy(axes: Axes, runs: list[Run], term: str, colour: str, members: int, kind: str) -> None:
    """Entropy of the weights below its maximum, reached where all members weigh the same."""
    maximum = math.log(members)
    _curves(axes, runs, f"{term}_entropy", colour, None)
    axes.axhline(maximum, color="#57606a", linewidth=1.2, linestyle=":")
    lowest = min(min(run.history[f"{term}_entropy"]) for run in runs)
    room = max(maximum - lowest, 1e-3)
    axes.set_ylim(lowest - 0.12 * room, maximum + 0.22 * room)
    axes.text(
        0.98, maximum + 0.04 * room, f"uniform: log {members} = {maximum:.2f}", fontsize=8.5, color="#57606a",
        ha="right", va="bottom", transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    axes.set_ylabel("nats", fontsize=9)
    _finish(axes, f"{term} weights: entropy\n({members} other {kind} per query)")


def _draw_accuracies(axes: Axes, scores: Scores, probe: str, bottom: float) -> None:
    """Bars of the mean with every seed as a dot."""
    width = 0.8 / len(REPRESENTATIONS)
    labels: list[tuple[float, str, str]] = []
    for index, name in enumerate(REPRESENTATIONS):
        for group, (measure, _) in enumerate(GROUPS):
            result = spread(scores, name, probe, measure)
            values = [100 * value for value in result.values]
            x = group + (index - (len(REPRESENTATIONS) - 1) / 2) * width
            axes.bar(x, 100 * result.mean, 0.92 * width, color=COLOURS[name], label=name if group == 0 else None)
            labels.append((x, f"{100 * result.mean:.1f}", "white" if name in LOSSES else "#24292f"))
            step = 0.5 * width / max(len(values), 2)
            offsets = [x + (k - (len(values) - 1) / 2) * step for k in range(len(values))]
            axes.scatter(offsets, values, s=13, color="white", edgecolors="#24292f", linewidths=0.8, zorder=3)
    axes.set_xticks(range(len(GROUPS)), [label for _, label in GROUPS], fontsize=9)
    room = 100.0 - bottom
    axes.set_ylim(bottom, 100.0 + 0.25 * room)
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 100.0])
    for x, text, colour in labels:
        axes.text(x, bottom + 0.03 * room, text, fontsize=8.5, color=colour, ha="center", va="bottom", rotation=90)
    axes.set_ylabel("accuracy (%), axis cut", fontsize=9)
    axes.set_title({"kNN": "k nearest neighbours", "linear": "linear probe"}[probe], fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.legend(fontsize=8.5, loc="upper center", ncols=2, frameon=False)


def _draw_classes(axes: Axes, scores: Scores, split: Split) -> None:
    """Recall of every class under the linear probe, beside the number of images it was trained on."""
    for index, name in enumerate(LOSSES):
        offset = (index - 0.5) * 0.18
        columns = list(zip(*(per_probe["linear"].per_class for per_probe in scores[name]), strict=True))
        for digit, values in enumerate(columns):
            x = digit + offset
            axes.plot([x, x], [100 * min(values), 100 * max(values)], color=COLOURS[name], linewidth=1.4, alpha=0.6)
        means = [100 * fmean(values) for values in columns]
        axes.scatter([d + offset for d in range(CLASSES)], means, s=30, color=COLOURS[name], label=name, zorder=3)
    labels = [f"{digit}\n{count}" for digit, count in enumerate(split.train_counts)]
    axes.set_xticks(range(CLASSES), labels, fontsize=8.5)
    axes.set_xlabel("digit, and its number of training images", fontsize=9)
    axes.set_ylabel("recall (%), mean and range over seeds", fontsize=9)
    axes.set_title("linear probe, class by class", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100.0])
    axes.legend(fontsize=8.5, loc="upper center", ncols=2, frameon=False)
