"""``normalize`` of the operators: raw rows in, gradients of raw rows out, against the definition in float64.

Gradients are multiplied with the length of their row, as a long row has a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import normalize

from cacr_kernels import cacr_loss, testing
from cacr_kernels.operators import cacr as of_cacr
from cacr_kernels.operators import contrast as of_contrast
from cacr_kernels.operators.contrast import plain_contrast
from cacr_kernels.operators.registry import Target, operator
from cacr_kernels.reference import unit_rows
from cacr_kernels.types import CACROptions, ContrastSpec
from tests.covering import covering

ALL, SAME, OTHER, SAME_NOT_SELF, OTHER_NOT_SELF = range(5)
DTYPES = [torch.float32, torch.float64]
LENGTHS = {"all alike": (0.0, 0.0), "3 apart": (0.0, 0.5), "1e-3 to 1e3": (-3.0, 3.0), "1e-17 to 1e10": (-17.0, 10.0)}
# Of a summand, what even float64 does not know to an eps of float32 (Scale in cacr_kernels/testing.py).
KNOWN = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def raw(*shape: int, lengths: str = "1e-3 to 1e3", seed: int = 0) -> Tensor:
    """Rows of lengths whose logarithms are uniform; some of them 0 where they may be short."""
    g = torch.Generator().manual_seed(seed + 1000)
    low, high = LENGTHS[lengths]
    length = 10 ** (low + (high - low) * torch.rand((*shape[:-1], 1), dtype=torch.float64, generator=g))
    rows = unit_rows(randn(*shape, seed=seed)) * length
    return rows * (torch.rand(length.shape, generator=g) > 0.02) if low < -12 else rows


def sized(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient of raw rows times their lengths."""
    return gradient.double() * torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)


def of_rows(of_unit_rows: list[Tensor], incoming: Tensor) -> list[Tensor]:
    """Sizes of gradients of unit rows: of sums of q_i and w_j k_j, of which an entry is about 1 / sqrt(D)."""
    return [x.abs().max().clamp(min=incoming.abs().max() / x.shape[-1] ** 0.5) for x in of_unit_rows]


class Found(NamedTuple):
    """What an operator gives, gradients of rows (times their lengths) and of numbers.

    By the definition also the size of what each is a sum of: a gradient loses what moves a unit row along itself.
    """

    values: list[Tensor]
    gradients: list[Tensor]
    numbers: list[Tensor]
    sizes: list[Tensor]

    @property
    def all(self) -> list[Tensor]:
        return [*self.values, *self.gradients, *self.numbers]


