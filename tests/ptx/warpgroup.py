"""``wgmma``: products by four warps that go on behind their backs, as the PTX ISA has them for sm_90.

Every warp forms its 16 rows of the product by itself, in its own time: nothing in ``wgmma`` makes warps wait for each
other. From the instruction to the ``wait_group`` that covers it

- the registers of the sum hold NaN, and what is written to them is lost;
- the operands are read at some moment, by a coin of the schedule the first or the last one: shared memory through the
  async proxy (``proxies.py``), and the registers of A;
- further products may add to the same sum; they are formed in the order in which they were issued.

Found, as an error: a register that was used since the last ``wgmma.fence``, by an ordinary instruction or in a product
of another shape; four warps that do not execute the same; descriptors that differ among threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import descriptor
from .errors import AccessError, PtxError
from .formats import Array, bits_type, encode
from .matrix import HALVES, SINGLE, assemble, lanes_of, left, result, values_of, whole_warps
from .schedule import WARP
from .site import Action, Mask, Site
from .syntax import WIDTHS, Function, Instruction, Register, Vector, registers_in
from .tensor_cores import multiply_add

if TYPE_CHECKING:
    from .machine import Machine

Warps = NDArray[np.intp]
ROWS, GROUP = 64, 4  # rows of a product, warps of a warpgroup
ROWS_OF_WARP = ROWS // GROUP
DEPTHS = {"f16": 16, "bf16": 16, "tf32": 8}
SHAPES = " ".join(f"m{ROWS}n{n}k{k}" for n in range(8, 257, 8) for k in sorted(set(DEPTHS.values())))
POISON = np.uint32(0xFFFFFFFF)
FENCED, USED = 0, 1  # what happened to a register since the last fence; beyond: it is the sum of products of a shape
FIRST_SHAPE = 2


def fragments(functions: list[Function]) -> list[tuple[str, str]]:
    """Function and name of all registers that hold sums or A."""
    found = {}
    for function in functions:
        for instruction in function.code:
            if instruction.opcode == "wgmma" and "mma_async" in instruction.modifiers:
                vectors = [operand for operand in instruction.operands[:2] if isinstance(operand, Vector)]
                names = [item.name for v in vectors for item in v.items if isinstance(item, Register)]
                found.update(dict.fromkeys((function.name, name) for name in names))
    return list(found)


# ---- one instruction of the code -------------------------------------------------------------------------------------
class Product:
    """The operands of one ``wgmma.mma_async``: ``D = A B + D`` or ``D = A B``."""

    def __init__(self, site: Site):
        self.machine = site.machine
        self.groups = site.machine.warpgroups
        self.shape = next((m for m in site.modifiers if m in SHAPES.split()), "")
        site.refuse(not self.shape or len(site.types) != 3, f"wgmma {'.'.join(site.modifiers)}")
        to, self.kind, other = site.types
        site.refuse(to != "f32" or other != self.kind or self.kind not in DEPTHS, ".".join(site.types))
        self.columns, self.depth = (int(x) for x in self.shape[1:].replace("n", " ").replace("k", " ").split()[1:])
        site.refuse(self.depth != DEPTHS[self.kind], f"{self.shape} of {self.kind}")
        self.result = result(SINGLE, self.columns)
        self.rows = self._registers(site, 0, self.result.registers)
        self.by_registers = isinstance(site.operands[1], Vector)
        per_register = SINGLE if self.kind == "tf32" else HALVES
        self.left = left(self.depth, per_register)
        self.left_rows = self._registers(site, 1, self.left.registers) if self.by_registers else self.rows[:0]
        turns = self._constants(site)
        self.transposed = (False, *turns) if self.by_registers else turns

    def _registers(self, site: Site, which: int, count: int) -> NDArray[np.intp]:
        """Rows of the table of fragments."""
        items = site.items(which)
        if len(items) != count:
            raise site.error(f"{count} registers are wanted for operand {which}, not {len(items)}")
        for item in items:
            site.load_register(item, "b32")
        rows = [self.groups.row[site.function.name, item.name] for item in items if isinstance(item, Register)]
        if len(set(rows)) != count:
            raise site.error(f"a register stands twice in operand {which}")
        return np.array(rows)

    def _constants(self, site: Site) -> tuple[bool, ...]:
        """Signs of A and B; whether A (where it is in shared memory) and B are transposed."""
        matrices = 1 if self.by_registers else 2
        turned = 0 if self.kind == "tf32" else matrices
        if len(site.operands) != 6 + turned:
            raise site.error(f"{6 + turned} operands are wanted, not {len(site.operands)}")
        self.signs = site.integer(4), site.integer(5)
        turns = [site.integer(6 + i) for i in range(turned)] or [0] * matrices
        if not set(self.signs) <= {1, -1} or not set(turns) <= {0, 1}:
            raise site.error("signs are 1 or -1, the other constants 0 or 1")
        return tuple(map(bool, turns))

    def places(self, which: int, descriptors: NDArray[np.uint64], warps: Warps) -> NDArray[np.intp]:
        """``[warp, line, k]``: where the elements of A (those of the warp's rows) or B are in shared memory."""
        lines = ROWS if which == 0 else self.columns
        size = WIDTHS[self.kind] // 8
        each = [descriptor.addresses(int(d), lines, self.depth, size, self.transposed[which]) for d in descriptors]
        if which == 0:
            first = warps % GROUP * ROWS_OF_WARP
            each = [table[f : f + ROWS_OF_WARP] for table, f in zip(each, first, strict=True)]
        addresses = np.stack(each)
        lanes = np.repeat(warps * WARP, addresses[0].size)
        index = self.machine.shared.index(addresses.ravel(), lanes, np.dtype(bits_type(self.kind)), 1)
        return index.reshape(addresses.shape).astype(np.intp)

    def operands(self, flight: Flight) -> tuple[Array, Array]:
        """A ``[warp, row, k]`` and B ``[warp, k, column]`` in float64, as they are at this moment."""
        if self.by_registers:
            lanes = lanes_of(flight.warps)
            bits = self.groups.bits[self.left_rows[:, None], lanes].reshape(-1, flight.warps.size, WARP)
            a = assemble(bits.swapaxes(0, 1), self.left, self.kind)
        else:
            a = self._from_shared(flight.places[0], flight.known)
        b = self._from_shared(flight.places[-1], flight.known)
        return self.signs[0] * a, (self.signs[1] * b).swapaxes(1, 2)

    def _from_shared(self, places: NDArray[np.intp], known: NDArray[np.int64]) -> Array:
        proxies, dtype = self.machine.proxies, bits_type(self.kind)
        assert proxies is not None
        size = WIDTHS[self.kind] // 8
        bits = self.machine.shared.data.view(dtype)[places]
        seen = proxies.seen(places * size // 4, known)
        return values_of(np.where(seen, bits, ~dtype(0)), self.kind).astype(np.float64)


@dataclass(frozen=True)
class Flight:
    """One execution of a product by some warps; ``group`` its number, ``known`` what is seen of shared memory.

    ``adds``: whether the sum goes on, ``read``: the operands where they were read at once.
    """

    product: Product
    warps: Warps
    group: NDArray[np.int64]
    places: tuple[NDArray[np.intp], ...]
    adds: NDArray[np.bool_]
    known: NDArray[np.int64]
    read: tuple[Array, Array] | None = None

    def part(self, which: NDArray[np.bool_]) -> Flight:
        places = tuple(table[which] for table in self.places)
        read = None if self.read is None else (self.read[0][which], self.read[1][which])
        fields = self.warps[which], self.group[which], places, self.adds[which], self.known[which]
        return Flight(self.product, *fields, read)


# ---- all warpgroups of a machine -------------------------------------------------------------------------------------
class Warpgroups:
    """The products on their way, and what is known of the registers that they use.

    ``bits``: those registers, one a row. ``held``: what a sum will be, while its registers hold NaN. ``flying``: how
    many products add to it. ``state``: what happened to a register since the last fence, of each warp.
    """

    def __init__(self, machine: Machine, names: list[tuple[str, str]]):
        self.machine, self.names = machine, names
        warps = machine.size // WARP
        self.row = {name: i for i, name in enumerate(names)}
        self.bits = np.empty((len(names), machine.size), np.uint32)
        self.held = np.empty_like(self.bits)
        self.flying = np.zeros((len(names), warps), np.int64)
        self.state = np.zeros((len(names), warps), np.int64)
        self.group = np.zeros(warps, np.int64)
        self.flights: list[Flight] = []
        self.shapes: dict[str, int] = {}
        self.count = np.zeros(warps, np.int64)
        self.steps: dict[tuple[int, int], list[tuple[int, ...]]] = {}  # those that not all four warps have done

    def reset(self) -> None:
        self.flying.fill(0)
        self.state.fill(USED)
        self.group.fill(0)
        self.count.fill(0)
        self.flights.clear()
        self.steps.clear()

    def finish(self) -> None:
        """At the end of all threads: no warp of a warpgroup may have left out what another one did."""
        for group, _ in self.steps:
            name = self.machine.thread_name(group * GROUP * WARP)
            raise PtxError(f"not all warps executed a wgmma in the warpgroup of {name}", self.machine.kernel.place)

    # ---- registers ----
    def watched(self, function: Function, instruction: Instruction, action: Action) -> Action:
        """An ordinary instruction, which remembers that it used registers of sums or A."""
        if not self.row:
            return action
        names = {(function.name, name) for operand in instruction.operands for name in registers_in(operand)}
        rows = np.array([self.row[name] for name in names if name in self.row], np.intp)
        if not rows.size:
            return action

        def remembering(mask: Mask) -> None:
            action(mask)
            if mask is True:
                self.state[rows] = USED
            else:
                self.state[rows[:, None], np.flatnonzero(mask.reshape(-1, WARP).any(1))] = USED

        return remembering

    def fence(self, warps: Warps) -> None:
        self.state[:, warps] = FENCED

    def _check(self, rows: NDArray[np.intp], warps: Warps, allowed: int) -> None:
        state = self.state[rows[:, None], warps]
        wrong = (state != FENCED) & (state != allowed)
        if wrong.any():
            row, warp = (int(i[0]) for i in np.nonzero(wrong))
            name = self.names[rows[row]][1]
            raise AccessError(f"no wgmma.fence since {name} was used", int(warps[warp]) * WARP)

    # ---- products ----
    def follow(self, warps: Warps, step: list[tuple[int, ...]]) -> None:
        """All warps of a warpgroup execute the same, one after the other or together."""
        for warp, what in zip(warps.tolist(), step, strict=True):
            key = warp // GROUP, int(self.count[warp])
            self.count[warp] += 1
            done = self.steps.setdefault(key, [])
            done.append(what)
            if what != done[0]:
                raise AccessError("the warps of a warpgroup do not execute the same wgmma", warp * WARP)
            if len(done) == GROUP:
                del self.steps[key]

    def issue(self, product: Product, warps: Warps, places: tuple[NDArray[np.intp], ...], adds: Array) -> None:
        shape = self.shapes.setdefault(product.shape, FIRST_SHAPE + len(self.shapes))
        self._check(product.rows, warps, shape)
        self._check(product.left_rows, warps, FENCED)
        proxies = self.machine.proxies
        assert proxies is not None
        known = proxies.fenced.reshape(-1, proxies.warps)[warps]
        flight = Flight(product, warps, self.group[warps], places, adds, known)
        if self.machine.schedule.is_eager():
            flight = replace(flight, read=product.operands(flight))
        self.flights.append(flight)
        here, lanes = (product.rows[:, None], warps), (product.rows[:, None], lanes_of(warps))
        fresh = np.repeat(self.flying[here] == 0, WARP, axis=1)
        self.held[lanes] = np.where(fresh, self.bits[lanes], self.held[lanes])
        self.bits[lanes] = POISON
        self.flying[here] += 1
        self.state[here] = shape

    def commit(self, warps: Warps) -> None:
        self.group[warps] += 1

    def wait(self, warps: Warps, allowed: int) -> None:
        """Until at most ``allowed`` of the latest groups are on their way."""
        last = np.zeros_like(self.group)
        last[warps] = self.group[warps] - allowed
        remaining = []
        for flight in self.flights:
            done = flight.group < last[flight.warps]
            if done.any():
                self._arrive(flight.part(done))
            if not done.all():
                remaining.append(flight.part(~done))
        self.flights = remaining

    def _arrive(self, flight: Flight) -> None:
        product, warps = flight.product, flight.warps
        a, b = flight.read or product.operands(flight)
        here, lanes = (product.rows[:, None], warps), (product.rows[:, None], lanes_of(warps))
        held = self.held[lanes].reshape(-1, warps.size, WARP)
        start = np.where(flight.adds[:, None, None], assemble(held.swapaxes(0, 1), product.result, "f32"), 0)
        total = encode(multiply_add(a, b, start, product.kind, "f32"), "f32")
        layout = product.result
        position = (layout.row * layout.columns + layout.column)[..., 0]  # [register, lane]
        self.held[lanes] = total.reshape(warps.size, -1)[:, position].swapaxes(0, 1).reshape(len(position), -1)
        self.flying[here] -= 1
        done = np.repeat(self.flying[here] == 0, WARP, axis=1)
        self.bits[lanes] = np.where(done, self.held[lanes], self.bits[lanes])


# ---- the instructions ------------------------------------------------------------------------------------------------
_numbers = itertools.count()  # tell the instructions of the code apart


def _together(site: Site, mask: Mask) -> Warps:
    warps = whole_warps(site, mask)
    if site.machine.padded // WARP % GROUP or site.machine.threads % WARP:
        raise AccessError("needs a block of whole warpgroups", int(warps[0]) * WARP)
    return warps


def _plainly(site: Site, act: Callable[[Warps], None]) -> Action:
    """One of the instructions without operands in registers."""
    number = next(_numbers)

    def action(mask: Mask) -> None:
        warps = _together(site, mask)
        site.machine.warpgroups.follow(warps, [(number,)] * warps.size)
        act(warps)

    return action


def fence(site: Site) -> Action:
    """``wgmma.fence``: what was done to registers is ordered before the products that follow."""
    return _plainly(site, site.machine.warpgroups.fence)


def commit_group(site: Site) -> Action:
    return _plainly(site, site.machine.warpgroups.commit)


def wait_group(site: Site) -> Action:
    """``wgmma.wait_group n``: all but the latest ``n`` groups of products are done."""
    allowed = site.integer(0)
    return _plainly(site, lambda warps: site.machine.warpgroups.wait(warps, allowed))


def mma_async(site: Site) -> Action:
    """``wgmma.mma_async.shape.f32.kind.kind d, a, b, scale-d, sign-a, sign-b, …``; A in registers or shared memory."""
    product, number = Product(site), next(_numbers)
    described = [site.source(2, "b64")] if product.by_registers else [site.source(i, "b64") for i in (1, 2)]
    adds = site.source(3, "pred")

    def action(mask: Mask) -> None:
        warps = _together(site, mask)
        first = warps * WARP
        for source in (*described, adds):
            by_warp = source().reshape(-1, WARP)[warps]
            if (by_warp != by_warp[:, :1]).any():
                raise AccessError("a descriptor or scale-d differs among threads", int(first[0]))
        values = [source()[first] for source in described]
        if any(descriptor.fields(int(d)).base for d in np.concatenate(values)):
            raise AccessError("not modelled: a base offset in a descriptor", int(first[0]))
        add = adds()[first]
        product.groups.follow(warps, [(number, *map(int, each)) for each in zip(*values, add, strict=True)])
        which = range(2 - len(values), 2)
        places = tuple(product.places(w, d, warps) for w, d in zip(which, values, strict=True))
        product.groups.issue(product, warps, places, add)

    return action
