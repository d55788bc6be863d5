"""How long the check takes to compile Triton's kernels, reckoned before one is compiled; needs Python alone."""

from __future__ import annotations

from .lines import RESULT, Line
from .steps import Step

# Kernels of each step that no step before it needs, counted by `python -m tests.fake_cuda.counting`; a check of some
# steps only may compile more of them in each. Those that torch.compile makes are not among them.
COMPILED = {"warm": 230, "smoke": 0, "verify": 268, "device_tests": 128}
SECONDS = 2.5  # of one process for a kernel on an ordinary server; the step that compiles beforehand says what it was


def sentence(steps: tuple[Step, ...], processes: int) -> str:
    """What is to be compiled, and how long that takes of the time that the steps may have."""
    names = {step.name for step in steps}
    parts = {step: count for step, count in COMPILED.items() if count and step in names}
    if not (total := sum(parts.values())):
        return "no Triton kernels to compile"
    each = ", ".join(f"{step} {count}" for step, count in parts.items())
    return (
        f"up to {total} Triton kernels to compile ({each}): at {SECONDS:g} s each {total * SECONDS:.0f} s of work, "
        f"about {total * SECONDS / processes:.0f} s for {processes} processes side by side, once for this machine"
    )


def measured(lines: list[Line]) -> str | None:
    """What a kernel has taken in the step that compiles them beforehand, where nothing is launched."""
    done = [line for line in lines if line["event"] == RESULT and line.get("kernels")]
    kernels = sum(line["kernels"] for line in done)
    if not kernels:
        return None
    return f"{kernels} kernels in {sum(line['seconds'] for line in done) / kernels:.2f} s each, if not kept from before"
