"""What goes in: refusals, dtypes, strides, empty sets, NaN and Inf; against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cacr_kernels
from cacr_kernels import cacr_loss, cacr_momentum_loss, cacr_queue_loss, supervised_cacr_loss

BACKENDS = [
    name for name, reason in cacr_kernels.available_backends().items() if reason is None and name != "reference"
]
Z = torch.nn.functional.normalize(torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
LABELS = torch.arange(7) % 3

each_backend = pytest.mark.parametrize("backend", BACKENDS)

REFUSALS = [
    (TypeError, "views", lambda: cacr_loss(3.0)),
    (TypeError, "views", lambda: cacr_loss(Z.long())),
    (TypeError, "views", lambda: cacr_loss(Z.to(torch.complex64))),
    (TypeError, r"views\[1\]", lambda: cacr_loss([Z[0], "z"])),
    (TypeError, "views", lambda: cacr_loss(Z.to_sparse())),
    (ValueError, r"\[V, B, D\], got \[7, 5\]", lambda: cacr_loss(Z[0])),
    (ValueError, "at least 2 views, got V = 1", lambda: cacr_loss(Z[:1])),
    (ValueError, "at least 2 views", lambda: cacr_loss([])),
    (ValueError, r"views\[1\].*\[7, 5\], got \[6, 5\]", lambda: cacr_loss([Z[0], Z[1, :6]])),
    (ValueError, r"views\[1\].*device", lambda: cacr_loss([Z[0], Z[1].to("meta")])),
    (ValueError, "empty dimension", lambda: cacr_loss(Z[:, :0])),
    (ValueError, "tau_pos must be >= 0, got -1", lambda: cacr_loss(Z, tau_pos=-1)),
    (ValueError, "tau_neg must be finite, got nan", lambda: cacr_loss(Z, tau_neg=math.nan)),
    (ValueError, "tau_neg must be finite, got inf", lambda: cacr_loss(Z, tau_neg=math.inf)),
    (TypeError, "tau_neg must be a number, got str 'a'", lambda: cacr_loss(Z, tau_neg="a")),
    (TypeError, "tau_neg must be a number, got bool", lambda: cacr_loss(Z, tau_neg=True)),
    (ValueError, r"tau_pos.*0-dim tensor, got shape \[1\]", lambda: cacr_loss(Z, tau_pos=torch.ones(1))),
    (TypeError, "tau_pos.*int64", lambda: cacr_loss(Z, tau_pos=torch.tensor(1))),
    (TypeError, "alpha", lambda: cacr_loss(Z, alpha=None)),
    (ValueError, "beta must be finite", lambda: cacr_loss(Z, beta=math.inf)),
    (ValueError, "pairing='all'.*'unordered', 'ordered', 'pooled'", lambda: cacr_loss(Z, pairing="all")),
    (ValueError, "cost='l2'.*'sqeuclidean', 'rbf'", lambda: cacr_loss(Z, cost="l2")),
    (TypeError, "cost must be a string", lambda: cacr_loss(Z, cost=2)),
    (ValueError, "rbf_scale must be >= 0", lambda: cacr_loss(Z, cost="rbf", rbf_scale=-1.0)),
    (ValueError, "reduction='avg'", lambda: cacr_loss(Z, reduction="avg")),
    (ValueError, "reduction='none'.*rbf", lambda: cacr_loss(Z, cost="rbf", reduction="none")),
    (TypeError, "normalize must be True or False, got int 1", lambda: cacr_loss(Z, normalize=1)),
    (TypeError, "return_parts", lambda: cacr_loss(Z, return_parts="yes")),
    (
        ValueError,
        "backend='gpu' is unknown.*'auto', 'reference', 'torch', 'triton', 'cuda', 'cpu'",
        lambda: cacr_loss(Z, backend="gpu"),
    ),
    (TypeError, "backend must be a string", lambda: cacr_loss(Z, backend=None)),
    (ValueError, "backend='cpu' cannot run here.*meta", lambda: cacr_loss(Z.to("meta"), backend="cpu")),
    (ValueError, r"keys.*\[3, 7, 5\], got \[3, 6, 5\]", lambda: cacr_queue_loss(Z, Z[:, :6], Z[0])),
    (ValueError, "queue.*D = 5.*got 4", lambda: cacr_queue_loss(Z, Z, Z[0, :, :4])),
    (ValueError, r"queue must have shape \[K, D\]", lambda: cacr_queue_loss(Z, Z, Z)),
    (ValueError, "weight_grad='all'", lambda: cacr_queue_loss(Z, Z, Z[0], weight_grad="all")),
    (TypeError, "in_batch", lambda: cacr_queue_loss(Z, Z, Z[0], in_batch=0)),
    (ValueError, "keys.*device", lambda: cacr_queue_loss(Z, Z.to("meta"), Z[0])),
    (ValueError, "temperature must be > 0, got 0", lambda: cacr_momentum_loss(Z, Z[0], temperature=0)),
    (ValueError, r"key_offset must be in \[0, 0\], got 1", lambda: cacr_momentum_loss(Z, Z[0], key_offset=1)),
    (TypeError, "key_offset must be an integer", lambda: cacr_momentum_loss(Z, Z[0], key_offset=0.0)),
    (ValueError, "keys must hold at least the B = 7", lambda: cacr_momentum_loss(Z, Z[0, :5])),
    (TypeError, "labels must have an integer dtype", lambda: supervised_cacr_loss(Z[0], Z[0, :, 0])),
    (ValueError, r"labels must have shape \[7\]", lambda: supervised_cacr_loss(Z[0], LABELS[:6])),
    (ValueError, "ref_labels must be given", lambda: supervised_cacr_loss(Z[0], LABELS, ref_embeddings=Z[1])),
    (ValueError, "ref_embeddings must be given", lambda: supervised_cacr_loss(Z[0], LABELS, ref_labels=LABELS)),
    (ValueError, "queue must be a tensor", lambda: cacr_kernels.CACRQueueLoss()(Z, Z)),
    (ValueError, "must not be given", lambda: cacr_kernels.CACRQueueLoss(queue_size=4, dim=5)(Z, Z, Z[0])),
    (ValueError, "dim must be given", lambda: cacr_kernels.CACRQueueLoss(queue_size=4)),
]


@pytest.mark.parametrize(("error", "message", "call"), REFUSALS, ids=[m for _, m, _ in REFUSALS])
def test_refusals_name_the_argument(error, message, call):
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error


def test_tensor_temperatures_are_not_inspected():
    assert cacr_loss(Z, tau_neg=torch.tensor(-1.0)).isfinite()
    assert cacr_loss(Z, tau_neg=torch.tensor(math.nan)).isnan()


@each_backend
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_against_the_reference(backend, data):
    V, B, D = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    number = st.sampled_from([0.0, 0.3, 1.0, 2.5])
    options = {k: data.draw(number) for k in ("tau_pos", "tau_neg", "alpha", "beta")}
    options["cost"] = data.draw(st.sampled_from(["sqeuclidean", "rbf"]))
    options["pairing"] = data.draw(st.sampled_from(["unordered", "ordered", "pooled"]))
    options["reduction"] = data.draw(st.sampled_from(["mean", "sum", "none"])) if options["cost"] != "rbf" else "mean"
    options["normalize"] = data.draw(st.booleans())
    z = torch.randn(V, B, D, generator=torch.Generator().manual_seed(V * B * D), dtype=torch.float64) / D**0.5
    results = []
    for name in (backend, "reference"):
        x, tau = z.clone().requires_grad_(), torch.tensor(options["tau_neg"], requires_grad=True, dtype=torch.float64)
        parts = cacr_loss(x, **options | {"tau_neg": tau}, backend=name, return_parts=True)
        weights = torch.linspace(1, 2, parts.loss.numel(), dtype=torch.float64).reshape(parts.loss.shape)
        gradients = torch.autograd.grad((parts.loss * weights).sum(), [x, tau], materialize_grads=True)
        results.append([*(p.detach() for p in parts), *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@each_backend
@pytest.mark.parametrize(("dtypes", "result"), [
    ((torch.float16, torch.float16), torch.float32),
    ((torch.bfloat16, torch.float16), torch.float32),
    ((torch.float32, torch.float32), torch.float32),
    ((torch.float16, torch.float64), torch.float64),
])  # fmt: skip
def test_dtypes(backend, dtypes, result):
    views = [z.to(d).requires_grad_() for z, d in zip(Z, dtypes, strict=False)]
    loss = cacr_loss(views, backend=backend)
    loss.backward()
    assert loss.dtype == result
    assert [v.grad.dtype for v in views] == list(dtypes)
    expected = cacr_loss([v.detach().double() for v in views], backend="reference")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@each_backend
def test_strides_do_not_matter(backend):
    expected = cacr_loss(Z, backend=backend)
    wide = torch.randn(3, 7, 10)
    wide[..., ::2] = Z
    for view in (Z.permute(2, 1, 0).contiguous().permute(2, 1, 0), wide[..., ::2]):
        assert not view.is_contiguous()
        assert cacr_loss(view, backend=backend) == expected
    expanded = Z[:1].expand(3, 7, 5).requires_grad_()
    assert cacr_loss(expanded, backend=backend) == cacr_loss(expanded.detach().contiguous(), backend=backend)
    queue = Z[0].repeat(2, 1)[::2]
    assert cacr_queue_loss(Z, Z.flip(0), queue, backend=backend).isfinite()


@each_backend
@pytest.mark.parametrize("cost", ["sqeuclidean", "rbf"])
@pytest.mark.parametrize("pairing", ["unordered", "ordered", "pooled"])
def test_one_instance_is_not_repelled(backend, cost, pairing):
    z = Z[:, :1].clone().requires_grad_()
    parts = cacr_loss(z, cost=cost, pairing=pairing, backend=backend, return_parts=True)
    assert parts.repulsion == 0
    assert parts.repulsion_entropy == 0
    torch.testing.assert_close(parts.loss.detach(), cacr_loss(z.detach(), beta=0.0, backend="reference"))
    (gradient,) = torch.autograd.grad(parts.loss, z)
    assert gradient.isfinite().all()


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [(0, 0, 0), (2, 6, 4), (1, 3, 2)])
@pytest.mark.parametrize("options", [{}, {"cost": "rbf"}, {"pairing": "pooled"}, {"tau_neg": 50.0, "cost": "rbf"}])
def test_bad_numbers_reach_the_loss(backend, bad, at, options):
    z = Z.clone()
    z[at] = bad
    assert not cacr_loss(z, backend=backend, **options).isfinite()
    assert not cacr_queue_loss(Z, Z, z[at[0]], backend=backend).isfinite()
    assert not cacr_momentum_loss(z, Z[0], backend=backend).isfinite()
    assert not cacr_momentum_loss(Z, z[at[0]], backend=backend, cost="sqeuclidean").isfinite()
    assert not supervised_cacr_loss(z[at[0]], LABELS, backend=backend).isfinite()


@each_backend
@pytest.mark.parametrize("labels", [[0] * 7, list(range(7)), [0, 0, 0, 1, 2, 2, 9], [2**62, -5, 2**62, 7, 7, 7, -5]])
@pytest.mark.parametrize("reference_set", [False, True])
def test_supervised_sets(backend, labels, reference_set):
    labels = torch.tensor(labels)
    extra = {"ref_embeddings": Z[1], "ref_labels": labels.flip(0)} if reference_set else {}
    extra64 = {k: v.double() if v.is_floating_point() else v for k, v in extra.items()}
    results = []
    for name in (backend, "reference"):
        x = Z[0].double().requires_grad_()
        parts = supervised_cacr_loss(x, labels, **extra64, tau_pos=0.5, tau_neg=2, backend=name, return_parts=True)
        results.append([*(p.detach() for p in parts), *torch.autograd.grad(parts.loss, x)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@each_backend
def test_a_lone_embedding_is_not_read(backend):
    x = torch.full((1, 4), math.nan, requires_grad=True)
    loss = supervised_cacr_loss(x, torch.tensor([1]), backend=backend)
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0].abs().max() == 0


@each_backend
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_attraction_of_nearly_equal_views(backend, distance):
    g = torch.Generator().manual_seed(3)
    base = torch.nn.functional.normalize(torch.randn(1, 9, 64, generator=g, dtype=torch.float64), dim=-1)
    z = (base + distance / 8 * torch.randn(4, 9, 64, generator=g, dtype=torch.float64)).float()
    for call in (
        lambda x, name: cacr_loss(x, backend=name, return_parts=True),
        lambda x, name: supervised_cacr_loss(
            x.flatten(0, 1), torch.arange(9).repeat(4), backend=name, return_parts=True
        ),
    ):
        actual, expected = call(z, backend).attraction, call(z.double(), "reference").attraction
        assert abs(actual / expected - 1) < 1e-6
