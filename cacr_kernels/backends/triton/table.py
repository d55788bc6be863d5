"""Launch configurations by kernel, kind of product and number of features.

Nothing here was timed. What was looked at are the compiled kernels (``python -m benchmarks.codegen``): every entry
compiles for sm_80, sm_90, sm_100, sm_120 and gfx942 without spilling registers, within the shared memory of the
smallest member of its family, and among those the larger tile was taken, as it reads less from memory per similarity.
The NVIDIA families share the entries where tiles that fit their registers are the same (each has some of its own, most
of them sm_100, whose products leave their sums in a memory of their own), and what the smallest sm_80 has in shared
memory is enough. AMD's differ in the number of warps, and in a tile.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch

from .launch import power_of_two, release
from .ops import installed, triton_version

Precision = Literal["half", "tf32", "tf32x3", "ieee", "fp64"]
CLASSES = (64, 128, 256, 512)  # of D; each serves all D up to it, the last one also larger ones, in chunks
LEAST_FEATURES = 32  # of a tile: all smaller D share its kernels


class Tile(NamedTuple):
    """Sizes of a program's tile, and how it is compiled.

    A program holds ``block_d`` features at a time: all there are, or chunks of that size. It writes ``block_out``
    features of a gradient: ``block_d`` where those are all there are.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    block_out: int

    def constants(self, writes_features: bool) -> dict[str, int]:
        """The constants of a launch; BLOCK_OUT only for kernels that write features."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        if writes_features:
            sizes["BLOCK_OUT"] = self.block_out
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def chunks(self, D: int) -> int:
        """How many times ``block_d`` features there are."""
        return -(-D // self.block_d)

    def constant_of_chunks(self, D: int) -> int:
        """Of a launch: 1, or 2 for any larger number of them, of which the kernels ask no more."""
        return min(2, self.chunks(D))

    def is_whole(self, D: int, rows: int) -> bool:
        """Whether all of a tile of ``rows`` can lie in memory: no features are missing, and there are rows enough."""
        return self.block_d == D and self.block_out in (0, D) and rows >= self.block_n


class Processor(NamedTuple):
    """``family`` is a key of the table, ``cores`` about the number of programs that run at a time."""

    family: str
    cores: int

    @property
    def has_tf32(self) -> bool:
        """Whether it has TF32 products."""
        return self.family != "cdna"

    @property
    def has_tf32x3(self) -> bool:
        """Whether Triton makes three TF32 products for one of float32 there."""
        return self.family not in ("cdna3", "cdna", "interpreter")


@functools.lru_cache(maxsize=64)
def processor_of(device: torch.device) -> Processor:
    """The entry of the launch table that a device takes."""
    if device.type == "cpu":
        return Processor("interpreter", 4)
    about = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        cdna3 = about.gcnArchName.startswith("gfx942")  # for others Triton has no TF32 products
        return Processor("cdna3" if cdna3 else "cdna", about.multi_processor_count)
    family = {9: "sm_90", 10: "sm_100"}.get(about.major, "sm_120" if about.major > 10 else "sm_80")
    return Processor(family, about.multi_processor_count)


def class_of(D: int) -> int:
    """The class that D features belong to."""
    return next((c for c in CLASSES if c >= D), CLASSES[-1])


def _row(*entries: tuple[int, ...]) -> tuple[Tile, ...]:
    return tuple(Tile(*entry) for entry in entries)


# BLOCK_M, BLOCK_N, BLOCK_D, warps, stages, BLOCK_OUT for D up to 64, 128, 256, and beyond.
# In gradient and detached_keys a tile of coefficients is the operand of another product, and all warps stand along its
# rows: 16 (8 in float64) for each, or they would compute the same twice.
ONE_SOFTMAX: dict[str, dict[Precision, tuple[Tile, ...]]] = {
    "statistics": {
        "half": _row((128, 64, 64, 8, 2, 0), (128, 64, 128, 8, 2, 0), *[(128, 64, 64, 8, 2, 0)] * 2),
        "tf32": _row((64, 64, 64, 4, 2, 0), (64, 64, 32, 4, 3, 0), (64, 64, 32, 4, 3, 0), (64, 64, 32, 4, 3, 0)),
        "tf32x3": _row((64, 32, 32, 4, 2, 0), (64, 32, 32, 4, 2, 0), (64, 32, 32, 4, 2, 0), (64, 32, 32, 4, 2, 0)),
        "ieee": _row((64, 32, 32, 8, 2, 0), (64, 32, 32, 8, 2, 0), (64, 32, 32, 8, 2, 0), (64, 32, 32, 8, 2, 0)),
        "fp64": _row(*[(32, 64, 32, 4, 2, 0)] * 4),
    },
    "gradient": {
        "half": _row(
            (64, 32, 64, 4, 2, 64), (64, 32, 128, 4, 1, 128), (64, 32, 64, 4, 2, 128), (64, 32, 64, 4, 2, 128)
        ),
        "tf32": _row((64, 32, 64, 4, 2, 64), (64, 16, 32, 4, 2, 128), (64, 16, 32, 4, 2, 128), (64, 16, 32, 4, 2, 128)),
        "tf32x3": _row((64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64)),
        "ieee": _row(*[(32, 16, 32, 8, 2, 64)] * 4),
        "fp64": _row(*[(64, 32, 32, 8, 2, 32)] * 4),
    },
    "detached_keys": {
        "half": _row((64, 32, 64, 4, 2, 64), (64, 32, 64, 4, 2, 128), (64, 32, 64, 4, 2, 128), (64, 32, 64, 4, 2, 128)),
        "tf32": _row((64, 32, 64, 4, 2, 64), (64, 16, 32, 4, 2, 128), (64, 16, 32, 4, 2, 128), (64, 16, 32, 4, 2, 128)),
        "tf32x3": _row((64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64)),
        "ieee": _row((32, 32, 64, 8, 2, 64), (32, 32, 32, 8, 2, 64), (32, 32, 32, 8, 2, 64), (32, 32, 32, 8, 2, 64)),
        "fp64": _row((32, 32, 32, 4, 2, 32), (32, 32, 32, 4, 2, 32), (32, 32, 32, 4, 2, 32), (32, 32, 32, 4, 2, 32)),
    },
}
# Two softmaxes, and the second accumulator of detached keys, take more registers.
TWO_SOFTMAXES: dict[str, dict[Precision, tuple[Tile, ...]]] = {
    "statistics": {
        "half": _row((64, 32, 64, 4, 2, 0), (64, 32, 128, 4, 2, 0), (64, 32, 64, 4, 2, 0), (64, 32, 64, 4, 2, 0)),
        "tf32": _row((64, 32, 64, 4, 2, 0), (64, 32, 32, 4, 2, 0), (64, 32, 32, 4, 2, 0), (64, 32, 32, 4, 2, 0)),
        "tf32x3": _row((64, 16, 32, 4, 2, 0), (64, 16, 32, 4, 2, 0), (64, 16, 32, 4, 2, 0), (64, 16, 32, 4, 2, 0)),
        "fp64": _row(*[(32, 32, 32, 4, 2, 0)] * 4),
    },
    "gradient": {
        "half": _row((64, 16, 64, 4, 1, 64), (64, 16, 64, 4, 1, 64), (64, 16, 64, 4, 1, 64), (64, 16, 64, 4, 1, 64)),
        "tf32": _row((64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64)),
        "tf32x3": _row((64, 16, 32, 4, 2, 32), (64, 16, 32, 4, 2, 32), (64, 16, 32, 4, 2, 32), (64, 16, 32, 4, 2, 32)),
        "ieee": _row((32, 32, 32, 8, 2, 64), (32, 32, 32, 8, 2, 64), (32, 32, 32, 8, 2, 64), (32, 32, 32, 8, 2, 64)),
        "fp64": _row((32, 16, 32, 4, 2, 32), (32, 16, 32, 4, 2, 32), (32, 16, 32, 4, 2, 32), (32, 16, 32, 4, 2, 32)),
    },
    "detached_keys": {
        "half": _row((64, 16, 64, 4, 2, 64), (64, 16, 64, 4, 2, 64), (64, 16, 64, 4, 2, 64), (64, 16, 64, 4, 2, 64)),
        "tf32": _row((64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64), (64, 16, 32, 4, 2, 64)),
        "tf32x3": _row((64, 16, 32, 4, 2, 32), (64, 16, 32, 4, 2, 32), (64, 16, 32, 4, 2, 32), (64, 16, 32, 4, 2, 32)),
    },
}

# Gradients by blocks (blocks.py): coefficients, without and with a second softmax or moments, those of both roles, and
# products with them.
BY_BLOCKS: dict[tuple[bool, str], dict[Precision, tuple[Tile, ...]]] = {
    (False, "blocks"): {"half": _row(*[(128, 64, 64, 8, 2, 0)] * 4)},
    (True, "blocks"): {"half": _row(*[(128, 32, 64, 8, 2, 0)] * 4)},
    (False, "triangles"): {"half": _row(*[(128, 64, 64, 8, 2, 0)] * 4)},
    (True, "triangles"): {"half": _row(*[(128, 32, 64, 8, 2, 0)] * 4)},
    (False, "products"): {"half": _row(*[(128, 64, 128, 8, 3, 128)] * 4)},
    (True, "products"): {"half": _row(*[(128, 64, 128, 8, 3, 128)] * 4)},
}

# Entries of one family, where it spills with those above: by whether there are two softmaxes or accumulators, by kernel
# and by kind of product.
SM_80: dict[tuple[bool, str, Precision], tuple[Tile, ...]] = {
    (False, "statistics", "tf32"): _row((128, 64, 64, 4, 2, 0), *[(64, 64, 32, 4, 3, 0)] * 3),
    (False, "gradient", "half"): _row((64, 32, 64, 4, 2, 64), (64, 32, 128, 4, 1, 128), *[(64, 32, 32, 4, 2, 128)] * 2),
    (False, "gradient", "ieee"): _row(*[(32, 16, 32, 4, 2, 64)] * 4),
    (True, "statistics", "half"): _row((64, 32, 64, 4, 2, 0), (64, 32, 128, 4, 2, 0), *[(64, 32, 32, 4, 2, 0)] * 2),
    (True, "statistics", "fp64"): _row(*[(32, 32, 64, 4, 2, 0)] * 4),
    (True, "gradient", "tf32"): _row(*[(128, 16, 32, 8, 2, 64)] * 4),
}
SM_90: dict[tuple[bool, str, Precision], tuple[Tile, ...]] = {
    (False, "statistics", "half"): _row(
        (128, 64, 64, 8, 2, 0), (64, 128, 128, 4, 2, 0), (128, 128, 64, 8, 2, 0), (128, 128, 64, 8, 2, 0)
    ),
    (False, "statistics", "fp64"): _row(*[(64, 64, 32, 8, 2, 0)] * 4),
    (False, "gradient", "half"): _row((64, 32, 64, 4, 2, 64), *[(128, 64, 128, 8, 2, 128)] * 3),
    (False, "blocks", "half"): _row(*[(128, 128, 64, 8, 2, 0)] * 4),
    (False, "triangles", "half"): _row(*[(128, 64, 128, 8, 2, 0)] * 4),
    (True, "triangles", "half"): _row(*[(64, 64, 64, 8, 2, 0)] * 4),
    (False, "gradient", "ieee"): _row(*[(32, 16, 32, 8, 3, 64)] * 4),
    (False, "detached_keys", "fp64"): _row(*[(64, 16, 32, 4, 2, 32)] * 4),
    (True, "detached_keys", "ieee"): _row((32, 32, 64, 8, 1, 64), *[(32, 32, 32, 8, 1, 64)] * 3),
    (True, "detached_keys", "fp64"): _row(*[(64, 16, 32, 4, 2, 32)] * 4),
}
SM_100: dict[tuple[bool, str, Precision], tuple[Tile, ...]] = {
    (True, "blocks", "half"): _row(*[(128, 32, 64, 8, 1, 0)] * 4),
    (False, "triangles", "half"): _row(*[(64, 64, 64, 8, 2, 0)] * 4),
    (True, "triangles", "half"): _row(*[(64, 32, 64, 8, 2, 0)] * 4),
    (False, "gradient", "half"): _row(
        (128, 32, 64, 8, 2, 64), (64, 16, 128, 4, 2, 128), (64, 32, 64, 4, 2, 128), (64, 32, 64, 4, 2, 128)
    ),
    (False, "gradient", "ieee"): _row(*[(32, 16, 32, 4, 2, 64)] * 4),
    (False, "gradient", "tf32x3"): _row(*[(64, 32, 32, 4, 2, 64)] * 4),
    (False, "gradient", "fp64"): _row(*[(64, 32, 32, 4, 1, 32)] * 4),
    (False, "detached_keys", "fp64"): _row(*[(128, 16, 32, 4, 2, 32)] * 4),
    (True, "statistics", "tf32"): _row(*[(64, 32, 64, 4, 2, 0)] * 4),
    (True, "statistics", "fp64"): _row(*[(32, 32, 32, 4, 1, 0)] * 4),
    (True, "gradient", "half"): _row((128, 16, 64, 4, 1, 64), *[(64, 16, 64, 4, 1, 128)] * 3),
    (True, "gradient", "ieee"): _row(*[(64, 32, 32, 8, 1, 64)] * 4),
    (True, "gradient", "fp64"): _row(*[(32, 32, 32, 8, 2, 32)] * 4),
    (True, "detached_keys", "fp64"): _row(*[(32, 16, 32, 4, 1, 32)] * 4),
}
SM_120: dict[tuple[bool, str, Precision], tuple[Tile, ...]] = {
    (False, "statistics", "fp64"): _row(*[(32, 64, 32, 4, 3, 0)] * 4),
    (False, "gradient", "fp64"): _row(*[(128, 16, 32, 8, 2, 32)] * 4),
    (True, "statistics", "ieee"): _row(*[(64, 64, 32, 8, 2, 0)] * 4),
    (True, "statistics", "fp64"): _row(*[(32, 32, 32, 4, 1, 0)] * 4),
    (True, "gradient", "ieee"): _row(*[(32, 64, 32, 8, 2, 64)] * 4),
    (True, "gradient", "fp64"): _row(*[(32, 32, 32, 8, 1, 32)] * 4),
    (True, "detached_keys", "half"): _row(*[(64, 32, 32, 4, 2, 64)] * 4),
    (True, "detached_keys", "fp64"): _row(*[(32, 16, 32, 4, 2, 32)] * 4),
}
CDNA: dict[tuple[bool, str, Precision], tuple[Tile, ...]] = {
    (False, "triangles", "half"): _row(*[(128, 64, 32, 8, 2, 0)] * 4),
}
BY_FAMILY = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_100, "sm_120": SM_120, "cdna3": CDNA, "cdna": CDNA}


# Entries of one family, where Triton before 3.7 spills with those above. Those of half types take as many instructions
# there, those of float64 2 % more. One still spills 16 bytes: full gradients of raw rows in float64.
SM_90_BEFORE_3_7: dict[tuple[bool, str, Precision], tuple[Tile, ...]] = {
    (False, "gradient", "half"): _row((64, 32, 64, 4, 2, 64), *[(128, 32, 128, 8, 2, 128)] * 3),
    (False, "detached_keys", "fp64"): _row(*[(64, 16, 32, 4, 1, 32)] * 4),
    (True, "detached_keys", "fp64"): _row(*[(64, 16, 32, 4, 1, 32)] * 4),
}


@functools.cache
def of_family(family: str) -> dict[tuple[bool, str, Precision], tuple[Tile, ...]]:
    """The entries of a family of its own, for the Triton that is installed."""
    own = BY_FAMILY.get(family, {})
    old = family == "sm_90" and installed() and release(triton_version()) < (3, 7)
    return own | SM_90_BEFORE_3_7 if old else own


def has_blocks(precision: Precision) -> bool:
    """Whether there are entries for gradients by blocks."""
    return precision in BY_BLOCKS[False, "blocks"]


def has_whole_tiles(family: str, kernel: str, precision: Precision, normalize: bool) -> bool:
    """Whether a sweep is compiled anew for tiles that lie in memory as a whole, whose loads need no masks.

    That pays where products are so fast that instructions bound a sweep. It costs another variant of a kernel, for
    batches with fewer rows than a tile. Gradients of rows as they are, which also add up the coefficients, have more
    instructions with it.
    """
    pays = (family, precision) == ("sm_90", "half") and (kernel == "statistics" or normalize)
    return pays or family == "interpreter"


def tile_of(family: str, kernel: str, precision: Precision, D: int, two: bool) -> Tile:
    """The configuration of ``kernel``, cut down to the features there are; ``two`` softmaxes or accumulators."""
    if family == "interpreter":
        entry = Tile(32, 32, 64, 4, 2, 64)
    else:
        rows = BY_BLOCKS[two, kernel][precision] if (two, kernel) in BY_BLOCKS else ONE_SOFTMAX[kernel][precision]
        if two:
            rows = TWO_SOFTMAXES.get(kernel, {}).get(precision, rows)
        rows = of_family(family).get((two, kernel, precision), rows)
        entry = rows[CLASSES.index(class_of(D))]
        if family in ("cdna3", "cdna"):  # its waves take 32 rows each, and without a second product 32 columns of them
            columns = entry.block_n // 32 if kernel in ("statistics", "blocks", "triangles", "products") else 1
            entry = entry._replace(num_warps=max(1, min(8, entry.block_m // 32 * columns)))
    features = max(LEAST_FEATURES, power_of_two(D))
    return entry._replace(block_d=min(entry.block_d, features), block_out=min(entry.block_out, features))
