"""The picture of the training demo: differences and accuracies first, then losses and entropies of weights."""

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
from .evaluation import PROBES, REPRESENTATIONS, Scores, interval, paired_difference, spread, verdict
from .training import Run

COLOURS = {"raw pixels": "#a8b0b8", "untrained encoder": "#57606a", "CACR": "#0b6bcb", "NT-Xent": "#e07b00"}
ATTRACTION, REPULSION = "#2a9d5c", "#c2334d"
GROUPS = (("balanced", "balanced"), ("tail", "three rarest\nclasses"), ("worst_class", "worst\nclass"))


def draw(path: Path, runs: list[Run], scores: Scores, split: Split, config: Config) -> None:
    """Write the picture as PNG: first what was found, then how training went."""
    layout = ConstrainedLayoutEngine(hspace=0.06, wspace=0.04)
    figure = Figure(figsize=(13.5, 8.4), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 12, height_ratios=(1.15, 1.0))
    cacr, nt_xent = ([run for run in runs if run.loss == name] for name in LOSSES)
    _draw_differences(figure.add_subplot(grid[0, 0:4]), scores)
    for column, probe in enumerate(PROBES):
        _draw_accuracies(figure.add_subplot(grid[0, 4 * column + 4 : 4 * column + 8]), scores, probe)
    _draw_classes(figure.add_subplot(grid[1, 0:6]), scores, split)
    _draw_losses(figure.add_subplot(grid[1, 6:9]), cacr, nt_xent)
    batch = min(config.batch, len(split.train_images))
    _draw_entropies(figure.add_subplot(grid[1, 9:12]), cacr, config.views - 1, batch - 1)
    figure.suptitle(
        f"CACR and NT-Xent, linear probe: {verdict(scores, 'linear')}; "
        f"nearest neighbours: {verdict(scores, 'kNN')}\n"
        f"digits, {len(split.train_images)} imbalanced images, scored on the {config.scored_on} "
        f"({len(split.test_images)}); {config.seeds} seed{'s' * (config.seeds > 1)}, {config.epochs} epochs, "
        f"tau_neg = {config.tau_neg:g}, T = {config.temperature:g}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _draw_differences(axes: Axes, scores: Scores) -> None:
    """CACR minus NT-Xent, seed by seed, with the interval of the mean."""
    y, ticks, labels = 0, [], []
    for probe in PROBES:
        for measure, label in GROUPS:
            found = paired_difference(scores, probe, measure)
            half = interval(found)
            colour = {"kNN": "#57606a", "linear": "#24292f"}[probe]
            if half is not None:
                axes.plot([100 * (found.mean - half), 100 * (found.mean + half)], [y, y], color=colour, linewidth=2.0)
            axes.scatter([100 * v for v in found.values], [y + 0.2] * len(found.values), s=9, color=colour, alpha=0.5)
            axes.scatter([100 * found.mean], [y], s=34, color=colour, zorder=3)
            ticks.append(y)
            labels.append(f"{'linear' if probe == 'linear' else 'neighbours'},\n{label.replace(chr(10), ' ')}")
            y += 1
    axes.axvline(0.0, color="#c7ccd1", linewidth=1.2, zorder=0)
    axes.set_yticks(ticks, labels, fontsize=8.5)
    axes.set_ylim(y - 0.4, -0.6)
    axes.set_xlabel("points, mean with 95 % over seeds, and each seed", fontsize=9)
    axes.set_title("accuracy, CACR minus NT-Xent", fontsize=10.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


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


def _draw_losses(axes: Axes, cacr: list[Run], nt_xent: list[Run]) -> None:
    _curves(axes, nt_xent, "loss", COLOURS["NT-Xent"], "NT-Xent")
    _curves(axes, cacr, "loss", COLOURS["CACR"], "CACR")
    _curves(axes, cacr, "attraction", ATTRACTION, "its attraction")
    _curves(axes, cacr, "repulsion", REPULSION, "its repulsion")
    axes.axhline(0.0, color="#c7ccd1", linewidth=0.8, zorder=0)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    _finish(axes, "losses")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))


def _draw_entropies(axes: Axes, runs: list[Run], positives: int, negatives: int) -> None:
    """Entropies of the weights as shares of the largest ones, from one member with all weight to uniform weights."""
    for term, colour, members in (("attraction", ATTRACTION, positives), ("repulsion", REPULSION, negatives)):
        if members < 2:
            continue  # one member has all weight, whatever it is
        series = [[value / math.log(members) for value in run.history[f"{term}_entropy"]] for run in runs]
        epochs = range(1, len(series[0]) + 1)
        mean = [fmean(column) for column in zip(*series, strict=True)]
        for values in series:
            axes.plot(epochs, values, color=colour, linewidth=0.8, alpha=0.45)
        axes.plot(epochs, mean, color=colour, linewidth=1.8, label=f"{term}, {members} members")
    axes.set_ylim(0.0, 1.04)
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["one has all", "", "half", "", "uniform"])
    axes.legend(fontsize=8.5, frameon=False, loc="lower center")
    _finish(axes, "entropy of CACR's weights")


def _draw_accuracies(axes: Axes, scores: Scores, probe: str) -> None:
    """Every seed as a dot, the mean as a dash with its number."""
    width = 0.8 / len(REPRESENTATIONS)
    for index, name in enumerate(REPRESENTATIONS):
        for group, (measure, _) in enumerate(GROUPS):
            result = spread(scores, name, probe, measure)
            values = [100 * value for value in result.values]
            x = group + (index - (len(REPRESENTATIONS) - 1) / 2) * width
            step = 0.5 * width / max(len(values), 2)
            offsets = [x + (k - (len(values) - 1) / 2) * step for k in range(len(values))]
            colour = COLOURS[name]
            axes.scatter(offsets, values, s=15, color=colour, alpha=0.6, linewidths=0)
            reach, mean = 0.42 * width, 100 * result.mean
            label = name if group == 0 else None
            axes.plot([x - reach, x + reach], [mean, mean], color=colour, linewidth=2.4, label=label)
            axes.annotate(
                f"{mean:.1f}", (x, max(values)), (0, 4 + 9 * (index % 2)), textcoords="offset points", fontsize=7.5,
                ha="center", color="#24292f",
            )  # fmt: skip
    axes.set_xticks(range(len(GROUPS)), [label for _, label in GROUPS], fontsize=9)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.22 * (high - low))
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100.0])
    axes.set_ylabel("accuracy (%)", fontsize=9)
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
