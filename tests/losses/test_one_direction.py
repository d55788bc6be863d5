"""The form ``queries [B, D], keys [B, D]`` of the queue loss, and what is said where axes look swapped."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from cacr_kernels import (
    CACRLoss,
    CACRMomentumLoss,
    CACRQueueLoss,
    cacr_loss,
    cacr_momentum_loss,
    cacr_queue_loss,
    checks,
)
from tests.agreement import device_of, each_backend, randn

OPTIONS: list[dict[str, Any]] = [
    {},
    {"in_batch": False, "weight_grad": "full", "tau_neg": 3.0},
    {"weight_grad": "none", "normalize": True, "alpha": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_one_direction_is_the_same_as_twice_the_same_view(backend: str, batch: int, options: dict[str, Any]) -> None:
    q, k, queue = randn(batch, 5), randn(batch, 5, seed=1), randn(11, 5, seed=2)
    one, two = q.clone().requires_grad_(), q.clone().requires_grad_()
    mine = cacr_queue_loss(one, k, queue, return_parts=True, backend=backend, **options)
    expected = cacr_queue_loss([two, two], [k, k], queue, return_parts=True, backend="reference", **options)
    torch.testing.assert_close(tuple(mine), tuple(expected), rtol=1e-10, atol=1e-10)
    mine.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-10)


@each_backend
def test_rows_of_one_direction(backend: str) -> None:
    q, k, queue = (randn(n, 5, seed=n).to(device_of(backend)) for n in (7, 7, 3))
    rows = cacr_queue_loss(q, k, queue, reduction="none", backend=backend)
    twice = cacr_queue_loss([q, q], [k, k], queue, reduction="none", backend=backend)
    assert rows.shape == (7,)
    torch.testing.assert_close(rows.expand(2, 7), twice)
    torch.testing.assert_close(rows.sum(), cacr_queue_loss(q, k, queue, reduction="sum", backend=backend))
    torch.testing.assert_close(rows.mean(), CACRQueueLoss(normalize=False, backend=backend)(q, k, queue))


def test_refusals_of_one_direction() -> None:
    q, queue = randn(7, 5), randn(3, 5)
    with pytest.raises(ValueError, match=r"keys must have the shape of queries, \[7, 5\], got \[6, 5\]"):
        cacr_queue_loss(q, q[1:], queue)
    with pytest.raises(ValueError, match=r"keys must have shape \[B, D\], got \[1, 7, 5\]"):
        cacr_queue_loss(q, q[None], queue)
    with pytest.raises(ValueError, match=r"queries \[B, D\] must not have an empty dimension"):
        cacr_queue_loss(q[:0], q[:0], queue)
    with pytest.raises(ValueError, match="queries must hold at least 2 views, got V = 1"):
        cacr_queue_loss([q], [q], queue)


@pytest.mark.parametrize("cost", ["rbf", "sqeuclidean"])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_momentum_queries_of_one_view(backend: str, cost: Any) -> None:
    q, k, options = randn(7, 5), randn(11, 5, seed=1), {"normalize": True, "cost": cost, "key_offset": 2}
    one, listed = q.clone().requires_grad_(), q.clone().requires_grad_()
    rows = cacr_momentum_loss(one, k, reduction="none", backend=backend, **options)
    expected = cacr_momentum_loss([listed], k, reduction="none", backend=backend, **options)
    assert rows.shape == (7,)
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    rows.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, listed.grad, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"queries \[V, B, D\] must not have an empty dimension, got \[1, 0, 5\]"):
        cacr_momentum_loss(q[:0], k)


# ---- keys that would learn -------------------------------------------------------------------------------------------
def test_keys_that_require_grad_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    loss, q, k = CACRMomentumLoss(), randn(7, 5).requires_grad_(), randn(7, 5, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(q, k)
        with torch.no_grad():
            loss(q, k.requires_grad_())
        cacr_momentum_loss(q, k)
    with pytest.warns(UserWarning, match=r"keys of CACRMomentumLoss get no gradient, .*detach\(\), or take CACRLoss"):
        loss(q, k).backward()
    assert k.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CACRMomentumLoss()(q, k)


@pytest.mark.parametrize("listed", [False, True])
def test_keys_of_a_queue_that_require_grad_are_said_once(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    loss, q, k = CACRQueueLoss(), randn(2, 7, 5).requires_grad_(), randn(2, 7, 5, seed=1)
    queue = randn(3, 5, seed=2)

    def keys() -> Any:
        return list(k) if listed else k

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(q, keys(), queue)
        k.requires_grad_()
        with torch.no_grad():
            loss(q, keys(), queue)
        cacr_queue_loss(q, keys(), queue)
    with pytest.warns(UserWarning, match=r"keys of CACRQueueLoss get no gradient, .*detach\(\), or take CACRLoss"):
        loss(q, keys(), queue).backward()
    assert k.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CACRQueueLoss(queue_size=4, dim=5)(q, keys())


# ---- axes ------------------------------------------------------------------------------------------------------------
def test_stacked_views_are_refused_with_the_way_out() -> None:
    for refused in (lambda: cacr_loss(randn(14, 5)), lambda: CACRLoss()(randn(14, 5))):
        with pytest.raises(ValueError, match=r"views must have shape \[V, B, D\], got \[14, 5\].*\.view\(2, B, D\)"):
            refused()


def test_axes_that_look_swapped_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    z = randn(8, 2, 5)  # 8 instances, 2 views
    with pytest.warns(UserWarning, match=r"V = 8 views of B = 2 instances.*\.transpose\(0, 1\)"):
        swapped = cacr_loss(z)
    assert swapped != cacr_loss(z.transpose(0, 1))
    cacr_momentum_loss(z, randn(9, 5))
    monkeypatch.setattr(checks, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plain in (z[:, :1], z[:2], z[:2, :1], list(z)):  # one instance, V = B, a list of views
            cacr_loss(plain)
