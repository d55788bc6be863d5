"""A backend is one entry of the table: what the package does with one that nobody knew of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import cacr_kernels
from cacr_kernels import functional, reference
from cacr_kernels.backends import table
from cacr_kernels.backends.entry import Backend, registered
from cacr_kernels.operators.contrast import members, pack, plain_contrast
from cacr_kernels.operators.registry import implement
from tests.agreement import LOSSES, assert_agree, each_loss, run, small_inputs

calls: list[str] = []
dtypes: list[torch.dtype] = []


# ---- the one file ----------------------------------------------------------------------------------------------------
def contrast(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, tau, spec = pack(*arguments)
    if k is None:
        k, spec = q, spec._replace(k_id=spec.q_id)
    value, lse = (x.double() for x in plain_contrast(q, k, tau, spec))
    return value, lse, torch.stack([value, value, value])


def contrast_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of ``reference.py``, as N x M arrays."""
    raw_q, raw_k, tau, spec, value, _, g_value, g_lse, *want = pack(*arguments)
    symmetric, (raw_k, spec) = raw_k is None, (raw_q, spec._replace(k_id=spec.q_id)) if raw_k is None else (raw_k, spec)
    q, k = (reference.unit_rows(x) if spec.normalize else x for x in (raw_q, raw_k))
    grad_q, grad_k, grad_tau = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(tau)
    everything = slice(0, q.shape[1]), slice(0, k.shape[1])
    for (s, kind), (p, i) in itertools.product(enumerate(spec.kinds), enumerate(spec.q_index)):
        x, y, mask = q[i], k[spec.k_index[p]], members(kind, spec, *everything)
        c = -2 * x @ y.mT if spec.inner_product else reference.pairwise_cost(x, y)
        w = reference.statistics(tau[s] * c, c, torch.ones_like(c, dtype=torch.bool) if mask is None else mask).weights
        gf, gl = g_value[s, p, :, None], torch.where(w.sum(-1) == 0, 0.0, g_lse[s, p])[:, None]
        apart = c - value[s, p, :, None]
        g = w * gf if spec.detach_weights else w * (gf + gl * tau[s] + gf * tau[s] * apart)
        own = 0.0 if spec.inner_product else 1.0
        grad_q[i] += 2 * (own * g.sum(1)[:, None] * x - g.to(y) @ y)
        grad_k[spec.k_index[p]] += 2 * (own * g.sum(0)[:, None] * y - g.mT.to(x) @ x)
        grad_tau[s] += 0.0 if spec.detach_weights else (w * (gf * c * apart + gl * c)).sum()
    if spec.normalize:
        grad_q, grad_k = reference.of_raw_rows(grad_q, raw_q), reference.of_raw_rows(grad_k, raw_k)
    grads = (grad_q + grad_k, q.new_empty(0), grad_tau) if symmetric else (grad_q, grad_k, grad_tau)
    return tuple(g if wanted else g.new_empty(0) for g, wanted in zip(grads, want, strict=True))  # type: ignore


def _implement(name: str) -> None:
    kernel = {"contrast": contrast, "contrast_backward": contrast_backward}[name]

    def counted(*arguments: Any) -> Any:
        calls.append(name)
        dtypes.append(arguments[0].dtype)
        return kernel(*(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in arguments))

    implement(f"{name}_toy", counted)


TOY = registered(Backend("toy", "plain formulas", lambda device: None, operators=("contrast",), implement=_implement))


# ---- the one line ----------------------------------------------------------------------------------------------------
@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, TOY))
    calls.clear()


@each_loss
def test_losses_run_on_it(loss: str, toy: None) -> None:
    tensors = small_inputs(loss)
    expected = run(loss, tensors, "reference")
    calls.clear()
    assert_agree(run(loss, tensors, "toy"), expected, 1e-10)
    assert set(calls) == {"contrast", "contrast_backward"}
    for reduction in ("sum", "none"):
        expected = run(loss, tensors, "reference", reduction=reduction)
        assert_agree(run(loss, tensors, "toy", reduction=reduction), expected, 1e-10, reduction)


@each_loss
def test_second_derivatives(loss: str, toy: None) -> None:
    def second(backend: str) -> Tensor:
        tensors = small_inputs(loss)
        name = next(iter(tensors))
        leaf = tensors[name].requires_grad_()
        value = LOSSES[loss](**tensors, backend=backend)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    torch.testing.assert_close(second("toy"), second("reference"), rtol=1e-9, atol=1e-9)


def test_it_is_the_fastest(toy: None) -> None:
    """The last entry that can run is what "auto" takes, and it is named where backends are listed."""
    assert cacr_kernels.available_backends()["toy"] is None
    z = small_inputs("cacr")["views"]
    cacr_kernels.cacr_loss(z)
    assert calls == ["contrast"]
    assert functional.backend_for("cacr_loss", [z]) == "toy"


def test_what_runs_for_tests_only_has_to_be_named(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton does on a CPU, in its interpreter."""
    monkeypatch.setattr(table, "TABLE", (*table.TABLE[:-1], TOY._replace(tests_only_on=("cpu",))))
    z = small_inputs("cacr")["views"]
    assert functional.backend_for("cacr_loss", [z]) != "toy"
    cacr_kernels.cacr_loss(z, backend="toy")
    assert calls == ["contrast"]


def test_auto_goes_by_size(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss whose size does not suit it goes to another backend with kernels, if there is one."""
    z = small_inputs("cacr")["views"]
    small = TOY._replace(suits=lambda size: size.similarities < 100)
    monkeypatch.setattr(table, "TABLE", (table.TABLE[0], table.TABLE[1], small))
    assert functional.backend_for("cacr_loss", [z]) == "toy", "nothing else has kernels"
    fast = TOY._replace(name="fast")
    monkeypatch.setattr(table, "TABLE", (*table.TABLE[:2], fast, small))
    assert functional.backend_for("cacr_loss", [z]) == "fast"
    assert functional.backend_for("cacr_loss", [z[:2, :3]]) == "toy"
    assert functional.backend_for("cacr_queue_loss", [z, z, z[0]]) == "fast"


def test_half_types_as_they_are(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators get bfloat16 if the entry says that it takes half types, else float32."""
    tensors = {name: t.bfloat16() for name, t in small_inputs("queue").items()}
    for takes, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(table, "TABLE", (*table.TABLE[:-1], TOY._replace(half_types=takes)))
        dtypes.clear()
        run("queue", tensors, "toy")
        assert set(dtypes) == {dtype}


def test_half_types_beside_float32(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half queries with a float32 queue, and the reverse: nothing of float32 is rounded."""
    monkeypatch.setattr(table, "TABLE", (*table.TABLE[:-1], TOY._replace(half_types=True)))
    for half in (("queries", "keys"), ("queue",)):
        tensors = {name: t.bfloat16() if name in half else t.float() for name, t in small_inputs("queue").items()}
        dtypes.clear()
        run("queue", tensors, "toy")
        assert set(dtypes) == {torch.float32}