def error(found: Found, truth: Found) -> list[float]:
    """The largest error of each, relative to the largest entry or summand."""
    errors = []
    for a, b, size in zip(found.all, truth.all, truth.sizes, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        a, b = (x.double().masked_fill(~finite, 0.0) for x in (a, b))
        largest = max(b.abs().max().item(), size.abs().nan_to_num(0.0, 0.0).max().item())
        errors.append((a - b).abs().max().item() / max(largest, 1e-30))
    return errors


def assert_as_exact_as_eager(mine: Callable[..., Found], eager: Callable[..., Found], dtype: torch.dtype) -> None:
    """``mine(seed, dtype)`` is at most twice as wrong as ``eager(seed, dtype)``, the worst of some draws.

    As in ``cacr_kernels/testing.py`` a miss counts if it is still there on more draws.
    """
    for count in (testing.DRAWS, *testing.CONFIRM):
        found = missed(mine, eager, dtype, range(count))
        if not found:
            return
    raise AssertionError(found)


def missed(
    mine: Callable[..., Found], eager: Callable[..., Found], dtype: torch.dtype, seeds: Iterable[int]
) -> list[str]:
    """What is too far off."""
    errors: dict[str, list[list[float]]] = {"mine": [], "eager": []}
    for seed in seeds:
        truth = eager(seed, torch.float64)
        errors["mine"].append(error(mine(seed, dtype), truth))
        errors["eager"].append(error(eager(seed, torch.float32), truth))
    worst = [[max(of_one) for of_one in zip(*draws, strict=True)] for draws in errors.values()]
    eps, factor = torch.finfo(dtype).eps, 3 if dtype == torch.float64 else 2  # the truth of float64 has errors, too
    return [
        f"{i}: {a / eps:.1f} eps, eager {b:.1e}"
        for i, (a, b) in enumerate(zip(*worst, strict=True))
        if not a <= factor * b * eps / torch.finfo(torch.float32).eps + 8 * eps
    ]


# ---- contrast --------------------------------------------------------------------------------------------------------
SETS = {
    "other": [(OTHER, -1.3)],
    "all": [(ALL, -0.7)],
    "supervised": [(SAME_NOT_SELF, 0.9), (OTHER, -1.3)],
    "positives": [(SAME, 0.9)],
    "rbf": [(OTHER, -1.3), (OTHER, -3.3)],
    "unbounded": [(OTHER, -40.0)],
    "detached": [(OTHER, -1.3)],
    "inner": [(ALL, -4.0)],
    "of no set": [(SAME_NOT_SELF, 0.9), (OTHER_NOT_SELF, -1.3)],
}
SHAPES = [(37, 29, 19), (5, 70, 64), (193, 101, 33), (230, 40, 1), (16, 16, 300)]  # N, M, D


def contrast(name: str, q: Tensor, k: Tensor | None, backend: str, half: torch.dtype | None = None) -> Found:
    """Value, lse and gradients of ``contrast``; keys ``None``: they are the queries. half: what the backend reads."""
    tau = torch.tensor([tau for _, tau in SETS[name]], dtype=torch.float64, requires_grad=True)
    q_id, k_id = (torch.arange(x.shape[1]).int() % 6 - int(name == "of no set") for x in (q, q if k is None else k))
    raw_rows = [x.clone().requires_grad_() for x in (q, k) if x is not None]
    kinds, index = [kind for kind, _ in SETS[name]], ([0, 1, 1], [0, 1, 1 if k is None else 0])
    spec = ContrastSpec(q_id, k_id, kinds, *index, name == "inner", name == "detached")
    unit = []
    if backend == "plain":
        unit = [unit_rows(x) for x in raw_rows]
        value, lse = plain_contrast(unit[0], unit[-1], tau, spec)
    else:
        x, y = raw_rows[0], None if k is None else raw_rows[1]
        spec = spec._replace(k_id=None if k is None else k_id, normalize=True)
        value, lse = of_contrast.contrast(Target(backend, ("contrast",), half), x, y, tau, spec)
    incoming = randn(*value.shape, 1, seed=5)[..., 0]
    loss = (incoming * value).sum() + (incoming.flip(-1) * lse.masked_fill(lse == -torch.inf, 0.0)).sum()
    gradients = list(grad(loss, [*raw_rows, tau, *unit], allow_unused=True, materialize_grads=True))
    n = len(raw_rows)
    of_raw_rows, of_tau, of_unit_rows = gradients[:n], gradients[n : n + 1], gradients[n + 1 :]
    for g, x in zip(of_raw_rows, raw_rows, strict=True):
        assert g.dtype == x.dtype
        assert not g[torch.linalg.vector_norm(x.detach().double(), dim=-1) < 1e-12].any()
    sizes = [sized(g, x.detach()) for g, x in zip(of_raw_rows, raw_rows, strict=True)]
    summands = [
        torch.ones(1),
        tau.detach().abs().clamp(min=1.0),
        *of_rows(of_unit_rows, incoming),
        incoming.abs().sum(),
    ]
    return Found([value.detach(), lse.detach()], sizes, of_tau, summands)


@covering({"name": list(SETS), "shape": SHAPES, "own": [False, True], "lengths": list(LENGTHS), "dtype": DTYPES}, 2)
def test_contrast(
    name: str, shape: tuple[int, int, int], own: bool, lengths: str, dtype: torch.dtype, threads: Any
) -> None:
    threads(3)
    n, m, dim = shape

    def run(seed: int, precision: torch.dtype, backend: str) -> Found:
        q, k = raw(2, n, dim, lengths=lengths, seed=seed), raw(2, m, dim, lengths=lengths, seed=seed + 50)
        q, k = (x.to(dtype).to(precision) for x in (q, k))
        return contrast(name, q, None if own else k, backend)

    assert_as_exact_as_eager(lambda *x: run(*x, "cpu"), lambda *x: run(*x, "plain"), dtype)


# ---- detached keys ---------------------------------------------------------------------------------------------------
@covering(
    {
        "kind": ["all", "other", "inner"],
        "detach": ["nothing", "weights", "value"],
        "shape": [*SHAPES, (7, 1500, 24)],
        "lengths": list(LENGTHS),
        "dtype": DTYPES,
    },
    2,
)  # fmt: skip
def test_detached_keys(
    kind: str, detach: str, shape: tuple[int, int, int], lengths: str, dtype: torch.dtype, threads: Any
) -> None:
    threads(5)
    n, m, dim = shape

    def run(seed: int, precision: torch.dtype, backend: str) -> Found:
        q, k = raw(2, n, dim, lengths=lengths, seed=seed), raw(1, m, dim, lengths=lengths, seed=seed + 50)
        q, k = (x.to(dtype).to(precision) for x in (q, k))
        q = q.requires_grad_()
        tau = torch.tensor([-1.3], dtype=torch.float64, requires_grad=True)
        ids = [torch.arange(x, dtype=torch.int32) % 6 for x in (n, m)] if kind == "other" else [None, None]
        kinds = [OTHER if kind == "other" else ALL]
        spec = ContrastSpec(*ids, kinds, [0, 1], [0, 0], kind == "inner", detach == "weights")
        unit = [unit_rows(q)] if backend == "plain" else []
        if backend == "plain":
            value, lse = plain_contrast(unit[0], unit_rows(k), tau, spec)
        else:
            arguments = *ids, tau, *spec[2:7], detach == "value", True, True, True
            value, lse, _, _ = operator("detached_keys_cpu")(q, k, *arguments)
        incoming = randn(*value.shape, 1, seed=5)[..., 0]
        loss = (incoming * (value.detach() if detach == "value" else value)).sum()
        if detach != "weights":
            loss = loss + (incoming.flip(-1) * lse).sum()
        of_q, of_tau, *of_unit = grad(loss, (q, tau, *unit), allow_unused=True, materialize_grads=True)
        summands = [torch.ones(1), torch.ones(1), *of_rows(of_unit, incoming), incoming.abs().sum()]
        return Found([value.detach(), lse.detach()], [sized(of_q, q.detach())], [of_tau], summands)

    assert_as_exact_as_eager(lambda *x: run(*x, "cpu"), lambda *x: run(*x, "plain"), dtype)


# ---- the fused loss --------------------------------------------------------------------------------------------------
VIEWS = {
    "unordered": {}, "ordered": {"pairing": 1}, "pooled": {"pairing": 2},
    "rbf": {"rbf": True}, "rbf, pooled": {"rbf": True, "pairing": 2},
    "attraction": {"beta": 0.0}, "repulsion": {"alpha": 0.0}, "unbounded rbf": {"rbf": True, "tau_neg": 30.0},
}  # fmt: skip


def fused(z: Tensor, options: CACROptions, backend: str, half: torch.dtype | None = None) -> Found:
    """Loss, parts and gradients of the fused loss. half: what the backend reads."""
    numbers = torch.tensor(options.numbers, dtype=torch.float64, requires_grad=True)
    z = z.clone().requires_grad_()
    if backend == "plain":
        unit = unit_rows(z)
        loss, parts = of_cacr.loss_and_parts(unit, numbers, options._replace(normalize=False))
        of_z, of_numbers, of_unit = grad(loss, (z, numbers, unit))
        of_costs = (
            of_numbers.abs().max().clamp(min=KNOWN * 16)
        )  # of the largest c^2, see Scale in cacr_kernels/testing.py
        summands = [torch.ones(1), torch.ones(1), of_unit, of_costs]
        return Found([loss.detach(), parts.detach()], [sized(of_z, z.detach())], [of_numbers], summands)
    views, compute = z.detach().to(half or z.dtype), operator(f"cacr_{backend}")
    loss, parts, of_z, of_numbers = compute(views, numbers, *options, True, True)
    alone = compute(views, numbers.detach(), *options, False, False)[0]
    assert abs(alone - loss) <= 10 * torch.finfo(z.dtype).eps * parts.abs().max()
    return Found([loss.detach(), parts], [sized(of_z, z.detach())], [of_numbers], [])


def options_of(name: str) -> CACROptions:
    """Those of ``VIEWS[name]``."""
    defaults = {"tau_pos": 1.2, "tau_neg": 0.8, "alpha": 1.0, "beta": 1.0, "pairing": 0, "rbf": False, "rbf_scale": 2.0}
    return CACROptions(**defaults | VIEWS[name], normalize=True)


@covering(
    {
        "name": list(VIEWS),
        "shape": [(2, 37, 19), (3, 70, 64), (2, 230, 33), (5, 1, 8), (4, 13, 128), (2, 50, 1)],
        "lengths": list(LENGTHS),
        "dtype": DTYPES,
    },
    2,
)  # fmt: skip
def test_fused_loss(name: str, shape: tuple[int, int, int], lengths: str, dtype: torch.dtype, threads: Any) -> None:
    threads(3)

    def run(seed: int, precision: torch.dtype, backend: str) -> Found:
        return fused(raw(*shape, lengths=lengths, seed=seed).to(dtype).to(precision), options_of(name), backend)

    assert_as_exact_as_eager(lambda *x: run(*x, "cpu"), lambda *x: run(*x, "plain"), dtype)


def test_many_views(threads: Any) -> None:
    """Costs of all pairs of views fit the workspace for fewer threads than there are."""
    threads(64)
    options = CACROptions(1.0, 1.0, 1.0, 1.0, 0, False, 2.0, True)
    z = raw(400, 4, 3, lengths="3 apart")
    assert max(error(fused(z, options, "cpu"), fused(z, options, "plain"))) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype: torch.dtype) -> None:
    """Normalised in float32, whatever the inputs are."""
    z = raw(2, 45, 21, lengths="3 apart").to(dtype)
    x, y = z.clone().requires_grad_(), z.double().requires_grad_()
    found, expected = cacr_loss(x, normalize=True, backend="cpu"), cacr_loss(y, normalize=True, backend="reference")
    assert abs(found.double() - expected) <= 1e-6
    a, b = grad(found, x)[0], grad(expected, y)[0]
    assert a.dtype == dtype
    assert (a.double() - b).abs().max() <= torch.finfo(dtype).eps * b.abs().max()


