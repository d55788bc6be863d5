"""Instructions of a call, for information: ``python -m benchmarks --count``. Nothing is timed, and nothing fails.

A count is the same on a busy machine, where times say nothing. But fewer instructions are not always less time, and
those counted are of the instruction set that ran: valgrind knows no AVX-512, so under it the kernels run as on a
processor with AVX2. ``perf stat`` counts what really runs, where the system lets it.

One thread, so that the count does not depend on who waits for whom. Under valgrind one process makes all calls, as
importing torch takes a minute there; with perf each row has two, which differ in the number of calls alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cacr_kernels.backends.library import active_isa

from .cases import BenchmarkCase
from .machine import ROOT
from .rows import Row, rows

WARM, CALLS = 2, 3
MORE = 20  # calls that the second process of perf makes beside those of the first
MOST_FLOP = 4e9  # of a call: larger ones take minutes under valgrind
TIMEOUT = 3600.0
Job = tuple[BenchmarkCase, Row]
Run = Callable[..., Any]  # subprocess.run


class Counted(NamedTuple):
    """Instructions of a call, or why there is no number."""

    case: str
    row: str
    instructions: float | None
    isa: str
    reason: str = ""


class Tool(NamedTuple):
    """What counts instructions, and how."""

    name: str
    count: Callable[[Sequence[Job]], list[Counted]]


# ---- which tool ------------------------------------------------------------------------------------------------------
def find_tool(run: Run = subprocess.run, which: Callable[[str], str | None] = shutil.which) -> Tool | str:
    """``perf stat`` if the system lets it count, else valgrind's callgrind, else a sentence that says why not."""
    reasons = []
    perf = which("perf")
    if perf is None:
        reasons.append("perf is not installed")
    else:
        tried = run([perf, "stat", "-x,", "-e", "instructions:u", "true"], capture_output=True, text=True)
        if perf_total(tried.stderr) is not None:
            return Tool("perf stat", by_perf)
        reasons.append("perf is not allowed to count instructions here")
    if which("valgrind") is None:
        reasons.append("valgrind is not installed")
    elif not torch._C._valgrind_supported_platform():
        reasons.append("this torch was built without what it needs for valgrind")
    else:
        return Tool("callgrind", by_callgrind)
    return f"no instructions are counted: {'; '.join(reasons)}"


def perf_total(text: str) -> float | None:
    """The number of the line ``N,,instructions:u,...`` that perf writes."""
    found = re.search(r"^(\d+),[^,\n]*,instructions:u", text, re.MULTILINE)
    return float(found[1]) if found else None


# ---- counting --------------------------------------------------------------------------------------------------------
def environment() -> dict[str, str]:
    """That of the processes: threads that wait do not spin, and the order of hashing is fixed."""
    return os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONHASHSEED": "0"}


def child(jobs: Sequence[Job], calls: int, dump: bool, file: Path) -> list[str]:
    """The command that makes ``calls`` calls of each job."""
    wanted = [{"case": case.to_json(), "row": row.name} for case, row in jobs]
    file.write_text(json.dumps({"jobs": wanted, "calls": calls, "dump": dump}), encoding="utf-8")
    return [sys.executable, "-m", "benchmarks.suite.count", str(file)]


def by_callgrind(jobs: Sequence[Job]) -> list[Counted]:
    """All jobs by one process, which has callgrind write a part after each."""
    with tempfile.TemporaryDirectory(prefix="cacr-count-") as name:
        folder = Path(name)
        command = [
            "valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder / 'out'}",
            *child(jobs, CALLS, True, folder / "jobs.json"),
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=TIMEOUT, check=False
        )
        answers = read_answers(done.stdout)
        found = []
        for i, (case, row) in enumerate(jobs, 1):
            answer = answers.get(i, {"error": last_line(done.stderr)})
            part, reason = folder / f"out.{i}", answer.get("error", "")
            total = None if reason or not part.exists() else callgrind_total(part.read_text(encoding="utf-8"))
            count = None if total is None else total / CALLS
            reason = reason or ("" if count is not None else "callgrind wrote nothing")
            found.append(Counted(case.key, row.name, count, answer.get("isa", ""), reason))
        return found


