"""Execution of the emitted PTX: the Triton kernels as compiled for sm_80 and sm_90, whole losses with their gradients.

Launches are the product's own, on CPU tensors; Triton compiles them, and ``tests/ptx`` interprets what came out. The
yardstick and the tolerance are those of ``testing.py``; for TF32 products, of the eager form with TF32 products.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import cacr_kernels
from cacr_kernels import testing
from cacr_kernels.testing import Case
from tests import agreement

pytest.importorskip("triton", reason="needs Triton")

from tests.ptx import triton_ptx

from .ptx_cases import (
    CASES,
    NARROW,
    NORMALIZED,
    PRECISIONS,
    SIZES,
    TAUS,
    WIDE,
    Target,
    compared,
    jit_functions,
    multiplications,
    of_size,
    wrong,
)

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("target")]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_every_kernel(precision: str, target: Target) -> None:
    """All kernels run, on tensor cores where there are products, and all results are right."""
    launched: set[str] = set()
    multiplied: set[str] = set()
    for case in (*CASES, NORMALIZED[0]):
        with triton_ptx.running() as launches:
            assert not wrong(compared(case, precision)), case.name
        launched |= {launch.name for launch in launches}
        multiplied |= {launch.name for launch in launches if launch.count(target.products[precision])}
    # Only where tensors are on a GPU, and only with many features: tested below.
    elsewhere = {"numbers_kernel", "scale_kernel", "block_kernel", "product_kernel"}
    assert launched | elsewhere == {name for name in jit_functions() if name.endswith("_kernel")}
    assert {"statistics_kernel", "gradient_kernel", "detached_keys_kernel"} <= multiplied


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_tiles_of_every_size(precision: str, D: int, target: Target) -> None:
    """Every sweep with every product and every entry of the launch table that has all features in its chunks."""
    multiplied: set[str] = set()
    for case in of_size(D):
        with triton_ptx.running() as launches:
            assert not wrong(compared(case, precision)), case
        multiplied |= {launch.name for launch in launches if launch.count(target.products[precision])}
    by_blocks = D > 128 and precision in ("bf16", "fp16")
    gradients = {"block_kernel", "product_kernel"} if by_blocks else {"gradient_kernel"}
    assert {"statistics_kernel", "detached_keys_kernel"} | gradients <= multiplied


@pytest.mark.parametrize(("D", "normalize"), [(64, True), (128, False), (128, True)])
@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_tiles_without_masks(D: int, normalize: bool, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps over rows for more than one tile, the last of which begins in the one before; with masks as without."""
    case = Case("cacr_loss", {"V": 2, "B": 139, "D": D}, TAUS | {"normalize": normalize})
    pairs = importlib.import_module("cacr_kernels.backends.triton.pairs")
    texts = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(pairs, "has_whole_tiles", lambda *_: False)
        with triton_ptx.running() as launches:
            assert not wrong(compared(case, "bf16")), whole
        texts.append({(launch.name, launch.ptx) for launch in launches})
    changed = {"statistics_kernel", "gradient_kernel"} if normalize else {"statistics_kernel"}
    assert {name for name, _ in texts[0] - texts[1]} == changed


@pytest.mark.parametrize(
    ("case", "precision"),
    [(CASES[0], "tf32x3"), (CASES[3], "ieee"), (CASES[2], "fp64"), (WIDE, "bf16"), (NARROW, "fp16")],
)
def test_other_products_and_widths(case: Case, precision: str, target: Target) -> None:
    """The remaining ways to form products; more features than a tile holds, and one."""
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    assert sum(launch.count(target.products[precision]) for launch in launches)


@pytest.mark.parametrize(("case", "precision"), list(zip(NORMALIZED, ("fp16", "bf16", "bf16"), strict=True)))
def test_unit_rows_of_half_types(case: Case, precision: str, target: Target) -> None:
    """They are multiplied as they are: every product is one of half types, on tensor cores."""
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    products = [launch for launch in launches if multiplications(launch)]
    sweeps = {"statistics_kernel", "gradient_kernel", "detached_keys_kernel"}
    assert {launch.name for launch in launches} & sweeps == {launch.name for launch in products}
    for launch in products:
        assert multiplications(launch) == launch.count(target.products[precision]), launch.name


