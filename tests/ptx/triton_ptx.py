"""Triton kernels on CPU tensors: compiled for a GPU that is not there, and run by the interpreter.

    with triton_ptx.running() as launches:
        kernel[grid](tensor, 5, BLOCK=64, num_warps=4)

compiles ``kernel`` as Triton does at a launch (with the specialisations that the arguments of this call allow), has
ptxas assemble it, and runs the PTX. ``launches`` lists what ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import launch
from .arguments import Pointer
from .schedule import WARP, Lockstep

Patch = Callable[[str], str]
ARCHITECTURE = 80


@dataclasses.dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name, what was run, and how many instructions that took."""

    name: str
    ptx: str
    grid: tuple[int, ...]
    executed: int

    def count(self, pattern: str) -> int:
        """How often an instruction like ``mma.sync`` stands in the PTX; ``*`` stands for any one modifier."""
        name = re.escape(pattern).replace(r"\*", r"\w+")
        return len(re.findall(rf"^\s*(?:@\S+\s+)?{name}", self.ptx, re.M))


class AbsentGpu(DriverBase):
    """What Triton asks of a driver to compile."""

    def __init__(self, architecture: int):
        super().__init__()
        self.target = GPUTarget("cuda", architecture, WARP)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched through C++")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed")

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


def bytes_of(tensor: torch.Tensor) -> Pointer:
    """The tensor's elements in its storage, which has to hold nothing else that the kernel may not touch."""
    storage = tensor.detach().untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    return Pointer(whole.numpy(), tensor.storage_offset() * tensor.element_size())


@contextlib.contextmanager
def running(
    schedule: Callable[[], Lockstep] = Lockstep, patch: Patch | None = None, architecture: int | None = None
) -> Iterator[list[Launched]]:
    """Inside, launches of Triton kernels run in the interpreter.

    Args:
        schedule: makes the schedule of each launch.
        patch: changes the PTX before it runs, to plant a bug.
        architecture: what is compiled for, ``ARCHITECTURE`` unless given; only what ``table.py`` knows can run.
    """
    launches: list[Launched] = []
    loaded: dict[str, launch.Kernels] = {}
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return kernel
        binder = self.device_caches[driver.active.get_current_device()][-1]
        bound = binder(*args, **kwargs)[0]
        values = [value for name, value in bound.items() if kernel.src.signature[name] != "constexpr"]
        text = kernel.asm["ptx"] if patch is None else patch(kernel.asm["ptx"])
        if text not in loaded:
            loaded[text] = launch.load(text, kernel.name)
        whole_grid = tuple(grid(bound) if callable(grid) else grid)
        executed = _launch(loaded[text], kernel, whole_grid, values, schedule())
        launches.append(Launched(kernel.name, text, whole_grid, executed))
        return kernel

    before = driver._active, driver._default
    driver.set_active(AbsentGpu(architecture or ARCHITECTURE))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = compile_only
        driver._active, driver._default = before


def _launch(kernels: launch.Kernels, kernel: Any, grid: tuple[int, ...], values: list, schedule: Lockstep) -> int:
    """Tensors as addresses; the buffers that Triton keeps for itself are empty here."""
    arguments = [bytes_of(v) if isinstance(v, torch.Tensor) else v for v in values]
    own = len(kernels.find(kernel.name).params) - len(arguments)
    assert not kernel.metadata.global_scratch_size
    threads = kernel.metadata.num_warps * WARP
    return kernels.launch(kernel.name, grid, (threads,), [*arguments, *[0] * own], kernel.metadata.shared, schedule)
