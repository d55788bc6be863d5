"""The kept queue where others handle its state: copies behind its back, recomputation, closures, transforms."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from cacr_kernels import CACRQueueLoss, cacr_queue_loss, checks
from tests.losses.test_queue import B, D, V, batches, filled, in_queue, kept, last_keys


def step(loss_fn: Any, q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    q = q.clone().requires_grad_()
    loss = loss_fn(q, k, **options)
    loss.backward()
    return loss.detach(), q.grad


def assert_go_on_alike(first: nn.Module, second: nn.Module, steps: int = 4) -> None:
    for q, k in batches(9)[-steps:]:
        for mine, expected in zip(step(first, q, k), step(second, q, k), strict=True):
            assert torch.equal(mine, expected)


# ---- 1: the buffers are all there is ---------------------------------------------------------------------------------
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
@pytest.mark.parametrize("used", [0, 3])
def test_copying_all_buffers_copies_the_queue(used: int, calls: int) -> None:
    """As an in-place load of a distributed checkpoint does, into a new module and into one that was used."""
    source, target = filled(calls), filled(used)
    for mine, theirs in zip(target.buffers(), source.buffers(), strict=True):
        mine.detach().copy_(theirs)
    assert_go_on_alike(target, source)


def test_averaged_model_copies_buffers() -> None:
    model = nn.Sequential(filled(0, 64), nn.Linear(1, 1))
    average = AveragedModel(model)
    for q, k in batches(5):
        model[0](q, k)
        average.update_parameters(model)
    assert_go_on_alike(average.module[0], model[0])


def test_averaged_buffers_have_no_unfilled_row() -> None:
    model = nn.Sequential(filled(0, 64), nn.Linear(1, 1))
    average = AveragedModel(model, use_buffers=True)
    for q, k in batches(7):
        model[0](q, k)
        average.update_parameters(model)
    loss_fn = average.module[0].eval()
    assert in_queue(loss_fn).norm(dim=-1).min() > 0
    q, k = batches(1)[0]
    assert loss_fn(q, k) == cacr_queue_loss(q, k, in_queue(loss_fn), normalize=True)  # a mean of keys is shorter


@pytest.mark.parametrize("count", [-3, 0, 5, 11, 2**40])
@pytest.mark.parametrize("waiting", [-1, 3, 99])
def test_counters_are_clamped(count: int, waiting: int) -> None:
    loss_fn = filled(5)
    loss_fn.queue_count.fill_(count)
    loss_fn.incoming_count.fill_(waiting)
    q, k = batches(1)[0]
    queue = loss_fn.queue[: max(0, min(8, count))]
    expected = cacr_queue_loss(normalize(q, dim=-1), normalize(k, dim=-1), queue)
    torch.testing.assert_close(loss_fn(q, k, update_queue=False), expected)
    loss_fn(q, k)
    assert loss_fn.queue_count.clamp(min=0) == max(count, 0) + max(0, min(8, waiting))


def test_functional_call_keeps_its_state_in_the_buffers_given() -> None:
    loss_fn, twin = (CACRQueueLoss(queue_size=32, dim=D) for _ in range(2))
    for q, k in batches(4):  # 32 rows of zeros were negatives
        value = torch.func.functional_call(loss_fn, dict(loss_fn.named_buffers()), (q, k))
        assert value == twin(q, k)
    own = {name: x.clone() for name, x in loss_fn.named_buffers()}
    before = copy.deepcopy(loss_fn.state_dict())
    for q, k in batches(9)[4:]:
        q = q.clone().requires_grad_()
        assert torch.func.functional_call(loss_fn, own, (q, k)) == twin(q, k)
    assert torch.equal(own["queue"], twin.queue)
    assert all(torch.equal(before[name], x) for name, x in loss_fn.named_buffers())


def test_a_write_over_saved_rows_is_noticed() -> None:
    """By autograd, as for any tensor: who copies over the buffers between forward and backward gets an error."""
    loss_fn = filled(5, backend="torch")
    q, k = batches(1)[0]
    loss = loss_fn(q.clone().requires_grad_(), k)
    loss_fn.queue.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("queue", lambda z, rows: (z * rows).sum(1).exp().sum()),
        ("queue", lambda z, rows: torch.cdist(z, rows).sum()),
        ("incoming", lambda z, rows: (z * rows).sum(1).exp().sum()),
    ],
)
def test_a_term_of_the_user_over_the_queue(name: str, term: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Autograd saves the buffer itself; the step that follows does not write to it."""
    q, k = batches(7)[-1]
    gradients = []
    for prepare in (torch.clone, lambda x: x):
        loss_fn = filled(5)
        z = torch.ones_like(loss_fn.queue).requires_grad_()
        aux = term(z, prepare(getattr(loss_fn, name)))
        (aux + loss_fn(q, k)).backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("weight_grad", ["in_batch", "full", "none"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_reset_before_the_backward(backend: str, weight_grad: str) -> None:
    q, k = batches(7)[-1]
    gradients = []
    for reset in (False, True):
        loss_fn = filled(5, backend=backend, weight_grad=weight_grad)
        leaf = q.clone().requires_grad_()
        loss = loss_fn(leaf, k)
        if reset:
            loss_fn.reset_parameters()
            assert not any(x.any() for x in loss_fn.buffers())
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        loss_fn = CACRQueueLoss(queue_size=filled(0).queue_size, dim=D)
    for q, k in batches(4):
        for mine, expected in zip(step(loss_fn, q, k), step(loss_fn, q, k, update_queue=False), strict=True):
            assert torch.isfinite(mine).all()
            assert torch.isfinite(expected).all()
    assert len(kept(loss_fn))


# ---- 2: forwards that run twice --------------------------------------------------------------------------------------
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_gradient_without_it(reentrant: bool, calls: int) -> None:
    """With a queue that is empty, fills and is full."""
    loss_fn, twin = filled(calls), filled(calls)
    for q, k in batches(9)[-4:]:
        mine, expected = q.clone().requires_grad_(), q.clone().requires_grad_()
        options = {"update_queue": True} if reentrant else {}
        loss = checkpoint(lambda q, k=k, o=options: loss_fn(q, k, **o), mine, use_reentrant=reentrant)
        truth = twin(expected, k)
        assert loss == truth
        loss.backward()
        truth.backward()
        torch.testing.assert_close(mine.grad, expected.grad, rtol=0, atol=0)
    assert torch.equal(kept(loss_fn), kept(twin))


def test_reentrant_checkpoint_without_update_queue_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    loss_fn = filled(2)
    before = kept(loss_fn)
    q, k = batches(1)[0]
    loss = checkpoint(loss_fn, q.clone().requires_grad_(), k, use_reentrant=True)
    with pytest.warns(UserWarning, match="pass update_queue=True, or use_reentrant=False"):
        loss.backward()
    checkpoint(loss_fn, q.clone().requires_grad_(), k, use_reentrant=True).backward()  # a second warning is an error
    assert torch.equal(kept(loss_fn), before)


def test_closures_that_run_twice() -> None:
    """As of SAM and LBFGS: the second evaluation sees the queue of the first, and its keys enter once."""
    encoder = nn.Linear(D, D)
    loss_fn, twin = filled(3), filled(3)
    for q, k in batches(9)[-3:]:
        first = step(lambda q, k: loss_fn(encoder(q), k), q, k)
        again = step(lambda q, k: loss_fn(encoder(q), k, update_queue=False), q, k)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        twin(q, k)
        assert torch.equal(kept(loss_fn), kept(twin))


def test_two_calls_before_the_backward() -> None:
    """The first does not store its keys; both read the queue, which the second one changes."""
    (q0, k0), (q1, k1) = batches(2)
    results = []
    for together in (False, True):
        loss_fn, leaf = filled(5), torch.stack([q0, q1]).requires_grad_()
        first = loss_fn(leaf[0], k0, update_queue=False)
        if not together:
            first.backward()
        second = loss_fn(leaf[1], k1)
        (first + second if together else second).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


def test_lbfgs() -> None:
    encoder, loss_fn = nn.Linear(D, D), filled(3)
    optimizer = torch.optim.LBFGS(encoder.parameters(), max_iter=3)
    for q, k in batches(9)[-3:]:
        evaluated: list[Tensor] = []

        def closure(q: Tensor = q, k: Tensor = k, evaluated: list[Tensor] = evaluated) -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(encoder(q), k, update_queue=not evaluated)
            loss.backward()
            evaluated.append(loss.detach())
            return loss

        before = loss_fn.queue_count + loss_fn.incoming_count
        optimizer.step(closure)
        assert len(evaluated) > 1
        assert loss_fn.queue_count + loss_fn.incoming_count == before + V * B


def test_a_symmetric_step_is_one_call() -> None:
    """Two calls make k1 a negative of its own instance, unless the first stores nothing."""
    (q, k), (together, apart, careful) = batches(9)[-1], (filled(5, 12) for _ in range(3))
    queue = last_keys([k for _, k in batches(5)], 12)
    torch.testing.assert_close(together(q, k), cacr_queue_loss(q, k, queue, normalize=True))
    first, second = ((q[i], k[1 - i]) for i in range(2))
    wrong = (apart(*first) + apart(*second)) / 2
    right = (careful(*first, update_queue=False) + careful(*second)) / 2
    late = last_keys([k for _, k in batches(4)], 12)
    expected = [
        cacr_queue_loss(*pair, rows, normalize=True) for pair, rows in zip((first, second), (late, queue), strict=True)
    ]
    torch.testing.assert_close(right, sum(expected) / 2)
    assert (wrong - right).abs() > 1e-3
    assert careful.incoming_count == B


# ---- 3: modes, see test_queue.py; 4: devices and ranks ---------------------------------------------------------------
def test_several_ranks_are_told_about_broadcast_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loss_fn, (q, k) = filled(0), batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(q, k, update_queue=False)
        CACRQueueLoss()(q, k, k[0])
    with pytest.warns(UserWarning, match="broadcast_buffers=False"):
        loss_fn(q, k)
    filled(2)


def test_keys_of_a_half_type_are_normalised_in_float32() -> None:
    """Where a backend takes half types as they are, so do the keys that wait."""
    loss_fn = CACRQueueLoss(queue_size=8, dim=D, normalize=True)
    keys = 7.3 * torch.randn(3, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss_fn(keys, keys)
    for found in (loss_fn.incoming[:3], loss_fn._normalized(keys)):
        torch.testing.assert_close(found, normalize(keys.float(), dim=-1), rtol=1e-6, atol=1e-7)


# ---- 5: transforms and replicas --------------------------------------------------------------------------------------
def test_func_grad_leaves_nothing_in_the_module() -> None:
    loss_fn, twin = (CACRQueueLoss(queue_size=8, dim=D) for _ in range(2))
    for q, k in batches(5):
        mine = torch.func.grad(lambda q, k=k: loss_fn(q, k))(q)
        assert torch.equal(mine, step(twin, q, k)[1])
        torch.func.grad(lambda k, q=q: loss_fn(q, k, update_queue=False))(k)
    for again in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(kept(again), kept(twin))


def test_func_grad_over_the_keys_stores_them() -> None:
    loss_fn, twin = (CACRQueueLoss(queue_size=8, dim=D) for _ in range(2))
    for q, _ in batches(3):
        torch.func.grad(lambda x: loss_fn(x, x))(q)
        twin(q, q)
        assert torch.equal(kept(copy.deepcopy(loss_fn)), kept(twin))


def test_replicas_say_that_they_cannot_fill_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``nn.DataParallel`` makes of a module on several devices; on one it calls the module itself."""
    monkeypatch.setattr(checks, "_warned", set())
    loss_fn = filled(2)
    replica = loss_fn._replicate_for_data_parallel()
    replica._buffers = dict(loss_fn._buffers)
    before, (q, k) = copy.deepcopy(loss_fn.state_dict()), batches(1)[0]
    with pytest.warns(UserWarning, match=r"cannot be filled under nn\.DataParallel"):
        replica(q, k)
    assert replica(q, k) == loss_fn(q, k, update_queue=False)
    assert all(torch.equal(x, before[name]) for name, x in loss_fn.state_dict().items())


# ---- 6: one direction, and which views enter -------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 4, 100])
def test_keys_of_one_direction_enter_once(size: int) -> None:
    loss_fn, history = CACRQueueLoss(queue_size=size, dim=D), [torch.zeros(0, B, D)]
    for q, k in batches(5):
        queue = last_keys(history, size)
        torch.testing.assert_close(loss_fn(q[0], k[0]), cacr_queue_loss(q[0], k[0], queue, normalize=True))
        history.append(k[0])
        torch.testing.assert_close(kept(loss_fn), last_keys(history, size))


@pytest.mark.parametrize("size", [2, 4, 100])
def test_the_last_view_enters(size: int) -> None:
    loss_fn, history = CACRQueueLoss(queue_size=size, dim=D, enqueue="last"), []
    for q, k in batches(5, 3):
        loss_fn(q, k)
        history.append(k[-1])
        torch.testing.assert_close(kept(loss_fn), last_keys(history, size))


# ---- the path of devices and compilers, which no CPU takes in eager mode ---------------------------------------------
@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from cacr_kernels import modules

    monkeypatch.setattr(modules, "_traced", lambda x: True)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("size", [1, 5, 9, 100])
def test_unfilled_rows_are_excluded_on_the_device(size: int, in_batch: bool, backend: str) -> None:
    loss_fn = CACRQueueLoss(queue_size=size, dim=D, backend=backend, in_batch=in_batch)
    history: list[Tensor] = []
    data = batches(6)
    leaves = [q.clone().requires_grad_() for q, _ in data]
    losses = [loss_fn(q, k) for q, (_, k) in zip(leaves, data, strict=True)]  # any number before the first backward
    for (q, k), leaf, loss in zip(data, leaves, losses, strict=True):
        expected = q.clone().requires_grad_()
        truth = cacr_queue_loss(expected, k, last_keys(history, size), normalize=True, in_batch=in_batch)
        torch.testing.assert_close(loss, truth)
        loss.backward()
        truth.backward()
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-6)
        history.append(k)
    assert torch.equal(kept(loss_fn), last_keys(history, size))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    "test",
    [
        lambda: test_checkpoint_gives_the_gradient_without_it(False, 1),
        lambda: test_checkpoint_gives_the_gradient_without_it(True, 5),
        test_closures_that_run_twice,
        test_two_calls_before_the_backward,
        test_func_grad_leaves_nothing_in_the_module,
        test_averaged_model_copies_buffers,
    ],
)
def test_the_same_on_a_device(test: Callable[[], None]) -> None:
    test()
