"""``tau_plus``, and the functions of the published scripts with all their options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cacr_kernels
from cacr_kernels import CACRLoss, cacr_loss
from cacr_kernels.integrations.cacr_ssl import (
    CHOICES,
    LazyWeights,
    cacr_euclideanloss,
    cacr_rbfloss,
    moco_losses,
    our_loss1,
    our_loss2,
)
from tests.agreement import randn, there
from tests.vectors_io import load_vectors, vector_id

BACKENDS = [name for name, reason in cacr_kernels.available_backends().items() if reason is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_vector = pytest.mark.parametrize("vector", load_vectors("options"), ids=vector_id)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found.detach().cpu(), torch.as_tensor(expected).cpu(), rtol=0, atol=1e-10)


@every_backend
@every_vector
def test_published_numbers(backend: str, vector: Any) -> None:
    m, a = vector.meta, there(vector.arrays, backend)
    options = {name: m[name] for name in ("tau_pos", "tau_neg", "alpha", "beta", "tau_plus")}
    for reduction in ("mean", "sum", "none"):
        z = torch.as_tensor(a["views"]).clone().requires_grad_()
        parts = cacr_loss(z, **options, backend=backend, reduction=reduction, return_parts=True)
        loss = parts.loss / z[..., 0].numel() if reduction == "sum" else parts.loss.mean()
        close(loss, a["loss1_full_debiased"] + a["loss2_full_debiased"])
        close(parts.repulsion, a["loss2_full_debiased"])
        close(torch.autograd.grad(loss, z)[0], a["grad_full_debiased"])


@every_backend
@pytest.mark.parametrize("pairing", ["unordered", "ordered"])
@pytest.mark.parametrize(("batch", "beta"), [(7, 0.8), (7, 0.0), (1, 0.8)])
def test_as_the_reference(backend: str, pairing: Any, batch: int, beta: float) -> None:
    """Also where there is no negative or no weight; a learned temperature gets its gradient."""
    found = []
    for name in (backend, "reference"):
        tensors = there({"z": randn(3, batch, 5), "tau": torch.tensor(1.3, dtype=torch.float64)}, name)
        z, tau = (x.requires_grad_() for x in tensors.values())
        options: Any = {"tau_plus": 0.3, "tau_neg": tau, "beta": beta, "pairing": pairing, "backend": name}
        loss = cacr_loss(z, **options)
        found.append([x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, (z, tau)))])
    torch.testing.assert_close(*found)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_raw_rows(backend: str, dtype: torch.dtype) -> None:
    """Of unit vectors, whatever the rows are; half types too."""
    z = there({"z": 3 * randn(3, 7, 5).to(dtype)}, backend)["z"]
    unit = torch.nn.functional.normalize(z.to(torch.float32 if dtype == torch.bfloat16 else dtype), dim=-1)
    for reduction in ("mean", "none"):
        options: Any = {"tau_plus": 0.3, "backend": backend, "reduction": reduction}
        torch.testing.assert_close(cacr_loss(z, normalize=True, **options), cacr_loss(unit, **options))


def test_module() -> None:
    z = randn(2, 6, 4)
    torch.testing.assert_close(CACRLoss(tau_plus=0.2)(z), cacr_loss(z, tau_plus=0.2, normalize=True))
    with pytest.raises(ValueError, match=r"tau_plus must be 0 with pairing='pooled', got 0\.2"):
        CACRLoss(tau_plus=0.2, pairing="pooled")


# ---- the functions ---------------------------------------------------------------------------------------------------
@every_vector
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("debiased", [False, True])
def test_functions(vector: Any, choice: str, debiased: bool) -> None:
    """Loss, gradient and both weights."""
    m, a, name = vector.meta, vector.arrays, f"{choice}_{'debiased' if debiased else 'plain'}"
    views = [torch.as_tensor(z).clone().requires_grad_() for z in a["views"]]
    first, weights1 = our_loss1(views, m["alpha"], m["tau_pos"], choice)
    second, weights2 = our_loss2(views, m["beta"], m["tau_neg"], m["tau_plus"], choice, debiased)
    close(first, a[f"loss1_{name}"])
    close(second, a[f"loss2_{name}"])
    close(torch.stack(torch.autograd.grad(first + second, views)), a[f"grad_{name}"])
    close(weights1.tensor(), a[f"weights1_{name}"])
    close(weights2.tensor(), a[f"weights2_{name}"])


def test_weights_are_formed_when_they_are_used() -> None:
    made = []

    def compute() -> Tensor:
        made.append(1)
        return torch.arange(6.0).view(2, 3)

    loss, weights = torch.ones(()), LazyWeights(compute)
    assert loss.item() == 1
    assert made == []
    assert weights.shape == (2, 3)
    assert made == [1]
    assert weights.sum().item() == 15
    assert torch.stack([weights, weights]).shape == (2, 2, 3)
    assert (weights * 2)[1, 2].item() == (2 * weights)[1, 2].item() == 10
    assert weights[1, 0].item() == 3
    assert len(weights) == 2
    assert torch.equal(weights.detach().argmax(dim=1), torch.tensor([2, 2]))
    assert torch.equal(torch.softmax(weights, dim=1), weights.tensor().softmax(1))
    assert made == [1]


def test_weights_carry_the_published_gradient() -> None:
    views = [x.requires_grad_() for x in randn(2, 5, 3)]
    _, weights = our_loss2(views)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(weights.square().sum(), views))


def test_an_unknown_choice_is_refused() -> None:
    for function in (our_loss1, our_loss2):
        with pytest.raises(ValueError, match="choice must be one of 'full', 'none'"):
            function([torch.eye(3)] * 2, choice="without")


ON_ONE_PROCESS = [vector for vector in load_vectors("momentum") if vector.meta["world"] == 1]


@pytest.mark.parametrize("vector", ON_ONE_PROCESS, ids=vector_id)
def test_functions_of_moco_v3(vector: Any) -> None:
    """On one process: the numbers of a mean, and of a sum."""
    for function, name in ((cacr_rbfloss, "rbf"), (cacr_euclideanloss, "sqeuclidean")):
        queries = [torch.as_tensor(q).clone().requires_grad_() for q in vector.arrays["queries"]]
        loss = function(queries, torch.as_tensor(vector.arrays["keys"]), T=vector.meta["T"])
        close(loss, vector.arrays[f"loss_{name}"])
        close(torch.stack(torch.autograd.grad(loss, queries)), vector.arrays[f"grad_{name}"])


# ---- MoCo v2 ---------------------------------------------------------------------------------------------------------
def published_moco_v2(vector: Any, queries: list[Tensor], cached: bool) -> tuple[Tensor, Tensor]:
    """By the formulas of the published model, which keeps the first view's distances to the queue."""
    m, keys, queue = vector.meta, torch.as_tensor(vector.arrays["keys"]), torch.as_tensor(vector.arrays["queue"])
    q = [torch.nn.functional.normalize(x, dim=1) for x in queries]
    of_view = [2 - 2 * x @ queue.T for x in q]
    others = ~torch.eye(len(q[0]), dtype=torch.bool)
    pulled, pushed = [], []
    for v, x in enumerate(q):
        cost = torch.stack([(x - k).square().sum(-1) for u, k in enumerate(keys) if u != v], dim=1)
        pulled.append(((m["tau_pos"] * cost).softmax(1).detach() * cost).sum(1).mean())
        cost = of_view[0 if cached else v]
        logits = -m["tau_neg"] * cost.detach()
        if m["intra_batch"]:
            near = (x[:, None] - x).square().sum(-1)[others].view(len(x), -1)
            cost, logits = torch.cat([cost, near], 1), torch.cat([logits, -m["tau_neg"] * near], 1)
        pushed.append((logits.softmax(1) * cost).sum(1).mean())
    return m["alpha"] * torch.stack(pulled).mean(), -m["beta"] * torch.stack(pushed).mean()


