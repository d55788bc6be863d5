"""The times as one table: a line for each problem, a column for each way to compute it; needs Python alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .lines import RESULT, Line

SIZES = ("products", "B", "D", "rows")


def table(lines: list[Line]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows, in the order of the sizes.

    Of our backends the time, what was predicted for it, the share of the peak measured there and the microseconds that
    the host takes for a call; of the others the multiple of the faster one of ours. A dash: no time.
    """
    problems: dict[tuple[Any, ...], dict[str, Line]] = defaultdict(dict)
    ours, others = dict[str, None](), dict[str, None]()
    for line in lines:
        if line["event"] == RESULT and line.get("ok") and line.get("p50 ms") is not None and "rows" in line:
            problems[tuple(line[size] for size in SIZES)][line["row"]] = line
            (ours if line.get("ours") else others)[line["row"]] = None
    head = [*SIZES, *(text for row in ours for text in (f"{row} ms", "predicted", "of peak", "host µs")), *others]
    rows = []
    for sizes in sorted(problems, key=lambda sizes: (sizes[0], sizes[3], sizes[2], sizes[1])):
        timed = problems[sizes]
        known = [cell for row in ours for cell in _ours(timed.get(row))]
        best = min((timed[row]["p50 ms"] for row in ours if row in timed), default=None)
        rows.append([*sizes, *known, *(_times(timed[row]["p50 ms"], best) if row in timed else "–" for row in others)])
    return head, rows


def _ours(line: Line | None) -> list[Any]:
    if line is None:
        return ["–"] * 4
    predicted = line.get("predicted ms")
    return [line["p50 ms"], "–" if predicted is None else predicted, f"{100 * line['of peak']:.0f} %", line["host µs"]]


def _times(other: float, best: float | None) -> str:
    return f"{other:.3g} ms" if best is None else f"{other / best:.1f} ×"
