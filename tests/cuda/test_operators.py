"""The CUDA kernels' operators, in the emulation: shapes, sets, types and schedules against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cacr_kernels
from cacr_kernels.backends import torch as blocks
from cacr_kernels.operators.registry import operator
from cacr_kernels.types import ALL, OTHER, OTHER_NOT_SELF, PAIRINGS, SAME, SAME_NOT_SELF
from tests.cuda.emulated_backend import emulated_cuda
from tests.cuda.emulated_cuda import Call, Emulation

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

TOLERANCE = {"bf16": 2e-6, "f16": 2e-6, "tf32": 4e-3, "tf32x3": 2e-6, "float": 2e-6, "double": 1e-13}
DTYPE = {"bf16": torch.bfloat16, "f16": torch.float16, "double": torch.float64}


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    with emulated_cuda() as found:
        yield found


class Problem(NamedTuple):
    """Sizes and options of one ``contrast``; ``M`` is ``None`` where the queries are the keys."""

    N: int
    M: int | None
    D: int
    kinds: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ((0, 0), (2, 1))
    inner_product: bool = False
    detach: bool = False
    taus: tuple[float, ...] = (1.3, -2.1)
    given_self: bool = False
    lowest_id: int = 0
    normalize: bool = False  # of rows that are up to 9 times as long as others


def arguments(problem: Problem, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of the operator."""
    g = torch.Generator().manual_seed(problem.N)

    def embeddings(views: int, rows: int) -> Tensor:
        x = torch.randn(views, rows, problem.D, generator=g, dtype=torch.float64) / problem.D**0.5
        if problem.normalize:
            x *= 3.0 ** (2.0 * torch.rand(views, rows, 1, generator=g, dtype=torch.float64) - 1.0)
        return x.to(dtype)

    def ids(rows: int) -> Tensor:
        return torch.randint(problem.lowest_id, 5, (rows,), generator=g, dtype=torch.int32)

    q, q_id = embeddings(3, problem.N), ids(problem.N)
    k, k_id = (None, None) if problem.M is None else (embeddings(2, problem.M), ids(problem.M))
    tau = torch.tensor(problem.taus[: len(problem.kinds)], dtype=torch.float64)
    index = [x for x, _ in problem.pairs], [y for _, y in problem.pairs]
    q_self = None
    if problem.given_self:
        q_self = torch.randint(-1, problem.M or problem.N, (problem.N,), generator=g, dtype=torch.int32)
    flags = problem.inner_product, problem.detach, q_self, problem.normalize
    return q, k, q_id, k_id, tau, list(problem.kinds), *index, *flags


def everything(forward: Any, backward: Any, given: tuple[Any, ...]) -> list[Tensor]:
    """Value, lse, and the gradients of q, k and tau."""
    value, lse, row_state = forward(*given)
    g = torch.Generator().manual_seed(1)
    incoming = [torch.rand(value.shape, generator=g, dtype=torch.float64) - 0.25 for _ in range(2)]
    return [value, lse, *backward(*given, value, row_state, *incoming, True, True, True)]


def assert_right(emulation: Emulation, problem: Problem, arithmetic: str) -> list[Tensor]:
    """Compares, and gives what was found."""
    emulation.float32 = arithmetic if arithmetic in ("tf32", "tf32x3") else "float"
    given = arguments(problem, DTYPE.get(arithmetic, torch.float32))
    exact = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
    expected = everything(blocks.contrast, blocks.contrast_backward, exact)
    found = everything(emulation.contrast, emulation.contrast_backward, given)
    for x, y in zip(found, expected, strict=True):
        finite = y[y.isfinite()].abs()
        size = max(1.0 if x is found[1] else 1e-3, finite.max().item() if finite.numel() else 0.0)
        torch.testing.assert_close(x.double(), y, rtol=0, atol=TOLERANCE[arithmetic] * size)
    return found


