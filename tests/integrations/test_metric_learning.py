"""The loss of pytorch-metric-learning: pairs of a miner, its memory, its wrappers, against the definition."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from cacr_kernels import supervised_cacr_loss
from cacr_kernels.integrations import pairs
from cacr_kernels.integrations.pytorch_metric_learning import CACRLoss, CrossBatchMemory, SelfSupervisedLoss

NUMBERS = {"tau_pos": 0.7, "tau_neg": 2.0, "alpha": 1.5, "beta": 0.8}


def embeddings(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    return z.requires_grad_(), torch.randint(4, (count,), generator=generator)


def same(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x, inputs, retain_graph=True) for x in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def definition(z: Tensor, ref: Tensor, lists: tuple[Tensor, ...]) -> Tensor:
    """By a loop over anchors."""
    x, y = torch.nn.functional.normalize(z, dim=-1), torch.nn.functional.normalize(ref, dim=-1)
    a1, p, a2, n = lists
    pulled, pushed = [], []
    for i in range(len(z)):
        for anchors, others, tau, into in ((a1, p, 0.7, pulled), (a2, n, -2.0, pushed)):
            cost = (x[i] - y[others[anchors == i]]).square().sum(-1)
            if len(cost):
                into.append(((tau * cost).softmax(0) * cost).sum())
    return 1.5 * torch.stack(pulled).mean() - 0.8 * torch.stack(pushed).mean()


def test_all_pairs() -> None:
    z, labels = embeddings()
    same(CACRLoss(**NUMBERS)(z, labels), supervised_cacr_loss(z, labels, **NUMBERS, normalize=True), z)


def test_reference_set() -> None:
    (z, labels), (ref, ref_labels) = embeddings(), embeddings(20, seed=1)
    expected = supervised_cacr_loss(
        z, labels, ref_embeddings=ref, ref_labels=ref_labels, **NUMBERS, normalize=True, backend="reference"
    )
    same(CACRLoss(**NUMBERS)(z, labels, ref_emb=ref, ref_labels=ref_labels), expected, z, ref)


@pytest.mark.parametrize("at_once", [1 << 16, 3])
@pytest.mark.parametrize("own", [True, False])
def test_pairs_of_a_miner(own: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets are what is listed, in one block of pairs or many."""
    monkeypatch.setattr(pairs, "PAIRS_AT_ONCE", at_once)
    (z, labels), (ref, ref_labels) = embeddings(), embeddings(20, seed=1)
    ref, ref_labels = (z, labels) if own else (ref, ref_labels)
    lists = miners.MultiSimilarityMiner()(z, labels, None if own else ref, None if own else ref_labels)
    assert 0 < len(lists[0]) < len(loss_and_miner_utils.get_all_pairs_indices(labels, ref_labels)[0])
    call = {} if own else {"ref_emb": ref, "ref_labels": ref_labels}
    found = CACRLoss(**NUMBERS)(z, labels, lists, **call)
    same(found, definition(z, ref, lists), *([z] if own else [z, ref]))


def test_triplets_and_all_pairs_as_a_list() -> None:
    z, labels = embeddings()
    lists = loss_and_miner_utils.get_all_pairs_indices(labels)
    same(CACRLoss(**NUMBERS)(z, None, lists), supervised_cacr_loss(z, labels, **NUMBERS, normalize=True), z)
    a, p, n = miners.TripletMarginMiner(margin=1.0)(z, labels)
    same(CACRLoss(**NUMBERS)(z, labels, (a, p, n)), definition(z, z, (a, p, a, n)), z)


def test_the_reducer_sees_elements() -> None:
    z, labels = embeddings()
    rows = CACRLoss(**NUMBERS, reducer=reducers.DoNothingReducer())(z, labels)["loss"]["losses"]
    assert rows.shape == labels.shape
    same(CACRLoss(**NUMBERS)(z, labels), rows.mean(), z)
    assert CACRLoss(beta=9.0)(z, labels).item() < 0  # what a reducer of positive values would drop


def test_memory_leaves_the_batch_itself_out() -> None:
    """No lists are made, and the value is that of the lists."""
    memory = CrossBatchMemory(CACRLoss(**NUMBERS), embedding_size=5, memory_size=30)
    by_lists = CrossBatchMemory(CACRLoss(**NUMBERS), embedding_size=5, memory_size=30)
    for seed in range(4):  # 12 a batch: the fourth wraps around
        z, labels = embeddings(seed=seed)
        found = memory(z, labels)
        keys, key_labels = memory.embedding_memory, memory.label_memory
        filled = 30 if memory.has_been_filled else memory.queue_idx
        lists = losses.CrossBatchMemory.create_indices_tuple(
            memory, z, labels, keys[:filled], key_labels[:filled], None, True
        )
        same(found, definition(z, keys[:filled].double(), lists), z)
        same(found, by_lists(z, labels, [torch.zeros(0, dtype=torch.int64)] * 4), z)


def test_memory_with_a_miner() -> None:
    memory = CrossBatchMemory(CACRLoss(**NUMBERS), 5, memory_size=30, miner=miners.MultiSimilarityMiner())
    for seed in range(3):
        z, labels = embeddings(seed=seed)
        assert memory(z, labels).isfinite()


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(symmetric: bool) -> None:
    x, y = embeddings()[0], embeddings(seed=1)[0]
    found = SelfSupervisedLoss(CACRLoss(**NUMBERS), symmetric=symmetric)(x, y)
    ids = torch.arange(12)
    if symmetric:
        expected = supervised_cacr_loss(torch.cat([x, y]), ids.repeat(2), **NUMBERS, normalize=True)
    else:
        expected = supervised_cacr_loss(
            x, ids, ref_embeddings=y, ref_labels=ids, **NUMBERS, normalize=True, backend="reference"
        )
    same(found, expected, x, y)


def test_other_losses_work_in_the_wrappers() -> None:
    z, labels = embeddings()
    assert CrossBatchMemory(losses.ContrastiveLoss(), 5, memory_size=30)(z, labels).isfinite()
    with pytest.raises(ValueError, match="does not support ArcFaceLoss"):
        CrossBatchMemory(losses.ArcFaceLoss(4, 5), 5)


def test_refusals() -> None:
    z, labels = embeddings()
    with pytest.raises(TypeError, match=r"CACRLoss takes no temperature: .*, here 5$"):
        CACRLoss(temperature=0.1)
    with pytest.raises(ValueError, match="takes no distance"):
        CACRLoss(distance=object())
    with pytest.raises(ValueError, match="labels or indices_tuple must be given"):
        CACRLoss()(z)
    lists = loss_and_miner_utils.get_all_pairs_indices(labels)
    (grad,) = torch.autograd.grad(CACRLoss()(z, labels, lists), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
