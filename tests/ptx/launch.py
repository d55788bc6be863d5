"""Launching: arguments to parameter bytes, arrays to buffers, the grid to waves of resident blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from .errors import PtxError
from .formats import FLOATS, bits_type
from .machine import Machine
from .memory import Global
from .schedule import WARP, Lockstep
from .syntax import Function, Module, Variable, parse

LANES_AT_ONCE = 2048  # more lanes side by side do not make numpy faster
WORKSPACE_BYTES = 64
Scalar: TypeAlias = "int | float | np.generic"


@dataclass(frozen=True)
class Pointer:
    """An address ``offset`` bytes into an array."""

    array: np.ndarray
    offset: int = 0


@dataclass(frozen=True)
class Struct:
    """A parameter passed by value: ``("u64", array), ("s32", 5), …``, laid out as C does; nests."""

    fields: Sequence[tuple[str, Argument]]


Argument: TypeAlias = "np.ndarray | Pointer | Struct | Scalar | bytes"


def load(text: str, source: str = "ptx") -> Kernels:
    """Read a PTX text; ``source`` is its name in messages."""
    return Kernels(parse(text, source))


class Kernels:
    """The kernels of one PTX text."""

    def __init__(self, module: Module):
        self.module = module

    @property
    def names(self) -> list[str]:
        return [name for name, function in self.module.functions.items() if function.entry]

    def find(self, name: str) -> Function:
        """The kernel of this name, or the only one whose (mangled) name contains it."""
        found = [name] if name in self.names else [full for full in self.names if name in full]
        if len(found) != 1:
            raise PtxError(f"{len(found)} kernels of {self.module.source} match {name!r}: {self.names}")
        return self.module.functions[found[0]]

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        shared_bytes: int = 0,
        schedule: Lockstep | None = None,
        cooperative: bool = False,
        resident: int | None = None,
        limit: int = 50_000_000,
    ) -> int:
        """Run a kernel on arrays, which are read and written in place; returns how many instructions were executed.

        Args:
            name: the kernel, or a part of its name that only it has.
            grid, block: up to three numbers each.
            args: one per parameter. An array is passed as its address, every other array is out of bounds.
            shared_bytes: dynamic shared memory.
            schedule: ``Lockstep()`` unless given.
            cooperative: all blocks are resident, and a workspace for cooperative groups is there.
            resident: how many blocks run side by side, interleaved; by default as many as make 2048 threads.
            limit: executed instructions after which a launch that does not end is given up.
        """
        launch = Launch(_triple(grid), _triple(block), shared_bytes, schedule or Lockstep(), cooperative, limit)
        kernel = self.find(name)
        launch.marshal(kernel, args)
        total = int(np.prod(launch.grid))
        threads = -(-int(np.prod(launch.block)) // WARP) * WARP
        at_once = total if cooperative else min(total, resident or max(1, LANES_AT_ONCE // threads))
        if at_once == 0 or threads == 0:
            raise PtxError("an empty grid or block", kernel.place)
        machine = Machine(self.module, kernel, launch, at_once)
        numbers = list(range(total))
        if type(launch.schedule) is not Lockstep:
            launch.schedule.rng.shuffle(numbers)
        for start in range(0, total, at_once):
            machine.run(numbers[start : start + at_once])
        return machine.executed


@dataclass
class Launch:
    """What is the same for all blocks of a launch."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    schedule: Lockstep
    cooperative: bool
    limit: int
    memory: Global = field(default_factory=Global)
    params: bytes = b""
    param_offsets: list[int] = field(default_factory=list)
    workspace: int = 0
    known: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cooperative:
            self.workspace = self.memory.add("the workspace of the grid", np.zeros(WORKSPACE_BYTES, np.uint8))

    def variable(self, variable: Variable) -> int:
        """Address of a variable of the module in global or constant memory."""
        content = np.frombuffer(variable.content.ljust(variable.size or 0, b"\0"), np.uint8).copy()
        return self.memory.add(variable.name, content)

    def marshal(self, kernel: Function, args: Sequence[Argument]) -> None:
        """Lay the arguments out as the parameters of the kernel."""
        if len(args) != len(kernel.params):
            raise PtxError(f"{len(kernel.params)} parameters, {len(args)} arguments", kernel.place)
        packed = bytearray()
        for number, (variable, value) in enumerate(zip(kernel.params, args, strict=True)):
            packed += bytes(-len(packed) % variable.align)
            self.param_offsets.append(len(packed))
            size = variable.size or 0
            content = self._bytes(f"argument {number}", value, size)
            if len(content) != size:
                message = f"parameter {number} has {size} bytes, its argument {len(content)}"
                raise PtxError(message, kernel.place)
            packed += content
        self.params = bytes(packed)

    def address(self, name: str, array: np.ndarray) -> int:
        """An array passed twice is one buffer."""
        key = id(array)
        if key not in self.known:
            self.known[key] = self.memory.add(name, array)
        return self.known[key]

    def _bytes(self, name: str, value: Argument, size: int) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, Struct):
            return self._struct(name, value)[0]
        if isinstance(value, Pointer):
            return (self.address(name, value.array) + value.offset).to_bytes(8, "little")
        if isinstance(value, np.ndarray) and value.ndim:
            return self.address(name, value).to_bytes(8, "little")
        if isinstance(value, float | np.floating):
            return np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
        return (int(value) % (1 << 8 * size)).to_bytes(size, "little")

    def _struct(self, name: str, value: Struct) -> tuple[bytes, int]:
        """Bytes and alignment."""
        packed, widest = bytearray(), 1
        for number, (kind, item) in enumerate(value.fields):
            inner = f"{name}.{number}"
            if isinstance(item, Struct):
                content, align = self._struct(inner, item)
            else:
                align = np.dtype(FLOATS.get(kind, bits_type(kind))).itemsize
                content = self._bytes(inner, item, align)
            packed += bytes(-len(packed) % align) + content
            widest = max(widest, align)
        return bytes(packed + bytes(-len(packed) % widest)), widest


def _triple(extent: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(n) for n in extent), 1, 1, 1)[:3]
    return x, y, z
