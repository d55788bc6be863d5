"""Tolerances and the measure of error: one rule for the tests, ``verify`` and the benchmarks (problems: ``cases.py``).

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
    x is right  <=>  error <= 2 yardstick + 8 eps,       eps of the dtype of the arithmetic

Scale. An error of eps in each summand is all one can ask for, so the scale is that of the summands, not of what is left
when they have cancelled: the larger of what attraction and repulsion contribute (to a gradient: in its largest entry).
A number is summed over the queries as well, and is measured against the sum of what each query contributes in size: the
derivative of ``cacr_queue_loss`` w.r.t. tau_neg with detached queue logits has both signs among the queries, and where
they happened to cancel to a thirtieth, errors would seem thirty times as large. It is also a variance of costs, a
difference of terms c^2: what is below eps(float64) / eps(float32) of the largest c^2, where one key has all the weight,
is not known to a float32 eps even in float64, so the scale is no smaller. A quantity whose scale is 0 (nothing flows to
it) has to be exactly 0. Anything not finite has an infinite error.

- The incoming gradient is the number of values under the mean or, per query, a random number of [0.5, 1.5): gradients
  have the size of one query's and do not vanish in float16.
- A float16 or bfloat16 gradient has been rounded once more, on its way out: its error is the distance from the truth to
  the interval of numbers that round to it, so that the last cast costs nothing and hides nothing.
- Some backends round what multiplies half features in a gradient to their type, too
  (``Backend.rounds_coefficients``). Theirs are measured against the eager form that does so, with 2 yardstick + 1 eps
  of that type.
- The repulsion under rbf is a difference of two lse, about log of the number of negatives each where costs are small:
  that belongs to the scale of the loss.
- The derivative of 2T lse w.r.t. T (``cacr_momentum_loss``, rbf) is itself a difference, of 2 lse and the mean logit:
  the first of them belongs to its scale.

Draws. The error of one number is itself random: of two equally good computations one is more than twice as wrong as
the other in 30 % of all draws of the inputs, and in 12 % if the worst of four draws is taken of both. The largest error
of a tensor may hang on the rounding of one cost, too. So error and yardstick are the worst of the same ``DRAWS`` draws,
and a miss is looked at again on ``CONFIRM`` draws, those included: it counts if it is still there. That leaves 1 in
1000.

float64. There the truth is the eager form itself, and its errors count as errors of what is measured: the allowance is
2 y for the backend and y for the truth. As rounding errors are proportional to eps, the error y of the eager form in
float64 is taken to be that in float32 times the ratio of the two eps, but no less than what changes in float64 when
all instances come in the opposite order: BLAS need not sum alike in both precisions. (Seen with 4128 clustered keys and
MKL: the eager form wrong by 3.6e-14 in float64, ten times its share, and two backends by 4e-15, against long double.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import functional, reference
from .backends.table import named
from .cases import NEAR, Case, cases, make_inputs
from .rounded import rounded_coefficients
from .types import KeySets, Numbers, Terms

FACTOR = 2.0  # tolerance = FACTOR yardstick + EPSILONS eps
EPSILONS = 8.0
DRAWS = 4
CONFIRM = (16, 64)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("views", "queries", "embeddings", "ref_embeddings")
TEMPERATURES = ("tau_pos", "tau_neg", "temperature")
DEFINITIONS: Mapping[str, tuple[Callable[..., Terms], dict[str, Any]]] = {
    "cacr_loss": (
        reference.cacr,
        {"pairing": "unordered", "cost": "sqeuclidean", "rbf_scale": 2.0},
    ),
    "cacr_queue_loss": (reference.queue, {"in_batch": True, "weight_grad": "in_batch"}),
    "cacr_momentum_loss": (reference.momentum, {"cost": "rbf", "key_offset": 0}),
    "supervised_cacr_loss": (
        reference.supervised,
        {"ref_embeddings": None, "ref_labels": None},
    ),
}


class Result(NamedTuple):
    """One measured quantity; ``error``, ``yardstick`` and ``tolerance`` are relative to the scale of the quantity."""

    quantity: str
    error: float
    yardstick: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the quantity is right (not if the error is NaN)."""
        return math.isfinite(self.error) and self.error <= self.tolerance


