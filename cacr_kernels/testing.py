"""Cases, tolerances and the measure of error: one list and one rule for the tests, ``verify`` and the benchmarks.

What is compared
----------------
    truth      the definition (``reference.py``) in float64, on the inputs as they were rounded to the input dtype
    yardstick  the definition in the dtype of the arithmetic (float32 for float16, bfloat16 and float32), that is the
               eager matmul form, on the same rounded inputs
    actual     a public loss with one backend, on the rounded inputs in the input dtype

for the loss, its gradient w.r.t. every differentiable input, and its derivative w.r.t. every temperature.

The measure
-----------
    error(x) = max |x - truth| / scale,        yardstick likewise,        both dimensionless
    scale    = max(max |attraction|, max |repulsion|) of the truth, where for a gradient or a derivative the two terms
               stand for their contributions to it
    x is right  <=>  error <= 2 yardstick + 8 eps,       eps of the dtype of the arithmetic

The scale belongs to the terms because they cancel in the sum: an error of eps in each is all one can ask for. A
quantity whose scale is 0 (nothing flows to it) has to be exactly 0. Anything not finite has an infinite error.

- The incoming gradient is the number of values under the mean or, per query, a random number of [0.5, 1.5): gradients
  have the size of one query's and do not vanish in float16.
- A float16 or bfloat16 gradient has been rounded once more, on its way out: its error is the distance from the truth to
  the interval of numbers that round to it, so that the last cast costs nothing and hides nothing.
- The derivative of 2T lse w.r.t. T (``cacr_momentum_loss``, rbf) is itself a difference, of 2 lse and the mean logit:
  the first of them belongs to its scale.
- An error of a scalar can be small by chance: error and yardstick alike are the worst of ``DRAWS`` draws of the inputs.
- In float64 the truth is the eager form itself, and its errors count as errors of what is measured. As rounding errors
  are proportional to eps, the error y of the eager form in float64 is taken to be that in float32 (of four times as
  many draws) times the ratio of the two eps; the allowance is 2 y for the backend and y for the truth.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import functional, reference
from .types import Terms

FACTOR = 2.0  # tolerance = FACTOR yardstick + EPSILONS eps
EPSILONS = 8.0
DRAWS = 4
NEAR = 1e-3  # distance of near-equal views, in lengths of the vectors, up to a factor of about one
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("views", "queries", "embeddings", "ref_embeddings")
TEMPERATURES = ("tau_pos", "tau_neg", "temperature")
DEFINITIONS: Mapping[str, tuple[Callable[..., Terms], dict[str, Any]]] = {
    "cacr_loss": (
        reference.cacr,
        {"alpha": 1.0, "beta": 1.0, "pairing": "unordered", "cost": "sqeuclidean", "rbf_scale": 2.0},
    ),
    "cacr_queue_loss": (reference.queue, {"alpha": 1.0, "beta": 1.0, "in_batch": True, "weight_grad": "in_batch"}),
    "cacr_momentum_loss": (reference.momentum, {"cost": "rbf", "key_offset": 0}),
    "supervised_cacr_loss": (
        reference.supervised,
        {"alpha": 1.0, "beta": 1.0, "ref_embeddings": None, "ref_labels": None},
    ),
}


class Case(NamedTuple):
    """A problem: a public loss, its sizes, its keywords (temperatures among them) and the kind of its data.

    Sizes: V views, B instances (supervised: embeddings), D features, K queue entries, M keys (momentum, in all) or
    reference embeddings (supervised), C classes. Data: ``"unit"`` vectors, ``"clustered"`` around 5 centres,
    ``"near-equal"`` views of an instance (or embeddings of a class), ``"long"``: not unit vectors.
    """

    loss: str
    shape: dict[str, int]
    options: dict[str, Any]
    data: str = "unit"
    quick: bool = False

    @property
    def name(self) -> str:
        """Readable and unique."""
        words = [f"{key}={value}" for key, value in (self.shape | self.options).items()]
        return " ".join([self.loss, *words, *([] if self.data == "unit" else [self.data])])

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def per_query(self) -> bool:
        """Whether the loss is one value per query."""
        return self.options.get("reduction") == "none"


class Result(NamedTuple):
    """One measured quantity; ``error``, ``yardstick`` and ``tolerance`` are relative to the scale of the quantity."""

    quantity: str
    error: float
    yardstick: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the quantity is right (not if the error is NaN)."""
        return self.error <= self.tolerance


# ---- cases: every axis has its own odd or prime size -----------------------------------------------------------------
def _taus(pos: float, neg: float) -> dict[str, Any]:
    return {"tau_pos": pos, "tau_neg": neg}


