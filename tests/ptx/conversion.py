"""``cvt``: from one format to another, with the rounding that is asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import FLOAT_TYPES, Array, encode, flush, round_float, saturate, tf32_round, to_integer, value_type
from .memory import window
from .site import Action, Mask, Site
from .syntax import WIDTHS

INTEGRAL: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def cvt(site: Site) -> Action:
    to, source = site.types[0], site.type
    if "tf32" in site.types:
        return _to_tf32(site)
    if to.endswith("x2"):
        return _pack(site, to)
    if len(site.types) != 2:
        raise site.error("cvt needs two types")
    value = site.source(1, source)
    if to not in FLOAT_TYPES:
        return _to_integer(site, value, to, source)
    return _to_float(site, value, to, source)


def _to_float(site: Site, value: Callable[[], Array], to: str, source: str) -> Action:
    rounding = site.one_of("rz", "rm", "rp", default="rn")
    site.refuse(rounding != "rn" and source in ("s64", "u64"), f".{rounding} from 64-bit integers")
    target = site.target(0, to, rounding)
    steps: list[Callable[[Array], Array]] = []
    if site.has("ftz") and source == "f32":
        steps.append(flush)
    steps += [INTEGRAL[m] for m in site.modifiers if m in INTEGRAL]
    if source not in FLOAT_TYPES:
        steps.append(lambda values: _from_integer(values, to))
    if to in ("f32", "f64"):
        steps.append(lambda values: round_float(values, value_type(to), rounding))
    if site.has("ftz") and to == "f32":
        steps.append(flush)
    if site.has("sat"):
        steps.append(saturate)
    if site.has("relu"):
        steps.append(lambda values: np.maximum(values, 0))

    def action(mask: Mask) -> None:
        values = value()
        for step in steps:
            values = step(values)
        target(values, mask)

    return action


def _from_integer(values: Array, to: str) -> Array:
    """Exactly as float64 where that is possible; 64-bit integers to float32 are rounded once, by numpy."""
    direct = values.dtype.itemsize == 8 and to == "f32"
    return values.astype(np.float32 if direct else np.float64)


def _to_integer(site: Site, value: Callable[[], Array], to: str, source: str) -> Action:
    target = site.target(0, to)
    if source not in FLOAT_TYPES:
        if site.has("sat"):
            return lambda mask: target(_clamp(value(), to), mask)
        return lambda mask: target(value().astype(value_type(to)), mask)
    rounding = next((INTEGRAL[m] for m in site.modifiers if m in INTEGRAL), None)
    if rounding is None:
        raise site.error("cvt from a float to an integer needs .rni, .rzi, .rmi or .rpi")
    flushes = site.has("ftz") and source == "f32"
    return lambda mask: target(to_integer(rounding(flush(value()) if flushes else value()), to, source), mask)


def _clamp(values: Array, to: str) -> Array:
    ends, own = np.iinfo(value_type(to)), np.iinfo(values.dtype)
    return np.clip(values, max(ends.min, own.min), min(ends.max, own.max)).astype(value_type(to))


def _to_tf32(site: Site) -> Action:
    """float32 to float32 whose lower 13 bits are 0."""
    site.refuse(not site.has("rna"), "a rounding to tf32 other than .rna")
    value, target = site.source(1, "f32"), site.target(0, "f32")
    return lambda mask: target(tf32_round(value()), mask)


def _pack(site: Site, to: str) -> Action:
    """``cvt.rn.bf16x2.f32 d, a, b``: ``a`` in the upper, ``b`` in the lower half."""
    if len(site.operands) != 3:
        raise site.error("a packed cvt needs two sources")
    upper, lower = site.source(1, site.type), site.source(2, site.type)
    rounding = site.one_of("rz", default="rn")
    target, relu = site.target(0, "b32"), site.has("relu")

    def action(mask: Mask) -> None:
        both = np.stack([lower(), upper()], -1)
        target(encode(np.maximum(both, 0) if relu else both, to, rounding), mask)

    return action


def cvta(site: Site) -> Action:
    """Between the generic addresses and those inside a space."""
    names = (m.split("::")[0] for m in site.modifiers)
    space = next((name for name in names if name in ("global", "shared", "local", "const")), None)
    if space is None:
        raise site.error("cvta without a state space")
    kind = site.type
    site.refuse(WIDTHS[kind] != 64, "addresses of 32 bits")
    start = np.uint64(0 if space == "const" else window(space))
    value, target = site.source(1, kind), site.target(0, kind)
    if site.has("to"):
        return lambda mask: target(value() - start, mask)
    return lambda mask: target(value() + start, mask)
