"""``contrast_triton`` and its gradient, as launches of kernels. Arguments and results: the operators' schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...operators.contrast import unpack
from ...operators.repulsion import as_contrast, with_views
from ...reference import entropy_of
from ...types import PAIRINGS, arithmetic_dtype
from . import blocks, tuning
from .kernels.coefficients import coefficients_kernel
from .kernels.gradient import gradient_kernel
from .kernels.merge import merge_kernel
from .kernels.norms import norms_kernel
from .kernels.statistics import statistics_kernel
from .kernels.total import add_splits_kernel, grad_tau_kernel
from .kernels.unit import unit_gradient_kernel, unit_kernel
from .launch import cdiv, on_device_of_first, start, width_of
from .pairs import Arguments, SetPairs, Split, view_table
from .table import Tile, processor_of

ROWS = 128  # of a program that works on rows, not on tiles


class Statistics(NamedTuple):
    """Results of a forward pass, float64."""

    value: Tensor  # [S, P, N]
    lse: Tensor  # [S, P, N]
    row_state: Tensor  # [3, S, P, N]: what the weights of a row are made of


class Coefficients(NamedTuple):
    """What the gradients of rows are made of."""

    rows: Tensor  # [5, S, P, N]
    bound: Tensor  # of |dL/dc|, by program of coefficients_kernel


class Incoming(NamedTuple):
    """Gradients that arrive at value and lse, [S, P, N] float64."""

    value: Tensor
    lse: Tensor


class Wanted(NamedTuple):
    """Which gradients of ``contrast`` are wanted, and whether the weights are constants."""

    q: bool
    k: bool
    tau: bool
    detach_weights: bool = False


# ---- the operators ---------------------------------------------------------------------------------------------------
@on_device_of_first
def contrast(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Value, lse and row state: one sweep over the keys."""
    *sets, _detach_weights, q_self, normalize = arguments
    value, lse, row_state = statistics(set_pairs(Arguments._make((*sets, normalize, q_self))))
    return value, lse, row_state


