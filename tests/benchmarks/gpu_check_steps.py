"""Steps of a GPU check that go wrong in every way that a GPU can; no torch, so that they start at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu_check import child
from benchmarks.gpu_check.child import Context, DroppedError, Task
from benchmarks.gpu_check.lines import ABSENT, NOTE, Lines
from benchmarks.gpu_check.steps import GPU, Step

SECONDS = 2.0  # of a task


def fake(name: str, seconds: float = 60.0, **fields: Any) -> Step:
    """A step of this module."""
    return Step(name, seconds, name.capitalize(), module=__name__, **fields)


def fine() -> dict[str, Any]:
    return {"milliseconds": 1.5}


def wrong() -> dict[str, Any]:
    return {"ok": False, "problem": "0.5 is not 0.25"}


def drop() -> dict[str, Any]:
    raise DroppedError("out of memory")


def sticky() -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crash() -> dict[str, Any]:
    os.abort()


def sleep() -> dict[str, Any]:
    time.sleep(60)
    return {}


def captures() -> dict[str, Any]:
    """As pytest does: standard input is another file for a while, in which a compiler is started.

    The end of a child that is quick enough reaches all threads, and a read of one of them begins anew.
    """
    kept, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for _ in range(20):
        subprocess.run(["true"], check=True)
    time.sleep(0.5)
    os.dup2(kept, 0)
    return {}


def with_children() -> dict[str, Any]:
    """A compiler that hangs, say, in a process group of its own, as ninja starts it."""
    compiler = subprocess.Popen([sys.executable, "-c", "import os, time; os.setpgid(0, 0); time.sleep(60)"])
    while os.getpgid(compiler.pid) != compiler.pid:
        time.sleep(0.01)
    WRITTEN[0].write(NOTE, text=f"process {compiler.pid}")
    compiler.wait()
    return {}


WRITTEN: list[Lines] = []  # by this process
TASKS = {
    "results": (fine, wrong, drop),
    "crashing": (fine, crash, sticky, drop),
    "hanging": (fine, sleep, drop),
    "late": (fine, with_children),
    "optional": (fine, sleep, drop),
    "last": (fine,),
    "captured": (captures, fine),
}


def run(context: Context) -> None:
    step = context.lines.step
    if step == "absent":
        return context.skip("there is no GPU")
    if step == "optional":
        return child.run(context, [Task(task.__name__, task, optional=task is not fine) for task in TASKS[step]], 100.0)
    if step == "decides":
        return context.lines.write(ABSENT, **{GPU: "there is no GPU"})
    WRITTEN.append(context.lines)
    context.lines.write(NOTE, text=f"process {os.getpid()}")
    seconds = 100.0 if step == "late" else SECONDS
    child.run(context, [Task(f"{task.__name__} of {step}", task) for task in TASKS[step]], seconds)
    return None
