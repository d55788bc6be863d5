"""``python -m tests.planted`` (``make planted``): plants the faults of the catalogue and says who noticed.

Results are kept in ``tests/planted/results.json`` and used again as long as the fault and its file are what they were,
and so is the test that noticed it, with the helpers in its file, or, where nobody noticed, all tests that are named.
Otherwise the test that noticed it before runs first. An interrupted run goes on where it was, and what is committed
says what the last run found; what a sample finds is not kept. Exit status: 0 every fault was caught, 2 the catalogue
or the arguments cannot be used, 3 a fault was not caught, 4 the tests of a fault say nothing.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .catalogue import faults, layers
from .fault import ROOT, Fault
from .scratch import ON_FAKE_CUDA, Outcome, Scratch

SCRATCH = ROOT / "build" / "planted"
KEPT = ROOT / "tests" / "planted" / "results.json"
Results = list[tuple[Fault, Outcome]]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("id", nargs="*", help="plant only these faults")
    parser.add_argument("--only", action="append", choices=layers(), metavar="LAYER", help="may be repeated")
    parser.add_argument("--sample", type=int, metavar="N", help="only N, others at every --seed")
    parser.add_argument("--seed", type=int, default=datetime.date.today().toordinal(), help="default: the date")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of a run of tests (%(default)g)")
    parser.add_argument(
        "--first", metavar="ARGUMENTS", help="of pytest, to run some of the tests of the faults before all of them"
    )
    parser.add_argument("--again", action="store_true", help="plant again what has a result that is kept")
    return parser.parse_args(given)


def chosen(options: argparse.Namespace) -> list[Fault]:
    """What the command line asks for; ``ValueError`` where that is nothing, or does not fit the code."""
    found = [fault for fault in faults() if not fault.equivalent]
    if options.id:
        found = [fault for fault in found if fault.id in options.id]
    if options.only:
        found = [fault for fault in found if fault.layer in options.only]
    if not options.id:
        found = [fault for fault in found if can_run(fault)]
    if options.sample is not None:
        found = sample(found, options.sample, options.seed)
    if not found or set(options.id) - {fault.id for fault in found}:
        raise ValueError("no such fault")
    for fault in found:
        fault.apply((ROOT / fault.file).read_text(encoding="utf-8"))  # now, not after hours
    return found


def can_run(fault: Fault) -> bool:
    """Whether this Python has torch for CUDA, where the tests of a fault need it."""
    absent = torch.version.cuda is None
    return not (absent and any(word.startswith(ON_FAKE_CUDA) for run in fault.runs for word in shlex.split(run)))


def sample(found: list[Fault], count: int, seed: int) -> list[Fault]:
    """``count`` faults of mixed layers; successive seeds go through all of them."""
    mixed = sorted(found, key=lambda fault: hashlib.sha256(fault.id.encode()).digest())
    return [mixed[(seed * count + i) % len(mixed)] for i in range(min(count, len(mixed)))]


def key(fault: Fault, outcome: Outcome) -> str:
    """A hash of the fault, the file it stands in, and the test that noticed it or else all that are named."""
    digest = hashlib.sha256(repr(fault).encode() + (ROOT / fault.file).read_bytes())
    if outcome.verdict == "caught" and "::" in outcome.by:
        digest.update(source_of(outcome.by).encode())
        return digest.hexdigest()
    named = (word.partition("::")[0] for run in fault.runs for word in shlex.split(run) if word.startswith("tests/"))
    for path in (ROOT / name for name in named):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def source_of(test: str) -> str:
    """Its file without the other tests, by the name that pytest gives it; nothing where the file is gone."""
    path, _, name = test.partition("::")
    name = name.partition("[")[0].rpartition("::")[2]
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    lines, found = text.splitlines(), []
    for node in ast.parse(text).body:  # what is no test counts: tables, helpers, fixtures
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not is_test or node.name == name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            found += lines[first - 1 : node.end_lineno]
    return "\n".join(found)


def read() -> dict[str, dict[str, Any]]:
    """What earlier runs found, by the name of the fault."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(KEPT.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}


