"""Pictures of a run: time and memory against B, speed-ups, roofline."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .cases import GRADIENTS
from .results import TIMED, label
from .rows import BASELINE, OTHER, OURS, PRODUCTS

Results = list[dict[str, Any]]

COLOURS = {
    "cpu": "#0b6bcb", "triton": "#0b6bcb", "cuda": "#14487e", "torch": "#5aa9e6", "reference": "#9db4c8",
    "eager": "#e07b00", "compiled": "#c2334d", "broadcasting": "#7a4bb3", "keops": "#2a9d5c", "bare mm": "#8b949e",
}  # fmt: skip
OTHER_COLOUR = "#c7ccd1"


def draw(directory: Path, rows: Results) -> list[Path]:
    """Every picture that the results have data for, as PNG."""
    timed = [row for row in rows if row["status"] == TIMED]
    found = []
    for name, figure in (("sweep", _sweep(timed)), ("speedup", _speedup(timed)), ("roofline", _roofline(timed))):
        if figure is not None:
            path = directory / f"{name}.png"
            FigureCanvasAgg(figure).print_png(path)
            found.append(path)
    return found


def colour(name: str) -> str:
    """The colour of a row in every picture."""
    return COLOURS.get(name, OTHER_COLOUR)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(True, which="major", color="#e4e7ea", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lines(axes: Axes, rows: Results, column: str) -> bool:
    """One line against B per measured row; whether there is any with two points."""
    points: dict[str, dict[int, tuple[float, dict[str, Any]]]] = defaultdict(dict)
    for row in rows:
        if row[column] is not None and row["family"] in (OURS, BASELINE, PRODUCTS):
            points[row["row"]][row["B"]] = max(row[column], 1e-3), row
    for name, by_batch in points.items():
        B = sorted(by_batch)
        y = [by_batch[b][0] for b in B]
        ours = any(row["ours"] for _, row in by_batch.values())
        style = {"linewidth": 2.6 if ours else 1.4, "zorder": 5 if ours else 3, "color": colour(name)}
        axes.plot(B, y, "o-", markersize=5 if ours else 3.5, label=name + (" (ours)" if ours else ""), **style)
        if column == "p50_ms":
            low, high = ([by_batch[b][1][p] for b in B] for p in ("p20_ms", "p80_ms"))
            axes.fill_between(B, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({b for by_batch in points.values() for b in by_batch})
    axes.set_xticks(batches, [f"{b}" for b in batches])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.set_xlabel("B")
    return any(len(by_batch) > 1 for by_batch in points.values())


def _sweep(rows: Results) -> Figure | None:
    """Time and memory of two views of 128 features against the batch."""
    chosen = [
        row
        for row in rows
        if (row["loss"], row["V"], row["D"], row["mode"], row["dtype"]) == ("cacr_loss", 2, 128, GRADIENTS, "float32")
        and "pairing" not in row["options"] and "cost" not in row["options"]
    ]  # fmt: skip
    threads = max((row["threads"] for row in chosen), default=0)
    by_options = defaultdict(list)
    for row in chosen:
        if row["threads"] == threads:
            by_options[row["options"]].append(row)
    if not by_options:
        return None
    chosen = max(by_options.values(), key=len)
    figure = _figure(10.5, 4.4)
    time, memory = figure.subplots(1, 2)
    several = _lines(time, chosen, "p50_ms")
    _lines(memory, chosen, "memory_mib")
    if not several:
        return None
    where = f"V = 2, D = 128, float32, {threads} thread{'s' * (threads > 1)}"
    _style(time, f"Loss and gradients, {where}")
    _style(memory, "Peak memory above the inputs")
    time.set_ylabel("milliseconds (band: 20–80 %)")
    memory.set_ylabel("MiB")
    time.legend(frameon=False, fontsize=8)
    return figure


def _speedup(rows: Results) -> Figure | None:
    """Bars: how many times faster than each baseline."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    groups = []
    for case in cases:
        mine = [r for r in rows if r["case"] == case and not r["ours"] and r["ratio"] and r["family"] != OTHER]
        if mine:
            groups.append(mine)
    if not groups:
        return None
    bars = sum(len(group) for group in groups)
    figure = _figure(9.0, 1.2 + 0.2 * bars + 0.25 * len(groups))
    axes = figure.subplots()
    y, ticks, seen = 0.0, [], set()
    for group in groups:
        start = y
        for row in group:
            once = None if row["row"] in seen else row["row"]
            seen.add(row["row"])
            spread = [[max(0.0, row["ratio"] - row["ratio_p20"])], [max(0.0, row["ratio_p80"] - row["ratio"])]]
            style = {"color": colour(row["row"]), "ecolor": "#555", "error_kw": {"lw": 0.8}}
            axes.barh(y, row["ratio"], 0.8, label=once, xerr=spread, **style)
            text = f" {row['ratio']:.1f}" if row["ratio"] < 100 else f" {row['ratio']:,.0f}"
            axes.text(max(row["ratio"], row["ratio_p80"]), y, text, va="center", fontsize=7.5)
            y += 1
        ticks.append(((start + y - 1) / 2, label(group[0]).replace(", ", "\n", 1)))
        y += 1.2
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.axvline(1, color="#333", linewidth=0.8)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlabel("time over ours (1 = as fast; median of interleaved rounds, whiskers 20–80 %)")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _intensity(row: dict[str, Any]) -> float:
    """FLOP per byte that has to move: inputs read once, gradients written once."""
    itemsize = {"float64": 8, "float32": 4}.get(row["dtype"], 2)
    keys = (row["K"] or 0) + (row["M"] or 0)
    own = (row["V"] or 1) * row["B"] * (2 if row["mode"] == GRADIENTS else 1)
    flop: float = row["gflops"] * 1e9 * row["p50_ms"] / 1e3
    return flop / ((own + keys) * row["D"] * itemsize)