def _cases_of(loss: str, axes: str, **defaults: Any) -> Callable[..., Case]:
    """Makes cases of ``loss`` from the sizes of ``axes``; options not given are ``defaults``."""

    def case(*sizes: int, data: str = "unit", quick: bool = False, **options: Any) -> Case:
        return Case(loss, dict(zip(axes, sizes, strict=True)), defaults | options, data, quick)

    return case


def _cacr_cases() -> list[Case]:
    case = _cases_of("cacr_loss", "VBD", **_taus(1.0, 2.0))
    both_costs = [
        case(3, 7, 5, quick=True),
        case(2, 1, 3, quick=True),
        case(2, 2, 1),
        case(3, 23, 1, data="long"),
        case(5, 13, 11),
        case(2, 67, 33, data="clustered", quick=True, **_taus(2.0, 5.0)),
        case(3, 41, 19, data="near-equal", quick=True),
        case(3, 29, 31, data="near-equal", beta=0.0),
        case(2, 43, 21, data="clustered", alpha=0.0),
        case(3, 53, 29, quick=True, **_taus(20.0, 40.0)),
        case(3, 19, 9, **_taus(0.0, 0.0)),
        case(3, 31, 23, data="long", quick=True),
        case(3, 17, 13, data="long", normalize=True, alpha=0.7, beta=1.3),
        case(2, 11, 1031),
        case(2, 257, 129, **_taus(1.0, 5.0)),
    ]
    rows = [
        case(3, 11, 7, quick=True, reduction="none"),
        case(4, 21, 15, data="near-equal", reduction="none", **_taus(5.0, 10.0)),
        case(3, 1, 2, reduction="none"),
    ]
    return [
        base._replace(options=base.options | {"pairing": pairing, "cost": cost})
        for pairing in ("unordered", "ordered", "pooled")
        for cost in ("sqeuclidean", "rbf")
        for base in both_costs + (rows if cost == "sqeuclidean" else [])
    ]


def _queue_cases() -> list[Case]:
    case = _cases_of("cacr_queue_loss", "VBDK", **_taus(1.0, 2.0))
    bases = (
        case(3, 7, 5, 13, quick=True),
        case(2, 1, 3, 0),
        case(2, 9, 4, 0),
        case(3, 11, 7, 29, in_batch=False),
        case(3, 17, 19, 67, data="near-equal", quick=True, **_taus(5.0, 10.0)),
        case(2, 23, 31, 59, **_taus(20.0, 40.0)),
        case(3, 19, 9, 37, data="long", normalize=True, reduction="none"),
        case(2, 61, 65, 521, **_taus(1.0, 5.0)),
    )
    return [b._replace(options=b.options | {"weight_grad": w}) for w in ("in_batch", "full", "none") for b in bases]


def _momentum_cases() -> list[Case]:
    case = _cases_of("cacr_momentum_loss", "VBDM")
    bases = (
        case(3, 7, 5, 13, quick=True, temperature=0.5, key_offset=3),
        case(1, 1, 3, 1, temperature=1.0),
        case(2, 43, 19, 43, data="near-equal", quick=True, temperature=0.2),
        case(3, 29, 21, 37, temperature=0.05, reduction="none"),
        case(4, 17, 11, 19, data="long", temperature=1.0, normalize=True),
        case(2, 127, 65, 387, temperature=0.2, key_offset=127),
    )
    return [base._replace(options=base.options | {"cost": cost}) for cost in ("rbf", "sqeuclidean") for base in bases]


def _supervised_cases() -> list[Case]:
    case = _cases_of("supervised_cacr_loss", "BDCM", **_taus(1.0, 2.0))
    return [
        case(21, 5, 4, 0, quick=True),
        case(1, 3, 1, 0),
        case(13, 6, 1, 0),
        case(17, 7, 97, 0),
        case(27, 11, 5, 41, quick=True),
        case(43, 19, 11, 0, data="near-equal", reduction="none", **_taus(5.0, 10.0)),
        case(75, 33, 9, 0, data="clustered", **_taus(2.0, 5.0)),
        case(37, 17, 3, 53, **_taus(20.0, 40.0)),
        case(29, 8, 7, 0, data="long", normalize=True),
    ]


def cases(quick: bool = False) -> list[Case]:
    """All cases, or the quick ones."""
    found = [*_cacr_cases(), *_queue_cases(), *_momentum_cases(), *_supervised_cases()]
    return [case for case in found if case.quick or not quick]


