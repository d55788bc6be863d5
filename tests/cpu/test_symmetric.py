"""``contrast`` without keys: the queries are the keys, and from 192 rows on each similarity is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck

from cacr_kernels import cacr_loss, supervised_cacr_loss
from cacr_kernels.operators.contrast import plain_contrast
from cacr_kernels.operators.registry import operator
from cacr_kernels.types import ContrastSpec
from tests.covering import covering

ALL, SAME, OTHER, SAME_NOT_SELF, OTHER_NOT_SELF = range(5)
PAIRS = [(0, 0), (1, 1)]
SETS = {
    "other": [(OTHER, -1.3)],
    "other, detached": [(OTHER, -1.3)],
    "all": [(ALL, -0.7)],
    "supervised": [(SAME_NOT_SELF, 0.9), (OTHER, -1.3)],
    "rbf": [(OTHER, -1.3), (OTHER, -3.3)],
    "unbounded": [(SAME_NOT_SELF, 40.0), (OTHER, -300.0)],
    "inner": [(ALL, -4.0)],
    "not self, some of no set": [(SAME_NOT_SELF, 0.9), (OTHER_NOT_SELF, -1.3)],
    "given self": [(SAME_NOT_SELF, 0.9), (OTHER_NOT_SELF, -1.3)],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator) / shape[-1] ** 0.5


def ids(n: int, layout: str) -> Tensor:
    index = torch.arange(n, dtype=torch.int32)
    many = index * 37 % 101
    layouts = {"diagonals": index % max(1, n // 2), "few": index % 3, "sorted": index // 5, "one": 0 * index}
    return (layouts | {"many": many, "equal low bits": index % 5 * 1024})[layout]


def temperatures(name: str) -> Tensor:
    return torch.tensor([tau for _, tau in SETS[name]], dtype=torch.float64)


def statistics(
    name: str,
    backend: str,
    q: Tensor,
    k: Tensor | None,
    label: Tensor,
    pairs: list[tuple[int, int]],
    tau: Tensor | None = None,
) -> Any:
    kinds, tau = [kind for kind, _ in SETS[name]], temperatures(name) if tau is None else tau
    index = [x for x, _ in pairs], [y for _, y in pairs]
    label = label - 1 if name == "not self, some of no set" else label
    k_id = None if k is None else label
    q_self = torch.arange(len(label), dtype=torch.int32) // 2 - 1 if name == "given self" else None
    op = operator(f"contrast_{backend}")
    return op(q, k, label, k_id, tau, kinds, *index, name == "inner", name.endswith("detached"), q_self, False)[:2]


def with_gradient(name: str, backend: str, z: Tensor, own: bool, label: Tensor, pairs: Any = PAIRS) -> list[Tensor]:
    """Value, lse, the gradients of all rows, alone and with those of the temperatures.

    Not ``own``: the keys are a copy, the two gradients are added here.
    """
    q, tau = z.clone().requires_grad_(), temperatures(name).requires_grad_()
    value, lse = statistics(name, backend, q, None if own else q.clone(), label, pairs, tau)
    incoming = randn(*value.shape, 1, seed=5)[..., 0] if value.shape[-1] else value
    loss = (incoming * value).sum() + (incoming.flip(0, -1) * lse.masked_fill(lse == -torch.inf, 0.0)).sum()
    both = grad(loss, (q, tau), retain_graph=True)
    return [value.detach(), lse.detach(), grad(loss, q)[0], *both]


def assert_close(mine: list[Tensor], expected: list[Tensor], dtype: torch.dtype, size: float = 1.0) -> None:
    for a, b in zip(mine, expected, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        b = b.masked_fill(~finite, 0.0)
        error = (a.double().masked_fill(~finite, 0.0) - b).abs().max()
        assert error <= TOLERANCE[dtype] * size * max(1.0, b.abs().max().item())


@covering({"name": list(SETS), "size": [(192, 17), (301, 64), (417, 5)], "dtype": list(TOLERANCE)}, 2)
def test_own_keys_are_a_copy_of_the_queries(name: str, size: tuple[int, int], dtype: torch.dtype, threads: Any) -> None:
    n, dim = size
    threads(3)
    z = randn(2, n, dim).to(dtype)
    factor = 300.0 if name == "unbounded" else 1.0  # what one rounding error of an exponent does to a weight
    for layout in ("diagonals", "few", "sorted", "one", "many", "equal low bits"):
        expected = with_gradient(name, "cpu", z.double(), False, ids(n, layout))
        assert_close(with_gradient(name, "cpu", z, True, ids(n, layout)), expected, dtype, factor)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_pairs_of_different_views(backend: str) -> None:
    z, label = randn(3, 203, 9), ids(203, "few")
    for pairs in ([(0, 1), (2, 1)], [(0, 0), (1, 2)]):
        mine = with_gradient("supervised", backend, z, True, label, pairs)
        assert_close(mine, with_gradient("supervised", backend, z, False, label, pairs), torch.float64)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(190, 420), dim=st.integers(1, 70), count=st.sampled_from([1, 2, 5, 64]), seed=st.integers(0, 99))
def test_any_shape_and_number_of_threads(n: int, dim: int, count: int, seed: int) -> None:
    torch.set_num_threads(count)
    name = list(SETS)[seed % len(SETS)]
    label = torch.randint(1 + seed, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    z = randn(2, n, dim, seed=seed)
    size = 300.0 if name == "unbounded" else 1.0
    assert_close(
        with_gradient(name, "cpu", z, True, label), with_gradient(name, "torch", z, False, label), torch.float64, size
    )


def test_gradient_against_differences() -> None:
    z = randn(1, 200, 6).requires_grad_()
    tau = torch.tensor([0.9, -1.3], dtype=torch.float64)
    index = torch.arange(200, dtype=torch.int32) % 7

    def f(z: Tensor) -> Any:
        kinds = [SAME_NOT_SELF, OTHER]
        return operator("contrast_cpu")(z, None, index, None, tau, kinds, [0], [0], False, False, None, False)[:2]

    assert gradcheck(f, (z,), fast_mode=True)


def test_second_derivative() -> None:
    label = ids(9, "few")
    found = []
    for backend in ("cpu", "torch", "plain"):
        z = randn(2, 9, 4).requires_grad_()
        if backend == "plain":
            spec = ContrastSpec(label, label, [SAME_NOT_SELF, OTHER], [0, 1], [0, 1], False, False)
            tau = temperatures("supervised")
            value, lse = plain_contrast(z, z, tau, spec)
        else:
            value, lse = statistics("supervised", backend, z, None, label, PAIRS)
        (first,) = grad(value.sin().sum() + lse.square().sum(), z, create_graph=True)
        found.append(grad(first.square().sum() + z.pow(3).sum(), z))
    assert_close(list(found[0]), list(found[2]), torch.float64)
    assert_close(list(found[1]), list(found[2]), torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14 in opcheck
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(backend: str) -> None:
    tau = torch.tensor([0.9, -1.3], dtype=torch.float64, requires_grad=True)
    z, label = randn(2, 5, 3).requires_grad_(), ids(5, "few")
    kinds = [SAME_NOT_SELF, OTHER]
    op = operator(f"contrast_{backend}")
    torch.library.opcheck(op, (z, None, label, None, tau, kinds, [0, 1], [0, 1], False, False, None, False))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 150, 299])
def test_bad_numbers_reach_every_row_that_has_them(bad: float, at: int, threads: Any) -> None:
    threads(2)
    z, label = randn(2, 300, 8), ids(300, "sorted")
    z[0, at, 3] = bad
    value, _ = statistics("other", "cpu", z, None, label, PAIRS)
    others = label != label[at]
    others[at] = True  # it is a query itself
    assert value[0, 0, others].isnan().all()
    assert value[0, 0, ~others].isfinite().all()
    assert value[0, 1].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 64])
def test_same_bits_for_the_same_threads(count: int, threads: Any) -> None:
    threads(count)
    z, label = randn(2, 397, 33).float(), ids(397, "diagonals")
    first = with_gradient("rbf", "cpu", z, True, label)
    for _ in range(3):
        assert all(map(torch.equal, first, with_gradient("rbf", "cpu", z, True, label)))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(("forward", "backward"), [(2, 2), (2, 1), (1, 64), (64, 3)])
def test_a_row_keeps_the_weights_it_was_normalised_with(
    forward: int, backward: int, learnable: bool, threads: Any
) -> None:
    """One key has all the weight: any other bits of its similarity on the way back would be another weight."""
    z = torch.nn.functional.normalize(randn(300, 33), dim=-1).float().requires_grad_()
    taus = [torch.tensor(1e6, requires_grad=True) if learnable else 1e6 for _ in range(2)]
    labels = torch.arange(300) % 5
    threads(forward)
    loss = supervised_cacr_loss(z, labels, tau_pos=taus[0], tau_neg=taus[1], backend="cpu")
    threads(backward)
    (found,) = grad(loss, z)
    exact = z.detach().double().requires_grad_()
    (expected,) = grad(supervised_cacr_loss(exact, labels, tau_pos=1e6, tau_neg=1e6, backend="reference"), exact)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_only_the_temperature_is_differentiated() -> None:
    z, taus = randn(300, 7), [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.7, 1.9)]
    for call in (
        lambda name: cacr_loss(z.view(2, 150, 7), tau_pos=taus[0], tau_neg=taus[1], pairing="pooled", backend=name),
        lambda name: supervised_cacr_loss(z, torch.arange(300) % 5, tau_pos=taus[0], tau_neg=taus[1], backend=name),
    ):
        torch.testing.assert_close(grad(call("cpu"), taus), grad(call("reference"), taus), rtol=1e-9, atol=1e-12)
