"""``normalize`` of the CUDA kernels' operators, in the emulation: raw rows in, gradients of raw rows out.

The yardstick is that of the CPU kernels: unit rows and the plain formula in float32, against float64. Half types are
multiplied as they are, so their errors are those of float32, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from cacr_kernels.types import CACROptions
from tests.covering import covering_set
from tests.cpu.test_raw_rows import (
    NEAR,
    SETS,
    VIEWS,
    Found,
    assert_as_exact_as_eager,
    attraction,
    contrast,
    error,
    fused,
    near,
    options_of,
    raw,
    sized,
)
from tests.cuda.emulated_backend import emulated_cuda
from tests.cuda.emulated_cuda import Emulation
from tests.losses import test_normalize as of_losses
from tests.losses.test_normalize import each_case

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

HALF = {"bf16": torch.bfloat16, "f16": torch.float16}
ARITHMETICS = ["float", "tf32x3", "double", "bf16", "f16"]
LENGTHS = ["all alike", "3 apart", "1e-3 to 1e3", "1e-17 to 1e10"]
IN_FLOAT16 = "3 apart"  # of those that are farther apart float16 has not all, and coefficients share its range
SHAPES = [(37, 29, 19), (5, 70, 64), (67, 101, 33), (130, 40, 1), (16, 16, 300)]  # N, M, D
VIEW_SHAPES = [(2, 37, 19), (3, 30, 64), (2, 70, 33), (5, 1, 8), (4, 13, 128), (2, 50, 1)]  # V, B, D
FLOAT_EPS = torch.finfo(torch.float32).eps
PLAIN = CACROptions(1.0, 1.0, 1.0, 1.0, 0, False, 2.0, True)
Run = Callable[[int, torch.dtype, torch.dtype, str, torch.dtype | None], Found]


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    with emulated_cuda() as found:
        yield found


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations that hold every pair of values of two axes."""
    chosen = covering_set([len(axis) for axis in axes], 2)
    return [tuple(axis[i] for axis, i in zip(axes, at, strict=True)) for at in chosen]


def assert_promise(emulation: Emulation, arithmetic: str, run: Run) -> None:
    """``run(seed, type of the inputs, type of the arithmetic, backend, half)`` is as exact on "cuda" as eager is."""
    emulation.float32 = arithmetic if arithmetic == "tf32x3" else "float"
    dtype = torch.float64 if arithmetic == "double" else torch.float32
    half = HALF.get(arithmetic)
    given = half or dtype
    assert_as_exact_as_eager(
        lambda seed, t: run(seed, given, t, "cuda", half), lambda seed, t: run(seed, given, t, "plain", None), dtype
    )


# ---- all lengths -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arithmetic", "name", "shape", "lengths", "own"),
    pairwise(ARITHMETICS, list(SETS), SHAPES, LENGTHS, [False, True]),
)
def test_contrast(
    emulation: Emulation, arithmetic: str, name: str, shape: tuple[int, int, int], lengths: str, own: bool
) -> None:
    lengths = IN_FLOAT16 if arithmetic == "f16" else lengths
    n, m, dim = shape

    def run(seed: int, given: torch.dtype, precision: torch.dtype, backend: str, half: torch.dtype | None) -> Found:
        q, k = raw(2, n, dim, lengths=lengths, seed=seed), raw(2, m, dim, lengths=lengths, seed=seed + 50)
        q, k = (x.to(given).to(precision) for x in (q, k))
        return contrast(name, q, None if own else k, backend, half)

    assert_promise(emulation, arithmetic, run)


@pytest.mark.parametrize(
    ("arithmetic", "name", "shape", "lengths"), pairwise(ARITHMETICS, list(VIEWS), VIEW_SHAPES, LENGTHS)
)
def test_fused_loss(
    emulation: Emulation, arithmetic: str, name: str, shape: tuple[int, int, int], lengths: str
) -> None:
    lengths = IN_FLOAT16 if arithmetic == "f16" else lengths

    def run(seed: int, given: torch.dtype, precision: torch.dtype, backend: str, half: torch.dtype | None) -> Found:
        z = raw(*shape, lengths=lengths, seed=seed).to(given).to(precision)
        return fused(z, options_of(name), backend, half)

    assert_promise(emulation, arithmetic, run)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["other", "inner"])
def test_lengths_of_float16_that_are_far_apart(emulation: Emulation, name: str, own: bool) -> None:
    """Coefficients share the range of float16: of lengths 1e6 apart they keep more than its own precision."""
    q, k = (raw(2, n, 19, lengths="1e-3 to 1e3", seed=n).half().double() for n in (37, 67))
    k = None if own else k
    found = contrast(name, q.float(), None if k is None else k.float(), "cuda", torch.float16)
    assert max(error(found, contrast(name, q, k, "plain"))) <= 128 * FLOAT_EPS


