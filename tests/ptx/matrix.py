"""Matrices held by a warp: ``ldmatrix``, ``stmatrix`` and ``mma``, with the fragment layouts of the PTX ISA.

tf32 operands are float32 registers whose lower 13 bits are not read. How sums are formed: ``tensor_cores.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import AccessError
from .formats import Array, bits_type, decode, encode, tf32_operand
from .schedule import WARP
from .site import Action, Mask, Site
from .tensor_cores import multiply_add

LANE = np.arange(WARP)
GROUP, IN_GROUP = LANE // 4, LANE % 4
ROW_BYTES = 16  # of an 8 x 8 matrix of 16-bit elements


def whole_warps(site: Site, mask: Mask) -> NDArray[np.intp]:
    """Numbers of the warps that take part, each of them whole."""
    if mask is True:
        return np.arange(site.machine.size // WARP)
    by_warp = mask.reshape(-1, WARP)
    partial = by_warp.any(1) & ~by_warp.all(1)
    if partial.any():
        lane = int(np.argmax(partial)) * WARP + int(by_warp[np.argmax(partial)].argmax())
        raise AccessError("needs all threads of the warp", lane)
    return np.flatnonzero(by_warp.any(1))


def lanes_of(warps: NDArray[np.intp]) -> NDArray[np.intp]:
    return (warps[:, None] * WARP + LANE).ravel()


# ---- ldmatrix and stmatrix -------------------------------------------------------------------------------------------
def _count(site: Site, which: int) -> int:
    """How many 8 x 8 matrices; each has a register of the operand."""
    count = {"x1": 1, "x2": 2, "x4": 4}[site.one_of("x1", "x2", "x4", default="x1")]
    if len(site.items(which)) != count:
        raise site.error(f"{count} registers are wanted")
    return count


def ldmatrix(site: Site) -> Action:
    """Up to four 8 x 8 matrices; thread ``8 i + r`` gives the address of row ``r`` of matrix ``i``."""
    count = _count(site, 0)
    address, shared = site.address(1, "shared"), site.machine.shared
    registers = [site.load_register(item, "b32") for item in site.items(0)]
    transposed = site.has("trans")

    def action(mask: Mask) -> None:
        warps = whole_warps(site, mask)
        rows = (warps[:, None] * WARP + LANE[: 8 * count]).ravel()
        words = shared.read(address(rows), rows, np.dtype(np.uint32), ROW_BYTES // 4)  # [word, row]
        matrices = np.ascontiguousarray(words.T).reshape(warps.size, count, 8, 4)
        if transposed:
            halves = matrices.view(np.uint16).swapaxes(-1, -2)  # [warp, matrix, 8, 8]
            matrices = np.ascontiguousarray(halves).view(np.uint32)
        lanes = lanes_of(warps)
        for i, register in enumerate(registers):
            register[lanes] = matrices[:, i].reshape(-1)  # thread l holds word l % 4 of row l // 4

    return action


def stmatrix(site: Site) -> Action:
    """The way back of ``ldmatrix``."""
    count = _count(site, 1)
    address, shared = site.address(0, "shared"), site.machine.shared
    sources, transposed = site.sources(1, "b32"), site.has("trans")

    def action(mask: Mask) -> None:
        warps = whole_warps(site, mask)
        rows = (warps[:, None] * WARP + LANE[: 8 * count]).ravel()
        held = np.stack([source().reshape(-1, WARP)[warps] for source in sources], 1)
        matrices = held.reshape(warps.size, count, 8, 4)
        if transposed:
            halves = matrices.view(np.uint16).swapaxes(-1, -2)
            matrices = np.ascontiguousarray(halves).view(np.uint32)
        shared.write(address(rows), rows, np.ascontiguousarray(matrices.reshape(-1, 4).T))

    return action


# ---- mma -------------------------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """Where the elements of a fragment are in its matrix; each array ``[register, lane, element of the register]``."""

    rows: int
    columns: int
    row: NDArray[np.intp]
    column: NDArray[np.intp]

    @property
    def registers(self) -> int:
        return len(self.row)

    def order(self) -> NDArray[np.intp]:
        """For each element of the matrix its position among ``[register, lane, element]``."""
        order = np.empty(self.rows * self.columns, np.intp)
        order[(self.row * self.columns + self.column).ravel()] = np.arange(order.size)
        return order


def _layout(
    rows: int, columns: int, registers: int, elements: int, position: Callable[[int, int], tuple[Array, Array]]
) -> Layout:
    """From ``position(register, element) -> rows and columns of the lanes``."""
    both = np.array(
        [[position(r, e) for e in range(elements)] for r in range(registers)]
    )  # [register, element, 2, lane]
    row, column = both[:, :, 0].swapaxes(1, 2), both[:, :, 1].swapaxes(1, 2)
    return Layout(rows, columns, row, column)


def left(depth: int, per_register: int) -> Layout:
    """A of ``m16``: registers alternate between the upper and the lower eight rows, then go on along k."""
    step = 4 * per_register
    return _layout(
        16,
        depth,
        16 * depth // (WARP * per_register),
        per_register,
        lambda r, e: (GROUP + 8 * (r % 2), IN_GROUP * per_register + e + step * (r // 2)),
    )


def _right(depth: int, per_register: int) -> Layout:
    """B of ``n8``: registers go along k."""
    step = 4 * per_register
    return _layout(
        depth,
        8,
        8 * depth // (WARP * per_register),
        per_register,
        lambda r, e: (IN_GROUP * per_register + e + step * r, GROUP),
    )


def result(per_register: int, columns: int = 8) -> Layout:
    """C and D of 16 rows: two neighbours of a row, in the upper and then in the lower eight rows; then on along n."""
    if per_register == SINGLE:
        place = lambda r, e: (GROUP + 8 * (r % 4 // 2), IN_GROUP * 2 + r % 2 + 8 * (r // 4))  # noqa: E731
        return _layout(16, columns, columns // 2, 1, place)
    return _layout(16, 8, 2, 2, lambda r, e: (GROUP + 8 * r, IN_GROUP * 2 + e))


def _tiny(which: str) -> Layout:
    """``m8n8k4`` of float64: one element of A and B, two of C."""
    if which == "a":
        return _layout(8, 4, 1, 1, lambda r, e: (GROUP, IN_GROUP))
    if which == "b":
        return _layout(4, 8, 1, 1, lambda r, e: (IN_GROUP, GROUP))
    return _layout(8, 8, 2, 1, lambda r, e: (GROUP, IN_GROUP * 2 + r))


HALVES, SINGLE = 2, 1
SHAPES: dict[tuple[str, str], tuple[Layout, Layout]] = {
    **{(f"m16n8k{k}", kind): (left(k, HALVES), _right(k, HALVES)) for k in (8, 16) for kind in ("f16", "bf16")},
    **{(f"m16n8k{k}", "tf32"): (left(k, SINGLE), _right(k, SINGLE)) for k in (4, 8)},
    **{(f"m16n8k{k}", "f64"): (left(k, SINGLE), _right(k, SINGLE)) for k in (4, 8, 16)},
    ("m8n8k4", "f64"): (_tiny("a"), _tiny("b")),
}


def mma(site: Site) -> Action:
    """``mma.sync.aligned.shape.row.col.d.a.b.c D, A, B, C``: ``D = A B + C``."""
    shape = next((m for m in site.modifiers if m.startswith("m") and m[1].isdigit()), "")
    if len(site.types) != 4:
        raise site.error("mma needs four types")
    to, kind, other, start = site.types
    site.refuse((shape, kind) not in SHAPES or other != kind or start != to, f"{shape} of {'.'.join(site.types)}")
    site.refuse(to not in (("f64",) if kind == "f64" else ("f32", "f16")), f"mma to .{to}")
    of_a, of_b = SHAPES[shape, kind]
    of_c = _tiny("c") if shape == "m8n8k4" else result(HALVES if to == "f16" else SINGLE)
    a, b = _fragment(site, 1, of_a, kind), _fragment(site, 2, of_b, kind)
    c = _fragment(site, 3, of_c, to)
    store = _store(site, of_c, to)

    def action(mask: Mask) -> None:
        warps = whole_warps(site, mask)
        store(multiply_add(a(warps), b(warps), c(warps), kind, to), warps)

    return action


def _fragment(site: Site, which: int, layout: Layout, kind: str) -> Callable[[NDArray[np.intp]], Array]:
    """Reads a matrix as float64, shape ``[warp, row, column]``."""
    sources = site.sources(which, "b64" if kind == "f64" else "b32")
    if len(sources) != layout.registers:
        raise site.error(f"{layout.registers} registers are wanted for operand {which}, not {len(sources)}")

    def read(warps: NDArray[np.intp]) -> Array:
        return assemble(np.stack([source().reshape(-1, WARP)[warps] for source in sources], 1), layout, kind)

    return read


def assemble(bits: Array, layout: Layout, kind: str) -> Array:
    """Matrices in float64 ``[warp, row, column]`` from registers ``[warp, register, lane]``."""
    count = len(bits)
    elements = np.ascontiguousarray(bits.reshape(count, -1)).view(bits_type(kind))
    values = values_of(elements, kind).astype(np.float64)
    return values[:, layout.order()].reshape(count, layout.rows, layout.columns)


def values_of(bits: Array, kind: str) -> Array:
    """What a product sees of these bits."""
    return tf32_operand(bits.view(np.float32)) if kind == "tf32" else decode(bits, kind)


def _store(site: Site, layout: Layout, kind: str) -> Callable[[Array, NDArray[np.intp]], None]:
    registers = [site.load_register(item, "b64" if kind == "f64" else "b32") for item in site.items(0)]
    if len(registers) != layout.registers:
        raise site.error(f"{layout.registers} registers are wanted for the result")
    position = layout.row * layout.columns + layout.column  # [register, lane, element]

    def write(values: Array, warps: NDArray[np.intp]) -> None:
        flat = values.reshape(warps.size, -1)[:, position]  # [warp, register, lane, element]
        bits = np.ascontiguousarray(encode(flat, kind)).view(registers[0].dtype)[..., 0]
        lanes = lanes_of(warps)
        for i, register in enumerate(registers):
            register[lanes] = bits[:, i].ravel()

    return write
