"""All committed results as one picture: ``python -m benchmarks.suite.history``.

A point is a case in ``benchmarks/results/NAME/results.json``, of today or of an earlier commit: the share that the
library reached of the peak, where that is the peak of multiply-adds. A line joins the runs of one problem on a machine
with the same threads, by date. Shares, and not times, as machines differ.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import readme, results
from .cases import INPUTS
from .machine import ROOT
from .peak import FMA
from .results import TIMED, problem_label, where

PICTURE = ROOT / "benchmarks" / "results" / "history.png"
MOST_CASES = 12
Point = tuple[str, float]  # run, percent


def runs(root: Path = ROOT, names: list[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Committed results with a share of a peak, oldest first: what the axis says of each, and the results."""
    found = {}
    for name in readme.committed() if names is None else names:
        for data in versions(root, name):
            if any(_share(row) is not None for row in data["rows"]):
                found[_title(name, data["environment"])] = data
    return sorted(found.items(), key=lambda run: str(run[1]["environment"]["date"]))


def versions(root: Path, name: str) -> list[dict[str, Any]]:
    """A results file as it is, and as it was in each commit that changed it; what cannot be read now is left out."""
    found = [results.read(root / name)]
    log = subprocess.run(["git", "log", "--format=%H", "--", name], cwd=root, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        for commit in log.stdout.split() if log.returncode == 0 else []:
            old = Path(folder, "results.json")
            shown = subprocess.run(["git", "show", f"{commit}:{name}"], cwd=root, capture_output=True)
            old.write_bytes(shown.stdout)
            with contextlib.suppress(ValueError):
                found.append(results.read(old))
    return found


def _title(name: str, environment: dict[str, Any]) -> str:
    return f"{Path(name).parent.name}\n{environment['commit'][:8]}\n{environment['date'][:10]}"


def _share(row: dict[str, Any]) -> float | None:
    timed = row["ours"] and row["status"] == TIMED and row["peak_source"] == FMA and row["processes"] is None
    return 100 * row["fraction"] if timed and row["fraction"] else None


def series(found: list[tuple[str, dict[str, Any]]]) -> dict[tuple[str, str], list[Point]]:
    """Points by problem, of unit rows, and by machine; a problem with its dtype, mode and threads."""
    lines: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for title, data in found:
        for row in data["rows"]:
            if (share := _share(row)) is not None and row["inputs"] in (None, INPUTS["unit"]):
                special = [row["dtype"]] if row["dtype"] != "float32" else []
                special += [row["mode"]] if row["mode"] == "loss" else []
                problem = ", ".join([problem_label(row), *special, where(row)])
                lines[problem, f"{row['machine']}, {row['isa']}"].append((title, share))
    return dict(lines)


def draw(found: list[tuple[str, dict[str, Any]]], path: Path = PICTURE) -> int:
    """Writes the picture; how many problems it shows: those that most runs have, then the first."""
    lines = series(found)
    titles = [title for title, _ in found]
    counts: dict[str, int] = defaultdict(int)
    for (problem, _), points in lines.items():
        counts[problem] += len(points)
    shown = sorted(counts, key=lambda problem: -counts[problem])[:MOST_CASES]
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    axes = figure.subplots()
    for i, problem in enumerate(shown):
        for (name, _), points in lines.items():
            if name == problem:
                style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
                x, y = [titles.index(title) for title, _ in points], [share for _, share in points]
                axes.plot(x, y, marker="o", markersize=4, linewidth=1.2, label=problem, **style)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.set_xticks(range(len(titles)), titles, fontsize=8)
    axes.set_xlim(-0.5, max(0.5, len(titles) - 0.5))
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of the FMA peak of the machine", fontsize=9)
    axes.set_title("Functions on unit rows, over committed results", fontsize=10, loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=7.5, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return len(shown)


def main() -> None:
    """Draws the results that are committed."""
    found = runs()
    count = draw(found)
    print(f"{PICTURE.relative_to(ROOT)}: {count} problems in {len(found)} runs")


if __name__ == "__main__":
    main()
