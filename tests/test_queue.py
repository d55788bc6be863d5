"""The queue that ``CACRQueueLoss`` keeps: what enters when, and that nothing is lost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.functional import normalize

from cacr_kernels import CACRQueueLoss, cacr_queue_loss

V, B, D = 2, 3, 5


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(V, B, D, generator=g), torch.randn(V, B, D, generator=g)) for _ in range(count)]


def expected(history: list[torch.Tensor], size: int) -> torch.Tensor:
    """The last ``size`` keys that came, in any order."""
    keys = torch.cat([normalize(k, dim=-1).reshape(-1, D) for k in history]) if history else torch.zeros(0, D)
    return keys[-size:]


@pytest.mark.parametrize("size", [1, 4, 6, 7, 13, 100])
def test_the_last_keys_are_the_queue(size):
    loss_fn = CACRQueueLoss(queue_size=size, dim=D)
    history: list[torch.Tensor] = []
    for q, k in batches(7):
        loss = loss_fn(q, k)
        by_hand = cacr_queue_loss(q, k, expected(history, size), normalize=True)
        torch.testing.assert_close(loss, by_hand)
        history.append(k)


def test_backward_may_come_after_later_forwards():
    loss_fn = CACRQueueLoss(queue_size=7, dim=D)
    data = batches(4)
    queries = [q.clone().requires_grad_() for q, _ in data]
    losses = [loss_fn(q, k) for q, (_, k) in zip(queries, data, strict=True)]
    for i, (q, loss) in enumerate(zip(queries, losses, strict=True)):
        (g,) = torch.autograd.grad(loss, q)
        again = q.detach().clone().requires_grad_()
        by_hand = cacr_queue_loss(again, data[i][1], expected([k for _, k in data[:i]], 7), normalize=True)
        torch.testing.assert_close(g, torch.autograd.grad(by_hand, again)[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_alike(duplicate):
    loss_fn = CACRQueueLoss(queue_size=8, dim=D)
    data = batches(5)
    for q, k in data[:3]:
        loss_fn(q, k)
    other = duplicate(loss_fn)
    for q, k in data[3:]:
        assert other(q, k) == loss_fn(q, k)


def test_a_resumed_run_goes_on_exactly():
    loss_fn = CACRQueueLoss(queue_size=8, dim=D)
    data = batches(6)
    for q, k in data[:3]:
        loss_fn(q, k)
    resumed = CACRQueueLoss(queue_size=8, dim=D)
    resumed.load_state_dict(loss_fn.state_dict())
    for q, k in data[3:]:
        assert resumed(q, k) == loss_fn(q, k)


def test_saving_and_evaluating_change_nothing():
    loss_fn, untouched = (CACRQueueLoss(queue_size=8, dim=D) for _ in range(2))
    data = batches(5)
    for q, k in data[:4]:
        assert loss_fn(q, k) == untouched(q, k)
        loss_fn.state_dict()
        assert loss_fn.eval()(q, k) == untouched.eval()(q, k)
        loss_fn.eval()(*data[4])
        loss_fn.train()
        untouched.train()


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="dim = 5 features, got 4"):
        CACRQueueLoss(queue_size=8, dim=D)(torch.randn(V, B, 4), torch.randn(V, B, 4))