# ---- inputs ----------------------------------------------------------------------------------------------------------
def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a case by argument name, float64 (labels: int64) on the CPU; the same for the same seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    sizes = {"V": 1, "K": 0, "M": 0, "C": 1} | case.shape
    V, B, D, M = (sizes[axis] for axis in "VBDM")
    centres = torch.randn(max(B + sizes["K"], M, 5), D, dtype=torch.float64, generator=generator)

    def make(*shape: int, owner: Tensor | None = None) -> Tensor:
        """``owner``: for near-equal data, whose copy each row is."""
        noise = torch.randn(*shape, D, dtype=torch.float64, generator=generator)
        if case.data == "long":
            return 0.4 * noise
        if case.data == "near-equal":
            own = normalize(centres[: shape[-1]] if owner is None else centres[owner], dim=-1)
            noise = own + NEAR / math.sqrt(D) * noise
        elif case.data == "clustered":
            noise = centres[torch.arange(shape[-1]) % 5] + 0.1 * noise
        return normalize(noise, dim=-1)

    if case.loss == "cacr_loss":
        return {"views": make(V, B)}
    if case.loss == "cacr_queue_loss":
        strangers = torch.arange(B, B + sizes["K"])  # the queue holds other instances
        return {"queries": make(V, B), "keys": make(V, B), "queue": make(sizes["K"], owner=strangers)}
    if case.loss == "cacr_momentum_loss":
        owner = torch.arange(M) - case.options.get("key_offset", 0)
        return {"queries": make(V, B), "keys": make(M, owner=owner % len(centres))}
    labels = torch.randint(sizes["C"], (B,), generator=generator)
    own = {"embeddings": make(B, owner=labels % len(centres)), "labels": labels}
    if not M:
        return own
    return own | {"ref_embeddings": make(M), "ref_labels": torch.randint(sizes["C"], (M,), generator=generator)}


def rounded(inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The inputs in ``dtype`` (labels as they are) on ``device``."""
    return {n: (t.to(dtype) if t.is_floating_point() else t).to(device) for n, t in inputs.items()}


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that inputs of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _leaves(case: Case, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arguments made of fresh leaves (temperatures rounded to float32, whatever the dtype), and other keywords."""
    tensors = {n: t.detach().clone().requires_grad_(n in DIFFERENTIABLE) for n, t in inputs.items()}
    options = dict(case.options)
    first = next(iter(inputs.values()))
    for name in options.keys() & set(TEMPERATURES):
        tau = torch.tensor(options.pop(name), dtype=torch.float32, device=first.device)
        tensors[name] = tau.to(arithmetic_dtype(first.dtype)).requires_grad_()
    return tensors, options


def _incoming(case: Case, value: Tensor) -> Tensor:
    """The gradient that flows into a loss or a term under test, see the head of this file."""
    if not case.per_query:
        count = case.shape["B"] * (case.shape.get("V", 1) if case.loss != "cacr_momentum_loss" else 1)
        return torch.full_like(value, count)
    weights = torch.rand(value.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(value.numel()))
    return (0.5 + weights).to(value)


def _gradients(value: Tensor, tensors: dict[str, Tensor], incoming: Tensor) -> dict[str, Tensor]:
    """Gradients of every leaf that asks for one, in the order of the arguments; zeros where nothing flows."""
    wanted = {n: tensors[n] for n in (*DIFFERENTIABLE, *TEMPERATURES) if n in tensors}
    if not value.requires_grad:
        return {n: torch.zeros_like(t) for n, t in wanted.items()}
    found = torch.autograd.grad(value, list(wanted.values()), incoming, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), found, strict=True)}


