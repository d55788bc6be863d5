"""The numbers of the published code, met by every backend that can run here: values and gradients."""

from __future__ import annotations

import pytest
import torch

import cacr_kernels
from tests.agreement import there
from tests.vectors_io import load_vectors, vector_id

BACKENDS = [name for name, reason in cacr_kernels.available_backends().items() if reason is None]
TOLERANCE = 1e-10
TERMS = [("attraction", "beta"), ("repulsion", "alpha")]  # each alone: the weight of the other one is 0

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def close(actual, expected):
    torch.testing.assert_close(actual.cpu(), torch.as_tensor(expected).cpu(), rtol=0, atol=TOLERANCE)


def leaf(array):
    return torch.as_tensor(array).clone().requires_grad_()


def test_backends_are_there(backend):
    assert {"reference", "torch", "cpu"} <= set(BACKENDS) or cacr_kernels.available_backends()["cpu"] is not None


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_views(backend, vector, reduction):
    m, a = vector.meta, there(vector.arrays, backend)
    z = leaf(a["views"])
    options = {k: m[k] for k in ("tau_pos", "tau_neg", "alpha", "beta")}
    parts = cacr_kernels.cacr_loss(z, **options, backend=backend, reduction=reduction, return_parts=True)
    loss = parts.loss / z[..., 0].numel() if reduction == "sum" else parts.loss.mean()
    close(loss.detach(), a["attraction"] + a["repulsion"])
    close(parts.attraction, a["attraction"])
    close(parts.repulsion, a["repulsion"])
    close(torch.autograd.grad(loss, z)[0], a["grad_attraction"] + a["grad_repulsion"])


@pytest.mark.parametrize(("term", "off"), TERMS)
@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_terms_of_views(backend, vector, term, off):
    m, a = vector.meta, there(vector.arrays, backend)
    z = leaf(a["views"])
    options = {k: m[k] for k in ("tau_pos", "tau_neg", "alpha", "beta")} | {off: 0.0}
    loss = cacr_kernels.cacr_loss(z, **options, backend=backend)
    close(loss.detach(), a[term])
    close(torch.autograd.grad(loss, z)[0], a[f"grad_{term}"])


@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_supervised_by_instance_is_the_attraction_of_views(backend, vector):
    m, a = vector.meta, there(vector.arrays, backend)
    z = leaf(a["views"])
    labels = torch.arange(m["B"], device=z.device).repeat(m["V"])
    options = {"tau_pos": m["tau_pos"], "alpha": m["alpha"], "beta": 0.0}
    loss = cacr_kernels.supervised_cacr_loss(z.flatten(0, 1), labels, **options, backend=backend)
    close(loss.detach(), a["attraction"])
    close(torch.autograd.grad(loss, z)[0], a["grad_attraction"])


@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_uniform_weights(backend, vector):
    m, a = vector.meta, there(vector.arrays, backend)
    z = leaf(a["views"])
    loss = cacr_kernels.cacr_loss(z, tau_pos=0, tau_neg=0, alpha=m["alpha"], beta=m["beta"], backend=backend)
    close(loss.detach(), a["uniform_loss"])
    close(torch.autograd.grad(loss, z)[0], a["grad_uniform"])


@pytest.mark.parametrize("vector", load_vectors("rbf"), ids=vector_id)
def test_rbf(backend, vector):
    m, a = vector.meta, there(vector.arrays, backend)
    z = leaf(a["views"])
    options = {k: m[k] for k in ("tau_pos", "tau_neg", "beta", "rbf_scale")}
    parts = cacr_kernels.cacr_loss(z, **options, alpha=0, cost="rbf", backend=backend, return_parts=True)
    close(parts.repulsion, a["repulsion"])
    close(torch.autograd.grad(parts.loss, z)[0], a["grad_repulsion"])


@pytest.mark.parametrize("vector", load_vectors("queue"), ids=vector_id)
def test_queue(backend, vector):
    m, a = vector.meta, there(vector.arrays, backend)
    q = leaf(a["queries"])
    parts = cacr_kernels.cacr_queue_loss(
        q,
        a["keys"],
        a["queue"],
        **{k: m[k] for k in ("tau_pos", "tau_neg", "alpha", "beta")},
        in_batch=m["intra_batch"],
        normalize=True,
        backend=backend,
        return_parts=True,
    )
    close(parts.attraction, a["attraction"])
    close(parts.repulsion, a["repulsion"])
    close(torch.autograd.grad(parts.loss, q)[0], a["grad_attraction"] + a["grad_repulsion"])


@pytest.mark.parametrize(("term", "off"), TERMS)
@pytest.mark.parametrize("vector", load_vectors("queue"), ids=vector_id)
def test_terms_of_queue(backend, vector, term, off):
    m, a = vector.meta, there(vector.arrays, backend)
    q = leaf(a["queries"])
    options = {k: m[k] for k in ("tau_pos", "tau_neg", "alpha", "beta")} | {off: 0.0}
    options |= {"in_batch": m["intra_batch"], "normalize": True, "backend": backend}
    loss = cacr_kernels.cacr_queue_loss(q, a["keys"], a["queue"], **options)
    close(loss.detach(), a[term])
    close(torch.autograd.grad(loss, q)[0], a[f"grad_{term}"])


@pytest.mark.parametrize(("cost", "reduction"), [("rbf", "mean"), ("sqeuclidean", "sum")])
@pytest.mark.parametrize("vector", load_vectors("momentum"), ids=vector_id)
def test_momentum(backend, vector, cost, reduction):
    m, a = vector.meta, there(vector.arrays, backend)
    q = leaf(a["queries"])
    loss = cacr_kernels.cacr_momentum_loss(
        q,
        a["keys"],
        temperature=m["T"],
        cost=cost,
        key_offset=m["rank"] * m["B"],
        normalize=True,
        reduction=reduction,
        backend=backend,
    )
    close(loss.detach(), a[f"loss_{cost}"])
    close(torch.autograd.grad(loss, q)[0], a[f"grad_{cost}"])


@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_weights(backend, vector):
    """``cacr_weights`` against the weights of the last view and of the last pair (backends play no part)."""
    m, a = vector.meta, there(vector.arrays, backend)
    views = torch.as_tensor(a["views"]).cpu()
    num_views, batch, _ = views.shape
    weights = cacr_kernels.cacr_weights(views, tau_pos=m["tau_pos"], tau_neg=m["tau_neg"], top_k=batch)
    close(weights.attraction[-1, :, : num_views - 1], a["last_attraction_weights"])
    assert weights.pairs[-1] == (num_views - 2, num_views - 1)
    full = torch.zeros(batch, batch, dtype=torch.float64).scatter(1, weights.indices[-1], weights.repulsion[-1])
    assert full.diagonal().abs().max() == 0
    off_diagonal = full[~torch.eye(batch, dtype=torch.bool)].reshape(batch, batch - 1)
    close(off_diagonal, a["last_repulsion_weights"])
