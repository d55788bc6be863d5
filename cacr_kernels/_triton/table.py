"""Launch configurations: one table per family of processors.

Nothing here was timed. What was looked at are the compiled kernels (``python -m benchmarks.codegen``): every entry
compiles without spilling registers, within the shared memory of the smallest member of its family, and among those the
largest tile was taken, as it reads the least from memory per similarity. ``CACR_AUTOTUNE=1`` measures instead.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch

Precision = Literal["half", "tf32", "tf32x3", "ieee", "fp64"]
CLASSES = (64, 128, 256, 512)  # of D; each serves all D up to it, the last one also larger ones, in chunks


class Tile(NamedTuple):
    """Sizes of a program's tile, and how it is compiled.

    ``block_d`` features are held at a time: all there are, or chunks of that size. ``block_out`` features of a gradient
    are written by a program: ``block_d`` where those are all there are.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    block_out: int

    def constants(self, writes_features: bool) -> dict[str, int]:
        """As the kernels take them."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        if writes_features:
            sizes["BLOCK_OUT"] = self.block_out
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def chunks(self, D: int) -> int:
        """How many times ``block_d`` features there are."""
        return -(-D // self.block_d)


class Processor(NamedTuple):
    """``family`` is a key of the table; ``cores``: programs that run at a time, about."""

    family: str
    cores: int

    @property
    def has_tf32x3(self) -> bool:
        """Three TF32 products for one of float32."""
        return self.family not in ("cdna3", "interpreter")


@functools.lru_cache(maxsize=64)
def processor_of(device: torch.device) -> Processor:
    """What a device is."""
    if device.type == "cpu":
        return Processor("interpreter", 4)
    about = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Processor("cdna3", about.multi_processor_count)
    family = {9: "sm_90", 10: "sm_100"}.get(about.major, "sm_120" if about.major > 10 else "sm_80")
    return Processor(family, about.multi_processor_count)


def class_of(D: int) -> int:
    """The D class of a problem."""
    return next((c for c in CLASSES if c >= D), CLASSES[-1])


def tile_of(family: str, kernel: str, precision: Precision, D: int) -> Tile:
    """The configuration of ``kernel``, cut down to the features there are."""
    entry = Tile(32, 32, 64, 4, 2, 64)
    features = max(16, 1 << max(0, D - 1).bit_length())
    return entry._replace(block_d=min(entry.block_d, features), block_out=min(entry.block_out, features))