# ---- nearly equal raw rows -------------------------------------------------------------------------------------------
def near(distance: float, dim: int, seed: int, count: int = 40) -> Tensor:
    """Two views in float32, of lengths up to 3 apart, whose directions are ``distance`` apart."""
    x = unit_rows(randn(1, count, dim, seed=seed))
    step = randn(1, count, dim, seed=seed + 100)
    step = unit_rows(step - (step * x).sum(-1, keepdim=True) * x) * distance
    return (torch.cat([x, x + step]) * raw(2, count, 1, lengths="3 apart", seed=seed).abs()).float()


NEAR = [(1.0, 1e-6), (1e-1, 1e-6), (1e-2, 1e-6), (1e-3, 1e-6), (1e-5, 1e-4)]


def attraction(z: Tensor, operands: str, backend: str) -> tuple[Tensor, Tensor]:
    """The mean cost of positives and its gradient, by ``cacr``, or by ``contrast`` with the labels of instances."""
    x = z.clone().requires_grad_()
    if operands == "views":
        options = CACROptions(1.0, 1.0, 1.0, 0.0, 0, False, 2.0, True)
        value = of_cacr.loss_and_parts(x, None, options)[0] if backend == "plain" else cacr_of(x, options, backend)
        return value.detach().double(), grad(value, x)[0]
    labels = torch.arange(z.shape[1], dtype=torch.int32)
    tau = torch.tensor([1.0], dtype=torch.float64)
    spec = ContrastSpec(labels, labels, [SAME], [0], [0], normalize=True)
    q, k = x[:1], x[1:]
    if operands == "one set":
        q = k = x.reshape(1, -1, x.shape[-1])
        spec = spec._replace(q_id=labels.repeat(2), k_id=labels.repeat(2), kinds=[SAME_NOT_SELF])
    if backend == "plain":
        value, _ = plain_contrast(q, k, tau, spec)
    else:
        own = operands == "one set"
        arguments = spec.q_id, None if own else spec.k_id, tau, *spec[2:]
        value, _, _ = operator(f"contrast_{backend}")(q, None if own else k, *arguments)
    return value.mean().detach(), grad(value.mean(), x)[0]


