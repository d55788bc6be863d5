"""A copy of the tree, in which faults are applied, compiled and tested."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cacr_kernels.backends import library

from .fault import ROOT, Fault
from .warm import WarmPytest

NATIVE = ("csrc/cpu/", "csrc/common/", "setup.py")  # after a change of these the CPU library is compiled
COMPILED = ("build/native-*", "cacr_kernels/*.so")  # what that makes
ON_FAKE_CUDA = ("tests/device/test_gpu", "tests/fake_cuda")  # with a CUDA build of torch
NOTICED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - (.*))?$", re.MULTILINE)
COMPILER = re.compile(r"^.*(?:(?::\d+|\(\d+\)): (?:fatal )?error: |\[-Werror|ld returned 1).*$", re.MULTILINE)
BUILD_LIMIT = 1800.0  # seconds
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",  # it would be kept by the time of a source, which is set back
    "OMP_WAIT_POLICY": "passive",
    "CI": "",  # where a skip is a failure
    "CACR_CPU_ISAS": library.active_isa() or "portable",  # others would take most of the time
}


class Outcome(NamedTuple):
    """``caught``, ``time-out`` (what only hangs with the fault is caught), ``NOT CAUGHT``, ``error``; by which test."""

    verdict: str
    by: str = ""
    said: str = ""
    seconds: float = 0.0

    @property
    def caught(self) -> bool:
        """Whether somebody noticed."""
        return self.verdict in ("caught", "time-out")


class Run(NamedTuple):
    """Arguments of pytest; ``exhaustive``: "1" for all tests, "0" for those of ``make test``."""

    arguments: tuple[str, ...]
    exhaustive: str


class Scratch:
    """The tree of the repository as it lies there, in a folder of its own."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.tree, self.clean, self.limit = folder / "tree", folder / "clean", limit
        self.passing: set[str] = set()  # tests known to pass without a fault
        shutil.rmtree(folder, ignore_errors=True)
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        copy_compiled(ROOT, self.tree)
        status, output = self.compile()
        if status != 0:
            raise ValueError(f"the sources do not compile: {output[-2000:]}")
        copy_compiled(self.tree, self.clean)
        self.warm = WarmPytest(folder / "output", ENVIRONMENT)

    def run(self, *command: str, limit: float, **environment: str) -> tuple[int | None, str]:
        """Status and output of a Python command in the tree; ``None`` if its time, ``limit`` seconds, was up."""
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(self.tree)} | environment
        process = subprocess.Popen(
            [sys.executable, *command], cwd=self.tree, env=env, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        status, output = None, ""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=limit)
                status = process.returncode
        finally:
            for end in (signal.SIGTERM, signal.SIGKILL):  # ninja ends its compilers only if it is asked politely
                if process.poll() is None:  # out of time, or interrupted
                    os.killpg(process.pid, end)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        output, _ = process.communicate(timeout=10)
        return status, output

    def compile(self) -> tuple[int | None, str]:
        """Makes the CPU library, as far as something has changed, in half the time of what is shipped."""
        return self.run("setup.py", "build_ext", "--inplace", limit=BUILD_LIMIT, CACR_BUILD_CUDA="0", CXXFLAGS="-O1")

    def test(self, runs: Sequence[str]) -> tuple[Outcome, Run]:
        """The verdict of pytest up to the first failure, and where that was.

        Of the tests of ``make test`` in all runs, then of all tests.
        """
        outcome, where = Outcome("error", said="no test was chosen"), Run((), "0")
        for exhaustive in "01":
            for run in runs:
                where = Run(tuple(shlex.split(run)), exhaustive)
                status, output = self.pytest(where)
                if status != 5:  # none of them is one of ``make test``
                    outcome = judge(status, output)
                    if outcome.verdict != "NOT CAUGHT":
                        return outcome, where
        return outcome, where

    def pytest(self, run: Run) -> tuple[int | None, str]:
        """Status and output of pytest."""
        arguments, exhaustive = run
        command = ["-x", "-q", "-p", "no:cacheprovider", *arguments]
        environment = {"CACR_TEST_ALL": exhaustive}
        if any("interpreted" in word for word in arguments):  # which Triton has to know when it is imported
            command = ["-m", "pytest", *command, "-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]  # overflows
            return self.run(*command, limit=self.limit, TRITON_INTERPRET="1", **environment)
        if any(word.startswith(ON_FAKE_CUDA) for word in arguments):
            return self.run("-m", "tests.fake_cuda", "-m", "pytest", *command, limit=self.limit, **environment)
        environment["PYTHONPATH"] = str(self.tree)
        status = self.warm.run(self.tree, command, self.limit, environment)
        return status, self.warm.output.read_text(encoding="utf-8", errors="replace")

    def plant(self, fault: Fault, guess: str = "") -> Outcome:
        """Tries the tests of a fault with it; what noticed has to pass without it.

        ``guess``: some of them that may notice it at once. The others run only if these do not.
        """
        begin = time.monotonic()
        outcome = self._plant(fault, guess)
        return outcome._replace(seconds=round(time.monotonic() - begin, 1))

    def _plant(self, fault: Fault, guess: str) -> Outcome:
        guessed = False
        with self.applied(fault) as refused:
            if refused:
                return Outcome("error", said=f"does not compile: {refused}")
            where = Run(tuple(shlex.split(guess)), "1")
            if guess:
                outcome = judge(*self.pytest(where))
                guessed = outcome.verdict == "caught" and covers(fault, outcome.by)
            if not guessed:
                outcome, where = self.test(fault.runs)
        if not outcome.caught or self.passes(outcome, where):
            return outcome
        if guessed:  # that test says nothing, the others may
            return self._plant(fault, "")
        return outcome._replace(verdict="error", said="fails, or takes too long, without the fault, too")

    @contextlib.contextmanager
    def applied(self, fault: Fault) -> Iterator[str]:
        """The tree with a fault, compiled; gives what the compiler says against it."""
        path = self.tree / fault.file
        before, times = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(fault.apply(before), encoding="utf-8")
        try:
            status, output = self.compile() if fault.file.startswith(NATIVE) else (0, "")
            yield first(COMPILER, output) if status != 0 else ""
        finally:
            path.write_text(before, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if fault.file.startswith(NATIVE):
                copy_compiled(self.clean, self.tree)
            shutil.rmtree(self.tree / ".hypothesis", ignore_errors=True)  # examples that failed belong to this fault

    def passes(self, outcome: Outcome, where: Run) -> bool:
        """Whether the test that noticed passes in this tree; where that is a module or the process, its whole run."""
        if "::" not in outcome.by:
            return self.pytest(where)[0] in (0, 5)
        if outcome.by not in self.passing:
            status, _ = self.pytest(Run((outcome.by,), "1"))
            if status == 4:  # not found: its parameters had their names from the fault
                status, _ = self.pytest(Run((outcome.by.partition("[")[0],), "1"))
            if status != 0:
                return False
            self.passing.add(outcome.by)
        return True


def covers(fault: Fault, test: str) -> bool:
    """Whether a test, or a module, lies in what a fault names: its files and folders."""
    path = test.partition("::")[0]
    words = [word.partition("::")[0].rstrip("/") for run in fault.runs for word in shlex.split(run)]
    return any(path == word or path.startswith(word + "/") for word in words)


def judge(status: int | None, output: str) -> Outcome:
    """What a run of pytest with ``-x`` says."""
    if status is None:
        return Outcome("time-out", said="the tests did not come to an end")
    if status == 0:
        return Outcome("NOT CAUGHT")
    by, said = next(iter(NOTICED.findall(output)), ("", ""))
    if COMPILER.search(output):  # emulations are compiled by their tests
        return Outcome("error", by, f"does not compile: {first(COMPILER, output)}")
    if status in (1, 2) and by:  # 2: a module that cannot be imported
        return Outcome("caught", by, said)
    if status < 0:
        return Outcome("caught", "the process", f"ended by signal {-status}")
    return Outcome("error", by, f"pytest ended with status {status}: {output.strip()[-200:]}")


def first(pattern: re.Pattern[str], text: str) -> str:
    """The first line that matches, else the end."""
    found = pattern.search(text)
    return found[0].strip() if found else text[-200:]


def copy_compiled(source: Path, target: Path) -> None:
    """Files with their times, by which ninja knows what is up to date."""
    for path in (path for pattern in COMPILED for path in source.glob(pattern)):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(path, to)
        else:
            shutil.copy2(path, to)