@pytest.mark.parametrize(("precision", "normalize"), [("bf16", True), ("fp16", True), ("fp16", False)])
def test_gradients_by_blocks(precision: str, normalize: bool, target: Target) -> None:
    """Of more features than a program of ``gradient_kernel`` writes; every product is one of half types."""
    case = Case("cacr_loss", {"V": 2, "B": 35, "D": 131}, TAUS | {"normalize": normalize})
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    products = {launch.name for launch in launches if launch.count(target.products[precision])}
    assert products == {"statistics_kernel", "block_kernel", "product_kernel"}
    assert any(launch.name == "scale_kernel" for launch in launches) == (precision == "fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_several_blocks(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two by two of them, added up in both gradients and in that of a temperature."""
    monkeypatch.setattr(importlib.import_module("cacr_kernels.backends.triton.blocks"), "SIDE", 128)
    case = Case("cacr_loss", {"V": 2, "B": 141, "D": 131}, TAUS)
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    assert [launch.name for launch in launches].count("block_kernel") == 4


@pytest.mark.parametrize(("precision", "normalize"), [("bf16", True), ("fp16", False)])
def test_triangles_of_blocks(precision: str, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled views: the block below the diagonal is not filled, and those on it are multiplied once."""
    monkeypatch.setattr(importlib.import_module("cacr_kernels.backends.triton.blocks"), "SIDE", 128)
    options = TAUS | {"normalize": normalize, "pairing": "pooled"}
    case = Case("cacr_loss", {"V": 2, "B": 70, "D": 131}, options, learnable=False)
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    names = [launch.name for launch in launches]
    assert (names.count("block_kernel"), names.count("product_kernel")) == (3, 4)


def test_triangles_of_two_softmaxes() -> None:
    """One block of labelled rows, some of them near."""
    case = Case("supervised_cacr_loss", {"B": 131, "D": 67, "C": 5}, TAUS, data="near-equal", learnable=False)
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, "bf16"))
    names = [launch.name for launch in launches]
    assert (names.count("block_kernel"), names.count("product_kernel")) == (1, 1)


@pytest.mark.parametrize("D", [64, 70])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_near_rows_far_from_the_origin(precision: str, D: int) -> None:
    """Of equal weights all are rounded alike, and the sums of weights and of weighted rows have to cancel."""
    z = 10 + 0.1 * torch.randn(2, 45, D, generator=torch.Generator().manual_seed(0))
    z = z.to(PRECISIONS[precision][0])
    grads = []
    for backend, dtype in (("triton", z.dtype), ("reference", torch.float64)):
        x = z.to(dtype).requires_grad_()
        with triton_ptx.running():
            loss = cacr_kernels.cacr_loss(x, tau_neg=0.0, alpha=0.0, backend=backend)
            grads.append(torch.autograd.grad(loss, x)[0].double())
    assert (grads[0] - grads[1]).abs().max() <= 2 * torch.finfo(z.dtype).eps * grads[1].abs().max()


@pytest.mark.parametrize("precision", ["ieee", "fp64"])
def test_unit_rows(precision: str) -> None:
    with triton_ptx.running():
        assert not wrong(compared(NORMALIZED[0], precision))


@pytest.mark.parametrize(("distance", "tolerance"), [(1e-3, 1e-6), (1e-5, 1e-4)])
def test_unit_rows_that_are_nearly_equal(distance: float, tolerance: float) -> None:
    """Lengths are up to 3 apart: unit rows are not rounded before their difference is taken."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(16, 33, generator=g, dtype=torch.float64), dim=-1)
    step = torch.nn.functional.normalize(torch.randn(16, 33, generator=g, dtype=torch.float64), dim=-1)
    lengths = 1.0 + 2.0 * torch.rand(2, 16, 1, generator=g, dtype=torch.float64)
    views = (lengths * torch.stack([x, torch.nn.functional.normalize(x + distance * step, dim=-1)])).float()
    units = torch.nn.functional.normalize(views.double(), dim=-1)
    c = (units[0] - units[1]).square().sum(-1)
    ids = torch.arange(16, dtype=torch.int32)
    one = torch.ones(1, dtype=torch.float64)
    with triton_ptx.running():
        options = 1.0, 1.0, 1.0, 1.0, 0, False, 2.0, True, False, False
        _, parts, _, _ = torch.ops.cacr_kernels.cacr_triton(views, None, *options)
        sets = views[:1], views[1:], ids, ids, one, [1], [0], [0], False, False, None, True
        value, _, _ = torch.ops.cacr_kernels.contrast_triton(*sets)
    assert abs(parts[0] / c.mean() - 1) <= tolerance
    assert (value[0, 0] / c - 1).abs().max() <= 2 * tolerance


def test_numbers() -> None:
    """Five float64 travel as the halves of their bits."""
    numbers, out = (0.1, -1e300, 3.0, -1 / 3, 2.0**40 + 2.0**-8), torch.empty(5, dtype=torch.float64)
    cacr = importlib.import_module("cacr_kernels.backends.triton.cacr")
    with triton_ptx.running():
        cacr.numbers_kernel[(1,)](out, *(half for number in numbers for half in cacr.halves(number)))
    assert out.tolist() == list(numbers)


@pytest.mark.parametrize("detached", [False, True])
def test_a_running_maximum_that_stays_moves_nothing(detached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles after the one with the nearest key: what rounding takes from a base must not be taken every time."""
    pairs = importlib.import_module("cacr_kernels.backends.triton.pairs")
    one = lambda self, programs, length, block, result_bytes: pairs.Split(length, 1)  # noqa: E731
    monkeypatch.setattr(pairs.SetPairs, "split", one)
    monkeypatch.setattr(pairs, "fp32_products", lambda: "ieee")
    g = torch.Generator().manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(1, n, 16, generator=g), dim=-1) for n in (7, 3201))
    k[0, :7] = torch.nn.functional.normalize(q[0] + 0.01 * torch.randn(7, 16, generator=g), dim=-1)
    tau = torch.tensor([-3.0], dtype=torch.float64)
    arguments = q, k, None, None, tau, [0], [0], [0], False, False
    with triton_ptx.running():
        if detached:
            value, lse, *_ = torch.ops.cacr_kernels.detached_keys_triton(*arguments, False, False, True, True)
        else:
            value, lse, _ = torch.ops.cacr_kernels.contrast_triton(*arguments, None, False)
    c = torch.cdist(q.double(), k.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    logit = -3.0 * c
    assert (lse[0] - logit.logsumexp(-1)).abs().max() < 2e-6
    assert (value[0] / (logit.softmax(-1) * c).sum(-1) - 1).abs().max() < 2e-6


def unit(V: int, B: int, D: int, seed: int = 0) -> torch.Tensor:
    """Random vectors of length 1 [V, B, D]."""
    z = torch.randn(V, B, D, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(z, dim=-1)


EXTREMES = [
    ("cacr", "bf16", {}),
    ("cacr", "fp64", {"pairing": "pooled"}),
    ("cacr", "fp16", {"reduction": "none"}),
    ("queue", "fp16", {"weight_grad": "full"}),
    ("queue", "tf32x3", {}),
    ("supervised", "bf16", {}),
    ("momentum", "tf32x3", {}),
]


@pytest.mark.parametrize(("loss", "precision", "options"), EXTREMES)
def test_any_temperature(loss: str, precision: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One key takes all of the weight. In an FMA a rounded base is something else than the product it was made of."""
    monkeypatch.setattr(agreement, "device_of", lambda backend: "cpu")
    dtype = PRECISIONS[precision][0]
    tensors = agreement.cast(agreement.small_inputs(loss), dtype)
    for tau in (1e8, 1e10, 1e30):
        taus = {"temperature": 1 / tau} if loss == "momentum" else {"tau_pos": tau, "tau_neg": tau}
        given = options | taus | ({"normalize": True} if loss == "momentum" else {})
        expected = agreement.run(loss, agreement.cast(tensors, torch.float64), "reference", **given)
        with triton_ptx.running():
            found = agreement.run(loss, tensors, "triton", **given)
        for x, y in zip(found.parts[:3], expected.parts[:3], strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
        for name, y in expected.gradients.items():
            if y is not None:
                tolerance = max(1e-6, torch.finfo(dtype).eps) * y.abs().max().item()
                torch.testing.assert_close(found.gradients[name].double(), y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cost", ["sqeuclidean", "rbf"])
@pytest.mark.parametrize("length", [1e-6, 1e4, 1e6])
def test_long_and_short_vectors(length: float, cost: str) -> None:
    """With weights that are uniform, and with one key that has all of it."""
    for tau in (0.0, 100.0):
        make = lambda seed: {"views": length * torch.randn(2, 23, 16, generator=torch.Generator().manual_seed(seed))}  # noqa: E731
        case = Case("cacr_loss", {}, {"tau_pos": tau, "tau_neg": tau, "cost": cost}, make, learnable=False)
        with triton_ptx.running():
            assert not wrong(testing.measure(case, testing.expect(case, torch.float32), "triton", torch.float32)), tau


@pytest.mark.parametrize(
    ("length", "tau", "scale", "pairing"),
    [
        (1e-3, 1e6, 1e-3, "pooled"),
        (1e-3, 1e6, 1e-2, "unordered"),
        (1.0, 1e4, 1e-3, "pooled"),
        (1.0, 10.0, 1e-7, "ordered"),
    ],
)
def test_rbf_of_two_softmaxes_that_are_nearly_one(length: float, tau: float, scale: float, pairing: str) -> None:
    """Their gradients cancel but for a part in 1e9: what rounds them has to be the same."""
    make = lambda seed: {"views": length * unit(2, 11, 7, seed)}  # noqa: E731
    options = TAUS | {"tau_neg": tau, "cost": "rbf", "rbf_scale": scale, "pairing": pairing, "alpha": 0.0}
    case = Case("cacr_loss", {}, options, make, learnable=False)
    with triton_ptx.running():
        assert not wrong(testing.measure(case, testing.expect(case, torch.float32), "triton", torch.float32))


def test_rbf_of_any_scale() -> None:
    """Of two slopes that are more than 2^76 apart neither may be moved so far that it shows."""
    for tau, scale in ((1.0, 1e30), (0.0, 1e30), (0.0, 1e20), (0.0, 1e-30), (1e-30, 1e-30)):
        results = []
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
            z, t = unit(2, 11, 7).to(dtype).requires_grad_(), torch.tensor(tau, dtype=dtype, requires_grad=True)
            options = {"tau_neg": t, "cost": "rbf", "rbf_scale": scale, "return_parts": True}
            with triton_ptx.running():
                parts = cacr_kernels.cacr_loss(z, **options, backend=backend)
                parts.loss.backward()
            results.append([x.double() for x in (*parts, z.grad, t.grad)])
        for found, expected in zip(results[1], results[0], strict=True):
            most = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * max(most, 1.0))


@pytest.mark.parametrize("tau", [1e3, 1e6])
def test_lse_of_rbf_share_their_rounding(tau: float) -> None:
    """Each is as large as tau, their difference is not."""
    z = torch.nn.functional.normalize(torch.randn(3, 23, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    options = {"tau_neg": tau, "alpha": 0.0, "cost": "rbf"}
    with triton_ptx.running():
        found = cacr_kernels.cacr_loss(z, **options, backend="triton")
    assert abs(found.double() - cacr_kernels.cacr_loss(z.double(), **options, backend="reference")) < 1e-6


def test_logits_out_of_range_show() -> None:
    """Beyond 2^98 a key would be taken for none; with tau = 0 weights would not be uniform beyond lengths of 2^31."""
    q, k = torch.ones(1, 3, 4), 1e10 * torch.ones(1, 5, 4)
    for x, y, seen in ((q, k, True), (k, q, True), (q, q, False)):
        for inner in (False, True):
            arguments = x, y, None, None, torch.tensor([-1e12], dtype=torch.float64), [0], [0], [0], inner
            with triton_ptx.running():
                value, _, _ = torch.ops.cacr_kernels.contrast_triton(*arguments, False, None, False)
            assert value.isnan().all() if seen else (value == (-8 if inner else 0)).all()
    for length in (1e9, 1e10):
        with triton_ptx.running():
            loss = cacr_kernels.cacr_loss(length * unit(2, 5, 4), tau_neg=0.0, backend="triton")
        assert bool(loss.isnan()) == (length > 2**31)
