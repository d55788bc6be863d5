"""The steps in their order. Their limits are for a machine with 16 cores, and sum to nine minutes.

The first limit is generous: on a machine that has just started, importing torch alone may take half a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.host import cores

MINUTES = 9.0
GPU, KERNELS, CORES = "gpu", "kernels", "cores"
MOST_PROCESSES = 16  # each holds a CUDA context of about 0.5 GiB


class Step(NamedTuple):
    """What ``run`` of ``module`` does (by default the module here of the same name), in a process of its own.

    ``only``: the choices of ``--only`` that the step belongs to. ``processes``: in as many as there are cores, each
    with a share of the tasks. ``resumes``: after a crash another process goes on with the next task. ``needs``: what
    has to be there, ``GPU``, ``KERNELS`` (an interpreter will do) or more than two ``CORES``; if it is not, which the
    first step finds, no process is started. ``least``: seconds that the limit is not shortened below.
    """

    name: str
    seconds: float
    title: str
    only: tuple[str, ...] = ()
    processes: bool = False
    resumes: bool = True
    module: str = ""
    needs: str = ""
    least: float = 0.0

    def commands(self, lines: Path, scale: float, workers: int) -> list[list[str]]:
        """The command of each process."""
        count = workers if self.processes else 1
        module = self.module or f"{__package__}.{self.name}"
        start = [sys.executable, "-m", f"{__package__}.child", self.name, f"--module={module}", f"--lines={lines}"]
        return [[*start, f"--scale={scale:.4g}", f"--share={share}", f"--shares={count}"] for share in range(count)]


ONLY = ("smoke", "times", "verify", "tests")
STEPS = (
    Step("environment", 45, "What this machine is", ONLY, resumes=False, least=30),
    Step("build", 130, "The compiled libraries, for the GPU of this machine", ONLY, resumes=False, needs=GPU),
    Step("warm", 40, "Kernels compiled beforehand", ("smoke", "times"), processes=True, needs=GPU),
    Step("smoke", 60, "Every loss and dtype against float64 on the host", ("smoke",), needs=KERNELS),
    Step("times", 95, "Times", ("times",), needs=GPU),
    Step("verify", 70, "Every case of `python -m cacr_kernels.verify`", ("verify",), processes=True, needs=GPU),
    Step("device_tests", 70, "Tests on the backends of the GPU", ("tests",), processes=True, needs=GPU),
    Step("cpu_threads", 30, "CPU threads", ("times",), needs=CORES),
)


def workers() -> int:
    """How many processes of a step run side by side."""
    return max(1, min(cores(), MOST_PROCESSES))