PROBLEMS = {
    "one row": Problem(1, 1, 1, (ALL,)),
    "tails": Problem(67, 70, 19, (SAME, OTHER)),
    "aligned": Problem(66, 65, 40, (OTHER, OTHER), taus=(-1.0, -3.0)),
    "symmetric": Problem(71, None, 24, (SAME_NOT_SELF, OTHER), ((0, 1), (2, 1), (1, 1))),
    "not self": Problem(71, None, 24, (SAME_NOT_SELF, OTHER_NOT_SELF), ((0, 1), (2, 1), (1, 1)), lowest_id=-2),
    "given self": Problem(67, 70, 19, (SAME_NOT_SELF, OTHER_NOT_SELF), given_self=True, lowest_id=-2),
    "features": Problem(3, 5, 275, (ALL,)),
    "inner product": Problem(65, 5, 16, (OTHER,), inner_product=True),
    "detached": Problem(5, 65, 24, (ALL,), detach=True),
    "no keys": Problem(5, 0, 3, (ALL,)),
    "no pairs": Problem(5, 7, 3, (ALL,), ()),
    "many pairs": Problem(2, 3, 4, (SAME,), ((0, 0), (2, 1), (1, 0)) * 45),
    "many pairs, two tiles": Problem(3, 70, 4, (SAME,), ((0, 0), (2, 1), (1, 0)) * 23),
    "raw rows": Problem(67, 70, 19, (SAME, OTHER), normalize=True),
    "raw queries": Problem(71, None, 24, (SAME_NOT_SELF, OTHER), ((0, 1), (2, 1), (1, 1)), normalize=True),
    "raw rows, aligned": Problem(66, 65, 40, (OTHER, OTHER), taus=(-1.0, -3.0), normalize=True),
    "raw inner product": Problem(65, 5, 16, (OTHER,), inner_product=True, normalize=True),
    "many pairs of raw rows": Problem(2, 3, 4, (SAME,), ((0, 0), (2, 1), (1, 0)) * 45, normalize=True),
}


@pytest.mark.parametrize("arithmetic", TOLERANCE)
@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(emulation, name, arithmetic):
    assert_right(emulation, PROBLEMS[name], arithmetic)


@pytest.mark.parametrize("seed", range(1, 7))
def test_schedules(emulation, seed):
    """In reverse, at random, starving: the same bits, and nothing that the emulation objects to."""
    emulation.resident_blocks = 4
    first = assert_right(emulation, PROBLEMS["symmetric"], "f16")
    emulation.seed = seed
    again = assert_right(emulation, PROBLEMS["symmetric"], "f16")
    for x, y in zip(first, again, strict=True):
        assert x.equal(y)


