"""``detached_keys_triton``: a sweep and a merge of its splits. Arguments and results: the operator's schema."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tuning
from .contrast import set_pairs
from .kernels.detached_keys import detached_keys_kernel, detached_keys_merge_kernel
from .launch import cdiv, on_device_of_first, start, width_of
from .pairs import Arguments, SetPairs
from .table import Tile


@on_device_of_first
def detached_keys(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, lse, means of keys and variance."""
    sets, (detach_weights, detach_value, normalize, want_q, want_tau) = arguments[:9], arguments[9:]
    pairs = set_pairs(Arguments._make((*sets, normalize, None)))
    moments = (want_q or want_tau) and not detach_weights and not detach_value
    state, sums = tuning.run(pairs, "detached_keys", detached_keys_sweep, want_q, moments, two=moments)
    value = pairs.empty(1, pairs.P, pairs.N, dtype=torch.float64)
    lse, variance = torch.empty_like(value), torch.empty_like(value) if moments else value.new_empty(0)
    means = pairs.empty(1 + moments, pairs.P, pairs.N, pairs.D) if want_q else pairs.empty(0)
    rows, width = 16, width_of(pairs.D, 64)
    grid = cdiv(pairs.N, rows), pairs.P, cdiv(pairs.D, width) if want_q else 1
    flags = {"WANT_MEAN": want_q, "MOMENTS": moments, "INNER_PRODUCT": pairs.inner_product}
    start(
        detached_keys_merge_kernel, grid, state, sums, pairs.q_norm, pairs.tau, pairs.q_view, value, lse, variance,
        means, pairs.N, pairs.D, pairs.P, state.shape[0], **flags, BLOCK_M=rows, BLOCK_D=width,
    )  # fmt: skip
    return value, lse, means, variance


def detached_keys_sweep(pairs: SetPairs, tile: Tile, want_mean: bool, moments: bool) -> tuple[Tensor, Tensor]:
    """What the merge takes: state [splits, 4, P, N], and sums [splits, 1 or 2, P, N, D]."""
    arrays = 1 + moments
    blocks, features = cdiv(pairs.N, tile.block_m), cdiv(pairs.D, tile.block_out) if want_mean else 1
    result_bytes = 8 * pairs.P * pairs.N * (arrays * pairs.D if want_mean else 4)
    split = pairs.split(blocks * pairs.P * features, pairs.M, tile.block_n, result_bytes)
    state = pairs.empty(split.number, 4, pairs.P, pairs.N)
    sums = pairs.empty(split.number, arrays, pairs.P, pairs.N, pairs.D) if want_mean else state
    flags = {"WANT_MEAN": want_mean, "MOMENTS": moments}
    start(
        detached_keys_kernel, (blocks, pairs.P, split.number * features), *pairs.sides, state, sums,
        pairs.N, pairs.M, pairs.D, pairs.P, split.size, features,
        **flags, **pairs.constants(), CHUNKS=tile.constant_of_chunks(pairs.D), **tile.constants(True),
    )  # fmt: skip
    return state, sums
