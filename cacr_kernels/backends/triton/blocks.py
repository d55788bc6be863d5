"""Gradients of rows with more features than a program of ``gradient_kernel`` writes: by blocks of stored coefficients.

A block has at most SIDE x SIDE coefficients: of SIDE queries and SIDE keys, of more of one where there are few of the
other, or of several pairs of sets where all of them fit. It is filled from similarities that are formed once, added to
the gradients of its queries and of its keys by two matrix products, and overwritten by the next one. So statistics and
gradients take 4U (U = 2 P N M D), and the order in which blocks are added is fixed. What it costs is the way of a block
through memory, and the workspace.

**Triangles.** Where the queries are the keys, two rows meet twice, in either role, with the same similarity. Then a
block holds g_ij + g_ji, which is symmetric: only blocks with i <= j are filled, of those on the diagonal only the tiles
that are not below it, and a block on the diagonal is multiplied once, for rows in both roles. Statistics and gradients
take 2.5U.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.blocks import block_kernel, product_kernel, scale_kernel
from .launch import cdiv, power_of_two, start
from .pairs import SetPairs
from .table import Tile, has_blocks

SIDE = 8192  # queries and keys of a square block: 128 MiB of a half type; products of 384 programs at D = 768
SPAN = 512  # keys of a program that fills a block, where that makes enough programs


class Block(NamedTuple):
    """Where a block lies, and its sizes, which are rounded up to whole tiles."""

    i: int  # first query
    j: int  # first key
    p: int  # first pair of sets
    pairs: int
    height: int
    width: int


class Workspace(NamedTuple):
    """What all blocks are written to in turn, flat."""

    block: Tensor  # [pairs, height, width]
    sums: Tensor  # of rows [splits, pairs, height], then of columns [tiles of rows, pairs, width]
    scale: Tensor  # [2]


class Parts(NamedTuple):
    """How many sums of a part of each row, and of each column, a block has."""

    rows: int
    columns: int


class Side(NamedTuple):
    """The queries or the keys: whose gradient a product is added to."""

    x: Tensor  # [views of x, N, D]
    y: Tensor  # [views of y, M, D]
    unit: Tensor | None  # factors of x
    x_view: Tensor  # [P]
    y_view: Tensor
    grad: Tensor  # [1, views of x, N, D]
    query: bool


def pay(pairs: SetPairs) -> bool:
    """Whether gradients take this way: where the other one would form a similarity more than once a side."""
    return has_blocks(pairs.precision) and pairs.tile("gradient").block_out < pairs.D


def of_both_roles(pairs: SetPairs, want_moment: bool) -> bool:
    """Whether a block holds g_ij + g_ji: the queries are the keys, and no moments are wanted, which are of queries."""
    one = pairs.P == pairs.q.shape[0] == 1
    return one and pairs.keys_are_queries and not (pairs.given_self or want_moment)


def gradients_by_blocks(
    pairs: SetPairs, rows: Tensor, bound: Tensor, want_q: bool, want_k: bool, want_moment: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, of both if they are the keys, and of the keys, as one split [1, views, N or M, D].

    And the moments [splits, S, P, N] where they are wanted.
    """
    both = of_both_roles(pairs, want_moment)
    tile, product = pairs.tile("triangles" if both else "blocks", want_moment), pairs.tile("products")
    whole = max(tile.block_m, tile.block_n, product.block_m, product.block_n)
    split = split_size(pairs, tile, whole, both)
    largest = next(blocks(pairs, whole), Block(0, 0, 0, 0, 0, 0))
    most = parts_of(largest, tile, split)
    space = workspace(pairs, largest, most)
    grad_q = pairs.empty(1, *pairs.q.shape).zero_() if want_q else pairs.empty(0)
    grad_k = pairs.empty(1, *pairs.k.shape).zero_() if want_k else pairs.empty(0)
    moment = pairs.empty(most.rows, pairs.S, pairs.P, pairs.N).zero_() if want_moment else bound
    sides = []
    if want_q:
        sides.append(Side(pairs.q, pairs.k, pairs.q_unit, pairs.q_view, pairs.k_view, grad_q, True))
    if want_k or (want_q and pairs.keys_are_queries):
        grad = grad_k if want_k else grad_q
        sides.append(Side(pairs.k, pairs.q, pairs.k_unit, pairs.k_view, pairs.q_view, grad, False))
    if pairs.q.dtype == torch.float16:
        sizes = bound.numel(), pairs.q_norm.numel(), pairs.k_norm.numel()
        flags = {"NORMALIZE": pairs.normalize, "BLOCK": 4096}
        start(scale_kernel, (1,), bound, pairs.q_unit, pairs.k_unit, space.scale, *sizes, **flags)
    for block in blocks(pairs, whole, both):
        fill(pairs, tile, block, space, rows, moment, split)
        parts = parts_of(block, tile, split)
        if both and block.i == block.j:  # where the sums of columns are further parts of those of rows
            add_product(pairs, product, block, space, sides[0], Parts(sum(parts), 0))
        else:
            for side in sides:
                add_product(pairs, product, block, space, side, parts)
    return grad_q, grad_k, moment