@on_device_of_first
def contrast_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients: one sweep for the queries (for both, if they are the keys), one for the keys."""
    sets, (detach_weights, q_self, normalize, *tensors, want_q, want_k, want_tau) = arguments[:9], arguments[9:]
    value, row_state, grad_value, grad_lse = (t.contiguous() for t in tensors)
    pairs = set_pairs(Arguments._make((*sets, normalize, q_self)))
    wanted = Wanted(want_q, want_k, want_tau, detach_weights)
    return gradients(pairs, value, row_state, Incoming(grad_value, grad_lse), wanted)


@on_device_of_first
def repulsion(*arguments: Any) -> tuple[Tensor, ...]:
    """Mean cost and entropy, and their gradients from sweeps of their own."""
    views, keys, tau, pairing, normalize, *want = arguments
    q, k, spec = as_contrast(views, keys, PAIRINGS[pairing], normalize)
    pairs = set_pairs(Arguments._make((*unpack(q, k, tau, spec)[:9], normalize, None)))
    value, lse, row_state = statistics(pairs)
    grads = pairs.empty(0), pairs.empty(0), tau.new_empty(0)
    if any(want):
        incoming = Incoming(torch.full_like(value, 1 / value.numel()), torch.zeros_like(value))
        grads = gradients(pairs, value, row_state, incoming, Wanted(*want))
    return value.mean(), entropy_of(value, lse, tau), *with_views(grads, keys)


# ---- forward ---------------------------------------------------------------------------------------------------------
def set_pairs(given: Arguments) -> SetPairs:
    """Contiguous arguments, and the norms of queries and keys (one launch)."""
    q, q_id, tau = readable(given.q), given.q_id, given.tau.contiguous()
    k, k_id = (q, q_id) if given.k is None else (readable(given.k), given.k_id)
    views = view_table(tuple(given.q_index), q.device), view_table(tuple(given.k_index), q.device)
    ids, given_self = views, False  # not read
    if q_id is not None and k_id is not None and any(given.kinds):
        given_self = given.q_self is not None
        ids = q_id.contiguous() if given.q_self is None else torch.stack([q_id, given.q_self]), k_id.contiguous()
    flags = given.inner_product, given.k is None, given_self
    known = units(q, k) if given.normalize else (*norms(q, k, tau), None, None)
    sets: tuple[Any, ...] = (*known, *ids, tau, *views, tuple(given.kinds), *flags)
    return SetPairs(q, k, *sets)


def readable(x: Tensor) -> Tensor:
    """Contiguous; for the interpreter, which cannot multiply bfloat16, in float32 instead."""
    interpreted = processor_of(x.device).family == "interpreter"
    return (x.float() if interpreted and x.dtype == torch.bfloat16 else x).contiguous()


def norms(q: Tensor, k: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Squared lengths of all rows."""
    q_rows, k_rows, D = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1], q.shape[2]
    q_norm = q.new_empty(q_rows, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    k_norm = q_norm if k is q else k.new_empty(k_rows, dtype=q_norm.dtype)
    block = 32
    blocks = cdiv(q_rows, block) + (0 if k is q else cdiv(k_rows, block))
    sizes = {"SOFTMAXES": tau.numel(), "BLOCK_M": block, "BLOCK_D": width_of(D, 128)}
    start(norms_kernel, (blocks,), q, k, q_norm, other(k_norm, q_norm), tau, q_rows, k_rows, D, **sizes)
    return q_norm, k_norm


def units(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared lengths of all rows as unit rows, and the factors that make those."""
    q_rows, k_rows, D = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1], q.shape[2]
    q_norm = q.new_empty(q_rows, dtype=arithmetic_dtype(q))
    k_norm = q_norm if k is q else q_norm.new_empty(k_rows)
    q_unit = torch.empty_like(q_norm)
    k_unit = q_unit if k is q else torch.empty_like(k_norm)
    block = 32
    blocks = cdiv(q_rows, block) + (0 if k is q else cdiv(k_rows, block))
    sizes = {"BLOCK_M": block, "BLOCK_D": width_of(D, 64)}
    written = q_norm, other(k_norm, q_norm), q_unit, other(k_unit, q_unit)
    start(unit_kernel, (blocks,), q, k, *written, q_rows, k_rows, D, **sizes)
    return q_norm, k_norm, q_unit, k_unit


def other(x: Tensor, first: Tensor) -> Tensor:
    """``x``, or nothing if it is ``first``.

    A compiler gives a kernel copies of what it writes. Of a result that is passed twice there are two, and the one that
    nobody writes would count.
    """
    return x.new_empty(0) if x is first else x


def statistics(pairs: SetPairs) -> Statistics:
    """What the operator returns, which is made of one sweep."""
    partial_state = tuning.run(pairs, "statistics", statistics_sweep)
    shape = pairs.S, pairs.P, pairs.N
    value, row_state = pairs.empty(*shape, dtype=torch.float64), pairs.empty(3, *shape, dtype=torch.float64)
    found = Statistics(value, torch.empty_like(value), row_state)
    start(
        merge_kernel, (cdiv(pairs.N, ROWS) * pairs.P, pairs.S), partial_state, pairs.q_norm, pairs.tau, pairs.q_view,
        *found, pairs.N, pairs.P, partial_state.shape[0], **pairs.row_constants(), BLOCK_M=ROWS,
    )  # fmt: skip
    return found


def statistics_sweep(pairs: SetPairs, tile: Tile) -> Tensor:
    """What ``merge_kernel`` merges [splits, 3, S, P, N]."""
    blocks = cdiv(pairs.N, tile.block_m) * pairs.P
    split = pairs.split(blocks, pairs.M, tile.block_n, 3 * pairs.S * pairs.P * pairs.N * 8)
    partial_state = pairs.empty(split.number, 3, pairs.S, pairs.P, pairs.N)
    start(
        statistics_kernel, (blocks, split.number), *pairs.sides, partial_state, pairs.N, pairs.M, pairs.D, pairs.P,
        split.size, **pairs.constants(), CHUNKS=tile.constant_of_chunks(pairs.D), **tile.constants(False),
        GIVEN_SELF=pairs.given_self, WHOLE=pairs.whole("statistics", tile, pairs.M),
    )  # fmt: skip
    return partial_state


# ---- backward --------------------------------------------------------------------------------------------------------
def gradients(
    pairs: SetPairs, value: Tensor, row_state: Tensor, incoming: Incoming, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of queries, keys and temperatures, as far as they are wanted."""
    coefficients = row_coefficients(pairs, value, row_state, incoming, wanted.detach_weights)
    moments = wanted.tau and not wanted.detach_weights
    grad_q, grad_k, grad_tau = pairs.empty(0), pairs.empty(0), pairs.tau.new_empty(0)
    if wanted.tau:
        grad_tau = torch.zeros_like(pairs.tau)
    of_keys = wanted.k and not pairs.keys_are_queries
    swept = sweeps(pairs, coefficients, Wanted(wanted.q, of_keys, moments))
    if wanted.q:
        grad_q = whole_gradient(pairs.q, swept.q, pairs.normalize)
    if of_keys:
        grad_k = whole_gradient(pairs.k, swept.k, pairs.normalize)
    if moments:
        grad_tau = temperature_gradient(pairs, swept.moment, coefficients.rows, value, row_state[1], incoming.lse)
    return grad_q, grad_k, grad_tau


class Swept(NamedTuple):
    """What sweeps over the similarities leave of a gradient, as splits; anything where nothing is wanted."""

    q: Tensor  # [splits, views, N, D]: of both, if the keys are the queries
    k: Tensor  # [splits, views, M, D]
    moment: Tensor  # [splits, S, P, N]


def sweeps(pairs: SetPairs, coefficients: Coefficients, wanted: Wanted) -> Swept:
    """Gradients by the way that pays for this many features; ``wanted.tau``: the moments."""
    q, k, moment = pairs.empty(0), pairs.empty(0), coefficients.bound
    if not any(wanted):
        return Swept(q, k, moment)
    if blocks.pay(pairs):
        return Swept(*blocks.gradients_by_blocks(pairs, *coefficients, wanted.q, wanted.k, wanted.tau))
    if wanted.q or wanted.tau:
        q, moment = tuning.run(pairs, "gradient", query_sweep, *coefficients, wanted.tau)
    if wanted.k:
        k = tuning.run(pairs, "gradient", key_sweep, *coefficients)
    return Swept(q, k, moment)


def row_coefficients(
    pairs: SetPairs, value: Tensor, row_state: Tensor, incoming: Incoming, detach_weights: bool
) -> Coefficients:
    """What the sweeps of the gradient multiply weights with."""
    blocks = cdiv(pairs.N, ROWS) * pairs.P
    found = Coefficients(pairs.empty(5, pairs.S, pairs.P, pairs.N), pairs.empty(blocks))
    flags = {"SOFTMAXES": pairs.S, "CANCELLING": pairs.cancelling, "DETACH": detach_weights}
    start(
        coefficients_kernel, (blocks,), row_state, value, *incoming, pairs.tau, pairs.q_norm, pairs.q_view, *found,
        pairs.N, pairs.P, **flags, **pairs.row_constants(), BLOCK_M=ROWS,
    )  # fmt: skip
    return found


def query_sweep(pairs: SetPairs, tile: Tile, rows: Tensor, bound: Tensor, want_moment: bool) -> tuple[Tensor, Tensor]:
    """Gradient of the queries, of both if they are the keys, as splits [splits, views, N, D].

    And the moments [splits, S, P, N] where they are wanted.
    """
    coefficients, sides = Coefficients(rows, bound), 2 if pairs.keys_are_queries else 1
    split = _gradient_split(pairs, tile, pairs.q, pairs.M, sides)
    partial = pairs.empty(sides * split.number, *pairs.q.shape)
    moment = pairs.empty(split.number, pairs.S, pairs.P, pairs.N) if want_moment else bound
    grads = _Gradients(partial[: split.number], moment, {"QUERY": True, "WANT_TAU": want_moment})
    _sweep(pairs, tile, pairs.sides, coefficients, grads, split)
    if pairs.keys_are_queries:
        _sweep_keys(pairs, tile, coefficients, partial[split.number :], split)
    return partial, moment


def key_sweep(pairs: SetPairs, tile: Tile, rows: Tensor, bound: Tensor) -> Tensor:
    """Gradient of keys that are not the queries, as splits [splits, views, M, D]."""
    split = _gradient_split(pairs, tile, pairs.k, pairs.N, 1)
    partial = pairs.empty(split.number, *pairs.k.shape)
    _sweep_keys(pairs, tile, Coefficients(rows, bound), partial, split)
    return partial


class _Gradients(NamedTuple):
    """What one launch of ``gradient_kernel`` writes, and which gradient that is."""

    partial: Tensor  # [splits, views, rows, D]
    moment: Tensor
    role: dict[str, bool]


def _sweep_keys(pairs: SetPairs, tile: Tile, coefficients: Coefficients, partial: Tensor, split: Split) -> None:
    grads = _Gradients(partial, coefficients.bound, {"QUERY": False, "WANT_TAU": False})
    _sweep(pairs, tile, pairs.sides_exchanged, coefficients, grads, split)


def _gradient_split(pairs: SetPairs, tile: Tile, x: Tensor, others: int, sides: int) -> Split:
    programs = cdiv(x.shape[1], tile.block_m) * x.shape[0] * cdiv(pairs.D, tile.block_out)
    return pairs.split(programs, others, tile.block_n, sides * x.numel() * 8)


def _sweep(
    pairs: SetPairs,
    tile: Tile,
    arrays: tuple[Any, ...],
    coefficients: Coefficients,
    grads: _Gradients,
    split: Split,
) -> None:
    """Gradient of the first of ``arrays``, which meets the second."""
    (views, rows, D), others = arrays[0].shape, arrays[1].shape[1]
    grid = cdiv(rows, tile.block_m), views * split.number, cdiv(D, tile.block_out)
    sizes = rows, others, D, pairs.P, coefficients.bound.numel(), *split
    start(
        gradient_kernel, grid, *arrays, *coefficients, grads.partial, grads.moment, *sizes, **grads.role,
        **pairs.constants(), CANCELLING=pairs.cancelling, CHUNKS=tile.constant_of_chunks(D), **tile.constants(True),
        GIVEN_SELF=pairs.given_self, WHOLE=pairs.whole("gradient", tile, others),
    )  # fmt: skip


def whole_gradient(x: Tensor, partial: Tensor, normalize: bool) -> Tensor:
    """The gradient of ``x`` from its splits."""
    if not normalize:
        return add_splits(partial)
    out = torch.empty_like(partial[0])
    unit_gradient(x, partial, out)
    return out


def unit_gradient(x: Tensor, partial: Tensor, out: Tensor) -> None:
    """The gradient of raw rows from splits of that of their unit rows; ``out`` may be the only split.

    Not the last step of a sweep, which seldom has whole rows (splits, blocks of features, two sides): against its
    products it is nothing.
    """
    D = x.shape[-1]
    rows, width = x.numel() // max(1, D), width_of(D, 256)
    block = (1024 if width >= D else 2048) // width  # tiles that spill no registers
    sizes = {"CHUNKS": min(2, cdiv(D, width)), "BLOCK_M": block, "BLOCK_D": width}
    start(unit_gradient_kernel, (cdiv(rows, block),), x, partial, out, rows, D, partial.shape[0], **sizes)


def add_splits(partial: Tensor) -> Tensor:
    """Sum over the first axis, in order."""
    if partial.shape[0] == 1:
        return partial[0]
    out, block = torch.empty_like(partial[0]), 1024
    start(add_splits_kernel, (cdiv(out.numel(), block),), partial, out, out.numel(), partial.shape[0], BLOCK=block)
    return out


def temperature_gradient(
    pairs: SetPairs, moment: Tensor, coefficients: Tensor, value: Tensor, sum_e: Tensor, grad_lse: Tensor
) -> Tensor:
    """Derivatives of the temperatures [S]."""
    grad_tau = pairs.empty(pairs.S, dtype=torch.float64)
    arrays = moment, coefficients, value, sum_e, grad_lse, grad_tau
    start(grad_tau_kernel, (pairs.S,), *arrays, pairs.P * pairs.N, moment.shape[0], BLOCK=1024)
    return grad_tau
