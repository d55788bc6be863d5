"""Execution of the emitted PTX: the Triton kernels as compiled for sm_80, whole losses with their gradients.

Launches are the product's own, on CPU tensors; Triton compiles them, and ``tests/ptx`` interprets what came out. The
yardstick and the tolerance are those of ``testing.py``; for TF32 products, of the eager form with TF32 products.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import cacr_kernels
from cacr_kernels import testing
from cacr_kernels.backends.precision import VARIABLE
from cacr_kernels.testing import Case, Result
from tests import agreement, ptx
from tests.ptx import triton_ptx
from tests.ptx.tf32 import TF32Products

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.exhaustive

KERNELS = importlib.import_module("cacr_kernels.backends.triton.kernels")
PRECISIONS = {
    "bf16": (torch.bfloat16, "none", "mma.sync.aligned.m16n8k16.row.col.f32.bf16"),
    "fp16": (torch.float16, "none", "mma.sync.aligned.m16n8k16.row.col.f32.f16"),
    "tf32": (torch.float32, "tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32"),
    "tf32x3": (torch.float32, "none", "mma.sync.aligned.m16n8k8.row.col.f32.tf32"),
    "ieee": (torch.float32, "ieee", "fma.rn.f32"),
    "fp64": (torch.float64, "none", "mma.sync.aligned.m8n8k4.row.col.f64"),
}
TAUS = {"tau_pos": 2.0, "tau_neg": 5.0}
FUSED = Case("cacr_loss", {"V": 2, "B": 67, "D": 33}, TAUS)
CASES = (
    FUSED,
    Case("cacr_loss", {"V": 3, "B": 23, "D": 13}, TAUS | {"pairing": "pooled", "cost": "rbf"}),
    Case("cacr_queue_loss", {"V": 2, "B": 9, "D": 19, "K": 67}, TAUS | {"weight_grad": "full"}),
    Case("supervised_cacr_loss", {"B": 37, "D": 17, "C": 5, "M": 601}, TAUS, data="near-equal"),
    Case(
        "cacr_momentum_loss", {"V": 2, "B": 21, "D": 7, "M": 70}, {"cost": "rbf", "temperature": 0.2, "key_offset": 3}
    ),
)
UNIT = TAUS | {"normalize": True}
NORMALIZED = (
    Case("cacr_loss", {"V": 2, "B": 35, "D": 33}, UNIT),
    Case("cacr_queue_loss", {"V": 2, "B": 9, "D": 19, "K": 67}, UNIT),
    Case("supervised_cacr_loss", {"B": 37, "D": 17, "C": 5}, UNIT, data="near-equal"),
)
WIDE = Case("cacr_loss", {"V": 2, "B": 19, "D": 601}, TAUS | {"reduction": "none"})
NARROW = Case("cacr_loss", {"V": 2, "B": 131, "D": 1}, TAUS, data="long")


def jit_functions() -> dict[str, JITFunction]:
    """Every function of the kernels by its name."""
    modules = [importlib.import_module(f"{KERNELS.__name__}.{m.name}") for m in pkgutil.iter_modules(KERNELS.__path__)]
    return {x.__name__: x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}


@pytest.fixture(autouse=True)
def sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as those of an sm_80 GPU."""
    table = importlib.import_module("cacr_kernels.backends.triton.table")
    backends = importlib.import_module("cacr_kernels.backends.table")
    usable = [b._replace(why_not=lambda device: None) if b.name == "triton" else b for b in backends.TABLE]
    monkeypatch.setattr(backends, "TABLE", tuple(usable))
    for name in ("pairs", "contrast", "detached_keys", "cacr"):
        module = importlib.import_module(f"cacr_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "processor_of", lambda device: table.Processor("sm_80", 108), raising=False)


def tf32_yardstick(eager: list[dict[str, float]]) -> dict[str, float]:
    """The worst of all draws; distant positives are products in the kernels only: numbers share one."""
    worst = {name: max(errors[name] for errors in eager) for name in eager[0]}
    numbers = {name: error for name, error in worst.items() if name == "loss" or name in testing.TEMPERATURES}
    return worst | dict.fromkeys(numbers, max(numbers.values()))


def compared(case: Case, precision: str) -> list[Result]:
    """Error, yardstick and tolerance of the loss and its gradients."""
    if precision == "tf32" and case.data == "near-equal":
        case = case._replace(data="unit")  # derivatives by tau_pos would be what TF32 leaves of tiny costs
    dtype, setting, _ = PRECISIONS[precision]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    os.environ[VARIABLE] = str(int(precision == "tf32x3"))
    try:
        expected = testing.expect(case, dtype, count=1)
        if precision != "tf32":
            results = testing.measure(case, expected, "triton", dtype)
            return testing.compare(case, "triton", dtype) if wrong(results) else results
        with TF32Products():
            eager = [draw.errors(testing.eager_quantities(case, draw.inputs, dtype)) for draw in expected.draws]
        return testing.measure(case, expected._replace(yardstick=tf32_yardstick(eager)), "triton", dtype)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        del os.environ[VARIABLE]


def wrong(results: list[Result]) -> list[Result]:
    return [result for result in results if not result.ok]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_every_kernel(precision: str) -> None:
    """All kernels run, on tensor cores where there are products, and all results are right."""
    launched: set[str] = set()
    multiplied: set[str] = set()
    for case in (*CASES, NORMALIZED[0]):
        with triton_ptx.running() as launches:
            assert not wrong(compared(case, precision)), case.name
        launched |= {launch.name for launch in launches}
        multiplied |= {launch.name for launch in launches if launch.count(PRECISIONS[precision][2])}
    # Only where tensors are on a GPU, and only with many features: tested below.
    elsewhere = {"numbers_kernel", "scale_kernel", "block_kernel", "product_kernel"}
    assert launched | elsewhere == {name for name in jit_functions() if name.endswith("_kernel")}
    assert {"statistics_kernel", "gradient_kernel", "detached_keys_kernel"} <= multiplied


@pytest.mark.parametrize(
    ("case", "precision"),
    [(CASES[0], "tf32x3"), (CASES[3], "ieee"), (CASES[2], "fp64"), (WIDE, "bf16"), (NARROW, "fp16")],
)
def test_other_products_and_widths(case: Case, precision: str) -> None:
    """The remaining ways to form products; more features than a tile holds, and one."""
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    assert sum(launch.count(PRECISIONS[precision][2]) for launch in launches)


@pytest.mark.parametrize(("case", "precision"), list(zip(NORMALIZED, ("fp16", "bf16", "bf16"), strict=True)))
def test_unit_rows_of_half_types(case: Case, precision: str) -> None:
    """They are multiplied as they are: every product is one of half types, on tensor cores."""
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    products = [launch for launch in launches if launch.count("mma.sync")]
    sweeps = {"statistics_kernel", "gradient_kernel", "detached_keys_kernel"}
    assert {launch.name for launch in launches} & sweeps == {launch.name for launch in products}
    for launch in products:
        assert launch.count("mma.sync") == launch.count(PRECISIONS[precision][2]), launch.name


@pytest.mark.parametrize(("precision", "normalize"), [("bf16", True), ("fp16", True), ("fp16", False)])
def test_gradients_by_blocks(precision: str, normalize: bool) -> None:
    """Of more features than a program of ``gradient_kernel`` writes; every product is one of half types."""
    case = Case("cacr_loss", {"V": 2, "B": 35, "D": 131}, TAUS | {"normalize": normalize})
    with triton_ptx.running() as launches:
        assert not wrong(compared(case, precision))
    products = {launch.name for launch in launches if launch.count(PRECISIONS[precision][2])}
    assert products == {"statistics_kernel", "block_kernel", "product_kernel"}
    assert any(launch.name == "scale_kernel" for launch in launches) == (precision == "fp16")


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


def right(schedule: Callable[[int], ptx.Lockstep], patch: triton_ptx.Patch | None = None) -> bool:
    """Whether one draw of one case in bfloat16 is right."""
    seeds, expected = iter(range(1000)), testing.expect(FUSED, torch.bfloat16, count=1)
    with triton_ptx.running(lambda: schedule(next(seeds)), patch):
        return not wrong(testing.measure(FUSED, expected, "triton", torch.bfloat16))


@pytest.mark.parametrize("schedule", [ptx.Random, ptx.Priority])
def test_hostile_schedules(schedule: Callable[[int], ptx.Lockstep]) -> None:
    """Whichever warp is ahead: no barrier and no wait for a copy is missing."""
    assert right(schedule)


# ---- planted bugs ----------------------------------------------------------------------------------------------------
@contextmanager
def edited(name: str, before: str, after: str) -> Iterator[None]:
    """A Triton function with another source; whatever was compiled is forgotten, before and afterwards."""
    functions = jit_functions()
    source = functions[name].src
    assert source.count(before) == 1, f"{name} does not have {before!r} once"

    def forget() -> None:
        for function in functions.values():
            function.hash = None
            function.device_caches.clear()

    functions[name]._unsafe_update_src(source.replace(before, after))
    forget()
    try:
        yield
    finally:
        functions[name]._unsafe_update_src(source)
        forget()


def found(patch: triton_ptx.Patch | None = None) -> bool:
    """Whether the interpreter refuses what a kernel does, or a result is wrong."""
    try:
        return not right(ptx.Priority, patch)
    except ptx.PtxError:
        return True


@pytest.mark.parametrize(
    ("function", "before", "after"),
    [
        pytest.param(
            "statistics_kernel",
            "columns < M, key_bias(keys.norm, first",
            "columns <= M, key_bias(keys.norm, first",
            id="mask",
        ),
        pytest.param("load_rows", "r[:, None] < count - first", "r[:, None] < count - first + 1", id="mask of a load"),
        pytest.param("logits", "x.id[:, None] != y.id[None, :], v", "x.id[:, None] == x.id[:, None], v", id="diagonal"),
        pytest.param("load_rows", "tile + r[:, None] * D", "tile + r[:, None] * (D - 1)", id="stride"),
        pytest.param(
            "statistics_kernel", "out + 2 * stride, sum_ez0", "out + 2 * stride - 1, sum_ez0", id="place of a result"
        ),
    ],
)
def test_bugs_in_the_source_are_found(function: str, before: str, after: str) -> None:
    with edited(function, before, after):
        assert found()


MMA = re.compile(r"(mma\.sync\S+ \{[^}]*\}, )\{([^},]*),([^},]*),([^},]*),([^}]*)\}")
BUGS = {
    "operand": lambda text: MMA.sub(r"\1{\2,\4,\3,\5}", text),
    "wait": lambda text: re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 7", text),
    "barrier": lambda text: re.sub(r"bar\.sync\s+0;", "", text),
    "lane": lambda text: re.sub(r"(shfl\.sync\.bfly\.b32\s+[^,]*,[^,]*,) 1,", r"\1 3,", text),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_in_the_ptx_are_found(bug: str) -> None:
    """Swapped operands of the products, missing waits and barriers, a shuffle with the wrong lane."""
    changed: list[bool] = []

    def patch(text: str) -> str:
        changed.append(BUGS[bug](text) != text)
        return BUGS[bug](text)

    assert found(patch)
    assert any(changed)
