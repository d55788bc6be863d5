"""``cacr_weights`` against the dense softmax of the reference: any option, tile by tile, ties, bounded memory."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cacr_kernels import CACRWeights, cacr_loss, cacr_weights, reference
from cacr_kernels.operators import aligned
from tests.agreement import randn, unit

MODULE = importlib.import_module("cacr_kernels.weights")
PAIRINGS = ("unordered", "ordered", "pooled")


def dense(views: Tensor, tau_pos: float, tau_neg: float, pairing: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the positives [V, B, V] and of all keys [P, N, M], and which keys are negatives [N, M]."""
    c, members = reference.negative_costs(views, pairing)
    negative = reference.statistics(-tau_neg * c, c, members)
    return reference.attraction_statistics(views, tau_pos).weights, negative.weights, members


def assert_top(weights: CACRWeights, full: Tensor, members: Tensor, queries: list[int], top_k: int) -> None:
    """The largest weights of the queries in descending order, each with an index of its own that has that weight."""
    full, members = full[:, queries], members[queries]
    expected = full.masked_fill(~members, -1.0).sort(-1, descending=True).values
    count = min(top_k, int(members[0].sum())) if queries else weights.repulsion.shape[-1]
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(weights.repulsion, expected[..., :count], **tolerance)
    torch.testing.assert_close(full.gather(-1, weights.indices), weights.repulsion, **tolerance)
    assert members.expand_as(full).gather(-1, weights.indices).all()
    ordered = weights.indices.sort(-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_input(data: st.DataObject) -> None:
    v, b, d = (data.draw(st.integers(low, high), label=n) for n, low, high in (("V", 2, 4), ("B", 1, 23), ("D", 1, 9)))
    pairing = data.draw(st.sampled_from(PAIRINGS))
    taus = [data.draw(st.sampled_from([0.0, 0.3, 5.0, 80.0])) for _ in range(2)]
    views = randn(v, b, d, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans(), label="ties"):
        views = views.round()
    rows = v * b if pairing == "pooled" else b
    queries = data.draw(st.none() | st.lists(st.integers(0, rows - 1), max_size=7), label="queries")
    top_k = data.draw(st.integers(1, rows + 3), label="top_k")
    block = data.draw(st.sampled_from([5, 16, 50, MODULE.BLOCK]), label="block")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "BLOCK", block)
        weights = cacr_weights(views, queries=queries, top_k=top_k, tau_pos=taus[0], tau_neg=taus[1], pairing=pairing)
    positive, full, members = dense(views, *taus, pairing)
    torch.testing.assert_close(weights.attraction, positive, rtol=1e-9, atol=1e-12)
    assert weights.pairs == ([] if pairing == "pooled" else reference.view_pairs(v, pairing))
    assert_top(weights, full, members, list(range(rows)) if queries is None else queries, top_k)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_all_weights_give_the_loss(pairing: str) -> None:
    """Weighted costs add up to the loss itself."""
    z = unit(3, 7, 5)
    taus: dict[str, Any] = {"tau_pos": 1.5, "tau_neg": 2.5, "pairing": pairing}
    weights = cacr_weights(z, top_k=1000, **taus)
    c = (z[:, None] - z[None]).square().sum(-1)  # [V, U, B]
    attraction = (weights.attraction * c.transpose(1, 2)).sum(-1).mean()
    pairs = [(z[x], z[y]) for x, y in weights.pairs] or [(z.flatten(0, 1), z.flatten(0, 1))]
    costs = torch.stack([(q[:, None] - k).square().sum(-1) for q, k in pairs])
    repulsion = -(weights.repulsion * costs.gather(-1, weights.indices)).sum(-1).mean()
    torch.testing.assert_close(weights.repulsion.sum(-1), torch.ones_like(weights.repulsion[..., 0]))
    torch.testing.assert_close(attraction + repulsion, cacr_loss(z, **taus, backend="reference"))


def test_ties() -> None:
    """Equal negatives have equal weights, whichever of them are returned."""
    z = torch.zeros(2, 6, 3)
    weights = cacr_weights(z, top_k=4)
    assert weights.repulsion.shape == weights.indices.shape == (1, 6, 4)
    torch.testing.assert_close(weights.repulsion, torch.full((1, 6, 4), 0.2))
    for b in range(6):
        assert len(set(weights.indices[0, b].tolist())) == 4
        assert b not in weights.indices[0, b]


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_more_than_there_are(pairing: str) -> None:
    z = unit(2, 5, 3)
    count = {"pooled": 8}.get(pairing, 4)
    weights = cacr_weights(z, top_k=100, pairing=pairing)
    assert weights.repulsion.shape[-1] == weights.indices.shape[-1] == count
    torch.testing.assert_close(weights.repulsion.sum(-1), torch.ones_like(weights.repulsion[..., 0]))
    alone = cacr_weights(z[:, :1], pairing=pairing)  # an instance has no negatives
    pairs, rows = {"unordered": (1, 1), "ordered": (2, 1), "pooled": (1, 2)}[pairing]
    assert alone.repulsion.shape == alone.indices.shape == (pairs, rows, 0)
    assert cacr_weights(z, queries=[], pairing=pairing).repulsion.shape == (pairs, 0, count)


