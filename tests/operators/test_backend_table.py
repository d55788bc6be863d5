"""A backend is one entry of the table: what the package does with one that nobody knew of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cacr_kernels
from cacr_kernels import functional
from cacr_kernels.backends import table
from cacr_kernels.backends.entry import Backend, registered
from cacr_kernels.operators.cacr import loss_and_parts
from cacr_kernels.operators.contrast import pack, plain_contrast
from cacr_kernels.operators.registry import implement
from cacr_kernels.types import CACROptions
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
    q, k, tau, spec, _, _, grad_value, grad_lse, want_q, want_k, want_tau = pack(*arguments)
    leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, tau)]
    with torch.enable_grad():
        value, lse, _ = contrast(leaves[0], leaves[1], *spec[:2], leaves[2], *spec[2:])
        grads = torch.autograd.grad(
            [value, lse],
            [x for x in leaves if x is not None],
            [grad_value, torch.where(lse == -torch.inf, 0.0, grad_lse)],
            allow_unused=True,
            materialize_grads=True,
        )
    grad_q, *grad_k, grad_tau = grads
    empty = q.new_empty(0)
    return (
        grad_q if want_q else empty,
        grad_k[0] if want_k and grad_k else empty,
        grad_tau if want_tau else tau.new_empty(0),
    )


def cacr(views: Tensor, numbers: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, want_grad, want_grad_numbers = rest
    z = views.detach().requires_grad_()
    t = None if numbers is None else numbers.detach().requires_grad_()
    with torch.enable_grad():
        loss, parts = loss_and_parts(z, t, CACROptions(*options))
        grads = torch.autograd.grad(loss, [z] if t is None else [z, t])
    grad_numbers = views.new_empty(0) if t is None else grads[1]
    return (
        loss.detach(),
        parts.detach(),
        grads[0] if want_grad else views.new_empty(0),
        grad_numbers if want_grad_numbers or t is None else torch.zeros_like(t),
    )


def _implement(name: str) -> None:
    kernel = {"contrast": contrast, "contrast_backward": contrast_backward, "cacr": cacr}[name]

    def counted(*arguments: Any) -> Any:
        calls.append(name)
        dtypes.append(arguments[0].dtype)
        return kernel(*(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in arguments))

    implement(f"{name}_toy", counted)


TOY = registered(
    Backend("toy", "plain formulas", lambda device: None, operators=("contrast", "cacr"), implement=_implement)
)


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
    assert set(calls) == ({"cacr"} if loss == "cacr" else {"contrast", "contrast_backward"})
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
    assert calls == ["cacr"]
    assert functional.backend_for("cacr_loss", [z]) == "toy"


def test_it_takes_what_it_says(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that its fused loss does not take are composed; a size that does not suit it goes to another backend."""
    picky = TOY._replace(fuses=lambda shape, pairing: False)
    monkeypatch.setattr(table, "TABLE", (*table.TABLE[:-1], picky))
    z = small_inputs("cacr")["views"]
    cacr_kernels.cacr_loss(z)
    assert calls == ["contrast"]
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
