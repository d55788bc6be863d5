"""What is printed, and the results section of docs/experiment.md."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .analysis import (
    BALANCED_ACCURACY,
    INTERACTION,
    KNN,
    MEASURES,
    TAIL,
    Analysis,
    Difference,
    headline,
    points,
    verdict,
)
from .design import KINDS, PIXELS, PRIMARY, UNTRAINED, Setting, expected_runs, groups, tau_neg

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "experiment.md"
BEGIN = "<!-- experiment: the following is made from {name} by `python -m benchmarks.science --load {name} --docs` -->"
END = "<!-- experiment: end -->"
BLOCK = re.compile(
    BEGIN.replace("{name}", "(?P<name>[^ ]+)", 1).replace("{name}", "(?P=name)") + ".*?" + END, re.DOTALL
)
NO_RESULTS = "none"
PICTURE = "experiment.png"


def print_setting(console: Console, setting: Setting, header: dict, done: int, workers: int) -> None:
    """What is going to run."""
    data = header["data"]
    console.print(
        f"[bold]What the loss does to representations: {data['name']}[/bold]\n"
        f"  {len(data['classes'])} classes, images {data['shape']}; {data['pool']} to draw training parts from, "
        f"{data['validation']} to choose temperatures on, {data['test']} for the scores\n"
        f"  at least {expected_runs(setting)} runs of {setting.steps} steps, batch {setting.batch}; {done} done; "
        f"{f'{workers} processes' if workers else 'one process'}",
        soft_wrap=True,
    )


def print_results(console: Console, analysis: Analysis) -> None:
    """Chosen temperatures, accuracies, differences, and a sentence."""
    seeds = len(analysis.seeds)
    if seeds < 2:
        console.print(f"  whole seeds so far: {seeds}; differences need two. The same command goes on.")
        return
    table = Table(title=f"Accuracy in %, {seeds} seeds", title_justify="left")
    for name in ("trained with", "on", "views", *MEASURES):
        table.add_column(name, justify="right" if name in MEASURES else "left")
    for arm, kind, views, found in analysis.accuracies():
        table.add_row(arm, kind, str(views or ""), *(f"{100 * value:.1f}" for value in found.values()))
    console.print(table)
    table = Table(title="Paired differences in points, 95 % over seeds and test images", title_justify="left")
    for name in ("difference", "views", "on", BALANCED_ACCURACY, "", KNN, TAIL):
        table.add_column(name)
    for row in rows_of_differences(analysis, (BALANCED_ACCURACY, KNN, TAIL)):
        first = row[0]
        cells = [_cell(difference) for difference in row]
        contrast = first.contrast
        table.add_row(
            f"{contrast.first} − {contrast.second}", str(contrast.views), first.kind, cells[0], verdict(first),
            *cells[1:], end_section=first.kind == INTERACTION,
        )  # fmt: skip
    console.print(table)
    console.print(f"  [bold]{headline(analysis)}[/bold]", soft_wrap=True)
    if not analysis.complete:
        console.print(f"  {seeds} of {len(analysis.setting.seeds)} seeds: the same command goes on.")


def rows_of_differences(analysis: Analysis, measures: tuple[str, ...]) -> list[list[Difference]]:
    """Every contrast on every kind, by each of the measures."""
    columns = [analysis.differences(measure) for measure in measures]
    return [list(row) for row in zip(*columns, strict=True)]


def _cell(difference: Difference) -> str:
    found = difference.interval
    return f"{points(found.mean)} [{points(found.low)}, {points(found.high)}]"


def render(name: str, analysis: Analysis) -> str:
    """The section for a file of results, markers included."""
    if not analysis.complete or len(analysis.seeds) < 2:
        wanted = len(analysis.setting.seeds)
        raise SystemExit(f"{name} holds {len(analysis.seeds)} of {wanted} seeds: the page shows whole experiments")
    environment, data = analysis.header["environment"], analysis.header["data"]
    hours = sum(float(r["seconds"]) for r in analysis.results.done.values()) / 3600
    lines = [
        BEGIN.format(name=name), "", "## What was found", "", f"**{headline(analysis)}**", "", *secondary(analysis), "",
        f"{data['name']}, {len(analysis.seeds)} seeds, {len(analysis.results.done)} runs of {analysis.setting.steps} "
        "steps,", f"{hours:.1f} hours of one thread on {environment['machine']}; torch {environment['torch']}, commit "
        f"{environment['commit']}, {environment['date'][:10]}.", "",
    ]  # fmt: skip
    picture = (ROOT / name).with_name(PICTURE)
    if picture.exists():
        lines += [f"![Paired differences, recalls, and a query](../{Path(name).with_name(PICTURE).as_posix()})", ""]
    lines += [
        "Differences in points with 95 % intervals. A tie is an interval that holds 0; of so many intervals one in",
        "twenty misses 0 by chance.", "",
        f"| difference | views | on | {BALANCED_ACCURACY}, balanced accuracy | verdict on it | {KNN} | {TAIL} |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows_of_differences(analysis, (BALANCED_ACCURACY, KNN, TAIL)):
        c = row[0].contrast
        cells = [f"{c.first} − {c.second}", str(c.views), row[0].kind, _cell(row[0]), verdict(row[0])]
        lines.append("| " + " | ".join([*cells, *map(_cell, row[1:])]) + " |")
    heading = "| trained with | on | views | T (`tau_neg`) | " + " | ".join(MEASURES) + " |"
    lines += ["", heading, "|---|---|---|---|" + "---:|" * len(MEASURES)]
    for arm, kind, views, found in analysis.accuracies():
        cells = [arm, kind, str(views or ""), temperature(analysis, arm, kind, views)]
        lines.append("| " + " | ".join([*cells, *(f"{100 * v:.1f}" for v in found.values())]) + " |")
    return "\n".join([*lines, "", END])


def secondary(analysis: Analysis) -> list[str]:
    """What other measures say of losses that users choose between, and of the pixels, whomever it favours."""
    said = []
    for measure in (BALANCED_ACCURACY, KNN, TAIL):
        for found in analysis.differences(measure):
            c = found.contrast
            published = all("tau_" not in name for name in (c.first, c.second))
            if published and not found.interval.tie and (c != PRIMARY or measure != BALANCED_ACCURACY):
                where = f"{measure}, {c.views} views, {found.kind}"
                said.append(f"{c.first} − {c.second} {points(found.interval.mean)} ({where})")
    lines = [f"Intervals without 0 in other comparisons of published losses: {'; '.join(said) or 'none'}."]
    scores = {(arm, kind, views): found[KNN] for arm, kind, views, found in analysis.accuracies()}
    pixels = scores.pop((PIXELS, "", 0))
    behind = sum(score < pixels for (arm, _, _), score in scores.items() if arm != UNTRAINED)
    lines.append(
        f"By nearest neighbours, raw pixels ({100 * pixels:.1f} %) are ahead of {behind} of the "
        f"{len(scores) - 1} trained rows below: the network is small and its training short."
    )
    return lines


def temperature(analysis: Analysis, arm: str, kind: str, views: int) -> str:
    """The chosen temperature as a cell."""
    tuned_as = {a.name: a.tuned_as for a, _, _ in groups(analysis.setting)}.get(arm)
    if kind not in KINDS or tuned_as is None:
        return ""
    t = analysis.chosen[tuned_as, kind, views]
    return f"{t:g} ({tau_neg(t):g})"


def shown(text: str) -> str | None:
    """The file of results that a page shows; ``None`` if none. ``ValueError`` without the markers."""
    found = BLOCK.search(text)
    if found is None:
        raise ValueError(f"the page has no block from {BEGIN.format(name='NAME')!r} to {END!r}")
    return None if found["name"] == NO_RESULTS else found["name"]


def write_docs(path: Path, analysis: Analysis, page: Path = PAGE, root: Path = ROOT) -> str:
    """Writes the section for a committed file of results into the page, and says which."""
    try:
        name = path.resolve().relative_to(root).as_posix()
    except ValueError as error:
        raise SystemExit(f"{path} does not lie in the repository, {root}") from error
    text = page.read_text(encoding="utf-8")
    shown(text)
    block = render(name, analysis)
    page.write_text(BLOCK.sub(lambda _: block, text, count=1), encoding="utf-8")
    return name
