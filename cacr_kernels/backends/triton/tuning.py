"""Optional autotuning (``CACR_AUTOTUNE=1``): tiles around that of the launch table are timed, the fastest is kept.

What is timed is a sweep: a function of pairs of sets and a tile, which launches one kernel into arrays of its own and
writes to nothing that it was given. A choice holds for a key: what the kernel is compiled for, the processor, the
features and roughly the number of similarities. It does not change within a process: where nothing may be timed it is
the entry of the table, from then on. Each is kept in a file of its own, so processes that write do not disturb each
other.

This is not ``triton.autotune``, which varies the constants of a launch: here a tile also decides how a loop is split
and how large the workspace is, which are arguments. It also times whenever a key is new, even in a capture. Calls are
timed by ``triton.testing``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..._version import __version__
from ...operators.registry import line_of_user
from ..kept import cache_dir, write
from .launch import launched, power_of_two, recording
from .pairs import SetPairs
from .table import LEAST_FEATURES, Precision, Tile

Result = TypeVar("Result")


def asked() -> bool:
    """Whether the environment asks for autotuning."""
    value = os.environ.get("CACR_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"the environment variable CACR_AUTOTUNE is {value!r}; accepted: '0' (off) and '1' (on)")
    return value == "1"


ON = asked()  # read once


class Key(NamedTuple):
    """What a choice holds for, within one version of this package and of Triton."""

    kernel: str
    sweep: str
    flags: tuple[bool, ...]  # of the sweep
    dtype: str
    precision: Precision
    kinds: tuple[int, ...]
    inner_product: bool
    keys_are_queries: bool
    normalize: bool
    features: int  # the next power of two
    work: int  # class of the number of similarities: powers of 4
    processor: str
    family: str
    cores: int


_chosen: dict[Key, Tile] = {}
_lock = threading.Lock()  # one thread times, others would disturb it
_warned: list[str] = []


def run(pairs: SetPairs, kernel: str, sweep: Callable[..., Result], *args: Any, two: bool = False) -> Result:
    """``sweep(pairs, tile, *args)`` with the tile of the launch table or a faster one.

    Flags in ``args`` are constants of the kernel. ``two``: it has two accumulators, although there is one softmax.
    """
    tile = pairs.tile(kernel, two)
    if ON and pairs.N and pairs.M and pairs.P:
        tile = _fastest(pairs, kernel, tile, sweep, args)
    return sweep(pairs, tile, *args)


def _fastest(pairs: SetPairs, kernel: str, entry: Tile, sweep: Callable[..., Any], args: tuple[Any, ...]) -> Tile:
    flags = tuple(x for x in args if isinstance(x, bool))
    sizes = features_of(pairs.D), (pairs.N * pairs.M * pairs.P).bit_length() // 2
    products = str(pairs.q.dtype), pairs.precision, pairs.kinds, pairs.inner_product
    roles = pairs.keys_are_queries, pairs.normalize
    key = Key(kernel, sweep.__name__, flags, *products, *roles, *sizes, _name(pairs.q.device), *pairs.processor)
    if key not in _chosen:
        with _lock:
            if key not in _chosen:
                tiles = candidates(kernel, pairs.precision, pairs.D, entry, key.family)
                _chosen[key] = _choose(key, tiles, pairs.q.device, lambda tile: sweep(pairs, tile, *args))
    return _chosen[key]


def _choose(key: Key, tiles: list[Tile], device: torch.device, sweep: Callable[[Tile], Any]) -> Tile:
    """From the disk, else by timing; the first of ``tiles`` where that may not be, or none of them can run."""
    about = key._asdict() | _versions()
    path = cache_dir() / f"{key.kernel}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"
    kept = _read(path, tiles)
    if kept is not None:
        return kept
    if recording(device) or torch.are_deterministic_algorithms_enabled():
        return tiles[0]
    found = {tile: _try(functools.partial(sweep, tile), device) for tile in tiles}
    times = {tile: result for tile, result in found.items() if isinstance(result, float)}
    if not times:
        return tiles[0]
    best = min(times, key=lambda tile: times[tile])
    tried = [tile._asdict() | {"ms" if tile in times else "failed": result} for tile, result in found.items()]
    _write(path, {"tile": best._asdict(), "tried": tried, "key": about})
    return best


def candidates(kernel: str, precision: Precision, D: int, entry: Tile, family: str) -> list[Tile]:
    """The entry of the launch table and its neighbours, each with one size changed.

    How three TF32 products are rounded depends on the chunks, which therefore stay those of the other sweeps.
    """
    names = ("block_n", "num_warps") if precision == "tf32x3" else ("block_n", "num_warps", "block_d")
    neighbours = [
        entry._replace(**{name: value})
        for name in names
        for value in (2 * getattr(entry, name), getattr(entry, name) // 2)
    ]
    neighbours += [entry._replace(num_stages=entry.num_stages + step) for step in (1, -1)]
    return [entry, *(tile for tile in neighbours if _legal(tile, kernel, precision, D, family))]


def _legal(tile: Tile, kernel: str, precision: Precision, D: int, family: str) -> bool:
    """Whether the kernels can be compiled for it, and whether that makes sense: ``table.py``."""
    features = features_of(D)
    least = features if features == LEAST_FEATURES else 16  # what all D of the smallest tiles fit into is not cut
    sizes = 16 <= tile.block_n <= 128 and least <= tile.block_d <= features
    if not (sizes and 1 <= tile.num_warps <= 8 and 1 <= tile.num_stages <= 4):
        return False
    if kernel == "statistics":
        return True
    rows = 32 if family.startswith("cdna") else 8 if precision == "fp64" else 16  # of a warp
    along_rows = precision == "ieee" or tile.num_warps * rows <= tile.block_m
    return along_rows and (tile.chunks(D) > 1 or tile.block_out == tile.block_d)


def features_of(D: int) -> int:
    """The features of a tile that holds all D."""
    return max(LEAST_FEATURES, power_of_two(D))


# ---- timing ----------------------------------------------------------------------------------------------------------
def measure(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, the median of several; of one in the interpreter, where they mean nothing."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def _try(call: Callable[[], object], device: torch.device) -> float | str:
    """Milliseconds, or why a tile is out of the question."""
    from triton.errors import TritonError

    try:
        with launched() as kernels:
            call()
        if any((getattr(kernel, "n_spills", 0) or 0) > 0 for kernel in kernels):
            return "spills registers"
        return measure(call, device)
    except (TritonError, RuntimeError) as error:  # of a compiler or a launch; a broken device fails the next launch too
        return f"{type(error).__name__}: {error}"[:300]


# ---- on disk ---------------------------------------------------------------------------------------------------------
def _read(path: Path, tiles: list[Tile]) -> Tile | None:
    """The tile in a file, if it is one of ``tiles``."""
    try:
        return tiles[tiles.index(Tile(**json.loads(path.read_text(encoding="utf-8"))["tile"]))]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn(f"cacr_kernels: the launch configuration in {path} is ignored ({type(error).__name__}: {error})")
    return None


def _write(path: Path, data: dict[str, Any]) -> None:
    """Write all of it or nothing, whoever else writes."""
    try:
        write(path, data)
    except OSError as error:
        _warn(f"cacr_kernels: launch configurations are not kept in {path.parent} ({type(error).__name__}: {error})")


def _warn(text: str) -> None:
    """Warn, but only once in a process."""
    if not _warned:
        _warned.append(text)
        warnings.warn(text, RuntimeWarning, stacklevel=line_of_user())


@functools.cache
def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.gcnArchName if torch.version.hip else f'sm_{about.major}{about.minor}'}"


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of everything that a compiled kernel is made of."""
    import triton

    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {"triton": triton.__version__, "cacr_kernels": __version__, "source": source.hexdigest()[:16]}
