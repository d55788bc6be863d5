"""Pairs of a query set and a key set as the kernels take them: contiguous arrays, sizes, and what follows from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import OTHER, POSITIVE_KINDS
from ..precision import fp32_products
from .launch import cdiv, recording
from .table import Precision, Processor, Tile, has_whole_tiles, processor_of, tile_of

# Further key sets of a second softmax; kernels/tile.py.
SHARED_SET = 5  # the set of the first softmax, with a temperature of the same sign
NO_SET = -1  # there is no second softmax
WORKSPACE = 1 << 28  # bytes that all splits of one array may take


class Arguments(NamedTuple):
    """The arguments that the schemas of ``contrast``, its gradient and ``detached_keys`` begin with."""

    q: Tensor
    k: Tensor | None
    q_id: Tensor | None
    k_id: Tensor | None
    tau: Tensor
    kinds: list[int]
    q_index: list[int]
    k_index: list[int]
    inner_product: bool
    normalize: bool
    q_self: Tensor | None = None  # of contrast alone


class Split(NamedTuple):
    """A loop that is split among programs, each of which writes results of its own."""

    size: int  # iterations of a program
    number: int  # of splits


@dataclass(frozen=True)
class SetPairs:
    """P pairs of a query set and a key set, with the same S softmaxes over each.

    P is the number of pairs, nothing else: pair p meets the N queries of view ``q_view[p]`` with the M keys of view
    ``k_view[p]``. The other symbols are those of ``cacr_kernels/reference.py``.
    """

    q: Tensor  # [views of q, N, D]
    k: Tensor  # [views of k, M, D]
    q_norm: Tensor  # [views of q, N] squared lengths
    k_norm: Tensor
    q_unit: Tensor | None  # [views of q, N] factors that make unit rows, where that is asked for
    k_unit: Tensor | None
    q_id: Tensor  # [N], anything if all kinds are ALL; [2, N] if given_self: ids, and which keys the queries are
    k_id: Tensor
    tau: Tensor  # [S] float64
    q_view: Tensor  # [P] int32
    k_view: Tensor
    kinds: tuple[int, ...]  # the key set of each softmax
    inner_product: bool
    keys_are_queries: bool
    given_self: bool = False

    @property
    def normalize(self) -> bool:
        """Whether rows are made unit rows."""
        return self.q_unit is not None

    @property
    def N(self) -> int:  # noqa: N802
        """Number of queries of a set."""
        return self.q.shape[1]

    @property
    def M(self) -> int:  # noqa: N802
        """Number of keys of a set."""
        return self.k.shape[1]

    @property
    def D(self) -> int:  # noqa: N802
        """Number of features of an embedding."""
        return self.q.shape[2]

    @property
    def P(self) -> int:  # noqa: N802
        """Number of pairs of sets."""
        return self.q_view.shape[0]

    @property
    def S(self) -> int:  # noqa: N802
        """Number of softmaxes over each pair of sets."""
        return len(self.kinds)

    @property
    def sides(self) -> tuple[Tensor | None, ...]:
        """What a kernel that sees similarities takes first: queries, keys, and what is known of them."""
        units = self.q_unit, self.k_unit
        ids = self.q_id, self.k_id
        return self.q, self.k, self.q_norm, self.k_norm, *units, *ids, self.tau, self.q_view, self.k_view

    @property
    def sides_exchanged(self) -> tuple[Tensor | None, ...]:
        """The same with the keys in the place of the queries."""
        units = self.k_unit, self.q_unit
        ids = self.k_id, self.q_id
        return self.k, self.q, self.k_norm, self.q_norm, *units, *ids, self.tau, self.k_view, self.q_view

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype of sums and gradients."""
        return self.q_norm.dtype

    @property
    def processor(self) -> Processor:
        """The processor of the device they lie on."""
        return processor_of(self.q.device)

    @property
    def precision(self) -> Precision:
        """The class of products that the launch table knows."""
        return precision_of(self.q, self.processor)

    @property
    def cancelling(self) -> bool:
        """Whether two softmaxes go over one set (rbf): their gradients nearly cancel."""
        return self.S == 2 and self.kinds[1] in (self.kinds[0], SHARED_SET)

    @property
    def second_set(self) -> int:
        """Key set of the second softmax."""
        return self.kinds[1] if self.S == 2 else NO_SET

    def tile(self, kernel: str, two: bool = False) -> Tile:
        """Entry of the launch table for a kernel; ``two``: with a second accumulator, although there is one softmax."""
        return tile_of(self.processor.family, kernel, self.precision, self.D, two or self.S == 2)

    def whole(self, kernel: str, tile: Tile, others: int) -> bool:
        """Whether tiles of a loop over ``others`` rows are loaded without masks."""
        pays = has_whole_tiles(self.processor.family, kernel, self.precision, self.normalize)
        return pays and tile.is_whole(self.D, others)

    def constants(self) -> dict[str, Any]:
        """What all kernels that see similarities are compiled for."""
        product = "ieee" if self.precision in ("half", "fp64") else self.precision
        sets = {"FIRST_SET": self.kinds[0], "SECOND_SET": self.second_set}
        flags = {"INNER_PRODUCT": self.inner_product, "NORMALIZE": self.normalize}
        return sets | flags | {"PRECISION": product}

    def row_constants(self) -> dict[str, Any]:
        """What kernels that turn row state into results are compiled for."""
        uses_cost = {"USES_COST0": self._uses_cost(0), "USES_COST1": self._uses_cost(self.S - 1)}
        second = self.second_set if self.second_set in (NO_SET, SHARED_SET) else OTHER  # they read no ids
        return {"SECOND_SET": second, "INNER_PRODUCT": self.inner_product} | uses_cost

    def _uses_cost(self, softmax: int) -> bool:
        """Whether the logits of a softmax are made of costs, as they are among positives."""
        return self.kinds[softmax] in POSITIVE_KINDS and not self.inner_product

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A new array on the device, in the type of the arithmetic."""
        return self.q.new_empty(shape, dtype=dtype or self.arithmetic)

    def split(self, programs: int, length: int, block: int, result_bytes: int) -> Split:
        """How a loop over ``length`` is split, where there are ``programs`` without a split.

        As many as fill the processor twice, of at least four blocks each, whose results fit in the workspace.
        """
        if length <= 0:
            return Split(block, 1)
        wanted = cdiv(2 * self.processor.cores, max(1, programs))
        wanted = max(1, min(wanted, length // (4 * block), WORKSPACE // max(1, result_bytes)))
        size = cdiv(cdiv(length, wanted), block) * block
        return Split(size, cdiv(length, size))


def view_table(index: tuple[int, ...], device: torch.device) -> Tensor:
    """Views by pair [P] int32, made on the device: a copy from the host would wait for it.

    Kept for the next call on the same stream, unless it belongs to a graph that is being captured. Another
    stream makes its own: it could read this one before it is written.
    """
    if recording(device):
        return _made_there(index, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _kept(index, device, stream)


def _made_there(index: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.full((), view, dtype=torch.int32, device=device) for view in index])


@functools.lru_cache(maxsize=1024)
def _kept(index: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _made_there(index, device)


def precision_of(x: Tensor, processor: Processor) -> Precision:
    """The class of products of ``x`` that the launch table knows."""
    if x.dtype == torch.float32:
        asked = fp32_products()
        missing = (asked == "tf32x3" and not processor.has_tf32x3) or (asked == "tf32" and not processor.has_tf32)
        return "ieee" if missing else asked
    return "fp64" if x.dtype == torch.float64 else "half"