every_queue = pytest.mark.parametrize("vector", load_vectors("queue"), ids=vector_id)


def leaves(vector: Any) -> list[Tensor]:
    return [torch.as_tensor(q).clone().requires_grad_() for q in vector.arrays["queries"]]


@every_queue
def test_function_of_moco_v2(vector: Any) -> None:
    """With a queue [D, K] that holds a key in each column, as there."""
    m, a, queries = vector.meta, vector.arrays, leaves(vector)
    options = {name: m[name] for name in ("tau_pos", "tau_neg", "alpha", "beta")}
    keys, queue = list(torch.as_tensor(a["keys"])), torch.as_tensor(a["queue"])
    losses = moco_losses(queries, keys, queue.T, **options, unif_intra_batch=m["intra_batch"])
    for found, name in zip(losses, ("attraction", "repulsion"), strict=True):
        close(found, a[name])
        close(torch.stack(torch.autograd.grad(found, queries, retain_graph=True)), a[f"grad_{name}"])
    close(losses.combine(2.0, 3.0), 2 * a["attraction"] + 3 * a["repulsion"])
    close(losses.combine(), a["attraction"] + a["repulsion"])


def test_what_the_cache_of_moco_v2_changes() -> None:
    """`docs/coming_from.md` says how much: of the repulsion, and of all gradients."""
    repulsions: list[float] = []
    gradients: list[float] = []
    for vector in load_vectors("queue"):
        queries = leaves(vector)
        exact, cached = (published_moco_v2(vector, queries, cached) for cached in (False, True))
        for found, name in zip(exact, ("attraction", "repulsion"), strict=True):
            close(found, vector.arrays[name])
        repulsions.append((cached[1] / exact[1] - 1).abs().item())
        own, other = (torch.stack(torch.autograd.grad(x[0] + x[1], queries)) for x in (exact, cached))
        gradients.append(((own - other).norm() / own.norm()).item())
    assert max(repulsions) == pytest.approx(0.04, abs=0.005)
    assert max(gradients) == pytest.approx(0.63, abs=0.01)
    assert sum(x > 0.2 for x in gradients) == 4