def test_deterministic_algorithms(emulation):
    """Every sum has one order: the same bits under two schedules, and under PyTorch's switch, which does not object."""
    z = torch.randn(2, 70, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    taus = {name: torch.tensor(2.0, requires_grad=True) for name in ("tau_pos", "tau_neg")}
    calls = {"mean": {"cost": "rbf"}, "sum": {}}  # the fused loss, and a composition

    def bits(seed: int) -> list[Tensor]:
        emulation.seed, emulation.resident_blocks = seed, 8
        found = []
        for reduction, options in calls.items():
            loss = cacr_kernels.cacr_loss(z, **taus, **options, reduction=reduction, backend="cuda")
            found += [loss.detach(), *torch.autograd.grad(loss, [z, *taus.values()])]
        return found

    first = bits(0)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        again = bits(5)
    finally:
        torch.use_deterministic_algorithms(before)
    for x, y in zip(first, again, strict=True):
        assert x.equal(y)


def test_probe(emulation):
    """Whether the kernels could be launched: needs no arguments and launches nothing."""
    for dtype in (torch.float32, *DTYPE.values()):
        emulation.run(Call(operation=3), dtype)


def test_many_thousand_views(emulation):
    """Indices of views beyond 16 bits."""
    q = torch.randn(40000, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tau = torch.ones(1, dtype=torch.float64)
    value, _, _ = emulation.contrast(q, q, None, None, tau, [ALL], [39999, 2], [5, 32768], False, False, None, False)
    exact = [(q[x] - q[y]).square().sum() for x, y in ((39999, 5), (2, 32768))]
    torch.testing.assert_close(value[0, :, 0], torch.stack(exact))


@pytest.mark.parametrize("cost", ["sqeuclidean", "rbf"])
def test_largest_temperature(emulation, cost):
    """One key has all the weight; a temperature that would overflow is refused before (test_refusals.py)."""
    z = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = cacr_kernels.cacr_loss(z, tau_pos=1e30, tau_neg=1e30, cost=cost, backend="cuda")
    exact = cacr_kernels.cacr_loss(z.double(), tau_pos=1e30, tau_neg=1e30, cost=cost, backend="reference")
    torch.testing.assert_close(loss, exact.float())
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("resident_blocks", [0, 1, 50])
def test_grids(emulation, resident_blocks):
    """A launch per phase; one block for all units; keys and gradients split among more blocks than there are."""
    emulation.resident_blocks = resident_blocks
    assert_right(emulation, PROBLEMS["tails"], "bf16")
    assert_right(emulation, PROBLEMS["symmetric"], "float")
    assert_right(emulation, PROBLEMS["raw rows"], "f16")
    assert_right(emulation, PROBLEMS["raw queries"], "float")
    assert_right(emulation, PROBLEMS["many pairs, two tiles"], "float")


@pytest.mark.parametrize("wanted", ["q", "k", "t", "qk", "qt", "kt"])
@pytest.mark.parametrize("name", ["tails", "symmetric", "many pairs", "raw rows", "many pairs of raw rows"])
def test_what_is_wanted(emulation, name, wanted):
    """Splits of one side, of variances alone, of all: the gradients are those of a call that wants everything."""
    given = arguments(PROBLEMS[name]._replace(D=70), torch.float64)
    emulation.resident_blocks = 1
    value, lse, row_state = emulation.contrast(*given)
    everything = value, row_state, torch.full_like(value, 0.75), torch.full_like(lse, -0.5)
    expected = emulation.contrast_backward(*given, *everything, True, True, True)
    emulation.resident_blocks = 50
    found = emulation.contrast_backward(*given, *everything, *(x in wanted for x in "qkt"))
    for x, y, w in zip(found, expected, "qkt", strict=True):
        if w in wanted:
            torch.testing.assert_close(x, y, rtol=0, atol=1e-14 * max(1.0, y.abs().max().item() if y.numel() else 0))
        else:
            assert not x.numel()


@pytest.mark.parametrize("room", [0, 3])
def test_less_room_than_the_device_said(emulation, room):
    """A cooperative launch that is refused after all becomes one for every phase, with the same bits."""
    emulation.resident_blocks = 50
    first = assert_right(emulation, PROBLEMS["symmetric"], "bf16")
    emulation.room = room
    for x, y in zip(first, assert_right(emulation, PROBLEMS["symmetric"], "bf16"), strict=True):
        assert x.equal(y)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(emulation, bad):
    q, *rest = arguments(PROBLEMS["tails"], torch.float32)
    q[0, 3, 2] = bad
    value, lse, _ = emulation.contrast(q, *rest)
    assert not value[:, 0, 3].isfinite().any()
    assert not lse[:, 0, 3].isfinite().any()
    others = torch.arange(q.shape[1]) != 3
    assert value[:, 0, others].isfinite().all()
    assert value[:, 1].isfinite().all()


def test_empty_sets(emulation):
    """Value 0, lse -inf, zero gradients, whatever flows in."""
    q, k, q_id, k_id, *rest = arguments(PROBLEMS["tails"]._replace(kinds=(SAME,)), torch.float32)
    q_id[:2] = 99
    given = q, k, q_id, k_id, *rest
    value, lse, row_state = emulation.contrast(*given)
    assert (value[0, :, :2] == 0).all()
    assert (lse[0, :, :2] == -torch.inf).all()
    incoming = torch.zeros_like(value)
    incoming[0, :, :2] = 7.0
    for grad in emulation.contrast_backward(*given, value, row_state, incoming, incoming, True, True, True):
        assert not grad.any()


def test_close_positives(emulation):
    """Costs of nearly equal rows come from differences: 1e-6 of themselves in float32, a millionth of |q|^2."""
    q, _, q_id, _, tau, *rest = arguments(PROBLEMS["tails"]._replace(kinds=(SAME,), pairs=((0, 0),)), torch.float32)
    q_id = torch.arange(q.shape[1], dtype=torch.int32)
    k = (q + 1e-3 * torch.randn(q.shape, generator=torch.Generator().manual_seed(2)))[:2]
    value, _, _ = emulation.contrast(q, k, q_id, q_id, tau, *rest)
    exact = (q[0].double() - k[0].double()).square().sum(-1)
    torch.testing.assert_close(value[0, 0], exact, rtol=1e-6, atol=0)


def test_a_late_top(emulation):
    """What rounding has taken from a long sum moves with it when a key far above all others comes last."""
    emulation.resident_blocks = 1
    k = torch.full((1, 64 * 256, 1), -0.03)
    k[0, :8], k[0, -3] = 0.0, 1.0
    tau = torch.tensor([-1.0], dtype=torch.float64)
    given = torch.ones(1, 3, 1), k, None, None, tau, [ALL], [0], [0], True, False, None, False
    exact = given[0].double(), k.double(), *given[2:]
    value, expected = emulation.contrast(*given)[0], blocks.contrast(*exact)[0]
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [1.0, 1.3, 1.7])  # an octave, as scales are powers of two
def test_float16_has_room_for_a_near_key(emulation, size):
    """Beside far keys with 85 % of the weight its coefficient is 13 times what any of theirs can be."""
    count, odds = 20000, torch.tensor(0.85 / (1 - 0.85))
    tau = -0.5 * (count / odds).log().item()  # of cost 2
    q, k = torch.eye(4)[:1], torch.eye(4)[[0] + [1] * count]
    taus, incoming = torch.tensor([tau], dtype=torch.float64), torch.full((1, 1, 1), size, dtype=torch.float64)
    rest = None, None, taus, [ALL], [0], [0], False, False, None, False

    def gradients(forward, backward, dtype):
        given = q[None].to(dtype), k[None].to(dtype), *rest
        value, _, row_state = forward(*given)
        return backward(*given, value, row_state, incoming, -incoming / tau, True, True, True)[:2]

    found = gradients(emulation.contrast, emulation.contrast_backward, torch.float16)
    expected = gradients(blocks.contrast, blocks.contrast_backward, torch.float64)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).abs().max() <= 3e-3 * y.abs().max()