# ---- inputs ----------------------------------------------------------------------------------------------------------
def rounded(inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The inputs in ``dtype`` (labels as they are) on ``device``."""
    return {n: (t.to(dtype) if t.is_floating_point() else t).to(device) for n, t in inputs.items()}


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that inputs of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def leaves_of(case: Case, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arguments made of fresh leaves (temperatures rounded to float32, whatever the dtype), and other keywords."""
    tensors = {n: t.detach().clone().requires_grad_(n in DIFFERENTIABLE) for n, t in inputs.items()}
    options = dict(case.options)
    first = next(iter(inputs.values()))
    for name in options.keys() & set(TEMPERATURES):
        tau = torch.tensor(options[name], dtype=torch.float32, device=first.device)
        options[name] = tau.item()
        if case.learnable:
            del options[name]
            tensors[name] = tau.to(arithmetic_dtype(first.dtype)).requires_grad_()
    return tensors, options


def incoming_gradient(case: Case, inputs: dict[str, Tensor], value: Tensor) -> Tensor:
    """The gradient that flows into a loss or a term under test, see the head of this file."""
    if case.per_query:
        weights = torch.rand(value.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(value.numel()))
        return (0.5 + weights).to(value)
    queries = next(iter(inputs.values())).shape[:-1]
    return torch.full_like(value, (queries[1:] if case.loss == "cacr_momentum_loss" else queries).numel())


def gradients_of(value: Tensor, tensors: dict[str, Tensor], incoming: Tensor) -> dict[str, Tensor]:
    """Gradients of every leaf that asks for one, in the order of the arguments; zeros where nothing flows."""
    wanted = {n: tensors[n] for n in (*DIFFERENTIABLE, *TEMPERATURES) if n in tensors}
    if not value.requires_grad:
        return {n: torch.zeros_like(t) for n, t in wanted.items()}
    found = torch.autograd.grad(value, list(wanted.values()), incoming, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), found, strict=True)}