# ---- evaluations -----------------------------------------------------------------------------------------------------
def actual_quantities(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The loss and its gradients as a user gets them, dtypes included, with the incoming gradient of this file."""
    tensors, options = _leaves(case, inputs)
    loss = getattr(functional, case.loss)(**tensors, **options, backend=backend)
    return {"loss": loss.detach(), **_gradients(loss, tensors, _incoming(case, loss))}


def true_quantities(
    case: Case, inputs: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same by the definition in ``dtype``, and the scale of each: the larger of what the two terms contribute."""
    tensors, options = _leaves(case, rounded(inputs, dtype, next(iter(inputs.values())).device))
    function, defaults = DEFINITIONS[case.loss]
    arguments = defaults | tensors | options
    arguments.pop("reduction", None)
    if arguments.pop("normalize", False):
        floats = [n for n, t in tensors.items() if t.is_floating_point() and t.dim()]
        arguments |= {n: normalize(tensors[n], dim=-1) for n in floats}
    terms = function(**arguments)
    parts = terms.attraction, terms.repulsion
    if not case.per_query:
        parts = parts[0].mean(), parts[1].mean()
    loss = parts[0] + parts[1]
    incoming = _incoming(case, loss)
    values = {"loss": loss.detach(), **_gradients(loss, tensors, incoming)}
    shares = [{"loss": part.detach(), **_gradients(part, tensors, incoming)} for part in parts]
    scale = {name: max(share[name].abs().max().item() for share in shares) for name in values}
    if case.loss == "cacr_momentum_loss" and arguments["cost"] == "rbf":
        summand = (parts[1] * incoming).sum().abs() / case.options["temperature"]
        scale["temperature"] = max(scale["temperature"], summand.item())
    return values, scale


# ---- the measure -----------------------------------------------------------------------------------------------------
def distance(actual: Tensor, exact: Tensor) -> Tensor:
    """``|actual - exact|`` in float64; for half types from ``exact`` to the numbers that round to ``actual``."""
    value, exact = actual.double(), exact.double()
    if actual.dtype not in HALF:
        return (value - exact).abs()
    # Counting in bit patterns gives the neighbours of a magnitude; the interval ends half-way to them.
    bits = actual.abs().view(torch.int16)
    above = (bits + 1).view(actual.dtype).double()
    below = (bits - 1).clamp(min=0).view(actual.dtype).double()
    low, high = (value.abs() + below) / 2, (value.abs() + above) / 2
    exact = torch.where(value == 0, exact.abs(), exact * value.sign())
    return torch.maximum(torch.where(value == 0, 0.0, low - exact), exact - high).clamp(min=0)


def error(actual: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """``max |actual - exact| / scale`` (by default ``max |exact|``).

    Infinite if the shapes differ, if something is not finite, or not 0 where the scale is 0.
    """
    if actual.shape != exact.shape or not (actual.isfinite().all() and exact.isfinite().all()):
        return math.inf
    if not actual.numel():
        return 0.0
    worst = distance(actual, exact).max().item()
    scale = exact.abs().max().item() if scale is None else scale
    return 0.0 if worst == 0 else worst / scale if scale > 0 else math.inf


def tolerance(yardstick: float, dtype: torch.dtype) -> float:
    """``2 yardstick + 8 eps`` of the arithmetic that inputs of ``dtype`` are computed in."""
    return FACTOR * yardstick + EPSILONS * torch.finfo(arithmetic_dtype(dtype)).eps


class Draw(NamedTuple):
    """Inputs of a case, and the truth and its scale by quantity."""

    inputs: dict[str, Tensor]
    truth: dict[str, Tensor]
    scale: dict[str, float]

    def errors(self, found: dict[str, Tensor]) -> dict[str, float]:
        """The error of every quantity."""
        return {name: error(found[name], exact, self.scale[name]) for name, exact in self.truth.items()}


class Expected(NamedTuple):
    """A case in one dtype, made once for all backends; ``yardstick`` by quantity, the worst of all draws."""

    draws: list[Draw]
    yardstick: dict[str, float]


def _worst(errors: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(draw[name] for draw in errors) for name in errors[0]}


def _as_asked_for(case: Case, dtype: torch.dtype) -> Case:
    """Where unit vectors are asked for: rounded to a half type they are none any more, and have to be normalised."""
    normalizes = case.loss == "cacr_momentum_loss" and dtype in HALF
    return case._replace(options=case.options | {"normalize": True}) if normalizes else case


def _draws(case: Case, dtype: torch.dtype, device: torch.device | str, count: int) -> list[Draw]:
    inputs = [rounded(make_inputs(case, seed), dtype, device) for seed in range(count)]
    return [Draw(draw, *true_quantities(_as_asked_for(case, dtype), draw, torch.float64)) for draw in inputs]


@functools.lru_cache(maxsize=4096)
def expect(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Expected:
    """Truth, scale and yardstick of a case for inputs of ``dtype``: found once, for all backends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors too small to share out
    try:
        draws, asked, double = _draws(case, dtype, device, DRAWS), _as_asked_for(case, dtype), dtype == torch.float64
        singles = _draws(case, torch.float32, device, 4 * DRAWS) if double else draws
        yardstick = _worst([draw.errors(true_quantities(asked, draw.inputs, torch.float32)[0]) for draw in singles])
    finally:
        torch.set_num_threads(threads)
    if double:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps * (FACTOR + 1) / FACTOR
        yardstick = {name: ratio * value for name, value in yardstick.items()}
    return Expected(draws, yardstick)


def measure(case: Case, expected: Expected, backend: str, dtype: torch.dtype) -> list[Result]:
    """Every quantity of a case with one backend against what is expected."""
    asked = _as_asked_for(case, dtype)
    worst = _worst([draw.errors(actual_quantities(asked, draw.inputs, backend)) for draw in expected.draws])
    return [
        Result(name if name == "loss" else f"gradient of {name}", worst[name], yardstick, tolerance(yardstick, dtype))
        for name, yardstick in expected.yardstick.items()
    ]


def compare(case: Case, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Result]:
    """Error, yardstick and tolerance of the loss, of each input gradient and of each temperature derivative."""
    return measure(case, expect(case, dtype, device), backend, dtype)
