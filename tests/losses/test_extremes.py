"""Large temperatures and norms, sets that start late: where a softmax written without care loses its digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cacr_kernels.testing import Case
from tests.agreement import BACKENDS, assert_within_budget, each_backend
from tests.covering import covering

# The temperatures are numbers: where one key has all the weight, derivatives w.r.t. them are below what float64 tells.


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def cacr(make, **options):
    defaults = {"tau_pos": 1.0, "tau_neg": 1.0}
    return Case("cacr_loss", {}, defaults | options, lambda seed: {"views": make(seed)}, learnable=False)


@covering(
    {"norm": [1.0, 30.0, 300.0, 1e4, 1e6], "tau": [1.0, 100.0], "cost": ["sqeuclidean", "rbf"], "backend": BACKENDS}, 2
)
def test_long_vectors(backend, norm, tau, cost):
    make = lambda seed: norm * torch.randn(2, 63, 128, generator=seeded(seed))  # noqa: E731
    assert_within_budget(cacr(make, tau_neg=tau, cost=cost), backend)


@each_backend
@pytest.mark.parametrize("tau", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("num_views", [2, 3])
def test_one_positive_takes_all(backend, num_views, tau):
    make = lambda seed: torch.randn(num_views, 200, 64, generator=seeded(seed))  # noqa: E731
    assert_within_budget(cacr(make, tau_pos=tau, beta=0.0), backend)


@each_backend
@pytest.mark.parametrize("tau", [0.5, 2.0, 8.0, 11.0])
def test_near_keys_after_many_far_ones(backend, tau):
    def make(seed):
        g = seeded(seed)
        pole = torch.zeros(8)
        pole[0] = 1
        q = normalize(pole + 0.05 * torch.randn(600, 8, generator=g), dim=-1)
        k = q + 0.001 * torch.randn(600, 8, generator=g)
        k[:144] = normalize(-pole + 0.05 * torch.randn(144, 8, generator=g), dim=-1)
        return torch.stack([q, k])

    assert_within_budget(cacr(make, tau_neg=tau, alpha=0.0), backend)


@covering({"classes": [3, 4, 300], "norm": [1.0, 20.0], "tau": [1.0, 0.1], "backend": BACKENDS}, 2)
def test_members_far_down_the_keys(backend, classes, tau, norm):
    def make(seed):
        z = norm * normalize(torch.randn(600, 16, generator=seeded(seed)), dim=-1)
        return {"embeddings": z, "labels": torch.arange(600) * classes // 600}

    options = {"tau_pos": tau, "tau_neg": tau}
    assert_within_budget(Case("supervised_cacr_loss", {}, options, make, learnable=False), backend)


@each_backend
@pytest.mark.parametrize("tau", [0.3, 0.1, 1e-30, 1e-40])
def test_a_first_part_without_members(backend, tau):
    make = lambda seed: normalize(torch.randn(2, 63, 32, generator=seeded(seed)), dim=-1)  # noqa: E731
    assert_within_budget(cacr(make, pairing="pooled", tau_neg=tau), backend)


# Many keys close to the query: their gradients cancel, and one long running sum would lose what is left


@covering({"loss": ["cacr_loss", "cacr_queue_loss", "supervised_cacr_loss"], "tau": [1.0, 5.0], "backend": BACKENDS}, 2)
def test_long_sums_of_clustered_keys(backend, loss, tau):
    def clustered(g, *shape):
        centres = torch.randn(5, shape[-1], generator=seeded(7))[torch.arange(shape[-2]) % 5]
        return normalize(centres + 0.1 * torch.randn(shape, generator=g), dim=-1)

    def make(seed):
        g = seeded(seed)
        if loss == "cacr_loss":
            return {"views": clustered(g, 2, 1013, 17)}
        if loss == "cacr_queue_loss":
            views = {name: clustered(g, 2, 11, 17) for name in ("queries", "keys")}
            return views | {"queue": clustered(g, 4099, 17)}
        return {"embeddings": clustered(g, 401, 17), "labels": torch.arange(401) % 2}

    options = {"tau_pos": 1.0, "tau_neg": tau, "alpha": 0.0}
    assert_within_budget(Case(loss, {}, options, make, learnable=False), backend)


SIZES = {"N": [2, 5, 31, 67], "D": [1, 3, 17, 64]}
LOG_NORMS = [-20, -12, -5, -1, 0, 1, 2, 3, 6]
TAUS = [0.0, 0.01, 1.0, 10.0, 30.0, 100.0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@each_backend
def test_any_norm_and_temperature(backend, data):
    """Losses and gradients of unit vectors and normal numbers of any length: 1e-20 ... 1e6."""
    draw = lambda values, label: data.draw(st.sampled_from(values), label=label)  # noqa: E731
    n, d = draw(SIZES["N"], "N"), draw(SIZES["D"], "D")
    norm, unit = 10.0 ** draw(LOG_NORMS, "log norm"), draw([False, True], "unit")
    loss = draw(["cacr_loss", "cacr_queue_loss", "supervised_cacr_loss"], "loss")
    options = {"tau_pos": draw(TAUS, "tau_pos"), "tau_neg": draw(TAUS, "tau_neg")}
    if loss == "cacr_loss":
        options |= {"pairing": draw(["unordered", "pooled"], "pairing"), "cost": draw(["sqeuclidean", "rbf"], "cost")}

    def make(seed):
        g = seeded(seed)

        def some(*shape):
            z = torch.randn(shape, dtype=torch.float64, generator=g)
            return norm * (normalize(z, dim=-1) if unit else z)

        if loss == "cacr_loss":
            return {"views": some(2, n, d)}
        if loss == "cacr_queue_loss":
            return {"queries": some(2, n, d), "keys": some(2, n, d), "queue": some(2 * n + 1, d)}
        return {"embeddings": some(n, d), "labels": torch.arange(n) % 3}

    assert_within_budget(Case(loss, {}, options, make, learnable=False), backend)
