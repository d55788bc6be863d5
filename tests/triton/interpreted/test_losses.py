"""The public losses on the Triton backend in Triton's interpreter, by the measure of ``cacr_kernels.testing``."""

from __future__ import annotations

import pytest
import torch

from cacr_kernels import cacr_loss, testing
from cacr_kernels.backends.triton import cacr, contrast
from tests.agreement import LOSSES, assert_agree, assert_within_budget, cast, run, small_inputs


def small(case: testing.Case) -> bool:
    """A second or two of the interpreter."""
    size = {"V": 1, "K": 0, "M": 0} | case.shape
    near = case.data == "near-equal" and case.options.get("pairing", "unordered") == "unordered"
    return size["V"] * size["B"] <= (130 if near and not size["K"] else 50) and max(size["K"], size["M"]) <= 50


SMALL = [case for case in testing.cases(quick=True) if small(case)]
# Every case in one dtype, in turn; float32 twice as often.
TURNS = (torch.float32, torch.float16, torch.float32, torch.float64)
TURN = [(case, TURNS[i % 4]) for i, case in enumerate(SMALL)]


@pytest.mark.parametrize(("case", "dtype"), TURN, ids=[f"{case.name} {dtype}" for case, dtype in TURN])
def test_within_the_promise(case: testing.Case, dtype: torch.dtype) -> None:
    assert_within_budget(case, "triton", dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16(loss: str) -> None:
    """Inputs of half types go to the operators as they are, gradients come back rounded once."""
    tensors = cast(small_inputs(loss), torch.bfloat16)
    options = {"normalize": True} if loss == "momentum" else {}
    expected = run(loss, cast(tensors, torch.float64), "reference", **options)
    found = run(loss, tensors, "triton", **options)
    assert all(g is None or g.dtype == torch.bfloat16 for g in found.gradients.values())
    assert_agree(found, expected, 4e-3)
    for x, y in zip(found.parts, expected.parts, strict=True):
        assert (x - y).abs() <= 2e-6 * max(1.0, y.abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_temperature(loss: str, dtype: torch.dtype) -> None:
    """One key takes all of the weight. Products are exact: statistics and gradient are to see the same similarity."""
    tensors = {n: (t * 256).round() / 256 if t.is_floating_point() else t for n, t in small_inputs(loss).items()}
    tensors = cast(tensors, dtype)
    for tau in (1e8, 1e30):
        options = {"tau_pos": tau, "tau_neg": tau}
        if loss != "cacr":
            options = {"temperature": 1 / tau} if loss == "momentum" else {"tau_pos": 1.0, "tau_neg": tau}
        expected = run(loss, cast(tensors, torch.float64), "reference", **options)
        found = run(loss, tensors, "triton", **options)
        assert_agree(found, expected, max(1e-6, torch.finfo(dtype).eps))


def test_grids_of_many_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """260 views are 67340 ordered pairs, and what axes of a grid but the first hold ends at 65535."""
    grids = {}
    for module in (cacr, contrast):
        monkeypatch.setattr(module, "start", lambda kernel, grid, *_, **__: grids.setdefault(kernel.__name__, grid))
    cacr_loss(torch.ones(260, 2, 1, requires_grad=True), pairing="ordered", backend="triton")
    assert {"statistics_kernel", "merge_kernel", "coefficients_kernel", "gradient_kernel"} <= set(grids)
    assert grids["statistics_kernel"][0] >= 260 * 259
    assert all(size <= 65535 for grid in grids.values() for size in grid[1:]), grids