def test_strided_inputs(emulation):
    q, k, *rest = arguments(PROBLEMS["aligned"], torch.bfloat16)
    strided = torch.stack([q, q], -1)[..., 0], k.transpose(1, 2).contiguous().transpose(1, 2)
    for x, y in zip(emulation.contrast(*strided, *rest), emulation.contrast(q, k, *rest), strict=True):
        assert x.equal(y)


def test_rows_off_16_bytes(emulation):
    """An array that begins elsewhere takes the way without asynchronous copies, with the same result."""
    q, k, *rest = arguments(PROBLEMS["aligned"], torch.float32)
    moved_q, moved_k = (torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in (q, k))
    expected = emulation.contrast(q, k, *rest)
    for elsewhere in ((moved_q, k), (q, moved_k)):
        assert any(x.data_ptr() % 16 != 0 for x in elsewhere)
        for x, y in zip(emulation.contrast(*elsewhere, *rest), expected, strict=True):
            assert x.equal(y)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pairing", range(len(PAIRINGS)), ids=PAIRINGS)
def test_repulsion(emulation: Emulation, pairing: int, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for the keys of all processes: value, entropy and gradients are those of plain PyTorch."""
    g = torch.Generator().manual_seed(3)
    keys = torch.randn(3, 41, 20, generator=g, dtype=torch.float64)
    given = keys[:, :17].contiguous(), keys, torch.tensor([-1.3], dtype=torch.float64), pairing, normalize
    found = operator("repulsion_cuda")(*given, True, True, True)
    torch.testing.assert_close(found, operator("repulsion_torch")(*given, True, True, True))
    monkeypatch.setattr(emulation, "contrast_backward", lambda *_: pytest.fail("no gradient is wanted"))
    *_, grad_views, grad_keys, grad_tau = operator("repulsion_cuda")(*given, False, False, False)
    assert grad_views.numel() == grad_keys.numel() == grad_tau.numel() == 0


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_repulsion_of_half_types(emulation: Emulation, dtype: torch.dtype, wanted: bool) -> None:
    """They stay as they are in the products; gradients are float32, also those that are not wanted."""
    g = torch.Generator().manual_seed(4)
    keys = torch.randn(2, 41, 20, generator=g).to(dtype)
    given = keys[:, :17].contiguous(), keys, torch.tensor([-0.6], dtype=torch.float64), 0, True, *[wanted] * 3
    found = operator("repulsion_cuda")(*given)
    expected = operator("repulsion_torch")(*(x.double() for x in given[:3]), *given[3:])
    assert [x.dtype for x in found] == [torch.float64] * 2 + [torch.float32] * 2 + [torch.float64]
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=2e-7)
