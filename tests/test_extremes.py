"""Large temperatures and norms, sets that start late: where a softmax written without care loses its digits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import cacr_kernels
from cacr_kernels import testing

BACKENDS = [name for name, reason in cacr_kernels.backends().items() if reason is None and name != "reference"]
EPS = torch.finfo(torch.float32).eps

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def gradient(call, z, backend):
    x = z.clone().requires_grad_()
    loss = call(x, backend)
    (g,) = torch.autograd.grad(loss, x)
    return loss.detach().double(), g.double()


def assert_within_budget(call, z, backend):
    """Loss and gradient of float32 input: error <= 2 x eager + 8 eps, the spec's rule."""
    true_loss, truth = gradient(call, z.double(), "reference")
    eager_loss, eager = gradient(call, z, "reference")
    loss, actual = gradient(call, z, backend)
    for x, y, t in ((loss, eager_loss, true_loss), (actual, eager, truth)):
        scale = t.abs().max()
        error, yardstick = ((v - t).abs().max() / scale for v in (x, y))
        assert error <= testing.FACTOR * yardstick + testing.EPSILONS * EPS, f"{error:.1e}, eager {yardstick:.1e}"


@each_backend
@pytest.mark.parametrize("cost", ["sqeuclidean", "rbf"])
@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("norm", [1.0, 30.0, 300.0, 1e4, 1e6])
def test_long_vectors(backend, norm, tau, cost):
    z = norm * torch.randn(2, 63, 128, generator=torch.Generator().manual_seed(1))
    assert_within_budget(lambda x, b: cacr_kernels.cacr_loss(x, tau_neg=tau, cost=cost, backend=b), z, backend)


@each_backend
@pytest.mark.parametrize("tau", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("num_views", [2, 3])
def test_one_positive_takes_all(backend, num_views, tau):
    z = torch.randn(num_views, 200, 64, generator=torch.Generator().manual_seed(2))
    assert_within_budget(lambda x, b: cacr_kernels.cacr_loss(x, tau_pos=tau, beta=0.0, backend=b), z, backend)


@each_backend
@pytest.mark.parametrize("tau", [0.5, 2.0, 8.0, 11.0])
def test_near_keys_after_many_far_ones(backend, tau):
    g = torch.Generator().manual_seed(0)
    pole = torch.zeros(8)
    pole[0] = 1
    q = normalize(pole + 0.05 * torch.randn(600, 8, generator=g), dim=-1)
    k = q + 0.001 * torch.randn(600, 8, generator=g)
    k[:144] = normalize(-pole + 0.05 * torch.randn(144, 8, generator=g), dim=-1)
    z = torch.stack([q, k])
    assert_within_budget(lambda x, b: cacr_kernels.cacr_loss(x, tau_neg=tau, alpha=0.0, backend=b), z, backend)


@each_backend
@pytest.mark.parametrize("tau", [1.0, 0.1])
@pytest.mark.parametrize("classes", [3, 4, 300])
@pytest.mark.parametrize("norm", [1.0, 20.0])
def test_members_far_down_the_keys(backend, classes, tau, norm):
    z = norm * normalize(torch.randn(600, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    labels = torch.arange(600) * classes // 600
    assert_within_budget(
        lambda x, b: cacr_kernels.supervised_cacr_loss(x, labels, tau_pos=tau, tau_neg=tau, backend=b), z, backend
    )


@each_backend
@pytest.mark.parametrize("tau", [0.3, 0.1, 1e-30, 1e-40])
def test_a_first_part_without_members(backend, tau):
    z = normalize(torch.randn(2, 63, 32, generator=torch.Generator().manual_seed(4)), dim=-1)
    call = lambda x, b: cacr_kernels.cacr_loss(x, pairing="pooled", tau_neg=tau, backend=b)  # noqa: E731
    assert_within_budget(call, z, backend)
