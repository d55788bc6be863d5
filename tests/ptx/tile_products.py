"""Running a handwritten kernel that adds the products of tiles, A_t times B_t transposed, under many schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from . import launch
from .schedule import Lockstep
from .snippet import kernel
from .test_arithmetic import bfloat, pack

PARAMS = ".param .u64 a, .param .u64 b, .param .u64 out"
DYNAMIC = ".extern .shared .align 16 .b8 dynamic[];\n"


class TileProducts(NamedTuple):
    """A ``[tiles, rows, depth]``, B ``[tiles, columns, depth]``, both bfloat16, by one block of ``threads``.

    ``written`` is the shape of what the kernel writes, ``sums`` makes the sum ``[rows, columns]`` of it.
    """

    tiles: int
    rows: int
    columns: int
    depth: int
    threads: int
    written: tuple[int, int]
    sums: Callable[[np.ndarray], np.ndarray]

    @property
    def shared(self) -> int:
        """Bytes of two buffers for a tile of A and of B."""
        return 2 * (self.rows + self.columns) * 2 * self.depth

    def correct(self, body: str, schedules: Sequence[Lockstep], shared: int | None = None) -> list[bool]:
        """For each schedule whether the result is right; what the interpreter refuses is raised."""
        rng = np.random.default_rng(0)
        a, b = (bfloat(rng.normal(size=(self.tiles, n, self.depth))) for n in (self.rows, self.columns))
        expected = np.einsum("tik,tjk->ij", a.astype(np.float64), b.astype(np.float64))
        kernels = launch.load(kernel(body, PARAMS, DYNAMIC), "tiles")
        found = []
        for schedule in schedules:
            out = np.full(self.written, np.nan, np.float32)
            arrays, size = [pack(a), pack(b), out], self.shared if shared is None else shared
            kernels.launch("snippet", (1,), (self.threads,), arrays, size, schedule)
            found.append(np.allclose(self.sums(out), expected, rtol=1e-5, atol=1e-5))
        return found
