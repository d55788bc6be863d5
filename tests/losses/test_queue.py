"""The queue that ``CACRQueueLoss`` keeps: what enters when, that nothing is lost, and its life in a training loop."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cacr_kernels import CACRQueueLoss, cacr_queue_loss

V, B, D = 2, 3, 5
Data = list[tuple[Tensor, Tensor]]


def batches(count: int, views: int = V) -> Data:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(views, B, D, generator=g), torch.randn(views, B, D, generator=g)) for _ in range(count)]


def last_keys(history: list[Tensor], size: int) -> Tensor:
    """The last ``size`` keys that came, oldest first; those of one call in the order of its views."""
    keys = torch.cat([normalize(k, dim=-1).reshape(-1, D) for k in history]) if history else torch.zeros(0, D)
    return keys[-size:]


def in_queue(loss_fn: nn.Module) -> Tensor:
    """What a forward reads now, oldest first."""
    count, size = int(loss_fn.queue_count), loss_fn.queue_size
    return loss_fn.queue[:count] if count <= size else loss_fn.queue.roll(-(count % size), 0)


def kept(loss_fn: nn.Module) -> Tensor:
    """The same after the keys that wait."""
    return torch.cat([in_queue(loss_fn), loss_fn.incoming[: loss_fn.incoming_count]])[-loss_fn.queue_size :]


def filled(count: int = 3, size: int = 8, **options: Any) -> CACRQueueLoss:
    """A loss whose queue holds the keys of ``count`` calls."""
    loss_fn = CACRQueueLoss(queue_size=size, dim=D, **options)
    for q, k in batches(count):
        loss_fn(q, k)
    return loss_fn


# ---- what is in the queue --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("size", [1, 4, 5, 6, 7, 9, 13, 100])
def test_the_last_keys_are_the_queue(size: int, views: int) -> None:
    """No key is lost and none is twice there: sizes below, at and above a batch, multiples of it and not."""
    loss_fn = CACRQueueLoss(queue_size=size, dim=D)
    history: list[Tensor] = []
    for q, k in batches(7, views):
        loss = loss_fn(q, k)
        torch.testing.assert_close(loss, cacr_queue_loss(q, k, last_keys(history, size), normalize=True))
        history.append(k)
        assert torch.equal(kept(loss_fn), last_keys(history, size))


@pytest.mark.parametrize(
    "options",
    [
        {"tau_pos": 2.0, "tau_neg": 3.0, "alpha": 0.5, "beta": 4.0},
        {"in_batch": False, "reduction": "none"},
        {"weight_grad": "full", "reduction": "sum"},
        {"weight_grad": "none", "return_parts": True, "backend": "torch"},
        {"normalize": False, "backend": "reference"},
    ],
    ids=str,
)
def test_options_hold_with_a_queue_of_its_own(options: dict[str, Any]) -> None:
    options = {"normalize": True} | options
    own, callers = CACRQueueLoss(queue_size=7, dim=D, **options), CACRQueueLoss(**options)
    queue = torch.zeros(0, D)
    for q, k in batches(4):
        torch.testing.assert_close(own(q, k), callers(q, k, queue))
        queue = torch.cat([queue, (normalize(k, dim=-1) if options["normalize"] else k).reshape(-1, D)])[-7:]


def test_keys_enter_at_the_next_forward() -> None:
    loss_fn = filled(2)
    before, copied = loss_fn.queue.detach(), loss_fn.queue.clone()
    q, k = batches(3)[-1]
    assert torch.equal(in_queue(loss_fn), last_keys([k for _, k in batches(1)], 8))
    loss_fn(q, k)
    assert torch.equal(before, copied)  # who holds the old queue keeps it
    assert torch.equal(in_queue(loss_fn), last_keys([k for _, k in batches(2)], 8))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_key_of_the_own_view_is_not_read(backend: str, bad: float) -> None:
    """With two views query 0 meets key 1: what is wrong with key 0 does not reach it."""
    q, k, queue = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.randn(5, 3)
    k[0, 1] = bad
    rows = cacr_queue_loss(q, k, queue, reduction="none", backend=backend)
    assert rows[0].isfinite().all()
    assert not rows[1, 1].isfinite()


def test_a_step_copies_no_queue() -> None:
    """In memory of its own the ring is written in place; a graph that is not done keeps the old rows."""
    loss_fn = filled(4)
    (q, k), where = batches(1)[0], loss_fn.queue.data_ptr()
    for _ in range(3):
        loss_fn(q.clone().requires_grad_(), k).backward()
        assert loss_fn.queue.data_ptr() == where
    loss = loss_fn(q.clone().requires_grad_(), k)
    assert loss_fn.queue.data_ptr() == where
    loss_fn(q, k)
    assert loss_fn.queue.data_ptr() != where
    loss.backward()


def test_the_callers_keys_are_copied() -> None:
    """Also where they are not normalised: what the caller writes into them later does not reach the queue."""
    loss_fn = CACRQueueLoss(queue_size=8, dim=D, normalize=False)
    q, k = batches(1)[0]
    given = k.clone()
    loss_fn(q, given)
    given.zero_()
    assert torch.equal(kept(loss_fn), k.reshape(-1, D))


def test_refused_calls_add_nothing() -> None:
    loss_fn = filled()
    before = kept(loss_fn)
    q, k = batches(1)[0]
    for bad in ((q, k[:, :2]), (q, k.long()), (q[:1], k), (q, k[..., :4])):
        with pytest.raises((TypeError, ValueError)):
            loss_fn(*bad)
    loss_fn.reduction = "all"
    with pytest.raises(ValueError, match="reduction"):
        loss_fn(q, k)
    assert torch.equal(kept(loss_fn), before)


# ---- backward --------------------------------------------------------------------------------------------------------
def test_backward_may_come_after_later_forwards() -> None:
    loss_fn = CACRQueueLoss(queue_size=7, dim=D)
    data = batches(4)
    queries = [q.clone().requires_grad_() for q, _ in data]
    losses = [loss_fn(q, k) for q, (_, k) in zip(queries, data, strict=True)]
    loss_fn.state_dict()
    for i, (q, loss) in enumerate(zip(queries, losses, strict=True)):
        (g,) = torch.autograd.grad(loss, q)
        again = q.detach().clone().requires_grad_()
        by_hand = cacr_queue_loss(again, data[i][1], last_keys([k for _, k in data[:i]], 7), normalize=True)
        torch.testing.assert_close(g, torch.autograd.grad(by_hand, again)[0])


def test_gradients_accumulate_over_calls() -> None:
    """One backward of the sum of four calls, and four backwards, give the same gradient of an encoder."""

    def encoder() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(D, D)

    together, single = encoder(), encoder()
    first, second = (CACRQueueLoss(queue_size=7, dim=D) for _ in range(2))
    torch.stack([first(together(q), k) for q, k in batches(4)]).sum().backward()
    for q, k in batches(4):
        second(single(q), k).backward()
    torch.testing.assert_close(together.weight.grad, single.weight.grad)
    assert single.weight.grad.abs().max() > 1e-3


def test_loading_leaves_a_pending_backward_alone() -> None:
    loss_fn, twin = filled(), filled()
    q, k = batches(4)[-1]
    mine, expected = q.clone().requires_grad_(), q.clone().requires_grad_()
    loss = loss_fn(mine, k)
    loss_fn.load_state_dict(CACRQueueLoss(queue_size=8, dim=D).state_dict())
    loss.backward()
    twin(expected, k).backward()
    assert torch.equal(mine.grad, expected.grad)


# ---- modes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode", "update_queue=False"])
def test_who_stores_no_keys_reads_the_queue_as_it_is(how: str) -> None:
    """The last batch still waits; later calls with gradients can save what they compute."""
    loss_fn, twin = filled(3), filled(3)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    loss_fn.train(how != "eval")
    options = {"update_queue": False} if how.startswith("update") else {}
    before = copy.deepcopy(loss_fn.state_dict())
    queue = last_keys([k for _, k in batches(2)], 8)
    for q, k in batches(6)[3:]:
        with modes.get(how, contextlib.nullcontext)():
            torch.testing.assert_close(loss_fn(q, k, **options), cacr_queue_loss(q, k, queue, normalize=True))
    for name, value in loss_fn.state_dict().items():
        assert torch.equal(value, before[name]), name
    for q, k in batches(6):
        mine, expected = q.clone().requires_grad_(), q.clone().requires_grad_()
        loss_fn.train()(mine, k).backward()
        twin(expected, k).backward()
        assert torch.equal(mine.grad, expected.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_update_queue_stores_in_any_mode(mode: Callable[[], Any]) -> None:
    loss_fn, plain = (CACRQueueLoss(queue_size=8, dim=D) for _ in range(2))
    loss_fn.eval()
    for q, k in batches(5):
        expected = plain(q, k)
        with mode():
            assert loss_fn(q, k, update_queue=True) == expected
    assert torch.equal(kept(loss_fn), kept(plain))


def test_autocast_keeps_full_precision() -> None:
    loss_fn, plain = CACRQueueLoss(queue_size=8, dim=D), CACRQueueLoss(queue_size=8, dim=D)
    for q, k in batches(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss_fn(q, k) == plain(q, k)
            assert loss_fn(q.bfloat16(), k.bfloat16()).dtype == torch.float32
        plain(q.bfloat16(), k.bfloat16())
    assert loss_fn.queue.dtype == torch.float32
    assert torch.equal(kept(loss_fn), kept(plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_another_dtype_in_the_middle(dtype: torch.dtype) -> None:
    """Keys that wait follow the module."""
    loss_fn = filled().to(dtype)
    q, k = batches(4)[-1]
    loss = loss_fn(q, k)
    assert loss_fn.queue.dtype == dtype
    assert loss_fn.queue_count.dtype == torch.int64
    queue = last_keys([k for _, k in batches(3)], 8).to(dtype)
    expected = cacr_queue_loss(q, k, queue, normalize=True)
    assert loss.dtype == expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, expected)
    assert kept(loss_fn).dtype == dtype


def test_to_another_device_in_the_middle() -> None:
    assert {x.device.type for x in filled(1).to("meta").state_dict().values()} == {"meta"}


def test_buffers_follow_the_keys() -> None:
    """From the device where the module was made, here one without data, to that of the first call."""
    with torch.device("meta"):
        loss_fn = CACRQueueLoss(queue_size=8, dim=D)
    twin = CACRQueueLoss(queue_size=8, dim=D)
    for q, k in batches(4):
        assert loss_fn(q, k) == twin(q, k)
    with pytest.raises(ValueError, match="queries, meta"):  # where they would be lost
        loss_fn(q.to("meta"), k.to("meta"))
    assert torch.equal(kept(loss_fn), kept(twin))


def test_reset_parameters_makes_meta_modules_whole() -> None:
    with torch.device("meta"):
        loss_fn = CACRQueueLoss(queue_size=8, dim=D)
    loss_fn.to_empty(device="cpu").reset_parameters()
    assert not any(x.any() for x in loss_fn.buffers())


# ---- copies and checkpoints ------------------------------------------------------------------------------------------
def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = CACRQueueLoss(queue_size=8, dim=D)
    result = fresh.load_state_dict(torch.load(file), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return fresh


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def assigned(module: nn.Module) -> nn.Module:
    fresh = CACRQueueLoss(queue_size=8, dim=D)
    fresh.load_state_dict(module.state_dict(), assign=True)
    return fresh


@pytest.mark.parametrize("again", [copy.deepcopy, pickled, saved_and_loaded, assigned])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_copies_go_on_alike(again: Callable[[nn.Module], nn.Module], calls: int) -> None:
    """Bit-equal losses in training and evaluation, and the original goes on as if nothing had happened."""
    loss_fn, untouched = filled(calls), filled(calls)
    other = again(loss_fn)
    for q, k in batches(8)[calls:]:
        assert loss_fn.eval()(q, k) == other.eval()(q, k)
        expected = untouched(q, k)
        assert other.train()(q, k) == expected
        assert loss_fn.train()(q, k) == expected
    assert torch.equal(kept(loss_fn), kept(other))


def test_state_dict_is_complete_at_any_time() -> None:
    names = {"queue", "queue_count", "incoming", "incoming_count"}
    assert CACRQueueLoss(queue_size=8, dim=D).state_dict().keys() == names
    assert CACRQueueLoss().state_dict() == {}
    model = nn.Sequential(nn.Identity(), filled(1))
    assert {f"1.{name}" for name in names} == model.state_dict().keys()
    snapshot = model.state_dict()
    copied = copy.deepcopy(snapshot)
    for q, k in batches(4):
        model[1](q, k)
    model.state_dict()
    model.load_state_dict(nn.Sequential(nn.Identity(), filled(2)).state_dict())
    model[1](q, k)
    for name, value in copied.items():  # like a parameter's, but later steps do not write into it
        assert torch.equal(snapshot[name], value), name
    assert torch.equal(kept(model[1]), last_keys([*(k for _, k in batches(2)), k], 8))


def test_saving_and_evaluating_change_nothing() -> None:
    loss_fn, untouched = (CACRQueueLoss(queue_size=8, dim=D) for _ in range(2))
    data = batches(5)
    for q, k in data[:4]:
        assert loss_fn(q, k) == untouched(q, k)
        loss_fn.state_dict()
        loss_fn.eval()(*data[4])
        loss_fn.train()


def test_a_checkpoint_without_the_queue_leaves_it() -> None:
    loss_fn, untouched = filled(), filled()
    result = loss_fn.load_state_dict({}, strict=False)
    assert len(result.missing_keys) == 4
    for q, k in batches(5)[3:]:
        assert loss_fn(q, k) == untouched(q, k)
    with pytest.raises(RuntimeError, match="Missing key"):
        loss_fn.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for queue"):
        loss_fn.load_state_dict(CACRQueueLoss(queue_size=9, dim=D).state_dict())
    assert torch.equal(kept(loss_fn), kept(untouched))


def test_learnable_temperature_beside_the_queue() -> None:
    tau = nn.Parameter(torch.tensor(0.5))
    loss_fn = CACRQueueLoss(queue_size=8, dim=D, tau_neg=tau, weight_grad="full")
    assert loss_fn.state_dict().keys() == {"tau_neg", "queue", "queue_count", "incoming", "incoming_count"}
    assert [*loss_fn.parameters()] == [tau]
    for q, k in batches(3):
        loss_fn(q, k).backward()
    assert tau.grad != 0


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"queue_size": 8}, ValueError, "dim must be given together with queue_size"),
        ({"dim": 8}, ValueError, "dim must be given together with queue_size"),
        ({"queue_size": -1, "dim": 5}, ValueError, "queue_size must be in"),
        ({"queue_size": 8.0, "dim": 5}, TypeError, "queue_size must be an integer, got float 8.0"),
        ({"queue_size": True, "dim": 5}, TypeError, "queue_size must be an integer, got bool True"),
        ({"queue_size": "8", "dim": 5}, TypeError, "queue_size must be an integer, got str '8'"),
        ({"queue_size": 8, "dim": 0}, ValueError, "dim must be in"),
        (
            {"queue_size": 8, "dim": 5, "enqueue": "first"},
            ValueError,
            "enqueue='first' is unknown; accepted: 'all', 'last'",
        ),
        ({"queue_size": 8, "dim": 5.0}, TypeError, "dim must be an integer, got float 5.0"),
    ],
    ids=str,
)
def test_construction(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CACRQueueLoss(**options)


def test_whose_queue() -> None:
    q, k = batches(1)[0]
    with pytest.raises(ValueError, match="queue must not be given: this module keeps its own of queue_size=8"):
        filled()(q, k, k[0])
    with pytest.raises(ValueError, match=r"queue must be a tensor \[K, D\], got None; or let the module keep one"):
        CACRQueueLoss()(q, k)
    with pytest.raises(ValueError, match="update_queue=True needs a module that keeps its queue"):
        CACRQueueLoss()(q, k, k[0], update_queue=True)
    with pytest.raises(TypeError, match="update_queue must be True or False, got int 1"):
        filled()(q, k, update_queue=1)
    with pytest.raises(ValueError, match="dim = 5 features, got 4"):
        filled()(q[..., :4], k[..., :4])


def test_repr_names_the_queue() -> None:
    assert repr(filled(0)).startswith("CACRQueueLoss(queue_size=8, dim=5, enqueue='all', tau_pos=1.0")
    assert repr(CACRQueueLoss()).startswith("CACRQueueLoss(tau_pos=1.0")
