"""This checkout against another, by turns: ``python -m benchmarks --compare COMMIT`` (or the folder of a built one).

Each checkout has a process of its own (``worker.py``) that keeps inputs and libraries. In a round both time one block
of calls of the same problem, in an order that changes from round to round, so that a slow moment of the machine hits
both.
The other checkout has two processes: what those differ by, though they run the same code, is the control. On a busy
machine it is far from 1, and the interval of the ratio is widened by as much.
A commit is exported and compiled below ``build/``, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from .cases import GRADIENTS, BenchmarkCase
from .compare import Comparison
from .machine import ROOT
from .measure import BLOCK_SECONDS, MAX_ROUNDS, MIN_ROUNDS, Budget, order
from .rows import OURS
from .verdict import CANNOT_TELL, Interval, judge, median_interval

CHECKOUTS = ROOT / "build" / "benchmarks" / "checkouts"
OLD, NEW, CONTROL = "old", "new", "old again"
DIFFERENCE, OF_HALVES = 1e-3, 2e-2  # of sums and norms of what the two compute, relative: more is another loss
WORKER = Path(__file__).with_name("worker.py")
IN_TURNS = "turns"


class NoCheckoutError(ValueError):
    """Why there is nothing to compare with."""


def checkout(name: str, tell: Callable[[str], None] = lambda text: None, root: Path = ROOT) -> Path:
    """The folder of a checkout: as it stands, or that of a commit, exported and compiled if it is not yet there."""
    if (Path(name) / "cacr_kernels" / "__init__.py").exists():
        return Path(name).resolve()
    command = ["git", "rev-parse", "--verify", f"{name}^{{commit}}"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if found.returncode:
        raise NoCheckoutError(f"--compare {name}: no results file, no folder with cacr_kernels, no commit")
    commit = found.stdout.strip()
    folder = CHECKOUTS / commit[:16]
    if (folder / ".built").exists():
        return folder
    tell(f"compiling {commit[:12]} in {folder}: some minutes, once")
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", commit], cwd=root, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as packed:
        packed.extractall(folder, filter="data")
    build = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"CACR_BUILD_CUDA": "0"},
    )  # fmt: skip
    if build.returncode:
        last = (build.stderr.strip() or build.stdout.strip() or "no output").splitlines()[-1]
        raise NoCheckoutError(f"--compare {name}: {folder} cannot be built: {last}")
    (folder / ".built").touch()
    return folder


class CallError(RuntimeError):
    """A call that failed after others of the same case had not."""


class Worker:
    """One process of ``worker.py``, which, if ``passive``, waits without spinning while it is not its turn."""

    def __init__(self, folder: Path, passive: bool = True) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder)} | ({"OMP_WAIT_POLICY": "passive"} if passive else {})
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        package = Path(str(self._answer()["package"]))
        if not package.is_relative_to(folder):
            self.close()
            raise NoCheckoutError(f"the process for {folder} found {package}")

    @property
    def pid(self) -> int:
        """The process, and the thread that calls."""
        return self._process.pid

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise NoCheckoutError(f"a process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; ``{"error": ...}`` where it could not be done."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process, which reads to the end of its requests."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


@contextmanager
def workers(old: Path, new: Path = ROOT) -> Iterator[dict[str, Worker]]:
    """Two processes for the old checkout and one for the new."""
    with ExitStack() as stack:
        found = {}
        for name, folder in ((OLD, old), (NEW, new), (CONTROL, old)):
            found[name] = Worker(folder)
            stack.callback(found[name].close)
        yield found


def take_turns(both: dict[str, Any], case: BenchmarkCase, budget: Budget, margin: float) -> Comparison:
    """The case in rounds, as many as fit into the budget, and the verdict on the ratio within a round."""
    with tempfile.TemporaryDirectory(prefix="cacr-inputs-") as folder:
        file = Path(folder, "inputs.pt")
        torch.save(case.inputs(), file)
        request = {
            "load": str(file), "loss": case.problem.loss, "options": case.problem.options, "module": case.module,
            "gradients": case.mode == GRADIENTS, "threads": case.threads,
        }  # fmt: skip
        first = {name: worker.ask(**request) for name, worker in both.items()}
    reason = next((f"{name}: {answer['error']}" for name, answer in first.items() if "error" in answer), "")
    allowed = OF_HALVES if case.torch_dtype.itemsize == 2 else DIFFERENCE
    if not reason and differ(first[OLD]["numbers"], first[NEW]["numbers"], allowed):
        reason = "the two compute different numbers"
    if reason:
        return nothing_told(case, reason)
    try:
        return verdict_of(case, times_of_rounds(both, budget), margin)
    except CallError as error:
        return nothing_told(case, str(error))


def nothing_told(case: BenchmarkCase, reason: str) -> Comparison:
    """A case without a verdict, and why."""
    return Comparison(case.key, "auto", OURS, 0.0, 0.0, 0.0, None, IN_TURNS, CANNOT_TELL, reason)


def times_of_rounds(both: dict[str, Any], budget: Budget) -> dict[str, list[float]]:
    """Seconds of a call, of each process in each round."""

    def measured(name: str, calls: int) -> float:
        answer = both[name].ask(calls=calls)
        if "error" in answer:
            raise CallError(f"{name}: {answer['error']}")
        return float(answer["seconds"])

    once = {name: min(measured(name, 1) for _ in range(2)) for name in both}
    calls = {name: max(1, round(BLOCK_SECONDS / max(seconds, 1e-7))) for name, seconds in once.items()}
    round_seconds = sum(once[name] * calls[name] for name in both)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget.seconds / round_seconds)))
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for r in range(rounds):
        for name in order(list(both), r):
            seconds[name].append(measured(name, calls[name]))
    return seconds


def verdict_of(case: BenchmarkCase, seconds: dict[str, list[float]], margin: float) -> Comparison:
    """What the times of the rounds say."""
    ratios, same = ([a / b for a, b in zip(seconds[name], seconds[OLD], strict=True)] for name in (NEW, CONTROL))
    interval = widened(median_interval(ratios), median_interval(same))
    middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    time = sorted(ratios)[len(ratios) // 2]
    old_ms, new_ms = 1e3 * middle[OLD], 1e3 * middle[NEW]
    return Comparison(case.key, "auto", OURS, old_ms, new_ms, time, interval, IN_TURNS, judge(interval, margin))


def widened(interval: Interval | None, control: Interval | None) -> Interval | None:
    """The interval with what two processes of the same code may differ by on top, to either side."""
    if interval is None or control is None:
        return None
    factor = max(1.0, control.high, 1 / control.low)
    return Interval(interval.low / factor, interval.high * factor)


def differ(old: list[float], new: list[float], allowed: float) -> bool:
    """Whether sums or norms are further apart than rounding: sums are measured against the norms of their tensors."""
    if len(old) != len(new):
        return True
    half = len(old) // 2
    sizes = [max(abs(a), abs(b)) for a, b in zip(old[half:], new[half:], strict=True)] * 2
    return any(not abs(a - b) <= allowed * s for a, b, s in zip(old, new, sizes, strict=True))
