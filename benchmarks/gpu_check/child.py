"""The process of a step, started by ``supervise.py``. Its tasks run one after the other.

It ends with ``LOST`` once the GPU is of no more use to it (after a CUDA error every further call fails, too), and when
a task takes too long; another process is then started, which begins with the next task.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import sessions
from .lines import ENOUGH, RESULT, SKIP, START, Lines

LOST = 86
STICKY = ("cuda error", "hip error", "acceleratorerror", "device-side assert", "illegal memory access")


class Context(NamedTuple):
    """What a step is told: where its lines go, which share of its tasks it does, and times limits are multiplied by."""

    lines: Lines
    share: int = 0
    shares: int = 1
    scale: float = 1.0

    def takes(self, group: str) -> bool:
        """Whether this process does the tasks of the group; the same in all processes, and whatever their order."""
        return zlib.crc32(group.encode()) % self.shares == self.share

    def skip(self, reason: str) -> None:
        """Says in one line why the step cannot run."""
        self.lines.write(SKIP, reason=reason)


class Task(NamedTuple):
    """``call`` returns what the report shows of it; ``ok`` among that is ``True``, ``False`` or ``None`` (dropped).

    ``group``: tasks of one group are done by one process (without any, a task is a group of its own). ``optional``:
    that it does not end is no failure.
    """

    name: str
    call: Callable[[], dict[str, Any]]
    group: str = ""
    optional: bool = False


class DroppedError(Exception):
    """A task that cannot be done here, and need not be."""


def is_sticky(text: str) -> bool:
    """Whether an error message means that this process can do nothing more on the GPU."""
    lower = text.lower()
    return any(word in lower for word in STICKY) and "out of memory" not in lower


def run(context: Context, tasks: Iterable[Task], seconds: float) -> None:
    """The share of ``tasks`` of this process, each within ``seconds``."""
    done = context.lines.started()
    left = [task for task in tasks if context.takes(task.group or task.name) and task.name not in done]
    needed = sum(not task.optional for task in left)
    for task in left:
        if not needed:
            context.lines.write(ENOUGH, share=context.share)
        needed -= not task.optional
        run_one(context, task, seconds)


def run_one(context: Context, task: Task, seconds: float) -> None:
    context.lines.write(START, task=task.name, share=context.share, optional=task.optional)
    begin = time.perf_counter()
    faulthandler.dump_traceback_later(seconds * context.scale, exit=True)
    try:
        found = {"ok": True} | task.call()
    except DroppedError as error:
        found = {"ok": None, "problem": str(error)}
    except Exception as error:  # whatever goes wrong is what the report is for
        traceback.print_exc()
        found = {"ok": False, "problem": f"{type(error).__name__}: {error}"}
    finally:
        faulthandler.cancel_dump_traceback_later()
    context.lines.write(RESULT, task=task.name, seconds=round(time.perf_counter() - begin, 3), **found)
    if found["ok"] is False and is_sticky(str(found.get("problem"))):
        leave(LOST)


def leave(status: int) -> None:
    """Ends this process at once: what is registered to run at its end may wait for the GPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_with_parent(parent: int) -> None:
    """The parent holds the other end of this file; once it is gone, so is everything it started.

    A file of its own: while pytest captures, the standard input is another one, which has an end.
    """
    with contextlib.suppress(OSError, ValueError):
        while os.read(parent, 4096):
            pass
    sessions.end(os.getsid(0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step")
    parser.add_argument("--module", required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--shares", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    faulthandler.enable()
    threading.Thread(target=end_with_parent, args=(os.dup(0),), daemon=True).start()
    lines = Lines(options.lines, options.step)
    try:
        step = importlib.import_module(options.module)
        step.run(Context(lines, options.share, options.shares, options.scale))
    except Exception as error:
        traceback.print_exc()
        lines.write(RESULT, task="the step itself", ok=False, problem=f"{type(error).__name__}: {error}")
        leave(1)


if __name__ == "__main__":
    main()
    leave(0)