@pytest.mark.parametrize("long", ["queries", "keys"])
def test_factors_of_one_side_that_are_large(emulation: Emulation, long: str) -> None:
    """The coefficients of queries hold factors of keys, those of keys factors of queries: each side has its scale."""
    q, k = (raw(2, n, 19, lengths="3 apart", seed=n) for n in (37, 67))
    q, k = (q * 1e3, k / 1e3) if long == "queries" else (q / 1e3, k * 1e3)
    q, k = q.half().double(), k.half().double()
    found = contrast("other", q.float(), k.float(), "cuda", torch.float16)
    assert max(error(found, contrast("other", q, k, "plain"))) <= 16 * FLOAT_EPS


# ---- nearly equal rows -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("distance", "tolerance"), NEAR)
@pytest.mark.parametrize("operands", ["views", "a set and another", "one set"])
def test_attraction_of_nearly_equal_rows(
    emulation: Emulation, operands: str, distance: float, tolerance: float
) -> None:
    """Unit rows would be rounded before their difference is taken: 4e-5 off at a distance of 1e-3."""
    for dim, float32 in ((8, "float"), (33, "tf32x3"), (128, "float")):
        emulation.float32 = float32
        z = near(distance, dim, seed=dim, count=19)
        (value, gradient), (truth, right) = attraction(z, operands, "cuda"), attraction(z.double(), operands, "plain")
        assert abs(value - truth) <= tolerance * truth
        if operands == "views":
            assert (sized(gradient, z) - sized(right, z)).abs().max() <= 1e-6 * sized(right, z).abs().max()


# ---- rows at the edge, bad numbers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shortest_rows_with_a_gradient(emulation: Emulation, dtype: torch.dtype) -> None:
    z = raw(2, 9, 5, lengths="all alike").to(dtype)
    z[:, 3:7] = torch.tensor([0.0, 0, 1, 0, 0])
    for i, length in ((3, 1.01e-12), (4, 1e-12 if dtype == torch.float64 else 1.0001e-12), (5, 0.99e-12), (6, 0.0)):
        z[:, i] *= length
    found, expected = fused(z, PLAIN, "cuda"), fused(z.double(), PLAIN, "plain")
    assert max(error(found, expected)) <= 20 * torch.finfo(dtype).eps
    (gradient,) = found.gradients
    assert gradient[:, 3:5].any(-1).all()
    assert not gradient[:, 5:7].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("own", [False, True])
def test_bad_numbers_reach_the_rows_that_meet_them(emulation: Emulation, bad: float, own: bool) -> None:
    q, k = raw(2, 20, 7), None if own else raw(2, 20, 7, seed=1)
    (q if k is None else k)[1, 3, 2] = bad
    found, expected = contrast("other", q, k, "cuda"), contrast("other", q, k, "plain")
    values = [x._replace(gradients=[], numbers=[], sizes=expected.sizes[:2]) for x in (found, expected)]
    assert max(error(*values)) <= 1e-12
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        assert torch.equal(a.isfinite().all(-1), b.isfinite().all(-1))


def test_zeros_meet_nothing_large(emulation: Emulation) -> None:
    """Rows of zeros in float16 do not take the range of the others."""
    q, k = (raw(2, n, 19, lengths="3 apart", seed=n) for n in (37, 67))
    k[:, ::5] = 0.0
    q, k = q.half().double(), k.half().double()
    found = contrast("other", q.float(), k.float(), "cuda", torch.float16)
    assert max(error(found, contrast("other", q, k, "plain"))) <= 16 * FLOAT_EPS


# ---- the losses ------------------------------------------------------------------------------------------------------
@each_case
def test_losses(emulation: Emulation, loss: str, options: dict[str, Any]) -> None:
    """What is asked of raw rows on the backends that run here, in all types."""
    for lengths, dtype in itertools.product(of_losses.LENGTHS, (torch.float32, torch.float64)):
        of_losses.test_rows_of_any_length(loss, options, lengths, dtype, "cuda")
    emulation.float32 = "tf32x3"
    of_losses.test_rows_of_any_length(loss, options, "any", torch.float32, "cuda")
    of_losses.test_half_types(loss, options, torch.float16, [1.0, 0.0, 60.0], "cuda")
    of_losses.test_half_types(loss, options, torch.bfloat16, [1.0, 1e10, 1e-5, 0.0], "cuda")
    of_losses.test_second_derivatives_with_zero_rows(loss, options, "cuda")
    for dtype in (torch.float32, torch.bfloat16):
        of_losses.test_nothing_more_is_kept_for_the_backward(loss, options, dtype, "cuda")


@pytest.mark.parametrize("loss", of_losses.FIRST)
def test_gradcheck(emulation: Emulation, loss: str) -> None:
    of_losses.test_gradcheck(loss, {"weight_grad": "full", "tau_pos": 0.0} if loss == "queue" else {}, "cuda")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("distance", "tolerance"), NEAR)
def test_near_positives(emulation: Emulation, distance: float, tolerance: float, reduction: str) -> None:
    of_losses.test_near_positives(distance, tolerance, 32, "cuda", reduction)