def kept(fault: Fault, earlier: dict[str, dict[str, Any]]) -> Outcome | None:
    """The result of an earlier run of the same fault in the same code."""
    if (found := earlier.get(fault.id)) is None:
        return None
    outcome = Outcome(**found["outcome"])
    return outcome if found["key"] == key(fault, outcome) else None


def noticed(fault: Fault, earlier: dict[str, dict[str, Any]]) -> str:
    """Arguments of pytest for the test that noticed the fault in an earlier run, if one did."""
    by: str = earlier.get(fault.id, {}).get("outcome", {}).get("by", "")
    return shlex.quote(by) if "::" in by else ""


def keep(fault: Fault, outcome: Outcome) -> None:
    """Adds a result to those kept, but no error; faults that are no longer in the catalogue are dropped."""
    if outcome.verdict == "error":
        return
    ids = [fault.id for fault in faults()]
    found = read() | {fault.id: {"key": key(fault, outcome), "outcome": outcome._asdict()}}
    text = json.dumps({name: found[name] for name in ids if name in found}, indent=1)
    KEPT.write_text(text + "\n", encoding="utf-8")


def run(found: list[Fault], options: argparse.Namespace, console: Console) -> Results:
    """Plants one after the other, with a line for each."""
    known = read()
    scratch = None
    results: Results = []
    width = max(len(fault.id) for fault in found)
    for i, fault in enumerate(found, 1):
        outcome = None if options.again else kept(fault, known)
        if earlier := outcome is not None:
            text = "kept"
        else:
            if scratch is None:
                console.print("[dim]copying and compiling the tree")
                scratch = Scratch(SCRATCH, options.limit)
            outcome = scratch.plant(fault, options.first or noticed(fault, known))
            text = f"{outcome.seconds:.0f} s"
        assert outcome is not None
        if not earlier and options.sample is None:
            keep(fault, outcome)
        style = "green" if outcome.caught else "bold red"
        about = (
            f"{outcome.by} [dim]{escape(outcome.said[:100])}[/]" if outcome.by else escape(outcome.said or fault.why)
        )
        line = f"{i:3d}/{len(found)} {fault.id:{width}} [{style}]{outcome.verdict:10}[/] {text:>6}  {about}"
        console.print(line, soft_wrap=True)
        results.append((fault, outcome))
    return results


def print_summary(results: Results, console: Console) -> None:
    """How many were caught: by layer, of the foreign ones, of all; and which were not."""
    table = Table("layer", title="planted faults", title_justify="left", show_edge=False)
    for heading in ("planted", "caught", "%", "minutes"):
        table.add_column(heading, justify="right")
    groups = {layer: [(f, o) for f, o in results if f.layer == layer] for layer in layers()}
    groups |= {"foreign": [(f, o) for f, o in results if f.foreign], "all": results}
    for name, group in groups.items():
        if group:
            caught, minutes = sum(o.caught for _, o in group), sum(o.seconds for _, o in group) / 60
            table.add_row(name, f"{len(group)}", f"{caught}", f"{100 * caught / len(group):.0f}", f"{minutes:.1f}")
    console.print(table)
    for fault, outcome in results:
        if not outcome.caught:
            text = f"[bold red]{outcome.verdict}[/] {fault.id} in {fault.file}: {escape(fault.why)}"
            console.print(text, soft_wrap=True)


def main(given: Sequence[str] | None = None) -> int:
    """Runs; returns the exit status."""
    options, console = arguments(given), Console(highlight=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended, too
    try:
        results = run(chosen(options), options, console)
    except (ValueError, OSError) as error:
        print(f"planted: {error}", file=sys.stderr)
        return 2
    print_summary(results, console)
    if left_out := [fault.id for fault in faults() if not can_run(fault)]:
        console.print(f"{len(left_out)} need torch for CUDA: not in this run unless named")
    if any(outcome.verdict == "error" for _, outcome in results):
        return 4
    return 0 if all(outcome.caught for _, outcome in results) else 3


if __name__ == "__main__":
    sys.exit(main())
