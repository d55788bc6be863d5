"""The definition against the published numbers, scalar loops, closed forms and numerical derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize

from cacr_kernels import reference
from cacr_kernels.types import KeySets, Numbers, Terms
from tests.vectors_io import Vector, load_vectors, vector_id

TOLERANCE = 1e-10

momentum = partial(reference.momentum, cost="rbf", key_offset=0)


def with_numbers(definition: Callable[..., Terms], **defaults: Any) -> Callable[..., Terms]:
    """A definition whose temperatures come after the tensors, and alpha and beta by name."""

    def terms(*arguments: Any, alpha: float = 1.0, beta: float = 1.0, **options: Any) -> Terms:
        *tensors, tau_pos, tau_neg = arguments
        return definition(*tensors, Numbers(tau_pos, tau_neg, alpha, beta), **defaults | options)

    return terms


cacr = with_numbers(reference.cacr, pairing="unordered", cost="sqeuclidean", rbf_scale=2.0)
queue = with_numbers(reference.queue, in_batch=True, weight_grad="in_batch")
supervised = with_numbers(reference.supervised)


def randn(*shape: int, seed: int = 0, scale: float = 0.7) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(randn(*shape, seed=seed), dim=-1)


def loss_of(terms: Terms) -> Tensor:
    return terms.attraction.mean() + terms.repulsion.mean()


def assert_close(actual: Tensor, expected: Tensor | float, tolerance: float = TOLERANCE) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance)


def assert_vector(vector: Vector, name: str, value: Tensor, inputs: Tensor, prefix: str = "") -> None:
    (grad,) = torch.autograd.grad(value, inputs, retain_graph=True)
    assert_close(value, vector.arrays[prefix + name])
    assert_close(grad, vector.arrays[f"grad_{name}"])


# Published numbers


@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_views_vector(vector: Vector) -> None:
    meta, arrays = vector.meta, vector.arrays
    views = arrays["views"].requires_grad_()
    options = {"alpha": meta["alpha"], "beta": meta["beta"]}
    terms = cacr(views, meta["tau_pos"], meta["tau_neg"], **options)
    assert_vector(vector, "attraction", terms.attraction.mean(), views)
    assert_vector(vector, "repulsion", terms.repulsion.mean(), views)
    uniform = loss_of(cacr(views, 0.0, 0.0, **options))
    (grad,) = torch.autograd.grad(uniform, views)
    assert_close(uniform, arrays["uniform_loss"])
    assert_close(grad, arrays["grad_uniform"])


@pytest.mark.parametrize("vector", load_vectors("views"), ids=vector_id)
def test_views_vector_weights(vector: Vector) -> None:
    meta, arrays = vector.meta, vector.arrays
    views = arrays["views"]
    attracted = reference.attraction_statistics(views, meta["tau_pos"])
    c, members = reference.negative_costs(views, "unordered")
    repelled = reference.statistics(-meta["tau_neg"] * c, c, members)
    assert_close(attracted.weights[-1, :, :-1], arrays["last_attraction_weights"])
    assert_close(repelled.weights[-1][members].reshape(meta["B"], -1), arrays["last_repulsion_weights"])


@pytest.mark.parametrize("vector", load_vectors("rbf"), ids=vector_id)
def test_rbf_vector(vector: Vector) -> None:
    meta = vector.meta
    views = vector.arrays["views"].requires_grad_()
    options = {"alpha": meta["alpha"], "beta": meta["beta"], "rbf_scale": meta["rbf_scale"]}
    terms = cacr(views, meta["tau_pos"], meta["tau_neg"], cost="rbf", **options)
    assert_vector(vector, "repulsion", terms.repulsion, views)


@pytest.mark.parametrize("vector", load_vectors("queue"), ids=vector_id)
def test_queue_vector(vector: Vector) -> None:
    meta, arrays = vector.meta, vector.arrays
    queries = arrays["queries"].requires_grad_()
    options = {"alpha": meta["alpha"], "beta": meta["beta"], "in_batch": meta["intra_batch"]}
    inputs = (normalize(queries, dim=-1), arrays["keys"], arrays["queue"])
    terms = queue(*inputs, meta["tau_pos"], meta["tau_neg"], **options)
    assert_vector(vector, "attraction", terms.attraction.mean(), queries)
    assert_vector(vector, "repulsion", terms.repulsion.mean(), queries)


@pytest.mark.parametrize("vector", load_vectors("momentum"), ids=vector_id)
def test_momentum_vector(vector: Vector) -> None:
    meta, arrays = vector.meta, vector.arrays
    queries = arrays["queries"].requires_grad_()
    for cost, reduce in (("rbf", Tensor.mean), ("sqeuclidean", Tensor.sum)):
        offset = meta["rank"] * meta["B"]
        terms = momentum(normalize(queries, dim=-1), arrays["keys"], meta["T"], cost=cost, key_offset=offset)
        assert_vector(vector, cost, reduce(terms.attraction + terms.repulsion), queries, prefix="loss_")


# Scalar loops: the spec with Python floats


def sqdist(x: Tensor, y: Tensor) -> float:
    return sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))


def softmax(logits: list[float]) -> list[float]:
    exps = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exps) for x in exps]


def expected_cost(tau: float, costs: list[float], s: float | None = None) -> float:
    """F of one query over ``costs``: with phi(c) = c, or exp(-s c)."""
    weights = softmax([tau * c for c in costs]) if costs else []
    return sum(w * (c if s is None else math.exp(-s * c)) for w, c in zip(weights, costs, strict=True))


def entropy(weights: list[float]) -> float:
    return -sum(w * math.log(w) for w in weights)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def loop_attraction(q: Tensor, k: Tensor, tau: float) -> list[list[float]]:
    return [
        [expected_cost(tau, [sqdist(q[v, b], k[u, b]) for u in range(len(k)) if u != v]) for b in range(q.shape[1])]
        for v in range(len(q))
    ]


def loop_repulsion(z: Tensor, tau_neg: float, pairing: str, s: float | None) -> float:
    num_views, batch, _ = z.shape
    views, instances = range(num_views), range(batch)

    def values(x: int, key_views: list[int]) -> list[float]:
        costs = [[sqdist(z[x, b], z[y, j]) for y in key_views for j in instances if j != b] for b in instances]
        return [expected_cost(-tau_neg, row, s) for row in costs]

    if pairing == "pooled":
        groups = [[value for x in views for value in values(x, list(views))]]
    else:
        groups = [values(x, [y]) for x in views for y in views if x < y or (x > y and pairing == "ordered")]
    if s is None:
        return -mean([mean(group) for group in groups])
    return mean([math.log(mean(group)) if batch > 1 else 0.0 for group in groups])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 6), st.integers(1, 5), st.floats(0, 4), st.floats(0, 4), st.integers(0, 99))
def test_cacr_is_the_scalar_loop(v: int, b: int, d: int, tau_pos: float, tau_neg: float, seed: int) -> None:
    z = randn(v, b, d, seed=seed)
    for pairing in ("unordered", "ordered", "pooled"):
        terms = cacr(z, tau_pos, tau_neg, pairing=pairing, alpha=2.0, beta=3.0)
        assert terms.attraction.shape == terms.repulsion.shape == (v, b)
        assert_close(terms.attraction, 2 * torch.tensor(loop_attraction(z, z, tau_pos), dtype=torch.float64))
        assert_close(terms.repulsion.mean(), 3 * loop_repulsion(z, tau_neg, pairing, None))
        rbf = cacr(z, tau_pos, tau_neg, pairing=pairing, cost="rbf", rbf_scale=1.5, beta=3.0)
        assert rbf.repulsion.shape == ()
        assert_close(rbf.repulsion, 3 * loop_repulsion(z, tau_neg, pairing, 1.5))


@pytest.mark.parametrize("pairing", ["unordered", "ordered"])
def test_pair_stands_on_the_row_of_its_query_view(pairing: str) -> None:
    z = randn(3, 4, 5)
    pairs = [(0, 1), (0, 2), (1, 2)] + [(1, 0), (2, 0), (2, 1)] * (pairing == "ordered")
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for x, y in pairs:
        for b in range(4):
            costs = [sqdist(z[x, b], z[y, j]) for j in range(4) if j != b]
            expected[x, b] -= expected_cost(-2.0, costs) * 3 / len(pairs)
    assert_close(cacr(z, 1.0, 2.0, pairing=pairing).repulsion, expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 3), st.integers(1, 5), st.integers(0, 4), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_queue_is_the_scalar_loop(v: int, b: int, k: int, d: int, in_batch: bool, seed: int) -> None:
    q, keys, entries = randn(v, b, d, seed=seed), randn(v, b, d, seed=seed + 1), randn(k, d, seed=seed + 2)
    expected = torch.zeros(v, b, dtype=torch.float64)
    for view in range(v):
        for i in range(b):
            negatives = [*entries, *(q[view, j] for j in range(b) if j != i and in_batch)]
            expected[view, i] = -3 * expected_cost(-1.5, [sqdist(q[view, i], key) for key in negatives])
    for weight_grad in ("in_batch", "full", "none"):
        options = {"in_batch": in_batch, "weight_grad": weight_grad, "alpha": 2.0, "beta": 3.0}
        terms = queue(q, keys, entries, 1.2, 1.5, **options)
        assert_close(terms.attraction, 2 * torch.tensor(loop_attraction(q, keys, 1.2), dtype=torch.float64))
        assert_close(terms.repulsion, expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.floats(0.1, 2), st.integers(0, 9))
def test_momentum_is_the_scalar_loop(v: int, b: int, before: int, after: int, t: float, seed: int) -> None:
    q, keys = unit(v, b, 5, seed=seed), unit(before + b + after, 5, seed=seed + 1)
    rbf = momentum(q, keys, t, cost="rbf", key_offset=before)
    euclidean = momentum(q, keys, t, cost="sqeuclidean", key_offset=before)
    assert rbf.attraction.shape == euclidean.repulsion.shape == (b,)
    for i in range(b):
        pos = before + i
        p = softmax([sqdist(q[x, i], keys[pos]) / t for x in range(v)])
        expected = dict.fromkeys(("rbf attraction", "rbf repulsion", "attraction", "repulsion"), 0.0)
        for x in range(v):
            inner = (keys @ q[x, i]).tolist()
            costs = [sqdist(q[x, i], keys[j]) for j in range(len(keys)) if j != pos]
            weights = softmax([inner[j] / t for j in range(len(keys)) if j != pos]) if costs else []
            expected["rbf attraction"] -= 2 * p[x] * inner[pos]
            expected["rbf repulsion"] += 2 * t * p[x] * math.log(sum(math.exp(y / t) for y in inner))
            expected["attraction"] += p[x] * sqdist(q[x, i], keys[pos]) / 2
            expected["repulsion"] -= p[x] * sum(w * c for w, c in zip(weights, costs, strict=True)) / 2
        actual = (rbf.attraction, rbf.repulsion, euclidean.attraction, euclidean.repulsion)
        for value, target in zip(actual, expected.values(), strict=True):
            assert_close(value[i], target)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7),
    st.lists(st.integers(0, 3), max_size=6),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_supervised_is_the_scalar_loop(
    labels: list[int], ref_labels: list[int], seed: int, holds_queries: bool, ignored: int | None
) -> None:
    z, refs = randn(len(labels), 3, seed=seed), randn(len(ref_labels), 3, seed=seed + 1)
    keys, key_labels = (refs, ref_labels) if ref_labels else (z, labels)
    distances = [[sqdist(query, key) for key in keys] for query in z]
    positives, negatives = [], []
    index = [(seed + 3 * i) % (len(ref_labels) + 1) - 1 for i in range(len(labels))]
    for i, row in enumerate(distances):
        own = i if not ref_labels else index[i] if holds_queries else None
        met = [j for j in range(len(row)) if j != own and ignored not in (labels[i], key_labels[j])]
        positives.append([row[j] for j in met if key_labels[j] == labels[i]])
        negatives.append([row[j] for j in met if key_labels[j] != labels[i]])
    reference_set = (refs, torch.tensor(ref_labels)) if ref_labels else (None, None)
    options: dict[str, Any] = {"ref_index": torch.tensor(index) if ref_labels and holds_queries else None}
    options["ignore_index"] = ignored
    terms = supervised(z, torch.tensor(labels), *reference_set, 1.1, 0.9, alpha=2.0, beta=3.0, sets=KeySets(**options))
    assert terms.attraction.shape == terms.repulsion.shape == (len(labels),)
    for n, sets, factor, tau in ((0, positives, 2, 1.1), (1, negatives, -3, -0.9)):
        actual, sets_read = terms[n], [costs for costs in sets if costs]
        assert_close(actual.mean(), factor * mean([expected_cost(tau, costs) for costs in sets_read] or [0]))
        assert_close(terms[n + 2], mean([entropy(softmax([tau * c for c in costs])) for costs in sets_read] or [0]))
        empty = torch.tensor([not costs for costs in sets])
        assert (actual[empty] == 0).all()


# Closed forms and identities


def test_collapsed_views_have_zero_cost_and_full_entropy() -> None:
    terms = cacr(torch.ones(4, 6, 3, dtype=torch.float64), 2.0, 5.0)
    assert_close(terms.attraction, torch.zeros(4, 6), 1e-14)
    assert_close(terms.repulsion, torch.zeros(4, 6), 1e-14)
    assert_close(terms.attraction_entropy, math.log(3))
    assert_close(terms.repulsion_entropy, math.log(5))
    assert_close(cacr(torch.ones(4, 6, 3).double(), 2.0, 5.0, pairing="pooled").repulsion_entropy, math.log(20))


def test_orthonormal_instances() -> None:
    z = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)  # all negatives at cost 2, positives at 0
    assert_close(cacr(z, 1.0, 3.0).repulsion.mean(), -2.0)
    assert_close(cacr(z, 1.0, 3.0, cost="rbf", rbf_scale=1.5).repulsion, -3.0)
    rbf = momentum(z, z[0], 0.5)
    assert_close((rbf.attraction + rbf.repulsion).mean(), math.log(1 + 4 * math.exp(-2)))
    assert_close(loss_of(momentum(z, z[0], 0.5, cost="sqeuclidean")), -1.0)


def test_attraction_prefers_the_distant_and_repulsion_the_close() -> None:
    c = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    stats = reference.statistics(math.log(2) * c, c, torch.ones(1, 3, dtype=torch.bool))
    assert_close(stats.weights[0], torch.tensor([2.0, 4.0, 16.0]).double() / 22)
    assert_close(stats.value[0], 74 / 22)
    assert_close(stats.lse[0], math.log(22))
    assert_close(stats.entropy[0], -sum(w / 22 * math.log(w / 22) for w in (2, 4, 16)))
    z = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)[None].repeat(2, 1, 1)
    assert cacr(z, 1.0, 2.0).repulsion.mean() > cacr(z, 1.0, 0.0).repulsion.mean()


def test_nearly_equal_views_keep_their_relative_accuracy_in_float32() -> None:
    z = unit(1, 16, 32).float()
    views = torch.cat([z, z + 1e-4 * randn(1, 16, 32, seed=1).float()])
    expected = cacr(views.double(), 1.0, 1.0).attraction
    for actual in (
        cacr(views, 1.0, 1.0).attraction,
        queue(views, views, views[0], 1.0, 1.0).attraction,
        supervised(views.flatten(0, 1), torch.arange(16).repeat(2), None, None, 1.0, 1.0).attraction.view(2, 16),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_rbf_does_not_underflow() -> None:
    z = 40 * randn(2, 5, 3)
    terms = cacr(z.requires_grad_(), 0.0, 1.0, cost="rbf", rbf_scale=100.0)
    assert terms.repulsion < -1e4
    assert torch.autograd.grad(terms.repulsion, z)[0].abs().max() > 1


def test_merge_of_disjoint_sets_is_the_whole_set() -> None:
    q, k = randn(3, 4, 5), randn(3, 9, 5, seed=1)
    c = reference.pairwise_cost(q, k)
    left = torch.arange(9) < 4
    whole, a, b = (reference.statistics(-1.3 * c, c, m) for m in (torch.ones(9) > 0, left, ~left))
    lse = torch.logaddexp(a.lse, b.lse)
    assert_close(whole.lse, lse)
    assert_close(whole.value, (a.lse - lse).exp() * a.value + (b.lse - lse).exp() * b.value)
    nothing = reference.statistics(-1.3 * c, c, torch.zeros(9) > 0)
    assert (nothing.lse == -math.inf).all()
    assert (nothing.value == 0).all()
    assert (nothing.weights == 0).all()


def test_pooled_is_supervised_by_instance() -> None:
    z = randn(3, 5, 4)
    a = cacr(z, 2.0, 1.5, pairing="pooled", alpha=2.0, beta=3.0)
    b = supervised(z.flatten(0, 1), torch.arange(5).repeat(3), None, None, 2.0, 1.5, alpha=2.0, beta=3.0)
    for x, y in zip(a, b, strict=True):
        assert_close(x.flatten(), y.flatten())


def test_queue_entropy_is_that_of_one_softmax() -> None:
    z = randn(2, 4, 3)
    entropies = [entropy(softmax([-2.0 * sqdist(query, key) for key in z[1]])) for query in z.flatten(0, 1)]
    a, b = (queue(z, z, z[1], 1.0, 2.0, in_batch=flag) for flag in (True, False))
    assert_close(b.repulsion_entropy, mean(entropies))
    assert a.repulsion_entropy > b.repulsion_entropy


# Derivatives

TAUS = [torch.tensor(value, dtype=torch.float64) for value in (1.4, 0.8)]
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
KEYS, ENTRIES = randn(2, 3, 4, seed=7), randn(4, 4, seed=8)
LOSSES: dict[str, tuple[Callable[..., Terms], tuple[Tensor, ...]]] = {
    **{
        f"cacr-{pairing}-{cost}": (partial(cacr, pairing=pairing, cost=cost), (randn(3, 3, 2), *TAUS))
        for pairing in ("unordered", "ordered", "pooled")
        for cost in ("sqeuclidean", "rbf")
    },
    "cacr-one-instance": (cacr, (randn(3, 1, 2), *TAUS)),
    "cacr-one-instance-rbf": (partial(cacr, cost="rbf"), (randn(3, 1, 2), *TAUS)),
    "supervised": (lambda z, *taus: supervised(z, LABELS, None, None, *taus), (randn(6, 3), *TAUS)),
    "supervised-no-positive": (lambda z, *t: supervised(z, torch.arange(4), None, None, *t), (randn(4, 3), *TAUS)),
    "supervised-no-negative": (lambda z, *t: supervised(z, LABELS[:1].repeat(4), None, None, *t), (randn(4, 3), *TAUS)),
    "supervised-alone": (lambda z, *t: supervised(z, LABELS[:1], None, None, *t), (randn(1, 3), *TAUS)),
    "supervised-reference": (
        lambda z, refs, *taus: supervised(z, LABELS[:4], refs, LABELS[:5] + 1, *taus),
        (randn(4, 3), randn(5, 3, seed=1), *TAUS),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("term", [0, 1], ids=["attraction", "repulsion"])
def test_first_and_second_derivatives(name: str, term: int) -> None:
    loss, inputs = LOSSES[name]
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert gradcheck(lambda *args: loss(*args)[term], inputs)
    assert gradgradcheck(lambda *args: loss(*args)[term], inputs)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("entries", [ENTRIES, ENTRIES[:0]], ids=["K4", "K0"])
def test_fully_differentiated_queue(in_batch: bool, entries: Tensor) -> None:
    inputs = (randn(2, 3, 4).requires_grad_(), TAUS[1].clone().requires_grad_())

    def repulsion(q: Tensor, tau_neg: Tensor) -> Tensor:
        return queue(q, KEYS, entries, 1.0, tau_neg, in_batch=in_batch, weight_grad="full").repulsion

    assert gradcheck(repulsion, inputs)
    assert gradgradcheck(repulsion, inputs)


@pytest.mark.parametrize("weight_grad", ["in_batch", "full", "none"])
def test_queue_gradient_is_the_formula(weight_grad: str) -> None:
    """dF/dc = w (1 + a tau (c - F)) and dF/dtau = sum a w c (c - F), where a says whose logit is differentiated."""
    q, tau_pos, tau_neg = randn(2, 3, 4).requires_grad_(), TAUS[0].clone(), TAUS[1].clone()
    tau_pos.requires_grad_(), tau_neg.requires_grad_()
    terms = queue(q, KEYS, ENTRIES, tau_pos, tau_neg, weight_grad=weight_grad)
    k = torch.cat([ENTRIES.expand(2, 4, 4), q.detach()], 1)
    c = torch.cdist(q.detach(), k, compute_mode="donot_use_mm_for_euclid_dist").square()
    logit = (-tau_neg.detach() * c).masked_fill(torch.eye(3, 7).roll(4, 1) > 0, -math.inf)
    w = logit.softmax(-1)
    active = torch.arange(7) >= {"in_batch": 4, "full": 0, "none": 7}[weight_grad]
    spread = active * (c - (w * c).sum(-1, keepdim=True))
    g = -w * (1 - tau_neg.detach() * spread) / 6
    expected = 2 * (q.detach() * g.sum(-1, keepdim=True) - g @ k)
    expected += 2 * (q.detach() * g[..., 4:].sum(-2)[..., None] - g[..., 4:].mT @ q.detach())
    grads = torch.autograd.grad(terms.repulsion.mean(), (q, tau_neg), retain_graph=True, allow_unused=True)
    assert_close(grads[0], expected)
    assert_close(torch.zeros(()).double() if grads[1] is None else grads[1], (w * c * spread).sum() / 6)
    assert torch.autograd.grad(terms.attraction.mean(), tau_pos, allow_unused=True)[0] is None


def test_detached_inputs_receive_no_gradient() -> None:
    q, keys, entries = (x.clone().requires_grad_() for x in (randn(2, 3, 4), KEYS, ENTRIES))
    loss_of(queue(q, keys, entries, 1.0, 1.0, weight_grad="full")).backward()
    loss_of(momentum(unit(2, 4, 4).requires_grad_(), entries, 0.5)).backward()
    assert keys.grad is None
    assert entries.grad is None


def test_momentum_derivatives_with_its_weights_held() -> None:
    """P (and w of "sqeuclidean") are constants: numerical derivatives are those of the loss with frozen weights."""
    keys, q0, t0 = unit(6, 4, seed=3), unit(2, 3, 4), TAUS[1]
    p = (((q0 - keys[2:5]) ** 2).sum(-1) / t0).softmax(0)
    score = q0 @ keys.T / t0
    w = score.masked_fill(torch.eye(3, 6).roll(2, 1) > 0, -math.inf).softmax(-1)

    def frozen(q: Tensor, t: Tensor, cost: str) -> Tensor:
        if cost == "rbf":
            return (p * 2 * t * ((q @ keys.T / t).logsumexp(-1) - (q * keys[2:5]).sum(-1) / t)).sum(0)
        c = (q[:, :, None] - keys).square().sum(-1)
        return (p * ((q - keys[2:5]).square().sum(-1) - (w * c).sum(-1)) / 2).sum(0)

    for cost in ("rbf", "sqeuclidean"):
        q, t = q0.clone().requires_grad_(), t0.clone().requires_grad_()
        terms = momentum(q, keys, t, cost=cost, key_offset=2)
        assert_close(terms.attraction + terms.repulsion, frozen(q0, t0, cost))
        options = {"allow_unused": True, "materialize_grads": True}
        actual = torch.autograd.grad((terms.attraction + terms.repulsion).sum(), (q, t), **options)
        for x, y in zip(actual, torch.autograd.grad(frozen(q, t, cost).sum(), (q, t), **options), strict=True):
            assert_close(x, y)


def test_terms_carry_gradient_and_entropies_do_not() -> None:
    for loss, inputs in LOSSES.values():
        terms = loss(*(x.clone().requires_grad_() for x in inputs))
        assert [x.requires_grad for x in terms] == [True, True, False, False]


# Empty sets, bad numbers, dtypes


def assert_zero(*tensors: Tensor) -> None:
    assert all((x == 0).all() for x in tensors), tensors


def test_empty_sets_are_zero() -> None:
    for pairing in ("unordered", "ordered", "pooled"):
        for cost in ("sqeuclidean", "rbf"):
            terms = cacr(randn(2, 1, 3), 1.0, 1.0, pairing=pairing, cost=cost)
            assert_zero(terms.repulsion, terms.repulsion_entropy)
            assert (terms.attraction > 0).all()
    for batch, in_batch in ((1, True), (3, False)):
        terms = queue(randn(2, batch, 3), KEYS[:, :batch, :3], ENTRIES[:0, :3], 1.0, 1.0, in_batch=in_batch)
        assert_zero(terms.repulsion, terms.repulsion_entropy)
    one = momentum(unit(2, 1, 3), unit(1, 3, seed=1), 0.5, cost="sqeuclidean")
    assert_zero(one.repulsion, one.repulsion_entropy)
    mixed = supervised(randn(4, 3), torch.tensor([0, 0, 1, 2]), None, None, 1.0, 1.0)
    assert_zero(mixed.attraction[2:], mixed.attraction_entropy)
    assert (mixed.attraction[:2] > 0).all()
    assert_zero(*supervised(torch.full((1, 3), math.nan), torch.tensor([0]), None, None, 1.0, 1.0))


def test_embedding_in_no_set_is_not_read() -> None:
    z = torch.full((1, 3), math.nan).requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(supervised(z, torch.tensor([0]), None, None, 1.0, 1.0)), z)
    assert (grad == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_data_reach_the_loss(bad: float) -> None:
    calls = {name: call for name, call in LOSSES.items() if "alone" not in name}
    for in_batch in (True, False):
        data = (randn(2, 3, 4), KEYS, ENTRIES)
        calls[f"queue-{in_batch}"] = (lambda *x, flag=in_batch: queue(*x, 1.0, 1.0, in_batch=flag), data)
    for sign in (1, -1):  # both signs of the inner product with an infinite component
        data = (unit(2, 3, 4).abs(), sign * unit(4, 4, seed=1).abs())
        for cost in ("rbf", "sqeuclidean"):
            calls[f"momentum-{cost}{sign}"] = (lambda *x, cost=cost: momentum(*x, 0.5, cost=cost), data)
    for name, (loss, inputs) in calls.items():
        for n, original in enumerate(inputs):
            for index in {0, original.numel() - 1} if original.dim() else ():
                poisoned = original.clone()
                poisoned.view(-1)[index] = bad
                result = loss_of(loss(*inputs[:n], poisoned, *inputs[n + 1 :]))
                assert not result.isfinite(), (name, n, index)


def test_bad_data_stay_out_of_the_sets_that_do_not_hold_them() -> None:
    z = randn(6, 3)
    z[3] = math.nan  # the only instance of label 2
    terms = supervised(z, LABELS, None, None, 1.0, 1.0)
    expected = supervised(z.nan_to_num(), LABELS, None, None, 1.0, 1.0)
    assert_close(terms.attraction, expected.attraction)
    assert_close(terms.attraction_entropy, expected.attraction_entropy)
    q = randn(2, 3, 4)
    q[0, 1] = math.nan
    bad = queue(q, KEYS, ENTRIES, 1.0, 1.0, in_batch=False).repulsion.isnan()
    assert bad.nonzero().tolist() == [[0, 1]]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_empty_sets_make_no_nan_on_the_way() -> None:
    z, labels = randn(4, 3).requires_grad_(), torch.tensor([0, 0, 1, 2])
    with torch.autograd.detect_anomaly():
        for loss in (
            loss_of(supervised(z, labels, None, None, 1.0, 1.0)),
            loss_of(supervised(z, labels * 0, None, None, 1.0, 1.0)),
            loss_of(cacr(z.view(4, 1, 3), 1.0, 1.0, cost="rbf")),
        ):
            (grad,) = torch.autograd.grad(loss, z, create_graph=True)
            grad.square().sum().backward()
    assert z.grad is not None


def test_infinite_negative_is_not_hidden_by_its_weight_of_zero() -> None:
    z = -randn(2, 4, 3).abs()
    z[1, 2, 0] = math.inf  # against queries below 0 the matmul form is inf, not NaN
    for cost in ("sqeuclidean", "rbf"):
        for pairing in ("unordered", "ordered", "pooled"):
            assert not cacr(z, 1.0, 1.0, cost=cost, pairing=pairing).repulsion.mean().isfinite()
    assert not queue(z[:1], z[:1], z[1], 1.0, 1.0).repulsion.mean().isfinite()


def test_bad_temperatures_reach_the_loss() -> None:
    for index in (1, 2):
        taus = [torch.tensor(math.nan if i == index else 1.0) for i in (1, 2)]
        assert loss_of(cacr(randn(3, 4, 2), *taus)).isnan()
        assert loss_of(cacr(randn(3, 4, 2), *taus, cost="rbf")).isnan()
        assert loss_of(queue(randn(2, 3, 4), KEYS, ENTRIES, *taus)).isnan()
        assert loss_of(supervised(randn(6, 3), LABELS, None, None, *taus)).isnan()
    for cost in ("rbf", "sqeuclidean"):
        assert loss_of(momentum(unit(2, 3, 4), ENTRIES, torch.tensor(math.nan), cost=cost)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_have_the_dtype_of_the_data(dtype: torch.dtype) -> None:
    for name, (loss, inputs) in LOSSES.items():
        data = [x if x.dim() == 0 else x.to(dtype) for x in inputs]  # float64 temperatures do not promote
        terms = loss(*data)
        assert {x.dtype for x in terms} == {dtype}, name
        torch.testing.assert_close(loss_of(terms).double(), loss_of(loss(*inputs)), rtol=0.1, atol=0.1)