def callgrind_total(text: str) -> float | None:
    """The instructions of a part that callgrind wrote."""
    found = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
    return float(found[1]) if found else None


def by_perf(jobs: Sequence[Job]) -> list[Counted]:
    """Each job by two processes, of which the second makes ``MORE`` calls more."""
    return [_difference(job) for job in jobs]


def _difference(job: Job) -> Counted:
    totals, answer = [], dict[str, Any]()
    for calls in (CALLS, CALLS + MORE):
        with tempfile.TemporaryDirectory(prefix="cacr-count-") as name:
            command = ["perf", "stat", "-x,", "-e", "instructions:u", *child([job], calls, False, Path(name, "jobs"))]
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=TIMEOUT, check=False
            )
        answer = read_answers(done.stdout).get(1, {"error": last_line(done.stderr)})
        totals.append(perf_total(done.stderr))
    few, many = totals
    count = None if answer.get("error") or few is None or many is None else (many - few) / MORE
    return Counted(job[0].key, job[1].name, count, answer.get("isa", ""), answer.get("error", ""))


def last_line(text: str) -> str:
    """The end of what a process said, for a process without an answer."""
    return (text.strip() or "the process ended without an answer").splitlines()[-1]


def read_answers(text: str) -> dict[int, dict[str, Any]]:
    """What the process said of each job, by its place from 1 on."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"job"')]
    return {line["job"]: line for line in lines}


# ---- what is counted -------------------------------------------------------------------------------------------------
def jobs_of(
    cases: Sequence[BenchmarkCase], chosen: Callable[[BenchmarkCase], list[Row]]
) -> tuple[list[Job], list[str]]:
    """Rows of the cases with one thread, and the names of cases that are too large."""
    small = [replace(case, threads=1) for case in cases if case.flop <= MOST_FLOP and case.timed]
    large = [case.key for case in cases if case.flop > MOST_FLOP and case.timed]
    return [(case, row) for case in small for row in chosen(case)], large


def show(console: Console, tool: str, found: Sequence[Counted], large: Sequence[str]) -> None:
    """The table, and what was left out."""
    isas = ", ".join(sorted({counted.isa for counted in found if counted.isa})) or "none"
    console.print(f"[bold]Instructions of a call, by {tool}, one thread, CPU kernels: {isas}", soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("case", "row", "instructions"):
        table.add_column(heading, justify="right" if heading == "instructions" else "left")
    for counted in found:
        text = counted.reason if counted.instructions is None else f"{counted.instructions:,.0f}"
        table.add_row(escape(counted.case), counted.row, escape(text))
    console.print(table)
    if large:
        console.print(
            f"[dim]left out, more than {MOST_FLOP:.0e} operations: {escape('; '.join(large))}", soft_wrap=True
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the calls that a file asks for; between two marks, where callgrind is to count them."""
    file = Path((sys.argv[1:] if arguments is None else arguments)[0])
    wanted = json.loads(file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    known = {row.name: row for row in rows()}
    for i, job in enumerate(wanted["jobs"], 1):
        answer: dict[str, Any] = {"job": i}
        try:
            case = BenchmarkCase.from_json(job["case"])
            step = known[job["row"]].step(case, case.inputs())
            for _ in range(WARM):
                step()
            if wanted["dump"]:
                torch._C._valgrind_toggle()
            for _ in range(wanted["calls"]):
                step()
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if wanted["dump"]:
            torch._C._valgrind_toggle_and_dump_stats()
        print(json.dumps(answer | {"isa": active_isa() or "none"}), flush=True)


if __name__ == "__main__":
    main()
