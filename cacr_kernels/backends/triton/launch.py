"""The general path: ``contrast`` and its backward, as launches of kernels. Arguments and results: ``ops.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tuning
from .kernels.coefficients import coefficients_kernel
from .kernels.gradient import gradient_kernel
from .kernels.merge import merge_kernel
from .kernels.norms import norms_kernel
from .kernels.statistics import statistics_kernel
from .kernels.total import add_shares_kernel, grad_tau_kernel
from .problem import Problem, cdiv, on_device_of_first, power_of_two, start, view_table
from .table import Tile, processor_of

ROWS = 128  # of a program that works on rows, not on tiles


def make_problem(
    q: Tensor,
    k: Tensor | None,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
) -> Problem:
    """Contiguous arguments, and the norms of queries and keys (one launch)."""
    own = k is None
    q = readable(q)
    k, k_id = (q, q_id) if k is None else (readable(k), k_id)
    q_view, k_view = view_table(tuple(q_index), q.device), view_table(tuple(k_index), q.device)
    ids = (q_view, k_view)
    if q_id is not None and k_id is not None and any(kinds):
        ids = q_id.contiguous(), k_id.contiguous()
    tau = tau.contiguous()
    q_norm, k_norm = norms(q, q if own else k, tau)
    return Problem(q, k, q_norm, k_norm, *ids, tau, q_view, k_view, tuple(kinds), inner, own)


def readable(x: Tensor) -> Tensor:
    """Contiguous; the interpreter cannot multiply bfloat16."""
    interpreted = processor_of(x.device).family == "interpreter"
    return (x.float() if interpreted and x.dtype == torch.bfloat16 else x).contiguous()


def norms(q: Tensor, k: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Squared lengths of all rows."""
    rows, k_rows, D = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1], q.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_norm = q.new_empty(rows, dtype=dtype)
    k_norm = q_norm if k is q else k.new_empty(k_rows, dtype=dtype)
    block = 32
    blocks = cdiv(rows, block) + (0 if k is q else cdiv(k_rows, block))
    sizes = {"SOFTMAXES": tau.numel(), "BLOCK_R": block, "BLOCK_D": min(128, power_of_two(D))}
    start(norms_kernel, (blocks,), q, k, q_norm, k_norm, tau, rows, k_rows, D, **sizes)
    return q_norm, k_norm


