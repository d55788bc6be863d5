"""State spaces with bounds: global buffers, and one row per block (shared) or thread (local) for the others.

Addresses are 64 bits wide. The top four bits of a *generic* address name the space, global is 0. Every global buffer
starts in a range of its own of 2^36 bytes, so that an offset computed in 32 bits, or an index past the end of a buffer,
never lands in another one. Buffers are the caller's arrays themselves: nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import AccessError
from .formats import Array

if TYPE_CHECKING:
    from .proxies import Proxies

Addresses = NDArray[np.uint64]
Lanes = slice | NDArray[np.intp]

SPACES = ("global", "shared", "local", "param")
WINDOW_SHIFT = 60
SLOT_SHIFT = 36
POISON = 0xFF  # NaN in every float format, -1 in every integer


def window(space: str) -> int:
    """What ``cvta`` adds to an address of a space."""
    return SPACES.index(space) << WINDOW_SHIFT


class Space(Protocol):
    """One state space: typed reads and writes of ``count`` neighbours at the addresses of some lanes."""

    def read(self, address: Addresses, lanes: Lanes, kind: np.dtype, count: int = 1) -> Array:
        """Reads values of shape ``[count, lanes]``."""

    def write(self, address: Addresses, lanes: Lanes, values: Array) -> None:
        """Stores values of shape ``[count, lanes]``."""


def _check_alignment(address: Addresses, lanes: Lanes, width: int) -> None:
    wrong = address & np.uint64(width - 1)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise AccessError(f"address {int(address[at]):#x} is not aligned to {width} bytes", lane_at(lanes, at))


def lane_at(lanes: Lanes, position: int) -> int:
    return position if isinstance(lanes, slice) else int(lanes[position])


class Buffer:
    """The bytes of one array at one address."""

    def __init__(self, name: str, array: np.ndarray, base: int):
        self.name = name
        self.base = base
        self.data = array.reshape(-1).view(np.uint8)
        self.views: dict[np.dtype, np.ndarray] = {}

    def view(self, kind: np.dtype) -> np.ndarray:
        if kind not in self.views:
            whole = self.data[: self.data.size // kind.itemsize * kind.itemsize]
            self.views[kind] = whole.view(kind)
        return self.views[kind]


class Global:
    """The arrays a kernel may touch."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.initial: list[np.ndarray] = []  # contents of the buffers that stay from launch to launch

    def keep(self) -> None:
        """All buffers there are now stay, and begin every launch with what they hold."""
        self.initial = [buffer.data.copy() for buffer in self.buffers]

    def reset(self) -> None:
        """Forget the arrays of the last launch."""
        del self.buffers[len(self.initial) :]
        for buffer, content in zip(self.buffers, self.initial, strict=True):
            buffer.data[:] = content

    def add(self, name: str, array: np.ndarray) -> int:
        """Register an array, return its address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: a contiguous array is needed, pass the storage of a strided one")
        base = (len(self.buffers) + 1) << SLOT_SHIFT
        self.buffers.append(Buffer(name, array, base))
        return base

    def parts(self, address: Addresses, lanes: Lanes, width: int) -> list[tuple[Buffer, Lanes]]:
        """The buffers that are accessed, with the positions that access them; an error if one is out of bounds."""
        slots = address >> np.uint64(SLOT_SHIFT)
        first = int(slots[0])
        if (slots == slots[0]).all():
            found = [(first, slice(None))]
        else:
            found = [(int(slot), np.flatnonzero(slots == slot)) for slot in np.unique(slots)]
        parts = []
        for slot, positions in found:
            inside = address[positions]
            if not 0 < slot <= len(self.buffers):
                where = lane_at(lanes, lane_at(positions, 0))
                raise AccessError(f"global address {int(inside[0]):#x} is in no buffer", where)
            buffer = self.buffers[slot - 1]
            offset = inside - np.uint64(buffer.base)
            beyond = offset.astype(np.int64) > buffer.data.size - width
            if beyond.any():
                at = int(np.flatnonzero(beyond)[0])
                raise AccessError(
                    f"out of bounds: {width} bytes at offset {int(offset[at])} of {buffer.name}, "
                    f"which has {buffer.data.size} bytes",
                    lane_at(lanes, lane_at(positions, at)),
                )
            parts.append((buffer, positions))
        return parts

    def read(self, address: Addresses, lanes: Lanes, kind: np.dtype, count: int = 1) -> Array:
        width = kind.itemsize * count
        _check_alignment(address, lanes, width)
        parts = self.parts(address, lanes, width)
        found = np.empty((count, address.size), kind)
        for buffer, positions in parts:
            index = (address[positions] - np.uint64(buffer.base)) // np.uint64(kind.itemsize)
            for i in range(count):
                found[i, positions] = buffer.view(kind)[index + np.uint64(i)]
        return found

    def write(self, address: Addresses, lanes: Lanes, values: Array) -> None:
        count, kind = len(values), values.dtype
        width = kind.itemsize * count
        _check_alignment(address, lanes, width)
        for buffer, positions in self.parts(address, lanes, width):
            index = (address[positions] - np.uint64(buffer.base)) // np.uint64(kind.itemsize)
            for i in range(count):
                buffer.view(kind)[index + np.uint64(i)] = values[i, positions]


class Banked:
    """A space of which every block or thread has its own copy: ``rows[lane]`` is the copy a lane sees."""

    def __init__(self, name: str, count: int, size: int, rows: NDArray[np.intp], base: int = 0):
        self.name, self.size, self.base = name, size, base
        self.stride = -(-size // 16) * 16
        self.data = np.full(count * self.stride, POISON, np.uint8)
        self.proxies: Proxies | None = None
        self.starts = rows.astype(np.uint64) * np.uint64(self.stride)

    def reset(self) -> None:
        self.data.fill(POISON)

    def index(self, address: Addresses, lanes: Lanes, kind: np.dtype, count: int) -> NDArray[np.uint64]:
        """Where the first of ``count`` neighbours is in ``data`` seen as ``kind``."""
        width = kind.itemsize * count
        _check_alignment(address, lanes, width)
        offset = address - np.uint64(self.base)
        beyond = offset.astype(np.int64) > self.size - width
        beyond |= address < np.uint64(self.base)
        if beyond.any():
            at = int(np.flatnonzero(beyond)[0])
            raise AccessError(
                f"out of bounds: {width} bytes at offset {int(offset[at].astype(np.int64))} of {self.name} memory, "
                f"which has {self.size} bytes",
                lane_at(lanes, at),
            )
        return (self.starts[lanes] + offset) // np.uint64(kind.itemsize)

    def read(self, address: Addresses, lanes: Lanes, kind: np.dtype, count: int = 1) -> Array:
        index = self.index(address, lanes, kind, count)
        data = self.data.view(kind)
        return np.stack([data[index + np.uint64(i)] for i in range(count)])

    def write(self, address: Addresses, lanes: Lanes, values: Array) -> None:
        index = self.index(address, lanes, values.dtype, len(values))
        data = self.data.view(values.dtype)
        for i, value in enumerate(values):
            data[index + np.uint64(i)] = value
        if self.proxies is not None:
            size = values.dtype.itemsize
            self.proxies.written(self.proxies.words(index * np.uint64(size), len(values) * size), lanes)


class Generic:
    """Addresses without a state space: the window says which one is meant."""

    def __init__(self, spaces: dict[str, Space]):
        self.spaces = spaces

    def parts(self, address: Addresses, lanes: Lanes) -> list[tuple[Space, Addresses, Lanes, Lanes]]:
        windows = address >> np.uint64(WINDOW_SHIFT)
        parts = []
        for number in np.unique(windows):
            if number >= len(SPACES):
                at = int(np.flatnonzero(windows == number)[0])
                raise AccessError(f"address {int(address[at]):#x} is in no state space", lane_at(lanes, at))
            positions = np.flatnonzero(windows == number)
            chosen = positions if isinstance(lanes, slice) else lanes[positions]
            inside = address[positions] & np.uint64((1 << WINDOW_SHIFT) - 1)
            parts.append((self.spaces[SPACES[int(number)]], inside, chosen, positions))
        return parts

    def read(self, address: Addresses, lanes: Lanes, kind: np.dtype, count: int = 1) -> Array:
        found = np.empty((count, address.size), kind)
        for space, inside, chosen, positions in self.parts(address, lanes):
            found[:, positions] = space.read(inside, chosen, kind, count)
        return found

    def write(self, address: Addresses, lanes: Lanes, values: Array) -> None:
        for space, inside, chosen, positions in self.parts(address, lanes):
            space.write(inside, chosen, values[:, positions])
