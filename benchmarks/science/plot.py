"""The picture: a forest of paired differences, recall against class frequency, a query with what it weighs most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .analysis import INTERACTION, Analysis, headline
from .data import Data
from .design import BALANCED, LONG_TAILED, PRIMARY
from .runs import shown_views

COLOURS = {"CACR": "#0b6bcb", "NT-Xent": "#e07b00"}
KIND_COLOURS = {LONG_TAILED: "#24292f", BALANCED: "#8b949e", INTERACTION: "#c2334d"}
GREY = "#57606a"


def draw(path: Path, analysis: Analysis, data: Data) -> None:
    """Writes the picture as PNG; needs two whole seeds."""
    figure = Figure(figsize=(13.5, 9.5), layout=ConstrainedLayoutEngine(hspace=0.05, wspace=0.04), facecolor="white")
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(1, 2, width_ratios=(1.1, 1.0))
    _forest(figure.add_subplot(outer[0]), analysis)
    right = outer[1].subgridspec(2, 1, height_ratios=(1.35, 1.0))
    _recalls(figure.add_subplot(right[0]), analysis)
    if (shown := analysis.example()) is not None:
        _query(figure, right[1], *shown, analysis, data)
    seeds = len(analysis.seeds)
    name = analysis.header["data"]["name"]
    figure.suptitle(f"{headline(analysis)}\n{name}, {seeds} seeds, linear probe, balanced accuracy", fontsize=12)
    figure.savefig(path, dpi=130)


def _forest(axes: Axes, analysis: Analysis) -> None:
    """Each difference with its interval, every seed as a small dot."""
    y, ticks, labels = 0.0, [], []
    for difference in analysis.differences():
        contrast, kind, found = difference.contrast, difference.kind, difference.interval
        colour = KIND_COLOURS[kind]
        values = [100 * v for v in found.seeds]
        axes.plot([100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.scatter(values, [y + 0.22] * len(values), s=5, color=colour, alpha=0.4, linewidths=0)
        first = not ticks
        axes.scatter([100 * found.mean], [y], s=34, color=colour, zorder=3, label=kind if y < 3 else None)
        if kind == LONG_TAILED:
            axes.text(
                0.0, y - 0.62, f"{contrast.first} − {contrast.second}, {contrast.views} views", fontsize=9,
                fontweight="bold" if first else "normal", transform=axes.get_yaxis_transform(), va="bottom",
            )  # fmt: skip
        ticks.append(y)
        labels.append(f"{round(100 * found.mean, 1) + 0.0:+.1f}".replace("+0.0", "0.0").replace("-", "−"))
        y += 1.0 if kind != INTERACTION else 1.9
    axes.axvline(0.0, color=GREY, linewidth=1.0, zorder=0)
    axes.set_xscale("symlog", linthresh=2.0)
    widest = max(abs(100 * v) for d in analysis.differences() for v in (d.interval.low, d.interval.high))
    limits = [t for t in (1, 2, 5, 10, 20, 50, 100) if t <= max(2, 1.3 * widest)]
    axes.set_xticks([-t for t in limits] + [0, *limits], [f"−{t}" for t in limits] + ["0"] + [str(t) for t in limits])
    axes.minorticks_off()
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.9, -1.0)
    axes.set_xlabel("points, 95 % over seeds and test images (linear up to ±2, then logarithmic)", fontsize=9)
    axes.set_title("paired differences; primary: the first group", fontsize=10.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")


def _recalls(axes: Axes, analysis: Analysis) -> None:
    """Every class of every seed at its number of training images, and the mean by rank."""
    counts, lowest = [analysis.counts(seed) for seed in analysis.seeds], 100.0
    for arm, shift in (("CACR", 1.04), ("NT-Xent", 1 / 1.04)):
        found = analysis.recalls(arm, PRIMARY.views)
        lowest = min(lowest, 100 * float(np.min(found)))
        by_rank = []
        for row, recall in zip(counts, found, strict=True):
            order = np.argsort(row, kind="stable")
            axes.scatter(np.array(row) * shift, 100 * recall, s=9, color=COLOURS[arm], alpha=0.3, linewidths=0)
            by_rank.append(100 * recall[order])
        axes.plot(sorted(counts[0]), np.mean(by_rank, axis=0), color=COLOURS[arm], marker="o", markersize=5, label=arm)
    axes.set_xscale("log")
    axes.set_xlabel("images of the class in the training part", fontsize=9)
    axes.set_ylabel("recall (%)", fontsize=9)
    bottom = max(0.0, 10 * np.floor(lowest / 10 - 0.5))  # the axis begins where there is something to see
    axes.set_ylim(bottom, 100 + 0.03 * (100 - bottom))
    axes.set_title(f"recall against class frequency, long-tailed, {PRIMARY.views} views", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")


def _query(figure: Figure, place, run, example, analysis: Analysis, data: Data) -> None:
    """The query, its positives and its strongest negatives, with their weights."""
    rows, views = shown_views(run, analysis.setting, data)
    columns = len(example["negatives"])
    title = "CACR: a query, its positives, and its strongest negatives as multiples of an equal weight"
    place = place.subgridspec(2, 1, height_ratios=(0.04, 1.0))
    axes = figure.add_subplot(place[0])
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    grid = place[1].subgridspec(2, columns, hspace=0.02)

    def show(row: int, column: int, image: Tensor, title: str) -> None:
        axes = figure.add_subplot(grid[row, column])
        pixels = image.permute(1, 2, 0).numpy()
        axes.imshow(pixels[..., 0] if pixels.shape[2] == 1 else pixels, cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title, fontsize=8.5)
        axes.set_axis_off()

    def label(j: int) -> str:
        return data.classes[int(data.labels[rows[j]])]

    show(0, 0, views[0, 0], f"query: {label(0)}")
    for column, (u, weight) in enumerate(example["positives"], start=2):
        if column < columns:
            show(0, column, views[u, 0], f"view {u + 1}\nweight {weight:.2f}")
    for column, (j, weight) in enumerate(example["negatives"]):
        show(1, column, views[example["negatives_view"], j], f"{label(j)}\n{weight * (len(rows) - 1):.1f} ×")
