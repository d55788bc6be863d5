"""What Triton would compile, counted on the fake device: ``python -m tests.fake_cuda.counting``.

The command runs the steps of ``make gpu-check`` that launch Triton kernels, all of their tasks, without compiling one,
and prints how many different kernels each step asks for that no step before it did. It takes minutes.
``benchmarks/gpu_check/reckoned.py`` keeps the numbers.

Not among them: kernels of the numerical gradients of verify that no case has, and what Inductor makes or compiles
(``torch.compile``), which needs a GPU that is there.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

STEPS = ("environment", "warm", "smoke", "verify", "device_tests")
OPERATORS = {  # by module of the package: what the backend implements there
    "contrast": ("contrast", "contrast_backward", "repulsion"),
    "cacr": ("cacr",),
    "detached_keys": ("detached_keys",),
}
_kernels: dict[str, SimpleNamespace] = {}


# ---- in the process that is counted ----------------------------------------------------------------------------------
def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """In the place of ``JITFunction.run``."""
    import torch

    _, specialization, options = self.device_caches[torch.cuda.current_device()][-1](*args, **kwargs)
    key = hashlib.sha256(f"{self.__name__} {specialization} {options}".encode()).hexdigest()
    if key not in _kernels:
        _kernels[key] = SimpleNamespace(name=self.__name__, n_spills=0)
        write(self.__name__, key)
    return _kernels[key]


def write(kernel: str, key: str) -> None:
    """A line of the file that all processes share."""
    step = sys.argv[1] if len(sys.argv) > 1 else ""
    file = os.open(os.environ["FAKE_CUDA_COUNT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps({"step": step, "kernel": kernel, "key": key}) + "\n").encode())
    finally:
        os.close(file)


def computes_on_the_host(module: ModuleType) -> None:
    """The launches of a module of the backend are counted, and its operators give what those of the CPU do."""
    for name in OPERATORS[module.__name__.rpartition(".")[2]]:
        setattr(module, name, _counted(name, getattr(module, name)))


def _counted(name: str, launches: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch import Tensor

    from . import aten

    half = (torch.float16, torch.bfloat16)

    @functools.wraps(launches)
    def both(*arguments: Any) -> Any:
        like = launches(*arguments)
        operator = aten.on_device(getattr(torch.ops.cacr_kernels, f"{name}_cpu").default)
        given = (x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in arguments)
        return tuple(x.to(y.dtype) for x, y in zip(operator(*given), like, strict=True))

    return both


def run(context: Any) -> None:
    """The step that verifies, without what is expected: every case in every dtype is computed once."""
    from functools import partial

    from benchmarks.gpu_check import child, warm
    from cacr_kernels import testing
    from cacr_kernels.verify import DTYPES

    cases = ((case, dtype) for case in testing.cases() for dtype in DTYPES)
    child.run(context, (child.Task(f"{d} {c.name}", partial(warm.compile_case, [], c, d)) for c, d in cases), 1000)


# ---- the command -----------------------------------------------------------------------------------------------------
def counted(folder: Path, steps: tuple[str, ...] = STEPS) -> dict[str, collections.Counter[str]]:
    """By step, in their order: how often each kernel is compiled there and in no step before."""
    from benchmarks.gpu_check import __main__ as check
    from benchmarks.gpu_check.steps import STEPS as ALL

    from .building import environment

    file = folder / "kernels"
    os.environ.update(environment(FAKE_CUDA_TRITON="count", FAKE_CUDA_COUNT=str(file), CACR_SELF_CHECK="0"))
    chosen = tuple(step for step in ALL if step.name in steps)
    chosen = tuple(step._replace(module=__spec__.name) if step.name == "verify" else step for step in chosen)
    if status := check.main(["--out", str(folder), "--minutes", "900"], chosen):
        raise SystemExit(f"the check ended with status {status}: {folder}/report.md")
    return by_step([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])


def by_step(lines: list[dict[str, str]]) -> dict[str, collections.Counter[str]]:
    seen: set[str] = set()
    found: dict[str, collections.Counter[str]] = {}
    for step in STEPS:
        kernels = {line["key"]: line["kernel"] for line in lines if line["step"] == step and line["key"] not in seen}
        seen |= kernels.keys()
        found[step] = collections.Counter(kernels.values())
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = counted(Path(folder), tuple(sys.argv[1:]) or STEPS)
    for step, kernels in found.items():
        if kernels:
            each = ", ".join(f"{count} {name.removesuffix('_kernel')}" for name, count in kernels.most_common())
            print(f"{step}: {kernels.total()} ({each})")
    print(f"all: {sum(kernels.total() for kernels in found.values())}")


if __name__ == "__main__":
    main()