def blocks(pairs: SetPairs, whole: int, both: bool = False) -> Iterator[Block]:
    """All blocks, the largest first; ``whole``: rows and columns of whole tiles; ``both``: none below the diagonal."""
    sides = cdiv(pairs.N, whole) * whole, cdiv(pairs.M, whole) * whole
    height = longest(sides[0], sides[1], whole)
    width = longest(sides[1], height, whole)
    together = max(1, SIDE * SIDE // max(1, height * width)) if (height, width) == sides else 1
    for p in range(0, pairs.P, together):
        for i in range(0, pairs.N, max(1, height)):
            for j in range(i if both else 0, pairs.M, max(1, width)):
                sizes = min(height, sides[0] - i), min(width, sides[1] - j)
                yield Block(i, j, p, min(together, pairs.P - p), *sizes)


def longest(side: int, other: int, whole: int) -> int:
    """How much of a side a block has: SIDE, or more where the other side is shorter than that."""
    return min(side, max(SIDE, SIDE * SIDE // max(whole, other) // whole * whole))


def split_size(pairs: SetPairs, tile: Tile, whole: int, both: bool) -> int:
    """Keys of a program that fills a block: SPAN, but no more than make two programs for each core.

    Of a block on the diagonal (``both``) half of the programs have nothing to do.
    """
    first = next(blocks(pairs, whole), None)
    if first is None:
        return tile.block_n
    programs = first.height // tile.block_m * first.pairs
    wanted = first.width * programs // ((4 if both else 2) * pairs.processor.cores)
    return max(tile.block_n, min(SPAN, power_of_two(wanted + 1) // 2))


def parts_of(block: Block, tile: Tile, split: int) -> Parts:
    """A sum of a row by every program that fills some of it, and a sum of a column by every tile of rows."""
    return Parts(cdiv(block.width, split), block.height // tile.block_m)


def workspace(pairs: SetPairs, largest: Block, parts: Parts) -> Workspace:
    """Arrays that hold the largest block; sums only where the gradient of a row needs them."""
    one, needed = largest.pairs, not (pairs.normalize or pairs.inner_product)
    sums = one * (parts.rows * largest.height + parts.columns * largest.width)
    block = pairs.q.new_empty(one * largest.height * largest.width)
    return Workspace(block, pairs.empty(sums if needed else 0), pairs.empty(2))


def column_sums(space: Workspace, block: Block, parts: Parts) -> Tensor:
    """Those of the columns stand behind those of the rows."""
    return space.sums[parts.rows * block.pairs * block.height :]


def fill(pairs: SetPairs, tile: Tile, block: Block, space: Workspace, rows: Tensor, moment: Tensor, split: int) -> None:
    """Writes the coefficients of a block, and adds to the moments where ``moment`` has rows of its own."""
    grid = block.height // tile.block_m * block.pairs, cdiv(block.width, split)
    sizes = pairs.N, pairs.M, pairs.D, pairs.P, *block[:3], *block[4:], split
    results = space.block, space.sums, column_sums(space, block, parts_of(block, tile, split)), moment
    want_moment = moment.dim() == 4
    start(
        block_kernel, grid, *pairs.sides, rows, space.scale, *results, *sizes, **pairs.constants(),
        **tile.constants(False), CANCELLING=pairs.cancelling, WANT_TAU=want_moment, GIVEN_SELF=pairs.given_self,
        CHUNKS=tile.constant_of_chunks(pairs.D), BOTH_ROLES=of_both_roles(pairs, want_moment),
    )  # fmt: skip


def add_product(pairs: SetPairs, tile: Tile, block: Block, space: Workspace, side: Side, parts: Parts) -> None:
    """Adds the product of a block, or of its transpose, with rows of the other side."""
    i, j, x_rows = (block.i, block.j, block.height) if side.query else (block.j, block.i, block.width)
    views = 1 if block.pairs == 1 else side.x.shape[0]
    grid = x_rows // tile.block_m * cdiv(pairs.D, tile.block_out), views
    sums, number = (space.sums, parts.rows) if side.query else (column_sums(space, block, parts), parts.columns)
    sizes = side.x.shape[1], side.y.shape[1], pairs.D, i, j, block.p, block.pairs, block.height, block.width, number
    constants = pairs.constants()
    flags = {name: constants[name] for name in ("INNER_PRODUCT", "NORMALIZE", "PRECISION")}
    start(
        product_kernel, grid, side.x, side.y, side.unit, side.x_view, side.y_view, space.block, sums, space.scale,
        side.grad, *sizes, QUERY=side.query, **flags, **product_constants(tile),
    )  # fmt: skip


def product_constants(tile: Tile) -> dict[str, int]:
    """The constants of a launch of ``product_kernel``."""
    return {name: size for name, size in tile.constants(True).items() if name != "BLOCK_D"}
