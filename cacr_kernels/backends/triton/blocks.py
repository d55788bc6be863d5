"""Gradients of rows with more features than a program of ``gradient_kernel`` writes: by blocks of stored coefficients.

A block has at most SIDE x SIDE coefficients: of SIDE queries and SIDE keys, of more of one where there are few of the
other, or of several pairs of sets where all of them fit. It is filled from similarities that are formed once, added to
the gradients of its queries and of its keys by two matrix products, and overwritten by the next one. So statistics and
gradients take 4U (U = 2 P N M D), and the order in which blocks are added is fixed. What it costs is the way of a block
through memory, and the workspace.
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
    row_sums: Tensor  # [splits, pairs, height]
    column_sums: Tensor  # [tiles of rows, pairs, width]
    scale: Tensor  # [2]


class Side(NamedTuple):
    """The queries or the keys: whose gradient a product is added to."""

    x: Tensor  # [views of x, N, D]
    y: Tensor  # [views of y, M, D]
    unit: Tensor | None  # factors of x
    x_view: Tensor  # [P]
    y_view: Tensor
    sums: Tensor  # of the workspace
    grad: Tensor  # [1, views of x, N, D]
    query: bool


def pay(pairs: SetPairs) -> bool:
    """Whether gradients take this way: where the other one would form a similarity more than once a side."""
    return has_blocks(pairs.precision) and pairs.tile("gradient").block_out < pairs.D


def gradients_by_blocks(
    pairs: SetPairs, rows: Tensor, bound: Tensor, want_q: bool, want_k: bool, want_moment: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, of both if they are the keys, and of the keys, as one split [1, views, N or M, D].

    And the moments [splits, S, P, N] where they are wanted.
    """
    tile, product = pairs.tile("blocks", want_moment), pairs.tile("products")
    whole = max(tile.block_m, tile.block_n, product.block_m, product.block_n)
    split = split_size(pairs, tile, whole)
    largest = next(blocks(pairs, whole), Block(0, 0, 0, 0, 0, 0))
    splits = cdiv(largest.width, split)
    space = workspace(pairs, largest, splits, largest.height // tile.block_m)
    grad_q = pairs.empty(1, *pairs.q.shape).zero_() if want_q else pairs.empty(0)
    grad_k = pairs.empty(1, *pairs.k.shape).zero_() if want_k else pairs.empty(0)
    moment = pairs.empty(splits, pairs.S, pairs.P, pairs.N).zero_() if want_moment else bound
    sides = []
    if want_q:
        views = pairs.q_view, pairs.k_view
        sides.append(Side(pairs.q, pairs.k, pairs.q_unit, *views, space.row_sums, grad_q, True))
    if want_k or (want_q and pairs.keys_are_queries):
        views, grad = (pairs.k_view, pairs.q_view), grad_k if want_k else grad_q
        sides.append(Side(pairs.k, pairs.q, pairs.k_unit, *views, space.column_sums, grad, False))
    if pairs.q.dtype == torch.float16:
        sizes = bound.numel(), pairs.q_norm.numel(), pairs.k_norm.numel()
        flags = {"NORMALIZE": pairs.normalize, "BLOCK": 4096}
        start(scale_kernel, (1,), bound, pairs.q_unit, pairs.k_unit, space.scale, *sizes, **flags)
    for block in blocks(pairs, whole):
        fill(pairs, tile, block, space, rows, moment, split)
        for side in sides:
            parts = cdiv(block.width, split) if side.query else block.height // tile.block_m
            add_product(pairs, product, block, space, side, parts)
    return grad_q, grad_k, moment


def blocks(pairs: SetPairs, whole: int) -> Iterator[Block]:
    """All blocks, the largest first; ``whole``: rows and columns of whole tiles."""
    sides = cdiv(pairs.N, whole) * whole, cdiv(pairs.M, whole) * whole
    height = longest(sides[0], sides[1], whole)
    width = longest(sides[1], height, whole)
    together = max(1, SIDE * SIDE // max(1, height * width)) if (height, width) == sides else 1
    for p in range(0, pairs.P, together):
        for i in range(0, pairs.N, max(1, height)):
            for j in range(0, pairs.M, max(1, width)):
                sizes = min(height, sides[0] - i), min(width, sides[1] - j)
                yield Block(i, j, p, min(together, pairs.P - p), *sizes)


def longest(side: int, other: int, whole: int) -> int:
    """How much of a side a block has: SIDE, or more where the other side is shorter than that."""
    return min(side, max(SIDE, SIDE * SIDE // max(whole, other) // whole * whole))


def split_size(pairs: SetPairs, tile: Tile, whole: int) -> int:
    """Keys of a program that fills a block: SPAN, but no more than make two programs for each core."""
    first = next(blocks(pairs, whole), None)
    if first is None:
        return tile.block_n
    programs = first.height // tile.block_m * first.pairs
    wanted = first.width * programs // (2 * pairs.processor.cores)
    return max(tile.block_n, min(SPAN, power_of_two(wanted + 1) // 2))


def workspace(pairs: SetPairs, largest: Block, splits: int, tiles: int) -> Workspace:
    """Arrays that hold the largest block; sums only where the gradient of a row needs them."""
    one, sums = largest.pairs, not (pairs.normalize or pairs.inner_product)
    row_sums = pairs.empty(splits * one * largest.height if sums else 0)
    column_sums = pairs.empty(tiles * one * largest.width if sums else 0)
    return Workspace(pairs.q.new_empty(one * largest.height * largest.width), row_sums, column_sums, pairs.empty(2))


def fill(pairs: SetPairs, tile: Tile, block: Block, space: Workspace, rows: Tensor, moment: Tensor, split: int) -> None:
    """Writes the coefficients of a block, and adds to the moments where ``moment`` has rows of its own."""
    grid = block.height // tile.block_m * block.pairs, cdiv(block.width, split)
    sizes = pairs.N, pairs.M, pairs.D, pairs.P, *block[:3], *block[4:], split
    start(
        block_kernel, grid, *pairs.sides, rows, space.scale, *space[:3], moment, *sizes, **pairs.constants(),
        **tile.constants(False), CANCELLING=pairs.cancelling, WANT_TAU=moment.dim() == 4, GIVEN_SELF=pairs.given_self,
        CHUNKS=tile.constant_of_chunks(pairs.D),
    )  # fmt: skip


def add_product(pairs: SetPairs, tile: Tile, block: Block, space: Workspace, side: Side, parts: int) -> None:
    """Adds the product of a block, or of its transpose, with rows of the other side; ``parts``: of the sums."""
    i, j, x_rows = (block.i, block.j, block.height) if side.query else (block.j, block.i, block.width)
    views = 1 if block.pairs == 1 else side.x.shape[0]
    grid = x_rows // tile.block_m * cdiv(pairs.D, tile.block_out), views
    sizes = side.x.shape[1], side.y.shape[1], pairs.D, i, j, block.p, block.pairs, block.height, block.width, parts
    constants = pairs.constants()
    flags = {name: constants[name] for name in ("INNER_PRODUCT", "NORMALIZE", "PRECISION")}
    start(
        product_kernel, grid, side.x, side.y, side.unit, side.x_view, side.y_view, space.block, side.sums, space.scale,
        side.grad, *sizes, QUERY=side.query, **flags, **product_constants(tile),
    )  # fmt: skip


def product_constants(tile: Tile) -> dict[str, int]:
    """The constants of a launch of ``product_kernel``."""
    return {name: size for name, size in tile.constants(True).items() if name != "BLOCK_D"}
