"""Costs between the views of the same instances: the operator ``aligned`` of the CPU against the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from cacr_kernels.operators import aligned
from cacr_kernels.operators.aligned import aligned_cost
from cacr_kernels.operators.registry import Target, operator
from tests.covering import covering

CPU, PLAIN = Target("cpu", ("aligned",)), Target("torch")
SHAPES = [(2, 2, 37, 19), (3, 1, 16, 128), (6, 5, 5, 33), (1, 1, 1, 1), (2, 3, 70, 300), (1, 4, 17, 66)]
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def rows(shape: tuple[int, int, int, int], own: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    V, U, B, D = shape
    generator = torch.Generator().manual_seed(B)
    q = torch.randn(V, B, D, generator=generator, dtype=torch.float64).to(dtype)
    return q, q if own else torch.randn(U, B, D, generator=generator, dtype=torch.float64).to(dtype)


def cost_and_gradients(q: Tensor, k: Tensor, normalize: bool, on: Target) -> list[Tensor]:
    own = k is q
    q = q.clone().requires_grad_()
    k = q if own else k.clone().requires_grad_()
    cost = aligned_cost(q, k, normalize, on)
    incoming = torch.linspace(-1.0, 2.0, cost.numel(), dtype=torch.float64).reshape(cost.shape).to(cost.dtype)
    return [cost.detach(), *grad(cost, (q,) if own else (q, k), incoming)]


@covering({"shape": SHAPES, "own": {"own": True, "keys": False}, "normalize": [False, True], "dtype": list(EPS)}, 2)
def test_costs_and_gradients(
    shape: tuple[int, int, int, int], own: bool, normalize: bool, dtype: torch.dtype, threads: Any
) -> None:
    """To a few eps of the largest entry, on any number of threads the same."""
    q, k = rows(shape, own, dtype)
    found = cost_and_gradients(q, k, normalize, CPU)
    exact = q.double(), k.double()
    expected = cost_and_gradients(exact[0], exact[0] if own else exact[1], normalize, PLAIN)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).abs().max() <= 8 * EPS[dtype] * max(y.abs().max().item(), 1e-3)
    threads(3)
    assert all(map(torch.equal, cost_and_gradients(q, k, normalize, CPU), found))


@pytest.mark.parametrize("own", [True, False])
def test_nearly_equal_raw_rows(own: bool) -> None:
    """A cost of 1e-6, where products of unit vectors would leave no digit."""
    x = torch.randn(1, 9, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = 3 * x + 1e-3 * torch.linspace(-1, 1, 65, dtype=torch.float64) * x.norm(dim=-1, keepdim=True) / 5
    q = torch.cat([x, y]).float()
    k = q if own else q.clone()
    found, expected = (aligned_cost(z, z if own else w, True, PLAIN) for z, w in ((q, k), (q.double(), k.double())))
    mine = aligned_cost(q, k, True, CPU)
    assert (mine[0, 1].double() - expected[0, 1]).abs().max() <= 2e-6 * expected[0, 1].max()
    torch.testing.assert_close(mine, found, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_second_derivatives(normalize: bool) -> None:
    q, k = (x.requires_grad_() for x in rows((3, 2, 2, 3), False, torch.float64))
    for tensors in ((q, k), (q,)):
        f = lambda q, k=None: aligned_cost(q, q if k is None else k, normalize, CPU)  # noqa: E731
        assert gradcheck(f, tensors, fast_mode=True)
        assert gradgradcheck(f, tensors, fast_mode=True)


def test_many_views_take_no_loop_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain PyTorch the pairs of many views are computed at once, in parts of a bounded size."""
    monkeypatch.setattr(aligned, "_to_later_views", None)
    monkeypatch.setattr(aligned, "DIFFERENCES", 7 * 7 * 5 * 2)
    q, _ = rows((7, 1, 11, 5), True, torch.float64)
    for x, y in zip(cost_and_gradients(q, q, True, PLAIN), cost_and_gradients(q, q, True, CPU), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_strided_rows_and_what_is_wanted() -> None:
    q, k = (x.transpose(1, 2) for x in rows((2, 3, 7, 11), False, torch.float64))
    forward, backward = operator("aligned_cpu"), operator("aligned_backward_cpu")
    cost = forward(q, k, False)
    torch.testing.assert_close(cost, aligned.costs(q, k, False), rtol=1e-13, atol=1e-13)
    both = backward(q, k, cost.mT.contiguous().mT, True, True, True)
    for want in ((True, False), (False, True), (False, False)):
        for found, expected, wanted in zip(backward(q, k, cost, True, *want), both, want, strict=True):
            assert torch.equal(found, expected if wanted else expected.new_empty(0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14 in opcheck
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_opcheck(own: bool, normalize: bool) -> None:
    q, k = (x.requires_grad_() for x in rows((2, 3, 4, 5), False, torch.float64))
    keys = None if own else k
    for name in ("aligned_cpu", "aligned_cpu_bf16"):
        torch.library.opcheck(operator(name), (q, keys, normalize))
    flow = torch.randn(2, 2 if own else 3, 4, dtype=torch.float64)
    given = (q.detach(), None if own else k.detach(), flow, normalize, True, True)
    for name in ("aligned_backward_cpu", "aligned_backward_cpu_bf16"):
        torch.library.opcheck(operator(name), given)


def test_refusals() -> None:
    q, k = rows((2, 3, 4, 5), False, torch.float64)
    for wrong in (k[:, :3], k[..., :4], k[0], k.float()):
        with pytest.raises(RuntimeError, match=r"q \[V, B, D\] and k \[U, B, D\] of one dtype expected"):
            operator("aligned_cpu")(q, wrong, False)
    with pytest.raises(RuntimeError, match=r"gradients \[V, U, B\] of the costs, in their dtype, expected"):
        operator("aligned_backward_cpu")(q, k, torch.zeros(3, 2, 4, dtype=torch.float64), False, True, True)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_positives_at_some_distance_lose_no_digits(share: float, backend: str) -> None:
    """Costs that are a ``share`` of |q|^2 + |k|^2: made of products they would be off by eps / share."""
    generator = torch.Generator().manual_seed(0)
    q, noise = torch.randn(2, 1, 200, 64, generator=generator, dtype=torch.float64)
    k = (q + (2 * share) ** 0.5 * noise).float()
    q, ids = q.float(), torch.arange(200, dtype=torch.int32)
    tau = torch.ones(1, dtype=torch.float64)
    value, *_ = operator(f"contrast_{backend}")(q, k, ids, ids, tau, [1], [0], [0], False, False, None, False)
    exact = (q.double() - k.double()).square().sum(-1)
    assert ((value[0] - exact).abs() / exact).max() <= 4 * EPS[torch.float32]
