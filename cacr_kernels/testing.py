"""Cases, tolerances and the measure of error: one list and one rule for the tests, ``verify`` and the benchmarks.

What is compared
----------------
    truth      the definition (``reference.py``) in float64, on the inputs as they were rounded to the input dtype
    yardstick  the definition in the dtype of the arithmetic (float32 for float16, bfloat16 and float32), that is the
               eager matmul form, on the same rounded inputs
    actual     a public loss with one backend, on the rounded inputs in the input dtype

for the loss, its gradient w.r.t. every differentiable input, and its derivative w.r.t. every temperature. With
``reduction="mean"`` the incoming gradient is the number of queries, with ``"none"`` it is a random number of [0.5, 1.5)
per query, so that gradients have the size of one query's and do not vanish in float16.

The measure
-----------
    error(x) = max |x - truth| / scale,        yardstick(x) likewise,        both dimensionless
    scale    = max(max |attraction|, max |repulsion|) of the truth, where for a gradient or a derivative the two terms
               stand for their contributions to it
    x is right  <=>  error <= 2 yardstick + 8 eps,       eps of the dtype of the arithmetic

The scale belongs to the terms because they cancel in the sum: an error of eps in each is all one can ask for. A
quantity whose scale is 0 (nothing flows to it) has to be exactly 0. Anything not finite has an infinite error.

Two details. A float16 or bfloat16 gradient has been rounded once more, on its way out: its error is the distance from
the truth to the interval of numbers that round to it, so that the last cast costs nothing and hides nothing. And in
float64 the truth carries the rounding errors of the very yardstick, which comparing it with itself would put at 0: the
yardstick of float64 is that of float32 times the ratio of the two eps.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import functional, reference
from .types import Terms

LossName = Literal["cacr", "queue", "momentum", "supervised"]
DataKind = Literal["unit", "clustered", "near-equal", "long"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NEAR = 1e-3  # distance of near-equal views, in lengths of the vectors, up to a factor of about one
PUBLIC: Mapping[LossName, Callable[..., Any]] = {
    "cacr": functional.cacr_loss,
    "queue": functional.cacr_queue_loss,
    "momentum": functional.cacr_momentum_loss,
    "supervised": functional.supervised_cacr_loss,
}
DEFINITION: Mapping[LossName, Callable[..., Terms]] = {
    "cacr": reference.cacr,
    "queue": reference.queue,
    "momentum": reference.momentum,
    "supervised": reference.supervised,
}


@dataclass(frozen=True)
class Case:
    """A named problem.

    ``V``, ``B``, ``D``: views, instances, features. ``M``: entries of the queue, keys beyond those of the queries
    (momentum), or size of the reference set (supervised, 0: none). ``taus`` are the temperatures in the order of the
    arguments of the loss; ``options`` its other keywords.
    """

    name: str
    loss: LossName = "cacr"
    V: int = 2
    B: int = 37
    D: int = 17
    M: int = 0
    data: DataKind = "unit"
    taus: tuple[float, ...] = (1.0, 2.0)
    options: Mapping[str, Any] = field(default_factory=dict)
    normalize: bool = False
    reduction: Literal["mean", "none"] = "mean"
    quick: bool = False

    @property
    def variant(self) -> str:
        """The loss and the options that decide which formula is computed."""
        words = [self.options[key] for key in ("pairing", "cost", "weight_grad") if key in self.options]
        return " ".join([self.loss, *words])

    @property
    def id(self) -> str:
        """Unique name, for ``pytest.mark.parametrize``."""
        return f"{self.variant}: {self.name}".replace(" ", "-")


class Inputs(NamedTuple):
    """Arguments of a loss by name; temperatures are 0-dim tensors in the dtype of the arithmetic."""

    differentiable: dict[str, Tensor]
    constant: dict[str, Tensor | None]
    temperatures: dict[str, Tensor]


class Expected(NamedTuple):
    """Inputs of a case in one dtype, and by quantity the truth, its scale and the yardstick relative to it."""

    inputs: Inputs
    truth: dict[str, Tensor]
    scale: dict[str, float]
    yardstick: dict[str, float]


class Result(NamedTuple):
    """One measured quantity; ``error``, ``yardstick`` and ``tolerance`` are relative to the scale of the quantity."""

    quantity: str
    error: float
    yardstick: float
    tolerance: float
    ok: bool

    @property
    def share(self) -> float:
        """``error / tolerance``: above 1 it has failed."""
        return self.error / self.tolerance


# ---- cases -----------------------------------------------------------------------------------------------------------
# Every axis has its own odd or prime size. The names of a variant are unique.
SHAPES = (
    Case("odd", V=3, B=7, D=5, quick=True),
    Case("one instance", B=1, D=3, quick=True),
    Case("two instances", B=2, D=1),
    Case("one feature", V=3, B=23, D=1, data="long"),
    Case("five views", V=5, B=13, D=11),
    Case("clustered", B=67, D=33, data="clustered", taus=(2.0, 5.0), quick=True),
    Case("near-equal views", V=3, B=41, D=19, data="near-equal", quick=True),
    Case("near-equal views, attraction alone", V=3, B=29, D=31, data="near-equal", options={"beta": 0.0}),
    Case("repulsion alone, clustered", B=43, D=21, data="clustered", options={"alpha": 0.0}),
    Case("large temperatures", V=3, B=53, D=29, taus=(20.0, 40.0), quick=True),
    Case("uniform weights", V=3, B=19, D=9, taus=(0.0, 0.0)),
    Case("long vectors", V=3, B=31, D=23, data="long", quick=True),
    Case("normalised here", V=3, B=17, D=13, data="long", normalize=True, options={"alpha": 0.7, "beta": 1.3}),
    Case("many features", B=11, D=1031),
    Case("large", B=257, D=129, taus=(1.0, 5.0)),
)
PER_QUERY = (
    Case("odd, per query", V=3, B=11, D=7, reduction="none", quick=True),
    Case("near-equal views, per query", V=4, B=21, D=15, data="near-equal", taus=(5.0, 10.0), reduction="none"),
    Case("one instance, per query", V=3, B=1, D=2, reduction="none"),
)
DEFAULTS: Mapping[LossName, Mapping[str, Any]] = {
    "cacr": {"alpha": 1.0, "beta": 1.0, "rbf_scale": 2.0},
    "queue": {"alpha": 1.0, "beta": 1.0, "in_batch": True},
    "momentum": {"key_offset": 0},
    "supervised": {"alpha": 1.0, "beta": 1.0},
}


def _variant(base: Case, loss: LossName, **options: Any) -> Case:
    return replace(base, loss=loss, options={**DEFAULTS[loss], **base.options, **options})


def _cacr_cases() -> list[Case]:
    pairings, costs = ("unordered", "ordered", "pooled"), ("sqeuclidean", "rbf")
    return [
        _variant(base, "cacr", pairing=pairing, cost=cost)
        for pairing in pairings
        for cost in costs
        for base in SHAPES + (PER_QUERY if cost == "sqeuclidean" else ())
    ]


def _queue_cases() -> list[Case]:
    bases = (
        Case("odd", V=3, B=7, D=5, M=13, quick=True),
        Case("one instance, empty queue", B=1, D=3),
        Case("empty queue", B=9, D=4),
        Case("queue alone", V=3, B=11, D=7, M=29, options={"in_batch": False}),
        Case("near-equal views", V=3, B=17, D=19, M=67, data="near-equal", taus=(5.0, 10.0), quick=True),
        Case("large temperatures", B=23, D=31, M=59, taus=(20.0, 40.0)),
        Case("normalised here, per query", V=3, B=19, D=9, M=37, data="long", normalize=True, reduction="none"),
        Case("large", B=61, D=65, M=521, taus=(1.0, 5.0)),
    )
    return [_variant(base, "queue", weight_grad=how) for how in ("in_batch", "full", "none") for base in bases]


def _momentum_cases() -> list[Case]:
    bases = (
        Case("odd", V=3, B=7, D=5, M=6, taus=(0.5,), options={"key_offset": 3}, quick=True),
        Case("one query and key", V=1, B=1, D=3, taus=(1.0,)),
        Case("near-equal views", V=2, B=43, D=19, data="near-equal", taus=(0.2,), quick=True),
        Case("low temperature, per query", V=3, B=29, D=21, taus=(0.05,), M=8, reduction="none"),
        Case("normalised here", V=4, B=17, D=11, data="long", M=2, taus=(1.0,), normalize=True),
        Case("large", B=127, D=65, M=260, taus=(0.2,), options={"key_offset": 127}),
    )
    return [_variant(base, "momentum", cost=cost) for cost in ("rbf", "sqeuclidean") for base in bases]


def _supervised_cases() -> list[Case]:
    bases = (
        Case("odd", V=3, B=7, D=5, quick=True),
        Case("alone", V=1, B=1, D=3),
        Case("reference set", V=2, B=13, D=11, M=41, quick=True),
        Case("near-equal views, per query", V=4, B=11, D=19, data="near-equal", taus=(5.0, 10.0), reduction="none"),
        Case("clustered", B=37, D=33, data="clustered", taus=(2.0, 5.0)),
        Case("large temperatures, reference set", B=19, D=17, M=53, taus=(20.0, 40.0)),
        Case("normalised here", V=3, B=9, D=8, data="long", normalize=True),
    )
    return [_variant(base, "supervised") for base in bases]


CASES: tuple[Case, ...] = (*_cacr_cases(), *_queue_cases(), *_momentum_cases(), *_supervised_cases())


def cases(*, quick: bool = False, loss: LossName | None = None) -> list[Case]:
    """The cases, or the quick ones, or those of one loss."""
    return [case for case in CASES if (case.quick or not quick) and loss in (None, case.loss)]


# ---- inputs ----------------------------------------------------------------------------------------------------------
def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype inputs of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_views(case: Case, V: int, B: int, generator: torch.Generator) -> Tensor:
    """Embeddings [V, B, D] in float64 on the CPU, of the kind ``case.data``; all but ``"long"`` are unit vectors."""
    noise = torch.randn(V, B, case.D, dtype=torch.float64, generator=generator)
    if case.data == "long":
        return 1.5 * noise
    if case.data == "unit":
        return normalize(noise, dim=-1)
    if case.data == "near-equal":
        centre = normalize(torch.randn(1, B, case.D, dtype=torch.float64, generator=generator), dim=-1)
        return normalize(centre + NEAR / math.sqrt(case.D) * noise, dim=-1)
    centre = torch.randn(5, case.D, dtype=torch.float64, generator=generator)
    return normalize(centre[torch.arange(B) % 5] + 0.1 * noise, dim=-1)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """The inputs of a case: always the same numbers, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def make(V: int, B: int) -> Tensor:
        return make_views(case, V, B, generator).to(device, dtype)

    # Temperatures are rounded to float32 in any case, so that every dtype is asked the same question.
    scalar = arithmetic_dtype(dtype)
    taus = [torch.tensor(tau, dtype=torch.float32, device=device).to(scalar) for tau in case.taus]
    views = make(2 * case.V if case.loss in ("queue", "momentum") else case.V, case.B)
    if case.loss == "cacr":
        return Inputs({"views": views}, {}, {"tau_pos": taus[0], "tau_neg": taus[1]})
    if case.loss == "queue":
        constant: dict[str, Tensor | None] = {"keys": views[case.V :], "queue": make(1, case.M)[0]}
        return Inputs({"queries": views[: case.V]}, constant, {"tau_pos": taus[0], "tau_neg": taus[1]})
    if case.loss == "momentum":
        others, offset = make(1, case.M)[0], case.options["key_offset"]
        keys = torch.cat([others[:offset], views[case.V], others[offset:]])
        return Inputs({"queries": views[: case.V]}, {"keys": keys}, {"temperature": taus[0]})
    labels = torch.arange(case.V * case.B, device=device) % max(1, case.B // 2)
    labels[-1] = case.B + 5  # a label nobody shares: no positive for it
    differentiable = {"embeddings": views.flatten(0, 1)}
    constant = {"labels": labels, "ref_embeddings": None, "ref_labels": None}
    if case.M:
        differentiable["ref_embeddings"] = make(1, case.M)[0]
        constant = {"labels": labels, "ref_labels": torch.arange(case.M, device=device) % max(2, case.B // 2 + 1)}
    return Inputs(differentiable, constant, {"tau_pos": taus[0], "tau_neg": taus[1]})


# ---- the three evaluations -------------------------------------------------------------------------------------------
def _leaves(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """Copies that require gradients where they can, floating ones in ``dtype`` (``None``: as they are)."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True)

    constant = {
        name: copy(tensor) if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.constant.items()
    }
    differentiable = {name: copy(tensor).requires_grad_() for name, tensor in inputs.differentiable.items()}
    return Inputs(differentiable, constant, {n: copy(t).requires_grad_() for n, t in inputs.temperatures.items()})


def _incoming(case: Case, loss: Tensor) -> Tensor:
    """The incoming gradient of the loss (or of one term of it), see the head of this file."""
    if case.reduction == "mean":
        return torch.full_like(loss, case.B if case.loss == "momentum" else case.V * case.B)
    values = torch.rand(loss.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(loss.numel()))
    return (0.5 + values).to(loss)


def _gradients(case: Case, value: Tensor, leaves: Inputs) -> dict[str, Tensor]:
    """Gradients by quantity; zeros where nothing flows."""
    tensors = {**leaves.differentiable, **leaves.temperatures}
    if not value.requires_grad:
        return {f"d/d {name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    grads = torch.autograd.grad(
        value, list(tensors.values()), _incoming(case, value), allow_unused=True, retain_graph=True
    )
    return {
        f"d/d {name}": torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True)
    }


def define(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Every quantity by the definition in ``dtype``, and its scale: the larger of what the two terms contribute."""
    leaves = _leaves(inputs, dtype)
    floats = {n: t for n, t in (leaves.differentiable | leaves.constant).items() if t is not None and t.is_floating_point()}
    if case.normalize:
        floats = {name: normalize(tensor, dim=-1) for name, tensor in floats.items()}
    arguments = {**leaves.constant, **floats, **leaves.temperatures}
    terms = DEFINITION[case.loss](**arguments, **case.options)
    parts = terms.attraction, terms.repulsion
    if case.reduction == "mean":
        parts = parts[0].mean(), parts[1].mean()
    loss = parts[0] + parts[1]
    values = {"loss": loss.detach(), **_gradients(case, loss, leaves)}
    contributions = [{"loss": part.detach(), **_gradients(case, part, leaves)} for part in parts]
    return values, {name: max(part[name].abs().max().item() for part in contributions) for name in values}


def evaluate(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Every quantity by the public loss, with the inputs in the dtype they have."""
    leaves = _leaves(inputs, None)
    arguments = {**leaves.constant, **leaves.differentiable, **leaves.temperatures, **case.options}
    loss = PUBLIC[case.loss](**arguments, normalize=case.normalize, reduction=case.reduction, backend=backend)
    return {"loss": loss.detach(), **_gradients(case, loss, leaves)}


# ---- the measure -----------------------------------------------------------------------------------------------------
def distance(actual: Tensor, truth: Tensor) -> Tensor:
    """``|actual - truth|`` in float64, elementwise.

    For float16 and bfloat16 the distance from ``truth`` to the interval of numbers that round to ``actual``.
    """
    value = actual.double()
    if actual.dtype not in (torch.float16, torch.bfloat16):
        return (value - truth).abs()
    # Counting in bit patterns gives the neighbours of a magnitude; the interval ends half-way to them.
    bits = actual.abs().view(torch.int16)
    magnitude = value.abs()
    above = (bits + 1).view(actual.dtype).double()
    below = (bits - 1).clamp(min=0).view(actual.dtype).double()
    truth = torch.where(value == 0, truth.abs(), truth * value.sign())
    low, high = (magnitude + below) / 2, (magnitude + above) / 2
    low = torch.where(value == 0, -high, low)
    inside = torch.maximum(low - truth, truth - high).clamp(min=0)
    return torch.where(actual.isfinite(), inside, math.inf)


def error(actual: Tensor, truth: Tensor, scale: float) -> float:
    """``max |actual - truth| / scale``; infinite if something is not finite, or not 0 where the scale is 0."""
    if actual.shape != truth.shape:
        return math.inf
    if not (actual.isfinite().all() and truth.isfinite().all()):
        return math.inf
    worst = distance(actual, truth).max().item() if actual.numel() else 0.0
    if worst == 0:
        return 0.0
    return worst / scale if scale > 0 else math.inf


def tolerance(yardstick: float, dtype: torch.dtype) -> float:
    """``2 yardstick + 8 eps`` of the arithmetic that inputs of ``dtype`` are computed in."""
    return 2 * yardstick + 8 * torch.finfo(arithmetic_dtype(dtype)).eps


def expect(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Expected:
    """Truth, scale and yardstick of a case for inputs of ``dtype``."""
    inputs = make_inputs(case, dtype, device)
    truth, scale = define(case, inputs, torch.float64)
    if dtype == torch.float64:
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        yardstick = expect(case, torch.float32, device).yardstick
        return Expected(inputs, truth, scale, {name: ratio * value for name, value in yardstick.items()})
    eager, _ = define(case, inputs, arithmetic_dtype(dtype))
    return Expected(inputs, truth, scale, {name: error(eager[name], truth[name], scale[name]) for name in truth})


def measure(case: Case, expected: Expected, dtype: torch.dtype, backend: str) -> list[Result]:
    """Every quantity of a case with one backend against what is expected."""
    actual = evaluate(case, expected.inputs, backend)
    results = []
    for name, truth in expected.truth.items():
        found, yardstick = error(actual[name], truth, expected.scale[name]), expected.yardstick[name]
        allowed = tolerance(yardstick, dtype)
        results.append(Result(name, found, yardstick, allowed, found <= allowed))
    return results


def error_budget(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Result]:
    """Error, yardstick and tolerance of the loss, of each input gradient and of each temperature derivative.

    Keys: ``"loss"``, and ``"d/d <argument>"`` for every differentiable input and temperature.
    """
    return {result.quantity: result for result in measure(case, expect(case, dtype, device), dtype, backend)}
