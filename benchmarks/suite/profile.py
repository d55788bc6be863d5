"""Where the time of our CPU kernels goes: ``python -m benchmarks --profile``, by samples of ``perf record``.

``python -m benchmarks.suite.profile RESULTS/profile.json`` prints a table of the cases that have a goal, as Markdown.

A process of ``worker.py`` repeats a call; perf looks at where its threads are, 500 times a second. The thread that
calls is always somewhere, so the number of its samples stands for the time, and what the others lack of it they waited.
Nothing here needs rights to count events: samples are those of the clock.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

from .cases import GRADIENTS, LOSS, BenchmarkCase
from .goals import GOALS
from .machine import ROOT
from .peak import Peaks
from .results import problem_label
from .versus import Worker

if TYPE_CHECKING:
    from rich.console import Console

FEW = 0.2  # share of the samples
HERTZ = 499  # no multiple of what a timer of the system may have; at 2,000 the calls themselves took longer
PRODUCTS, SOFTMAX, ROWS, POSITIVES = "products", "softmax", "rows", "positives"
OURS, WAITING, FRAMEWORK = "planner", "waiting", "Python, torch"
PARTS = (PRODUCTS, SOFTMAX, ROWS, POSITIVES, OURS, WAITING, FRAMEWORK)

# The functions of csrc/cpu/kernels by the names they begin with; the first that fits.
FUNCTIONS = (
    (PRODUCTS, "similarity_panel|similarity_tiles|query_gradient|key_gradient|multiply_|compute_similarities"),
    (SOFTMAX, "add_statistics|accumulate_|add_keys|tile_gradient|finish_|move_means|merge_rows|find_top|weigh_tile"),
    (SOFTMAX, "meet_tile|set_given|for_parts|turn$|symmetric_|add_moments|PanelState|detached_keys_merge"),
    (SOFTMAX, "round_|start_rows|write_variance|gradient_tile|add_sums|with_flags"),
    (ROWS, "pack|turn_|squared_norm|to_raw_rows|reduce|add_query_gradients|subtract_key|add_gradients|start_panel"),
    (POSITIVES, "Aligned|RowPair|aligned|positives|meet_|replace_|for_blocks"),
)  # fmt: skip


class Sample(NamedTuple):
    """Where a thread was when perf looked."""

    thread: int
    symbol: str
    library: str


class Profile(NamedTuple):
    """Seconds of a call, what share of the time of its threads each part took, and the peak beside it in FLOP/s."""

    case: BenchmarkCase
    seconds: float
    shares: dict[str, float]
    peak: float = 0.0
    reason: str = ""

    @property
    def of_peak(self) -> float:
        """The share of the peak that the call makes."""
        return self.case.flop / self.seconds / self.peak

    @property
    def of_peak_in_products(self) -> float | None:
        """The same while its threads are in products: what a call would make that has nothing else to do.

        None of products in other arithmetic than that of the peak, nor where they are too few to tell.
        """
        known = self.case.arithmetic == self.case.torch_dtype and self.shares[PRODUCTS] > FEW
        return self.of_peak / self.shares[PRODUCTS] if known else None

    def to_json(self) -> dict[str, Any]:
        """What a file keeps of it."""
        named = {"case": self.case.key, "name": name_of(self.case)}
        found = named | {"reason": self.reason, "goal": goal_of(self.case)}
        if self.reason:
            return found
        speeds = {"ms": 1e3 * self.seconds, "of_peak": self.of_peak, "of_peak_in_products": self.of_peak_in_products}
        return found | speeds | {"peak_gflops": self.peak / 1e9, "shares": self.shares}


def why_not(which: Callable[[str], str | None] = shutil.which) -> str | None:
    """Why there is nothing to profile with."""
    return None if which("perf") else "--profile needs perf (the package linux-tools or linux-perf of your system)"


def bare_name(symbol: str) -> str:
    """A function of ours without its type, namespaces, template arguments and parameters; of a class with the class."""
    text = symbol.replace("(anonymous namespace)", "anonymous")
    while (shorter := re.sub(r"<[^<>]*>", "", text)) != text:
        text = shorter
    text = (text.split("(")[0].split() or [""])[-1]
    return re.sub(r"^cacr::(?:(?:portable|avx\w*|amx|neon|anonymous)::)*", "", text)


def part_of(sample: Sample) -> str:
    """The part of a call that a sample belongs to."""
    if "libgomp" in sample.library or "libomp" in sample.library or "libiomp" in sample.library:
        return WAITING
    if "_C_cpu" not in sample.library:
        return FRAMEWORK
    name = bare_name(sample.symbol)
    return next((part for part, names in FUNCTIONS if re.match(names, name)), OURS)


def read_samples(text: str) -> list[Sample]:
    """What ``perf script -F tid,ip,sym,dso`` prints."""
    found = re.findall(r"^\s*(\d+)\s+[0-9a-f]+ (.*) \(([^()]*(?:\([^()]*\))?)\)$", text, re.MULTILINE)
    return [Sample(int(thread), symbol, library) for thread, symbol, library in found]


def shares_of(samples: Iterable[Sample], caller: int, threads: int) -> dict[str, float]:
    """Share of the time of all threads that each part took; where a thread has no sample, it slept."""
    samples = list(samples)
    whole = threads * sum(sample.thread == caller for sample in samples)
    counted = Counter(part_of(sample) for sample in samples)
    shares = {part: counted[part] / whole for part in PARTS}
    shares[WAITING] += max(0.0, 1 - sum(shares.values()))
    return shares


def profile(case: BenchmarkCase, seconds: float, peaks: Peaks) -> Profile:
    """Calls the case for so many seconds in a process of its own."""
    peaks.see(case.arithmetic, case.threads, case.device)
    with tempfile.TemporaryDirectory(prefix="cacr-profile-") as name, closing(Worker(ROOT, passive=False)) as worker:
        file, data = Path(name, "inputs.pt"), Path(name, "perf.data")
        torch.save(case.inputs(), file)
        first = worker.ask(
            load=str(file), loss=case.problem.loss, options=case.problem.options, module=case.module,
            gradients=case.mode == GRADIENTS, threads=case.threads,
        )  # fmt: skip
        if "error" in first:
            return Profile(case, 0.0, {}, reason=str(first["error"]))
        calls = max(1, round(0.25 / worker.ask(calls=3)["seconds"]))
        once = worker.ask(calls=calls)["seconds"]
        calls = max(3, round(seconds / once))
        command = ["perf", "record", "-q", "-F", str(HERTZ), "-o", str(data), "-p", str(worker.pid)]
        perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        answer = worker.ask(calls=calls)
        perf.terminate()
        _, complaint = perf.communicate()
        if "error" in answer or not data.exists():
            reason = answer.get("error") or (complaint.strip() or "perf wrote nothing").splitlines()[-1]
            return Profile(case, 0.0, {}, reason=str(reason))
        script = ["perf", "script", "-i", str(data), "-F", "tid,ip,sym,dso"]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        samples = read_samples(done.stdout)
        if not any(sample.thread == worker.pid for sample in samples):
            return Profile(
                case,
                0.0,
                {},
                reason=(done.stderr.strip() or "perf saw nothing of the call: try more --seconds").splitlines()[-1],
            )
    peaks.see(case.arithmetic, case.threads, case.device)
    peak = peaks.highest(case.arithmetic, case.threads, case.device)
    shares = shares_of(samples, worker.pid, case.threads)
    return Profile(case, answer["seconds"], shares, 1e9 * peak.gflops)


def goal_of(case: BenchmarkCase) -> float | None:
    """The share of the peak that the goals ask of a case, in percent."""
    wanted = (goal.required for goal in GOALS if goal.case == case.key and goal.row is None and goal.unit == "%")
    return max(wanted, default=None)


def name_of(case: BenchmarkCase) -> str:
    """The case for people, in one line of a narrow table."""
    options = " ".join(f"{k}={v}" for k, v in case.problem.options.items() if k != "normalize")
    fields = dict.fromkeys("VBDKMC") | case.problem.shape | {"loss": case.problem.loss, "options": options}
    more = ["raw rows"] * bool(case.problem.options.get("normalize")) + [case.dtype] * (case.dtype != "float32")
    more += ["loss only"] * (case.mode == LOSS)
    return ", ".join([problem_label(fields), *more])


def show(console: Console, found: Sequence[Profile]) -> None:
    """Prints a row for each case."""
    console.print(
        "[bold]Where the time of a call goes, in percent of the time of its threads, and how fast it is, in percent of "
        "the FMA peak",
        soft_wrap=True,
    )
    table = Table(show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("case")
    for heading in ("ms", "goal", "of peak", "in products", *PARTS):
        table.add_column(heading, justify="right")
    for p in found:
        if p.reason:
            table.add_row(escape(name_of(p.case)), escape(p.reason))
            continue
        goal, alone = goal_of(p.case), p.of_peak_in_products
        speeds = f"{100 * p.of_peak:.0f}", "–" if alone is None else f"{100 * alone:.0f}"
        shares = (f"{100 * p.shares[part]:.0f}" for part in PARTS)
        table.add_row(
            escape(name_of(p.case)), f"{1e3 * p.seconds:.3g}", "–" if goal is None else f"{goal:.0f}", *speeds, *shares
        )
    console.print(table)
    console.print(
        "[dim]In products: the speed while threads are in products, a bound for the whole call. Softmax: statistics "
        "and coefficients; rows: lengths, copies, sums; positives: costs of pairs of views by differences; planner: "
        "the rest of our library; waiting: for another thread, or for the core.[/dim]",
        soft_wrap=True,
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """What a file holds of the cases whose goal is a share of the peak, in percent; small parts are one column."""
    headings = (
        "case",
        "goal",
        "reached",
        "in products",
        "products",
        "softmax",
        "rows and the rest",
        "waiting",
        FRAMEWORK,
    )
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    for row in rows:
        if row["goal"] is None or row["reason"]:
            continue
        shares = row["shares"]
        rest = sum(shares[part] for part in (ROWS, POSITIVES, OURS))
        figures = row["of_peak"], row["of_peak_in_products"], shares[PRODUCTS], shares[SOFTMAX], rest
        figures += shares[WAITING], shares[FRAMEWORK]
        cells = [row["name"], f"{row['goal']:.0f}", *(f"{100 * x:.0f}" for x in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of a file."""
    (file,) = sys.argv[1:] if arguments is None else arguments
    print(markdown(json.loads(Path(file).read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
