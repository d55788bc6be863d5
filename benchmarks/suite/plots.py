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
from .goals import GOALS
from .peak import FMA
from .results import SINGLE, TIMED, problem_label, where
from .rows import BASELINE, LESS_WORK, OURS

Results = list[dict[str, Any]]

COLOURS = {
    "cpu": "#0b6bcb", "triton": "#0b6bcb", "cuda": "#14487e", "torch": "#5aa9e6", "reference": "#9db4c8",
    "eager": "#e07b00", "compiled": "#c2334d", "broadcasting": "#7a4bb3", "keops": "#2a9d5c", "bare mm": "#8b949e",
}  # fmt: skip
OTHER_COLOUR = "#c7ccd1"
NAMES = {
    "torch": "plain PyTorch backend", "reference": "reference", "eager": "PyTorch, matmul form",
    "compiled": "torch.compile of it", "broadcasting": "published formulation", "keops": "KeOps",
    "bare mm": "bare torch.mm, no loss",
}  # fmt: skip
MOST_CASES = 14  # in one picture of bars


def draw(directory: Path, rows: Results) -> list[Path]:
    """Every picture that the results have data for, as PNG."""
    timed = [row for row in rows if row["status"] == TIMED]
    measured = [row for row in rows if row["status"] in (TIMED, SINGLE)]
    found = []
    for name, figure in (("sweep", _sweep(measured)), ("speedup", _speedup(timed)), ("roofline", _roofline(timed))):
        if figure is not None:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{name}.png"
            FigureCanvasAgg(figure).print_png(path)
            found.append(path)
    return found


def colour(name: str) -> str:
    """The colour of a row in every picture."""
    return COLOURS.get(name, OTHER_COLOUR)


def name_of(row: dict[str, Any]) -> str:
    """What a row is called in every picture."""
    return f"cacr_kernels ({row['row']})" if row["ours"] else NAMES.get(row["row"], row["row"])


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(True, which="major", color="#e4e7ea", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _lines(axes: Axes, rows: Results, column: str, instead: str = "") -> bool:
    """One line against B per measured row (``instead``: the column where there is none); whether it is any line."""
    points: dict[str, dict[int, tuple[float, dict[str, Any]]]] = defaultdict(dict)
    for row in rows:
        value = row[column] if row[column] is not None or not instead else row[instead]
        if value is not None and row["family"] in (OURS, BASELINE, LESS_WORK):
            points[row["row"]][row["B"]] = max(value, 1e-3), row
    for name, by_batch in points.items():
        B = sorted(by_batch)
        y = [by_batch[b][0] for b in B]
        some = by_batch[B[0]][1]
        style = {"linewidth": 2.6 if some["ours"] else 1.4, "zorder": 5 if some["ours"] else 3, "color": colour(name)}
        axes.plot(B, y, "o-", markersize=5 if some["ours"] else 3.5, label=name_of(some), **style)
        if column == "p50_ms":
            ends = [[by_batch[b][1][p] or by_batch[b][0] for b in B] for p in ("p20_ms", "p80_ms")]
            axes.fill_between(B, *ends, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({b for by_batch in points.values() for b in by_batch})
    axes.set_xticks(batches, [f"{b}" for b in batches])
    axes.tick_params(axis="x", labelrotation=45 if len(batches) > 8 else 0)
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
    with_memory = len({row["row"] for row in chosen if row["memory_mib"] is not None}) > 1
    figure = _figure(10.5 if with_memory else 7.5, 4.8)
    time, *memory = figure.subplots(1, 1 + with_memory, squeeze=False)[0]
    if not _lines(time, chosen, "p50_ms", "single_ms"):
        return None
    _style(time, f"Loss and gradients: V = 2, D = 128, float32, {where(chosen[0])}")
    time.set_ylabel("milliseconds (band: 20–80 % of the rounds)")
    for axes in memory:
        _lines(axes, chosen, "memory_mib")
        _style(axes, "Peak memory above the inputs, gradients included")
        axes.set_ylabel("MiB")
    handles, names = time.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8.5, ncols=5 if memory else 3, loc="outside lower center")
    return figure


def _speedup(rows: Results) -> Figure | None:
    """Bars: how many times longer each baseline takes. Of many cases those that a goal is set for."""
    of_interest = (BASELINE, LESS_WORK)
    groups = {case: [r for r in rows if r["case"] == case and r["family"] in of_interest and r["ratio"]]
              for case in dict.fromkeys(row["case"] for row in rows)}  # fmt: skip
    if sum(map(bool, groups.values())) > MOST_CASES:
        wanted = {goal.case for goal in GOALS}
        groups = {case: group for case, group in groups.items() if case in wanted}
    groups = {case: group for case, group in groups.items() if group}
    if not groups:
        return None
    bars = sum(map(len, groups.values()))
    figure = _figure(9.0, 1.3 + 0.2 * bars + 0.2 * len(groups))
    axes = figure.subplots()
    y, ticks, seen = 0.0, [], set()
    for group in groups.values():
        start = y
        for row in group:
            once = None if row["row"] in seen else name_of(row)
            seen.add(row["row"])
            spread = [[max(0.0, row["ratio"] - row["ratio_p20"])], [max(0.0, row["ratio_p80"] - row["ratio"])]]
            style = {"color": colour(row["row"]), "ecolor": "#555", "error_kw": {"lw": 0.8}}
            axes.barh(y, row["ratio"] - 1, 0.8, left=1, label=once, xerr=spread, **style)
            text = f" {row['ratio']:.1f}×" if row["ratio"] < 10 else f" {row['ratio']:,.0f}×"
            axes.text(max(row["ratio"], row["ratio_p80"], 1.0), y, text, va="center", fontsize=7.5)
            y += 1
        ticks.append(((start + y - 1) / 2, _case_text(group[0])))
        y += 1.0
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="#333", linewidth=0.8)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.set_xlabel("time over that of cacr_kernels (median of interleaved rounds, whiskers 20–80 %)", fontsize=9)
    figure.legend(frameon=False, fontsize=8.5, ncols=3, loc="outside upper center")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _case_text(row: dict[str, Any]) -> str:
    """The problem, and below it what is not float32, loss and gradients."""
    special = [row["dtype"]] if row["dtype"] != "float32" else []
    special += ["loss only"] if row["mode"] != GRADIENTS else []
    name, *options = problem_label(row).split(", ")
    return "\n".join(filter(None, (name, ", ".join([*options, *special]))))


