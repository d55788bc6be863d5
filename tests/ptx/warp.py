"""Instructions that the threads of a warp do together. Each reads what the others hold; who has to come says a mask."""

from __future__ import annotations

import numpy as np

from .errors import AccessError
from .formats import Array, bits_type, decode
from .schedule import WARP
from .site import Action, Mask, Site, Source
from .syntax import Immediate

LANE = np.arange(WARP)


def member_mask(site: Site) -> Source:
    """The mask that is the last operand."""
    return site.source(site.operands[-1], "u32")


def whole_warp(site: Site) -> Source:
    """``.aligned`` without a mask: the whole warp."""
    return site.source(Immediate(0xFFFFFFFF), "u32")


def _flags(site: Site, mask: Mask) -> Array:
    return np.ones(site.machine.size, np.bool_) if mask is True else mask


def _ballot(flags: Array) -> Array:
    """One bit per thread, the same 32 bits for all threads of the warp."""
    bits = (flags.reshape(-1, WARP) * (np.uint32(1) << LANE.astype(np.uint32))).sum(1, dtype=np.uint32)
    return np.repeat(bits, WARP)


def shfl(site: Site) -> Action:
    """``shfl.sync.mode.b32 d|p, a, b, c, members``; reading from a thread that does not take part is an error."""
    first, second = site.pair(0)
    value, by, clamp = site.source(1, "b32"), site.source(2, "u32"), site.source(3, "u32")
    target = site.target(first, "b32")
    valid = None if second is None else site.target(second, "pred")
    mode = site.one_of("up", "down", "bfly", "idx", default="")
    if not mode or not site.has("sync"):
        raise site.error("shfl needs .sync and a mode")
    lane = np.tile(LANE, site.machine.size // WARP)
    start = np.arange(site.machine.size) - lane

    def action(mask: Mask) -> None:
        b, c = by().astype(np.int64) & 31, clamp().astype(np.int64)
        segment = c >> 8 & 31
        last = (lane & segment) | (c & 31 & ~segment)
        other = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": (lane & segment) | (b & ~segment),
        }[mode]
        inside = other >= last if mode == "up" else other <= last
        origin = start + np.where(inside, other, lane)
        if mask is not True and not (mask[origin] | ~mask).all():
            reader = int(np.flatnonzero(~mask[origin] & mask)[0])
            raise AccessError(f"shfl reads from lane {int(origin[reader]) % WARP}, which does not take part", reader)
        target(value()[origin], mask)
        if valid is not None:
            valid(inside, mask)

    return action


def vote(site: Site) -> Action:
    """``vote.sync``: all, any, uniform or the ballot of a predicate over the members."""
    predicate, members = site.source(1, "pred"), member_mask(site)
    ballot = site.has("ballot")
    target = site.target(0, "b32" if ballot else "pred")
    mode = site.one_of("all", "any", "uni", "ballot", default="")
    if not mode or not site.has("sync"):
        raise site.error("vote needs .sync and a mode")

    def action(mask: Mask) -> None:
        flags = _flags(site, mask)
        present = _ballot(flags) & members()
        yes = _ballot(flags & predicate()) & present
        found = {
            "all": yes == present,
            "any": yes != 0,
            "uni": (yes == present) | (yes == 0),
            "ballot": yes,
        }[mode]
        target(found, mask)

    return action


def activemask(site: Site) -> Action:
    """Which threads of the warp execute this together."""
    target = site.target(0, "b32")
    return lambda mask: target(_ballot(_flags(site, mask)), mask)


def _with_whom(site: Site, mask: Mask, members: Array) -> Array:
    """``[lane, 32]``: whether the lane works together with each one of its warp."""
    present = _ballot(_flags(site, mask)) & members
    return (present[:, None] >> LANE.astype(np.uint32) & np.uint32(1)).astype(np.bool_)


def _of_warp(values: Array) -> Array:
    """``[lane, 32]``: the values of all threads of the lane's warp."""
    return np.repeat(values.reshape(-1, WARP), WARP, axis=0)


def match(site: Site) -> Action:
    """``match.any.sync``: members with the same value; ``match.all.sync``: all of them, or none if values differ."""
    kind = site.type
    value, members = site.source(1, kind), member_mask(site)
    first, second = site.pair(0)
    target, predicate = site.target(first, "b32"), None if second is None else site.target(second, "pred")
    every = site.has("all")
    bit = np.uint32(1) << LANE.astype(np.uint32)

    def action(mask: Mask) -> None:
        together = _with_whom(site, mask, members())
        same = (_of_warp(value()) == value()[:, None]) & together
        agree = (same == together).all(1)
        found = (same * bit).sum(1, dtype=np.uint32)
        target(np.where(agree, found, np.uint32(0)) if every else found, mask)
        if predicate is not None:
            predicate(agree, mask)

    return action


REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def redux(site: Site) -> Action:
    """``redux.sync``: one operation over the members, the result in all of them."""
    kind = site.type
    value, members, target = site.source(1, kind), member_mask(site), site.target(0, kind)
    name = next((m for m in site.modifiers if m in REDUCTIONS), None)
    if name is None:
        raise site.error("redux without its operation")
    function = REDUCTIONS[name]
    dtype = decode(np.zeros(1, bits_type(kind)), kind).dtype
    ends = np.iinfo(dtype)
    neutral = {"add": 0, "or": 0, "xor": 0, "and": ~dtype.type(0), "min": ends.max, "max": ends.min}[name]

    def action(mask: Mask) -> None:
        together = _with_whom(site, mask, members())
        values = np.where(together, _of_warp(value()), dtype.type(neutral))
        target(function.reduce(values, axis=1, dtype=dtype), mask)

    return action