# ---- evaluations -----------------------------------------------------------------------------------------------------
def actual_quantities(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The loss and its gradients as a user gets them, dtypes included, with the incoming gradient of this file."""
    tensors, options = leaves_of(case, inputs)
    loss = getattr(functional, case.loss)(**tensors, **options, backend=backend)
    return {"loss": loss.detach(), **gradients_of(loss, tensors, incoming_gradient(case, inputs, loss))}


def _terms(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], Terms]:
    """Leaves, and the two terms by the definition in ``dtype``."""
    tensors, options = leaves_of(case, rounded(inputs, dtype, next(iter(inputs.values())).device))
    function, defaults = DEFINITIONS[case.loss]
    arguments = defaults | tensors | options
    arguments.pop("reduction", None)
    if arguments.pop("normalize", False):
        floats = [n for n, t in tensors.items() if t.is_floating_point() and t.dim()]
        arguments |= {n: normalize(tensors[n], dim=-1) for n in floats}
    if case.loss == "supervised_cacr_loss":
        arguments["sets"] = KeySets(arguments.pop("ref_index", None), arguments.pop("ignore_index", None))
    if "tau_pos" in arguments:
        arguments["numbers"] = Numbers(*(arguments.pop(n, 1.0) for n in Numbers._fields))
    return tensors, function(**arguments)


def _loss(case: Case, terms: Terms) -> Tensor:
    """The loss that two terms make: a number for every query, or the sum of their means."""
    if case.per_query:
        return terms.attraction + terms.repulsion
    return terms.attraction.mean() + terms.repulsion.mean()


def eager_quantities(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss and its gradients by the definition in ``dtype``."""
    tensors, terms = _terms(case, inputs, dtype)
    loss = _loss(case, terms)
    return {"loss": loss.detach(), **gradients_of(loss, tensors, incoming_gradient(case, inputs, loss))}


def true_quantities(case: Case, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same in float64, and the scale of each: the larger of what the two terms contribute."""
    tensors, terms = _terms(case, inputs, torch.float64)
    attraction, attraction_sizes = _contribution(case, inputs, tensors, terms.attraction)
    repulsion, repulsion_sizes = _contribution(case, inputs, tensors, terms.repulsion)
    values = {name: x + repulsion[name] for name, x in attraction.items()}
    found = (attraction_sizes, repulsion_sizes, _rbf_sizes(case, inputs, terms))
    scale = {name: max(0.0, *(sizes.get(name, 0.0) for sizes in found)) for name in attraction_sizes}
    return values, scale


def _contribution(
    case: Case, inputs: dict[str, Tensor], tensors: dict[str, Tensor], rows: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What one term contributes to the loss and each gradient, and the size of that: see Scale above."""
    part = rows if case.per_query else rows.mean()
    incoming = incoming_gradient(case, inputs, part)
    values = {"loss": part.detach(), **gradients_of(part, tensors, incoming)}
    sizes = {name: x.abs().max().item() for name, x in values.items()}
    if not case.per_query:
        sizes["loss"] = rows.abs().mean().item()
    weight = incoming if case.per_query else incoming / rows.numel()
    return values, sizes | _derivative_sizes(rows, tensors, weight)


def _rbf_sizes(case: Case, inputs: dict[str, Tensor], terms: Terms) -> dict[str, float]:
    """Sizes of what cancels within the repulsion under rbf, for the loss or for the derivative w.r.t. T."""
    if case.loss == "cacr_loss" and case.options.get("cost") == "rbf":
        views, batch, _ = inputs["views"].shape
        negatives = (views if case.options.get("pairing") == "pooled" else 1) * (batch - 1)
        return {"loss": abs(case.options.get("beta", 1.0)) * math.log(max(1, negatives))}
    if case.loss == "cacr_momentum_loss" and case.options.get("cost", "rbf") == "rbf":
        part = terms.repulsion if case.per_query else terms.repulsion.mean()
        summand = (part * incoming_gradient(case, inputs, part)).sum().abs() / case.options.get("temperature", 1.0)
        return {"temperature": summand.item()}
    return {}


def _in_opposite_order(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and its gradients by the definition in float64, all instances and keys in the opposite order."""
    turned = {name: t.flip(0 if t.dim() == 1 else -2) for name, t in inputs.items()}
    options = dict(case.options)
    if case.loss == "cacr_momentum_loss":
        options["key_offset"] = len(inputs["keys"]) - inputs["queries"].shape[1] - options.get("key_offset", 0)
    tensors, terms = _terms(case._replace(options=options), turned, torch.float64)
    loss = _loss(case, terms)
    loss = loss.flip(-1) if case.per_query else loss
    found = gradients_of(loss, tensors, incoming_gradient(case, inputs, loss))
    return {"loss": loss.detach(), **{n: g.flip(-2) if g.dim() else g for n, g in found.items()}}


def _derivative_sizes(rows: Tensor, tensors: dict[str, Tensor], weight: Tensor) -> dict[str, float]:
    """For each temperature ``sum |weight d rows / d tau|``, by differentiating the derivative w.r.t. what flows in."""
    sizes = {}
    longest = max(t.detach().square().sum(-1).max().item() for t in tensors.values() if t.dim() > 1 and t.numel())
    resolution = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    floor = resolution * (4 * longest) ** 2 if "temperature" not in tensors else 0.0  # costs are at most 4 |x|^2
    for name in (n for n in TEMPERATURES if n in tensors):
        incoming = weight.detach().expand_as(rows).clone().requires_grad_()
        sizes[name] = 0.0
        if not rows.requires_grad:
            continue
        (d_tau,) = torch.autograd.grad(rows, tensors[name], incoming, create_graph=True, allow_unused=True)
        if d_tau is not None and d_tau.requires_grad:
            (each,) = torch.autograd.grad(d_tau, incoming)
            sizes[name] = max((each * incoming).abs().sum().item(), floor * incoming.abs().sum().item())
    return sizes


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

    def least_yardstick(self) -> dict[str, float]:
        """8 times the smallest subnormal number of float32: below, not even the exact loss, rounded, has 8 eps."""
        single = torch.finfo(torch.float32)
        floor = EPSILONS * single.smallest_normal * single.eps
        return {name: floor / scale if scale > floor else 0.0 for name, scale in self.scale.items()}


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


@functools.lru_cache(maxsize=4096)
def expect(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", count: int = DRAWS) -> Expected:
    """Truth, scale and yardstick of a case for inputs of ``dtype``: found once, for all backends."""
    asked = _as_asked_for(case, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors too small to share out
    try:
        inputs = [rounded(make_inputs(case, seed), dtype, device) for seed in range(count)]
        draws = [Draw(draw, *true_quantities(asked, draw)) for draw in inputs]
        if dtype == torch.float64:
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            single = expect(case, torch.float32, device, count).yardstick
            own = _worst([draw.errors(_in_opposite_order(case, draw.inputs)) for draw in draws])
            share = (FACTOR + 1) / FACTOR
            return Expected(draws, {n: share * max(ratio * value, own[n]) for n, value in single.items()})
        found = [draw.errors(eager_quantities(asked, draw.inputs, torch.float32)) for draw in draws]
    finally:
        torch.set_num_threads(threads)
    return Expected(draws, _worst([*found, *(draw.least_yardstick() for draw in draws)]))


# ---- coefficients of half types --------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4096)
def half_yardstick(case: Case, dtype: torch.dtype, device: torch.device | str, count: int) -> dict[str, float]:
    """Errors of the eager form whose coefficients and gradients are rounded to ``dtype``."""
    asked, found = _as_asked_for(case, dtype), []
    for draw in expect(case, dtype, device, count).draws:
        with rounded_coefficients(dtype, positives=case.loss == "supervised_cacr_loss"):
            quantities = eager_quantities(asked, draw.inputs, torch.float32)
        found.append(draw.errors({n: q.to(dtype) if n in DIFFERENTIABLE else q for n, q in quantities.items()}))
    return _worst(found)


def measure(case: Case, expected: Expected, backend: str, dtype: torch.dtype) -> list[Result]:
    """Every quantity of a case with one backend against what is expected."""
    asked = _as_asked_for(case, dtype)
    worst = _worst([draw.errors(actual_quantities(asked, draw.inputs, backend)) for draw in expected.draws])
    allowed = {name: (yardstick, tolerance(yardstick, dtype)) for name, yardstick in expected.yardstick.items()}
    if dtype in named(backend).rounds_coefficients:
        device = next(iter(expected.draws[0].inputs.values())).device
        for name, yardstick in half_yardstick(case, dtype, device, len(expected.draws)).items():
            if name in DIFFERENTIABLE:
                looser = FACTOR * yardstick + torch.finfo(dtype).eps
                allowed[name] = max(allowed[name], (yardstick, looser), key=lambda pair: pair[1])
    return [Result(name if name == "loss" else f"gradient of {name}", worst[name], *allowed[name]) for name in allowed]


def compare(case: Case, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Result]:
    """Error, yardstick and tolerance of the loss, of each input gradient and of each temperature derivative.

    Misses are confirmed as the head of this file says.
    """
    results = measure(case, expect(case, dtype, device), backend, dtype)
    for count in CONFIRM:
        misses = [result for result in results if not result.ok]
        if not misses or not all(math.isfinite(result.error) for result in misses):
            break
        results = measure(case, expect(case, dtype, device, count), backend, dtype)
    return results


__all__ = ["NEAR", "Case", "Draw", "Expected", "Result", "cases", "compare", "expect", "make_inputs", "measure"]
