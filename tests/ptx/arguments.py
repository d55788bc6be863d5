"""The arguments of a launch as the bytes of the kernel's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .errors import PtxError
from .formats import FLOATS, bits_type
from .memory import Global
from .syntax import Function

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


@dataclass(frozen=True)
class Image:
    """A struct as the host filled it in: words that are addresses of one of the ``arrays`` are translated."""

    content: bytes
    arrays: Sequence[np.ndarray]


Argument: TypeAlias = "np.ndarray | Pointer | Struct | Image | Scalar | bytes"


def offsets(kernel: Function) -> tuple[list[int], int]:
    """Where each parameter starts, and the size of all."""
    starts, end = [], 0
    for variable in kernel.params:
        starts.append(-(-end // variable.align) * variable.align)
        end = starts[-1] + (variable.size or 0)
    return starts, end


def pack(kernel: Function, args: Sequence[Argument], memory: Global) -> bytes:
    """Parameter bytes; the arrays among the arguments become buffers, one that is passed twice the same one."""
    if len(args) != len(kernel.params):
        raise PtxError(f"{len(kernel.params)} parameters, {len(args)} arguments", kernel.place)
    starts, end = offsets(kernel)
    packed, packer = bytearray(end), _Packer(memory)
    for number, (variable, value, start) in enumerate(zip(kernel.params, args, starts, strict=True)):
        content = packer.bytes_of(f"argument {number}", value, variable.size or 0)
        if len(content) != variable.size:
            message = f"parameter {number} has {variable.size} bytes, its argument {len(content)}"
            raise PtxError(message, kernel.place)
        packed[start : start + len(content)] = content
    return bytes(packed)


class _Packer:
    def __init__(self, memory: Global):
        self.memory = memory
        self.known: dict[tuple[int, int], int] = {}  # address and size of an array -> address of its buffer

    def address(self, name: str, array: np.ndarray) -> int:
        key = array.__array_interface__["data"][0], array.nbytes
        if key not in self.known:
            self.known[key] = self.memory.add(name, array)
        return self.known[key]

    def bytes_of(self, name: str, value: Argument, size: int) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, Struct):
            return self.struct(name, value)[0]
        if isinstance(value, Image):
            return self.image(name, value)
        if isinstance(value, Pointer):
            return (self.address(name, value.array) + value.offset).to_bytes(8, "little")
        if isinstance(value, np.ndarray) and value.ndim:
            return self.address(name, value).to_bytes(8, "little")
        if isinstance(value, float | np.floating):
            return np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
        return (int(value) % (1 << 8 * size)).to_bytes(size, "little")

    def image(self, name: str, value: Image) -> bytes:
        words = np.frombuffer(value.content.ljust(-(-len(value.content) // 8) * 8, b"\0"), np.uint64).copy()
        for number, array in enumerate(value.arrays):
            address = self.address(f"{name}, array {number}", array)
            offset = words - np.uint64(array.__array_interface__["data"][0])
            words = np.where(offset < array.nbytes, offset + np.uint64(address), words)
        return words.tobytes()[: len(value.content)]

    def struct(self, name: str, value: Struct) -> tuple[bytes, int]:
        """The bytes of a struct and the alignment that its widest member asks for."""
        packed, widest = bytearray(), 1
        for number, (kind, item) in enumerate(value.fields):
            inner = f"{name}.{number}"
            if isinstance(item, Struct):
                content, align = self.struct(inner, item)
            else:
                align = np.dtype(FLOATS.get(kind, bits_type(kind))).itemsize
                content = self.bytes_of(inner, item, align)
            packed += bytes(-len(packed) % align) + content
            widest = max(widest, align)
        return bytes(packed + bytes(-len(packed) % widest)), widest