def test_queries_of_any_kind() -> None:
    z = unit(2, 9, 3)
    everything = cacr_weights(z, top_k=3)
    for queries in ([4, 0, 4], (4, 0, 4), torch.tensor([4, 0, 4]), torch.tensor([4, 0, 4], dtype=torch.uint8)):
        some = cacr_weights(z, queries=queries, top_k=3)
        assert torch.equal(some.indices, everything.indices[:, [4, 0, 4]])
        torch.testing.assert_close(some.repulsion, everything.repulsion[:, [4, 0, 4]])
        assert torch.equal(some.attraction, everything.attraction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_lists_and_autocast(dtype: torch.dtype) -> None:
    """Half types are computed in float32, also under autocast; nothing is differentiated."""
    z = (3 * unit(2, 9, 5)).to(dtype).requires_grad_()
    exact = cacr_weights(z.detach().double(), tau_neg=torch.tensor(9.0), normalize=True, top_k=9)
    plain = cacr_weights(z, tau_neg=torch.tensor(9.0, requires_grad=True), normalize=True, top_k=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cacr_weights(list(z), tau_neg=9.0, normalize=True, top_k=9)
    for found in (plain, cast):
        assert found.repulsion.dtype == found.attraction.dtype == torch.promote_types(dtype, torch.float32)
        assert not found.repulsion.requires_grad
        assert torch.equal(found.indices, exact.indices)
        torch.testing.assert_close(found.repulsion.double(), exact.repulsion, rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(found.attraction.double(), exact.attraction, rtol=1e-5, atol=1e-7)


def test_sharp_weights_keep_their_digits() -> None:
    """Logits of thousands in float32: the log-sum-exp alone would cost three digits."""
    z = 30 * unit(2, 40, 8).float()
    weights = cacr_weights(z, top_k=2, tau_neg=1.0)
    best = weights.repulsion[0]
    assert (best.sum(1) <= 1 + 1e-6).all()
    assert (best[:, 0] > 0.5).sum() > 20
    torch.testing.assert_close(cacr_weights(z, top_k=39).repulsion.sum(-1), torch.ones(1, 40), rtol=2e-6, atol=0)


def test_bad_numbers_show_and_infinitely_far_negatives_count_nothing() -> None:
    z = unit(2, 6, 3)
    z[1, 2, 0] = torch.nan
    weights = cacr_weights(z, top_k=5)
    assert weights.repulsion[0, [0, 1, 3, 4, 5]].isnan().all()
    assert weights.repulsion[0, 2].isfinite().all()  # its own other view is no negative
    assert weights.attraction[:, 2].isnan().any()
    z[1, 2, 0] = 1e200  # whose square overflows
    weights = cacr_weights(z, top_k=5)
    for b in (0, 1, 3, 4, 5):
        assert weights.indices[0, b].sort().values.tolist() == [j for j in range(6) if j != b]
        assert weights.repulsion[0, b, -1] == 0
        assert weights.indices[0, b, -1] == 2
    assert cacr_weights(z, tau_neg=torch.tensor(torch.nan)).repulsion.isnan().all()


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_memory_is_that_of_a_block(pairing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No N x M array, and none of N x D x something: blocks of keys where one row of them is too long."""
    views, batch, dim, top_k = 2, 1501, 4, 5
    rows = views * batch if pairing == "pooled" else batch
    for block in (1 << 15, 1 << 10):
        monkeypatch.setattr(MODULE, "BLOCK", block)
        monkeypatch.setattr(aligned, "DIFFERENCES", block // 8)
        queries = torch.arange(0, batch, 29 if block < batch else 1)
        with Largest() as largest:
            weights = cacr_weights(unit(views, batch, dim), pairing=pairing, top_k=top_k, queries=queries)
        some = max(1, block // rows)
        allowed = max(some * (min(rows, block) + top_k), views * views * batch * 2, views * batch * dim)
        allowed = max(allowed, 2 * weights.repulsion.numel())
        assert largest.numel <= allowed < rows * batch / 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"views": unit(7, 5)}, ValueError, ("views", "[V, B, D]", "[7, 5]")),
        ({"views": unit(1, 7, 5)}, ValueError, ("views", "at least 2", "V = 1")),
        ({"views": torch.ones(2, 7, 5, dtype=torch.int64)}, TypeError, ("views", "int64", "float32")),
        ({"views": unit(2, 7, 5).to("meta")}, ValueError, ("meta", "no data")),
        ({"tau_pos": -1.0}, ValueError, ("tau_pos", ">= 0", "-1.0")),
        ({"tau_neg": float("nan")}, ValueError, ("tau_neg", "finite", "nan")),
        ({"tau_neg": "1"}, TypeError, ("tau_neg", "number", "'1'")),
        ({"pairing": "all"}, ValueError, ("pairing", "'all'", "'pooled'")),
        ({"normalize": 1}, TypeError, ("normalize", "True", "1")),
        ({"top_k": 0}, ValueError, ("top_k", "[1,", "0")),
        ({"top_k": 2.0}, TypeError, ("top_k", "integer", "2.0")),
        ({"queries": [0, 7]}, ValueError, ("queries[1]", "[0, 6]", "7")),
        ({"queries": [-1]}, ValueError, ("queries[0]", "[0, 6]", "-1")),
        ({"queries": torch.tensor([0, 7])}, ValueError, ("queries", "[0, 6]", "0 to 7")),
        ({"queries": torch.tensor([[0]])}, ValueError, ("queries", "[Q]", "[1, 1]")),
        ({"queries": torch.tensor(0)}, ValueError, ("queries", "[Q]", "[]")),
        ({"queries": torch.tensor([0.0])}, TypeError, ("queries", "integer", "float32")),
        ({"queries": torch.tensor([True])}, TypeError, ("queries", "integer", "bool")),
        ({"queries": [0.0]}, TypeError, ("queries", "integers", "[0.0]")),
        ({"queries": [True]}, TypeError, ("queries", "integers", "[True]")),
        ({"queries": "0"}, TypeError, ("queries", "integers", "'0'")),
        ({"queries": 0}, TypeError, ("queries", "integers", "0")),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        cacr_weights(**({"views": unit(2, 7, 5)} | change))
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in words), str(caught.value)
