"""NaN, Inf and overflow in data and temperatures reach the loss of every backend; they are never hidden."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cacr_kernels import CACRQueueLoss
from tests.agreement import BACKENDS, LOSSES, cast, device_of, each_backend, randn, run, small_inputs, there, unit
from tests.covering import covering

BAD = (math.nan, math.inf, -math.inf)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(("cacr", {"pairing": p, "cost": c}) for p in ("unordered", "ordered", "pooled") for c in ("sqeuclidean", "rbf")),
    ("cacr", {"pairing": "pooled", "reduction": "none"}),
    ("cacr", {"tau_pos": 0, "tau_neg": 0}),
    ("cacr", {"tau_neg": 50.0, "cost": "rbf"}),
    ("cacr", {"tau_pos": 50.0, "tau_neg": 50.0, "normalize": True}),
    *(("queue", {"in_batch": i, "weight_grad": w}) for i in (True, False) for w in ("in_batch", "full", "none")),
    ("queue", {"tau_neg": 0.0, "normalize": True}),
    *(
        ("momentum", {"cost": c, "key_offset": 4, "normalize": n})
        for c in ("rbf", "sqeuclidean")
        for n in (True, False)
    ),
    *(("momentum", {"cost": c}) for c in ("rbf", "sqeuclidean")),
    ("supervised", {}),
    ("supervised", {"tau_pos": 0.0, "tau_neg": 30.0}),
]


def loss_of(loss: str, tensors: dict[str, Tensor], backend: str, **options: Any) -> Tensor:
    """The loss without and with gradients, which may take different ways; on the CPU."""
    tensors = there(tensors, backend)
    value = LOSSES[loss](**tensors, **options, backend=backend)
    leaves = {n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    learning = LOSSES[loss](**leaves, **options, backend=backend)
    assert torch.equal(value.isfinite(), learning.isfinite())
    return value.detach().sum().cpu()


@covering({"variant": VARIANTS, "bad": BAD, "backend": BACKENDS}, 2)
def test_bad_data_reach_the_loss(variant: tuple[str, dict[str, Any]], bad: float, backend: str) -> None:
    """Any element of any tensor: first, last, and one in between."""
    loss, options = variant
    for dtype in (torch.float32, torch.float64):
        tensors = cast(small_inputs(loss), dtype)
        assert loss_of(loss, tensors, backend, **options).isfinite()
        for name in (name for name, t in tensors.items() if t.is_floating_point()):
            for index in (0, tensors[name].numel() // 2 + 1, tensors[name].numel() - 1):
                poisoned = tensors[name].clone()
                poisoned.view(-1)[index] = bad
                value = loss_of(loss, tensors | {name: poisoned}, backend, **options)
                assert not value.isfinite(), (dtype, name, index)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bad_half_data_reach_the_loss(dtype: torch.dtype, backend: str) -> None:
    for loss in LOSSES:
        tensors = cast(small_inputs(loss), dtype)
        name = next(iter(tensors))
        for bad in BAD:
            poisoned = tensors[name].clone()
            poisoned.view(-1)[3] = bad
            assert not loss_of(loss, tensors | {name: poisoned}, backend).isfinite(), (loss, bad)


@covering({"batch": [1, 2, 15, 16, 17, 33, 70], "bad": BAD, "backend": BACKENDS}, 2)
def test_bad_data_at_every_instance(bad: float, batch: int, backend: str) -> None:
    """In the middle of the vectors of a kernel and in its tails: the rows and the keys of every block."""
    for row in range(batch):
        queue = unit(batch, 9)
        queue[row, row % 9] = bad
        tensors = {"views": unit(2, batch, 9).float(), "queue": queue.float(), "labels": torch.arange(batch) % 2}
        views, queue, labels = there(tensors, backend).values()
        assert not LOSSES["queue"](views, views, queue, in_batch=False, backend=backend).isfinite(), row
        for tau in (1.0, 40.0) if batch > 2 else ():
            assert not LOSSES["supervised"](queue, labels, tau_neg=tau, backend=backend).isfinite(), row


@each_backend
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("entries", [1, 2, 5])
def test_negatives_that_are_all_infinitely_far(entries: int, bad: float, sign: int, backend: str) -> None:
    """Their cost is +Inf or NaN, depending on the sign of the inner product; such a set is not an empty one."""
    views = sign * unit(2, 1, 3).abs().float()
    queue = randn(entries, 3).float()
    queue[:, 1] = bad
    for weight_grad in ("in_batch", "full", "none"):
        value = loss_of("queue", {"queries": views, "keys": views, "queue": queue}, backend, weight_grad=weight_grad)
        assert not value.isfinite(), weight_grad
    refs = {"ref_embeddings": queue, "ref_labels": torch.ones(entries, dtype=torch.int64)}
    value = loss_of("supervised", {"embeddings": views[0], "labels": torch.tensor([0]), **refs}, backend)
    assert not value.isfinite()
    keys = torch.cat([views[0], queue])
    for cost in ("sqeuclidean", "rbf") if math.isinf(bad) else ("sqeuclidean",):
        value = loss_of("momentum", {"queries": views, "keys": keys}, backend, cost=cost, temperature=0.5)
        assert not value.isfinite(), cost


@each_backend
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bad", BAD)
def test_bad_values_of_one_instance_per_query(bad: float, sign: int, backend: str) -> None:
    """``reduction="none"``: every query whose set holds the bad embedding shows it, no other does."""
    z = sign * unit(2, 4, 3).abs().to(device_of(backend))
    z[1, 2, 0] = bad
    for options in ({"pairing": "ordered"}, {"pairing": "pooled"}):
        rows = LOSSES["cacr"](z, reduction="none", backend=backend, **options)
        expected = LOSSES["cacr"](z, reduction="none", backend="reference", **options)
        assert torch.equal(rows.isfinite(), expected.isfinite()), options
    queue = torch.cat([z[0], z[1]])
    rows = LOSSES["queue"](z[:, :2], z[:, :2], queue, reduction="none", backend=backend)
    assert not rows.isfinite().any()
    clean = z.nan_to_num(0.0, 0.0, 0.0)
    queries = clean.clone()
    queries[0, 1, 1] = bad
    rows = LOSSES["queue"](queries, clean, queue[:3], in_batch=False, reduction="none", backend=backend)
    assert (~rows.isfinite()).nonzero().cpu().tolist() == [[0, 1]]


@each_backend
def test_finite_data_whose_squares_overflow_reach_the_loss(backend: str) -> None:
    for loss in ("cacr", "queue", "supervised"):
        tensors = cast(small_inputs(loss), torch.float32)
        for name in (name for name, t in tensors.items() if t.is_floating_point()):
            huge = tensors[name].clone()
            huge.view(-1)[1] = 1e30
            assert not loss_of(loss, tensors | {name: huge}, backend).isfinite(), (loss, name)


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_temperatures_reach_the_loss(loss: str, backend: str) -> None:
    """Tensor temperatures are not inspected."""
    variants = [options for name, options in VARIANTS if name == loss and not any("tau" in o for o in options)]
    for options in variants or [{}]:
        for name in ("temperature",) if loss == "momentum" else ("tau_pos", "tau_neg"):
            for dtype in (torch.float32, torch.float64):
                tau = {name: torch.tensor(math.nan, dtype=dtype)}
                assert loss_of(loss, small_inputs(loss) | tau, backend, **options).isnan(), (options, name)


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_temperatures_reach_the_loss(loss: str, bad: float, backend: str) -> None:
    """Infinity times a cost is no number; an infinite divisor T makes the weights uniform, where that is finite."""
    variants = [options for name, options in VARIANTS if name == loss and not any("tau" in o for o in options)]
    for options in variants or [{}]:
        for name in ("temperature",) if loss == "momentum" else ("tau_pos", "tau_neg"):
            for dtype in (torch.float32, torch.float64):
                tensors = cast(small_inputs(loss), dtype) | {name: torch.tensor(bad, dtype=dtype)}
                value = loss_of(loss, tensors, backend, **options)
                expected = loss_of(loss, tensors, "reference", **options)
                assert value.isfinite() == expected.isfinite(), (options, name, dtype)
                if value.isfinite():
                    assert loss == "momentum"
                    torch.testing.assert_close(value, expected)


@each_backend
@pytest.mark.parametrize("cost", ["rbf", "sqeuclidean"])
def test_a_momentum_temperature_of_zero_reaches_the_loss(cost: str, backend: str) -> None:
    zero = {"temperature": torch.tensor(0.0)}
    assert not loss_of("momentum", small_inputs("momentum") | zero, backend, cost=cost).isfinite()


@each_backend
@pytest.mark.parametrize("bad", BAD)
def test_bad_temperatures_of_the_kept_queue(bad: float, backend: str) -> None:
    """And the module, where the loss is a module's."""
    loss_fn = CACRQueueLoss(queue_size=20, dim=5, tau_neg=torch.tensor(bad), backend=backend)
    loss_fn, q = loss_fn.to(device_of(backend)), unit(2, 7, 5).to(device_of(backend))
    for _ in range(3):
        assert not loss_fn(q, q.flip(1)).isfinite()


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
def test_negative_temperature_tensors_are_computed_with(loss: str, backend: str) -> None:
    for name in ("temperature",) if loss == "momentum" else ("tau_pos", "tau_neg"):
        tensors = small_inputs(loss) | {name: torch.tensor(-0.5, dtype=torch.float64)}
        for options in [{}] if loss != "cacr" else [{}, {"cost": "rbf"}, {"pairing": "pooled"}]:
            actual, expected = (run(loss, tensors, b, **options).parts for b in (backend, "reference"))
            torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-10, atol=1e-10)


@each_backend
def test_bad_data_stay_out_of_the_sets_that_do_not_hold_them(backend: str) -> None:
    z, labels = randn(6, 3), torch.tensor([0, 1, 0, 2, 1, 0])
    clean = run("supervised", {"embeddings": z, "labels": labels}, "reference").parts
    z[3] = math.nan  # the only instance of its label
    parts = run("supervised", {"embeddings": z, "labels": labels}, backend).parts
    torch.testing.assert_close(parts.attraction, clean.attraction, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts.attraction_entropy, clean.attraction_entropy, rtol=1e-10, atol=1e-10)
    assert parts.repulsion.isnan()
    assert parts.loss.isnan()
