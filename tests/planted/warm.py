"""Runs of pytest without the seconds that its imports take: a process that has them forks one for each run.

``python tests/planted/warm.py`` reads lines of JSON with the tree, the arguments of pytest, what the environment has
more, and the file for the output; it answers each with the number of the process and, when it ends, with its status.
The project itself is imported by the forked process alone, so that a changed file counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path


class WarmPytest:
    """The process, from the side of the one who asks."""

    def __init__(self, output: Path, environment: dict[str, str]) -> None:
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "-B", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | environment, cwd="/",
        )  # fmt: skip

    def run(self, tree: Path, arguments: list[str], limit: float, environment: dict[str, str]) -> int | None:
        """The status of pytest; ``None`` if its time, ``limit`` seconds, was up. What it says is in ``output``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"tree": str(tree), "arguments": arguments, "environment": environment, "output": str(self.output)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        number, late = int(self.process.stdout.readline()), threading.Event()
        timer = threading.Timer(limit, end, (number, late))
        timer.start()
        try:
            status = int(self.process.stdout.readline())
        finally:
            timer.cancel()
            end(number)  # what it started
        return None if late.is_set() else status

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def end(number: int, late: threading.Event | None = None) -> None:
    """Kills a run and all that it started."""
    if late:
        late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def become_pytest(request: dict[str, object]) -> None:
    """What ``python -m pytest`` is, in this process."""
    import pytest

    os.setsid()
    output = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, number)
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["tree"]))
    sys.path.insert(0, str(request["tree"]))
    arguments = [str(word) for word in request["arguments"]]  # type: ignore[attr-defined]
    sys.argv = ["pytest", *arguments]
    sys.exit(pytest.main(arguments))


def main() -> None:
    """Answers until nobody asks."""
    for module in ("pytest", "torch._dynamo", "torch.distributed", "torch.testing"):
        __import__(module)
    sys.path.pop(0)  # the folder of this file
    for line in sys.stdin:
        number = os.fork()
        if number == 0:
            become_pytest(json.loads(line))
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