def _roofline(rows: Results) -> Figure | None:
    """GFLOP/s of the library and the baselines below the measured ceiling."""
    points = [row for row in rows if row["gflops"] and row["dtype"] == "float32"]
    if not points:
        return None
    threads = max(row["threads"] for row in points)
    points = [row for row in points if row["threads"] == threads]
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    ceiling = max(row["ceiling_gflops"] for row in points)
    speed = max(row["bandwidth_gbs"] or 0 for row in points)
    reached = [_intensity(row) for row in points]
    left, right = min(*reached, ceiling / speed) / 2, max(*reached, ceiling / speed) * 2
    axes.plot([left, ceiling / speed, right], [left * speed, ceiling, ceiling], color="#333", linewidth=1.2)
    axes.annotate(
        f"a large copy: {speed:.0f} GB/s", (left, left * speed), (4, -12), textcoords="offset points", fontsize=8
    )
    text = f"a large torch.mm: {ceiling:.0f} GFLOP/s"
    axes.text(right, ceiling * 1.08, text, fontsize=8, ha="right")
    for name in dict.fromkeys(row["row"] for row in points):
        mine = [row for row in points if row["row"] == name]
        ours = any(row["ours"] for row in mine)
        for mode, fill in ((GRADIENTS, True), ("loss", False)):
            some = [row for row in mine if row["mode"] == mode]
            style = {"edgecolors": colour(name), "facecolors": colour(name) if fill else "none"}
            style |= {"s": 46 if ours else 22, "zorder": 5 if ours else 3, "label": name if fill else None}
            axes.scatter([_intensity(row) for row in some], [row["gflops"] for row in some], **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=2 * ceiling)
    axes.set_xlabel("FLOP per byte of inputs and gradients")
    axes.set_ylabel("GFLOP/s")
    _style(axes, f"Share of the machine, float32, {threads} thread{'s' * (threads > 1)} (hollow: loss only)")
    axes.legend(frameon=False, fontsize=8)
    return figure
