"""``contrast_frozen_triton``: a sweep and a merge of its shares. Arguments and results: ``operators/frozen.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tuning
from .kernels.frozen import frozen_kernel, frozen_merge_kernel
from .launch import make_problem
from .problem import Problem, cdiv, on_device_of_first, power_of_two, start
from .table import Tile


@on_device_of_first
def contrast_frozen(
    q: Tensor,
    k: Tensor,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
    detach_value: bool,
    want_q: bool,
    want_tau: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, lse, means of keys and variance."""
    p = make_problem(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner)
    moments = (want_q or want_tau) and not detach_weights and not detach_value
    state, sums = tuning.run(p, "frozen", frozen_sweep, want_q, moments, two=moments)
    value = p.empty(1, p.P, p.N, dtype=torch.float64)
    lse, variance = torch.empty_like(value), torch.empty_like(value) if moments else value.new_empty(0)
    means = p.empty(1 + moments, p.P, p.N, p.D) if want_q else p.empty(0)
    flags = {"WANT_MEAN": want_q, "MOMENTS": moments}
    rows, width = 16, min(64, power_of_two(p.D))
    start(
        frozen_merge_kernel, (cdiv(p.N, rows), p.P, cdiv(p.D, width) if want_q else 1), state, sums, p.q_norm, p.tau,
        p.q_view, value, lse, variance, means, p.N, p.D, p.P, state.shape[0], **flags, INNER=inner, BLOCK=rows,
        BLOCK_D=width,
    )  # fmt: skip
    return value, lse, means, variance


def frozen_sweep(p: Problem, tile: Tile, want_mean: bool, moments: bool) -> tuple[Tensor, Tensor]:
    """What ``frozen_merge_kernel`` merges: state [shares, 4, P, N], and sums [shares, 1 or 2, P, N, D]."""
    arrays = 1 + moments
    blocks, features = cdiv(p.N, tile.block_m), cdiv(p.D, tile.block_out) if want_mean else 1
    row_bytes = 8 * p.P * p.N * (arrays * p.D if want_mean else 4)
    share, shares = p.shares(blocks * p.P * features, p.M, tile.block_n, row_bytes)
    state = p.empty(shares, 4, p.P, p.N)
    sums = p.empty(shares, arrays, p.P, p.N, p.D) if want_mean else state
    flags = {"WANT_MEAN": want_mean, "MOMENTS": moments}
    given = p.q, p.k, p.q_norm, p.k_norm, p.q_id, p.k_id, p.tau, p.q_view, p.k_view
    start(
        frozen_kernel, (blocks, p.P, shares * features), *given, state, sums, p.N, p.M, p.D, p.P, share, features,
        **flags, **p.constants(), CHUNKS=tile.chunks(p.D), **tile.constants(True),
    )  # fmt: skip
    return state, sums
