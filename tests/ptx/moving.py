"""Moving data: between registers, from and to memory, atomically or asynchronously."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import AccessError
from .formats import Array, bits_type, decode, encode, value_type
from .memory import Space, lane_at
from .site import Action, Mask, Site
from .syntax import WIDTHS, Address, Immediate, Symbol, Vector

SPACE_NAMES = ("global", "shared", "local", "const", "param")


# ---- registers -------------------------------------------------------------------------------------------------------
def mov(site: Site) -> Action:
    kind = site.type
    if isinstance(site.operands[0], Vector):
        return _unpack(site, kind)
    if isinstance(site.operands[1], Vector):
        return _pack(site, kind)
    source, target = site.source(1, kind), site.target(0, kind)
    out, array = site.direct(0, kind), site.array(1, kind)
    if out is not None and array is not None and out.ndim == 1:
        return lambda mask: np.copyto(out, array, where=mask)
    return lambda mask: target(source(), mask)


def _part(site: Site, kind: str, count: int) -> str:
    width = WIDTHS[kind] // count
    if width not in (8, 16, 32):
        raise site.error(f"{count} parts of .{kind}")
    return f"b{width}"


def _unpack(site: Site, kind: str) -> Action:
    """``mov.b32 {a, b}, d``: the lowest part first."""
    part = _part(site, kind, len(site.items(0)))
    source, targets = site.source(1, kind), site.targets(0, part)

    def action(mask: Mask) -> None:
        parts = np.ascontiguousarray(source()).view(bits_type(part)).reshape(-1, len(targets))
        for i, target in enumerate(targets):
            target(parts[:, i], mask)

    return action


def _pack(site: Site, kind: str) -> Action:
    sources = site.sources(1, _part(site, kind, len(site.items(1))))
    target = site.target(0, kind)
    return lambda mask: target(np.stack([source() for source in sources], 1).view(bits_type(kind))[:, 0], mask)


# ---- loads and stores ------------------------------------------------------------------------------------------------
def _space(site: Site, which: int) -> tuple[str, Space]:
    """The state space an instruction names, or else the generic one; parameters of calls are a space of their own."""
    names = [m.split("::")[0] for m in site.modifiers]
    name = next((n for n in names if n in SPACE_NAMES), "generic")
    operand = site.operands[which]
    if name == "param" and isinstance(operand, Address) and isinstance(operand.base, Symbol):
        name = site.machine.space_of(site, operand.base.name)
    return name, site.machine.spaces[name]


def _access_type(kind: str) -> np.dtype:
    """How memory is read: signed types as such, so that wider registers are extended; all others as bits."""
    return np.dtype(value_type(kind) if kind[0] == "s" else bits_type(kind))


def ld(site: Site) -> Action:
    kind = site.type
    name, space = _space(site, 1)
    address, dtype = site.address(1, name), _access_type(kind)
    items = site.items(0)
    registers = [None if item == Symbol("_") else site.load_register(item, kind) for item in items]

    def action(mask: Mask) -> None:
        lanes = site.lanes(mask)
        values = space.read(address(lanes), lanes, dtype, len(items))
        for register, value in zip(registers, values, strict=True):
            if register is not None:
                register[lanes] = value

    return action


def st(site: Site) -> Action:
    kind = site.type
    name, space = _space(site, 0)
    address, sources = site.address(0, name), site.sources(1, f"b{WIDTHS[kind]}")
    site.refuse(name in ("const", "param"), f"a store to {name}")

    def action(mask: Mask) -> None:
        lanes = site.lanes(mask)
        space.write(address(lanes), lanes, np.stack([source()[lanes] for source in sources]))

    return action


# ---- atomics ---------------------------------------------------------------------------------------------------------
def _compare_and_swap(old: Array, expected: Array, new: Array) -> Array:
    return np.where(old.view(f"u{old.dtype.itemsize}") == expected.view(f"u{old.dtype.itemsize}"), new, old)


ATOMICS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": _compare_and_swap,
    "inc": lambda old, top: np.where(old >= top, 0, old + 1).astype(old.dtype),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - 1).astype(old.dtype),
}


def atom(site: Site) -> Action:
    """Reads and changes memory; the threads that meet at one address come one after the other, in a random order."""
    return _atomic(site, 1)


def red(site: Site) -> Action:
    """An atomic operation whose old value nobody reads: ``atom`` without a result."""
    return _atomic(site, 0)


def _atomic(site: Site, at: int) -> Action:
    kind = site.type
    operation = next((m for m in site.modifiers if m in ATOMICS), None)
    if operation is None:
        raise site.error("an atomic without its operation")
    function = ATOMICS[operation]
    name, space = _space(site, at)
    address, dtype = site.address(at, name), np.dtype(bits_type(kind))
    values = [site.source(i, f"b{WIDTHS[kind]}") for i in range(at + 1, len(site.operands))]
    target = site.target(0, f"b{WIDTHS[kind]}") if at else None

    def action(mask: Mask) -> None:
        lanes = np.arange(site.machine.size) if mask is True else np.flatnonzero(mask)
        lanes = site.machine.schedule.rng.permutation(lanes)
        where, operands = address(lanes), [value()[lanes] for value in values]
        result = np.zeros(site.machine.size, dtype)
        while lanes.size:
            _, turn = np.unique(where, return_index=True)  # one thread per address
            old = space.read(where[turn], lanes[turn], dtype)[0]
            new = encode(function(*(decode(bits, kind) for bits in (old, *(o[turn] for o in operands)))), kind)
            space.write(where[turn], lanes[turn], new[None])
            result[lanes[turn]] = old
            rest = np.setdiff1d(np.arange(lanes.size), turn)
            lanes, where, operands = lanes[rest], where[rest], [o[rest] for o in operands]
        if target is not None:
            target(result, mask)

    return action


# ---- asynchronous copies ---------------------------------------------------------------------------------------------
def cp(site: Site) -> Action:
    """``cp.async``: the copy itself, or closing and waiting for groups of them."""
    site.refuse(not site.has("async"), "a cp that is not cp.async")
    copies = site.machine.copies
    if site.has("commit_group"):
        return lambda mask: copies.commit(_all(site, mask))
    if site.has("wait_all"):
        return lambda mask: copies.wait(_all(site, mask), None)
    if site.has("wait_group"):
        allowed = site.integer(0)
        return lambda mask: copies.wait(_all(site, mask), allowed)
    if len(site.operands) < 3:
        raise site.error("cp.async needs two addresses and a size")
    return _copy(site)


def _copy(site: Site) -> Action:
    size = site.integer(2)
    if size not in ((16,) if site.has("cg") else (4, 8, 16)):
        raise site.error(f"cp.async of {size} bytes")
    target, source = site.address(0, "shared"), site.address(1, "global")
    cached = site.has("L2::cache_hint")
    given = len(site.operands) - cached > 3
    used = site.source(3, "u32") if given else site.source(Immediate(size), "u32")

    def action(mask: Mask) -> None:
        lanes = np.flatnonzero(_all(site, mask))
        count = used()[lanes]
        if (count > size).any():
            raise AccessError(f"more than {size} bytes to copy", lane_at(lanes, int(np.argmax(count > size))))
        site.machine.copies.issue(lanes, target(lanes), source(lanes), count, size)

    return action


def _all(site: Site, mask: Mask) -> Array:
    return np.ones(site.machine.size, np.bool_) if mask is True else mask


# ---- fences ----------------------------------------------------------------------------------------------------------
def proxy_fence(site: Site) -> Action:
    """``fence.proxy.async``: the async proxy sees what was written to shared memory. Other proxies are not modelled."""
    proxies = site.machine.proxies
    if proxies is None or not site.has("async") or site.has("global"):
        return nothing(site)
    return lambda mask: proxies.fence(_all(site, mask))


# ---- nothing to do ---------------------------------------------------------------------------------------------------
def nothing(site: Site) -> Action:
    """Fences, prefetches, hints: memory is sequentially consistent here, and there is no cache."""
    return lambda mask: None


def createpolicy(site: Site) -> Action:
    """A cache policy is a number nobody looks at."""
    target, zero = site.target(0, "b64"), site.source(Immediate(0), "b64")
    return lambda mask: target(zero(), mask)
