"""Which kernels the interpreter of PTX executes: ``python -m tests.triton.executed`` prints a table for sm_90.

It runs what ``test_ptx.py`` runs as ``test_tiles_of_every_size``. A cell says how many compilations of the kernel were
executed for tiles of 64, 128 and 256 features; results beyond their tolerance follow, and make the status 1. Two small
kernels, of a total and of numbers that travel to a GPU, know no features and are executed by other tests there.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

import pytest
import torch

from tests.ptx import triton_ptx

from .ptx_cases import PRECISIONS, SIZES, TARGETS, compared, compile_for, jit_functions, of_size, wrong

Executed = dict[str, dict[tuple[str, int], set[str]]]  # by kernel, precision and D: the texts that ran


def execute(precisions: list[str]) -> tuple[Executed, list[str]]:
    """What ran, and what was wrong."""
    executed: Executed = defaultdict(lambda: defaultdict(set))
    misses = []
    for precision in precisions:
        for D in SIZES:
            for case in of_size(D):
                with triton_ptx.running() as launches:
                    results = compared(case, precision)
                misses += [f"{case.name} in {precision}, D = {D}: {result}" for result in wrong(results)]
                for launch in launches:
                    executed[launch.name][precision, D].add(launch.ptx)
            print(f"{precision}, D = {D}", file=sys.stderr, flush=True)
    return executed, misses


def table(executed: Executed, precisions: list[str]) -> str:
    """Markdown, a row for every kernel there is."""
    lines = ["| kernel | " + " | ".join(precisions) + " |", "|---" * (1 + len(precisions)) + "|"]
    for kernel in sorted(name for name in jit_functions() if name.endswith("_kernel")):
        counts = [" / ".join(str(len(executed[kernel][p, D])) for D in SIZES) for p in precisions]
        lines.append(f"| `{kernel}` | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        compile_for(TARGETS[options.target], monkeypatch)
        executed, misses = execute(options.precisions)
    print("\n".join([table(executed, options.precisions), *misses]))
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()