def cacr_of(x: Tensor, options: CACROptions, backend: str) -> Tensor:
    loss: Tensor = operator(f"cacr_{backend}")(x, None, *options, True, False)[0]
    return loss


@pytest.mark.parametrize(("distance", "tolerance"), NEAR)
@pytest.mark.parametrize(
    ("operands", "count"),
    [("views", 40), ("views", 3), ("a set and another", 40), ("one set", 40), ("one set", 130)],
    ids=["views", "few views", "two sets", "one set", "symmetric sweeps"],
)
def test_attraction_of_nearly_equal_rows(operands: str, count: int, distance: float, tolerance: float) -> None:
    """Unit rows would be rounded before their difference is taken: 4e-5 off at a distance of 1e-3."""
    for dim in (8, 33, 128, 1024):
        z = near(distance, dim, seed=dim, count=count)
        (value, gradient), (truth, right) = attraction(z, operands, "cpu"), attraction(z.double(), operands, "plain")
        assert abs(value - truth) <= tolerance * truth
        assert (sized(gradient, z) - sized(right, z)).abs().max() <= 1e-6 * sized(right, z).abs().max()


def test_costs_of_equal_rows_of_one_size() -> None:
    """Norms are made of the products that similarities are made of: of codes their roundings are all alike."""
    mine, eager = [], []
    for dim in (7, 64, 128, 541, 16001):
        g = torch.Generator().manual_seed(dim)
        signs = torch.randn(dim, generator=g).sign()
        for size in torch.rand(4, generator=g) + 0.5:
            z = (signs * size).repeat(1, 40, 1)
            u = unit_rows(z)
            eager.append((2 * u[0, 0].square().sum() - 2 * (u[0] @ u[0].T)[0, 0]).abs())
            tau = torch.tensor([-1.0], dtype=torch.float64)
            (((value,),),), *_ = operator("contrast_cpu")(
                z[:, :1], z, None, None, tau, [ALL], [0], [0], False, False, None, True
            )
            mine.append(value.abs())
    assert max(mine) <= 2 * max(eager) + 8 * torch.finfo(torch.float32).eps