@on_device_of_first
def contrast(
    q: Tensor,
    k: Tensor | None,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``contrast_triton``; weights are base, sum e and mean z of each row."""
    return statistics(make_problem(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner))


def statistics(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Value and lse [S, P, N], and the three numbers [3, S, P, N] that the weights of a row are made of."""
    state = tuning.run(p, "statistics", statistics_sweep)
    value = p.empty(p.S, p.P, p.N, dtype=torch.float64)
    lse, weights = torch.empty_like(value), p.empty(3, p.S, p.P, p.N, dtype=torch.float64)
    by_cost = {"BY_COST0": p.by_cost(0), "BY_COST1": p.by_cost(p.S - 1)}
    start(
        merge_kernel, (cdiv(p.N, ROWS) * p.P, p.S), state, p.q_norm, p.tau, p.q_view, value, lse, weights,
        p.N, p.P, state.shape[0], KIND1=p.second, **by_cost, INNER=p.inner, BLOCK=ROWS,
    )  # fmt: skip
    return value, lse, weights


def statistics_sweep(p: Problem, tile: Tile) -> Tensor:
    """What ``merge_kernel`` merges [shares, 3, S, P, N]."""
    blocks = cdiv(p.N, tile.block_m)
    share, shares = p.shares(blocks * p.P, p.M, tile.block_n, 3 * p.S * p.P * p.N * 8)
    state = p.empty(shares, 3, p.S, p.P, p.N)
    arrays = p.q, p.k, p.q_norm, p.k_norm, p.q_id, p.k_id, p.tau, p.q_view, p.k_view
    start(
        statistics_kernel, (blocks * p.P, shares), *arrays, state, p.N, p.M, p.D, p.P, share, **p.constants(),
        CHUNKS=tile.chunks(p.D), **tile.constants(False),
    )  # fmt: skip
    return state


@on_device_of_first
def contrast_backward(
    q: Tensor,
    k: Tensor | None,
    q_id: Tensor | None,
    k_id: Tensor | None,
    tau: Tensor,
    kinds: list[int],
    q_index: list[int],
    k_index: list[int],
    inner: bool,
    detach_weights: bool,
    value: Tensor,
    weights: Tensor,
    grad_value: Tensor,
    grad_lse: Tensor,
    want_q: bool,
    want_k: bool,
    want_tau: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``contrast_backward_triton``: one sweep for the queries (for both, if they are the keys), one for the keys."""
    p = make_problem(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner)
    value, weights, grad_value, grad_lse = (t.contiguous() for t in (value, weights, grad_value, grad_lse))
    rows = row_coefficients(p, value, weights, grad_value, grad_lse, detach_weights)
    moments = want_tau and not detach_weights
    grad_q, grad_k, grad_tau = p.empty(0), p.empty(0), torch.zeros_like(tau) if want_tau else tau.new_empty(0)
    if want_q or moments:
        shares, moment = tuning.run(p, "gradient", query_sweep, *rows, moments)
        grad_q = add_shares(shares) if want_q else grad_q
        if moments:
            grad_tau = temperature_gradient(p, moment, rows[0], value, weights[1], grad_lse)
    if want_k and not p.own:
        grad_k = add_shares(tuning.run(p, "gradient", key_sweep, *rows))
    return grad_q, grad_k, grad_tau


def row_coefficients(
    p: Problem, value: Tensor, weights: Tensor, grad_value: Tensor, grad_lse: Tensor, detach: bool
) -> tuple[Tensor, Tensor]:
    """What the gradients of rows are made of [5, S, P, N], and bounds of them."""
    coefficients, blocks = p.empty(5, p.S, p.P, p.N), cdiv(p.N, ROWS)
    bound = p.empty(blocks * p.P)
    flags = {"SOFTMAXES": p.S, "KIND1": p.second, "CANCELLING": p.cancelling, "DETACH": detach, "INNER": p.inner}
    by_cost = {"BY_COST0": p.by_cost(0), "BY_COST1": p.by_cost(p.S - 1)}
    start(
        coefficients_kernel, (blocks * p.P,), weights, value, grad_value, grad_lse, p.tau, p.q_norm, p.q_view,
        coefficients, bound, p.N, p.P, **flags, **by_cost, BLOCK=ROWS,
    )  # fmt: skip
    return coefficients, bound


def query_sweep(
    p: Problem, tile: Tile, coefficients: Tensor, bound: Tensor, want_moment: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the queries, of both if they are the keys, as shares [shares, views, N, D].

    And the moments [shares, S, P, N] where they are wanted.
    """
    x = p.q, p.k, p.q_norm, p.k_norm, p.q_id, p.k_id, p.tau, p.q_view, p.k_view
    sides = 2 if p.own else 1
    share, shares = _shares(p, tile, p.q, p.M, sides)
    grads = p.empty(sides * shares, *p.q.shape)
    moment = p.empty(shares, p.S, p.P, p.N) if want_moment else bound
    role = {"QUERY": True, "WANT_TAU": want_moment}
    _sweep(p, tile, x, coefficients, bound, grads[:shares], moment, share, role)
    if p.own:
        _keys(p, tile, coefficients, bound, grads[shares:], share)
    return grads, moment


def key_sweep(p: Problem, tile: Tile, coefficients: Tensor, bound: Tensor) -> Tensor:
    """Gradient of keys that are not the queries, as shares."""
    share, shares = _shares(p, tile, p.k, p.N, 1)
    grads = p.empty(shares, *p.k.shape)
    _keys(p, tile, coefficients, bound, grads, share)
    return grads


def _keys(p: Problem, tile: Tile, coefficients: Tensor, bound: Tensor, grads: Tensor, share: int) -> None:
    x = p.k, p.q, p.k_norm, p.q_norm, p.k_id, p.q_id, p.tau, p.k_view, p.q_view
    _sweep(p, tile, x, coefficients, bound, grads, bound, share, {"QUERY": False, "WANT_TAU": False})


def _shares(p: Problem, tile: Tile, x: Tensor, others: int, sides: int) -> tuple[int, int]:
    programs = cdiv(x.shape[1], tile.block_m) * x.shape[0] * cdiv(p.D, tile.block_out)
    return p.shares(programs, others, tile.block_n, sides * x.numel() * 8)


def _sweep(
    p: Problem,
    tile: Tile,
    arrays: tuple[Tensor, ...],
    coefficients: Tensor,
    bound: Tensor,
    grads: Tensor,
    moment: Tensor,
    share: int,
    role: dict[str, bool],
) -> None:
    """Gradient of the first of ``arrays``, which meets the second."""
    shares, (views, rows, D), others = grads.shape[0], arrays[0].shape, arrays[1].shape[1]
    grid = cdiv(rows, tile.block_m), views * shares, cdiv(D, tile.block_out)
    start(
        gradient_kernel, grid, *arrays, coefficients, bound, grads, moment, rows, others, D, p.P, bound.numel(),
        share, shares, **role, **p.constants(), CANCELLING=p.cancelling, CHUNKS=tile.chunks(D), **tile.constants(True),
    )  # fmt: skip


def add_shares(shares: Tensor) -> Tensor:
    """Sum over the first axis, in order."""
    if shares.shape[0] == 1:
        return shares[0]
    out, block = torch.empty_like(shares[0]), 1024
    start(add_shares_kernel, (cdiv(out.numel(), block),), shares, out, out.numel(), shares.shape[0], BLOCK=block)
    return out


def temperature_gradient(
    p: Problem, moment: Tensor, coefficients: Tensor, value: Tensor, total: Tensor, grad_lse: Tensor
) -> Tensor:
    """Derivatives of the temperatures [S]."""
    grad_tau = p.empty(p.S, dtype=torch.float64)
    arrays = moment, coefficients, value, total, grad_lse, grad_tau
    start(grad_tau_kernel, (p.S,), *arrays, p.P * p.N, moment.shape[0], BLOCK=1024)
    return grad_tau