def _intensity(row: dict[str, Any]) -> float:
    """FLOP per byte that has to move: inputs read once, gradients written once."""
    itemsize = {"float64": 8, "float32": 4}.get(row["dtype"], 2)
    keys = (row["K"] or 0) + (row["M"] or 0)
    own = (row["V"] or 1) * row["B"] * (2 if row["mode"] == GRADIENTS else 1)
    flop: float = row["gflops"] * 1e9 * row["p50_ms"] / 1e3
    return flop / ((own + keys) * row["D"] * itemsize)


def _roofline(rows: Results) -> Figure | None:
    """GFLOP/s of the library and the baselines below what the machine can do."""
    points = [row for row in rows if row["gflops"] and row["dtype"] == "float32"]
    if not points:
        return None
    threads = max(row["threads"] for row in points)
    points = [row for row in points if row["threads"] == threads]
    figure = _figure(8.0, 5.0)
    axes = figure.subplots()
    top = max(points, key=lambda row: row["peak_gflops"])
    peak, product, speed = top["peak_gflops"], top["mm_gflops"], max(row["bandwidth_gbs"] for row in points)
    reached = [_intensity(row) for row in points]
    left, right = min(*reached, peak / speed) / 2, max(*reached, peak / speed) * 2
    axes.plot([left, peak / speed, right], [left * speed, peak, peak], color="#333", linewidth=1.2)
    at = left * speed
    slope = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    axes.text(left, at * 1.12, f"large copy: {speed:.0f} GB/s", fontsize=8, **slope)
    if top["peak_source"] == FMA:
        axes.text(right, peak * 1.06, f"peak of multiply-adds: {peak:.0f} GFLOP/s", fontsize=8, ha="right")
        axes.plot([product / speed, right], [product] * 2, color="#888", linewidth=0.9, linestyle="--")
        axes.text(peak / speed, product / 1.06, f"large torch.mm: {product:.0f}", fontsize=8, va="top", color="#666")
    else:
        axes.text(right, peak * 1.06, f"{top['peak_source']}: {peak:.0f} GFLOP/s", fontsize=8, ha="right")
    for name in dict.fromkeys(row["row"] for row in points):
        mine = [row for row in points if row["row"] == name]
        for mode, fill in ((GRADIENTS, True), ("loss", False)):
            some = [row for row in mine if row["mode"] == mode]
            style = {"edgecolors": colour(name), "facecolors": colour(name) if fill else "none", "linewidths": 1.2}
            style |= {"s": 46 if mine[0]["ours"] else 22, "zorder": 5 if mine[0]["ours"] else 3}
            x, y = [_intensity(row) for row in some], [row["gflops"] for row in some]
            axes.scatter(x, y, label=name_of(mine[0]) if fill else None, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1.6 * peak)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("FLOP per byte of inputs and gradients")
    axes.set_ylabel("GFLOP/s (of the products alone)")
    _style(axes, f"Share of the machine, float32, {where(points[0])} (hollow: loss only)")
    figure.legend(frameon=False, fontsize=8.5, ncols=4, loc="outside lower center")
    return figure