# ---- rows at the edge, bad numbers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shortest_rows_with_a_gradient(dtype: torch.dtype) -> None:
    z = raw(2, 9, 5, lengths="all alike").to(dtype)
    z[:, 3:6] = torch.tensor([0.0, 0, 1, 0, 0])
    for i, length in ((3, 1.01e-12), (4, 1e-12 if dtype == torch.float64 else 1.0001e-12), (5, 0.99e-12)):
        z[:, i] *= length
    found = fused(z, CACROptions(1.0, 1.0, 1.0, 1.0, 0, False, 2.0, True), "cpu")
    expected = fused(z.double(), CACROptions(1.0, 1.0, 1.0, 1.0, 0, False, 2.0, True), "plain")
    assert max(error(found, expected)) <= 20 * torch.finfo(dtype).eps
    (gradient,) = found.gradients
    assert gradient[:, 3:5].any(-1).all()
    assert not gradient[:, 5].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("n", [20, 230])
def test_bad_numbers_reach_the_rows_that_meet_them(bad: float, own: bool, n: int) -> None:
    q, k = raw(2, n, 7), None if own else raw(2, n, 7, seed=1)
    (q if k is None else k)[1, 3, 2] = bad
    found, expected = contrast("other", q, k, "cpu"), contrast("other", q, k, "plain")
    values = [x._replace(gradients=[], numbers=[], sizes=expected.sizes[:2]) for x in (found, expected)]
    assert max(error(*values)) <= 1e-12
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        assert torch.equal(a.isfinite().all(-1), b.isfinite().all(-1))


# ---- threads ---------------------------------------------------------------------------------------------------------
def everything() -> list[Tensor]:
    found = []
    for dim, options in ((64, {}), (33, {"pairing": "pooled"}), (64, {"cost": "rbf"}), (16, {"reduction": "none"})):
        z = raw(3, 131, dim).float().requires_grad_()
        loss = cacr_loss(z, normalize=True, backend="cpu", **options).mean()
        found += [loss.detach(), sized(grad(loss, z)[0], z.detach())]
    return found


@pytest.mark.parametrize("n", [1, 2, 64])
def test_same_bits_for_the_same_threads(threads: Any, n: int) -> None:
    threads(n)
    first = everything()
    assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
    threads(1)
    for a, b in zip(first, everything(), strict=True):
        assert (a - b).abs().max() <= 3e-6 * max(1e-3, a.abs().max())


def test_unit_rows_are_left_as_they_are() -> None:
    """The gradient alone differs: what moves a row along itself is taken out of it."""
    u = normalize(raw(2, 60, 24), dim=-1)
    x, y = u.clone().requires_grad_(), u.clone().requires_grad_()
    found, expected = cacr_loss(x, normalize=True, backend="cpu"), cacr_loss(y, backend="cpu")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    g = grad(expected, y)[0]
    torch.testing.assert_close(grad(found, x)[0], g - (g * u).sum(-1, keepdim=True) * u, rtol=1e-12, atol=1e-15)
