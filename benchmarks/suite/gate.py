"""The correctness gate: every row against the float64 reference before anything is timed.

Errors and tolerance are those of the tests (``cacr_kernels.testing``): 2 x the error of the definition + 8 eps. Where a
backend rounds the coefficients of gradients to a half type: 2 x the error of the definition that does so + 1 eps of the
type. The baselines are not ours to hold to that: they get ``BASELINE_SLACK`` times as much.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cacr_kernels import testing
from cacr_kernels.backends.table import named
from cacr_kernels.rounded import rounded_coefficients

from .cases import GRADIENTS, BenchmarkCase
from .rows import OURS, Row, Step

BASELINE_SLACK = 20.0
AFFORDABLE = 2**22 * 10  # similarities of which the float64 truth takes about a second
ROUGH = {"float16": 3e-2, "bfloat16": 3e-2, "float64": 1e-9}  # at full size, between two rows; float32: 1e-3


class Check(NamedTuple):
    """Errors of a row in a case. Green if no error is above its tolerance (and none is NaN)."""

    row: str
    case: str
    loss_error: float
    loss_tolerance: float
    gradient_error: float
    gradient_tolerance: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the row may be timed."""
        return (
            not self.problem
            and self.loss_error <= self.loss_tolerance
            and self.gradient_error <= self.gradient_tolerance
        )


def broken(row: Row, case: str, reason: str) -> Check:
    """The red check of a row that gives no numbers."""
    return Check(row.name, case, 0.0, 0.0, 0.0, 0.0, reason)


class Draw(NamedTuple):
    """Inputs of a case and the truth, scale and yardstick (error of the definition) of its loss and its gradient.

    ``rounded`` is the error of the gradient whose coefficients the definition rounds to the half type of the inputs.
    """

    inputs: dict[str, Tensor]
    truth: tuple[Tensor, Tensor]
    scale: tuple[float, float]
    yardstick: tuple[float, float]
    rounded: float


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def embeddings(inputs: dict[str, Tensor]) -> Tensor:
    """The input that carries the gradient."""
    return next(v for k, v in inputs.items() if k in testing.DIFFERENTIABLE)


def gradient(outputs: Sequence[Tensor], like: Tensor) -> Tensor | None:
    """The gradients of a step as one tensor shaped like the embeddings; ``None`` for a step without."""
    return torch.stack(list(outputs[1:])).reshape(like.shape) if len(outputs) > 1 else None


class Gate:
    """Checks rows; keeps draws, and the steps of compiled rows so that what is checked is what is timed."""

    def __init__(self) -> None:
        self._draws: dict[str, list[Draw]] = {}
        self._steps: dict[tuple[str, str], Step] = {}

    def instance(self, case: BenchmarkCase, row: Row) -> BenchmarkCase:
        """What is checked: a smaller instance, or for a row compiled for one shape that shape, if affordable."""
        P, N, M, _ = case.extent
        return case if row.compiles and P * N * M <= AFFORDABLE else case.smaller()

    def step(self, case: BenchmarkCase, row: Row, inputs: dict[str, Tensor]) -> Step:
        """The step of a row, the same one each time for a row that compiles."""
        if not row.compiles:
            return row.step(case, inputs)
        key = case.key, row.name
        if key not in self._steps:
            self._steps[key] = row.step(case, inputs)
        return self._steps[key]

    def draws(self, case: BenchmarkCase, count: int) -> list[Draw]:
        """Truths and yardsticks as in the tests, for gradients of the loss itself."""
        key = replace(case, mode=GRADIENTS).key
        if key not in self._draws:
            self._draws[key] = [_draw(case, seed) for seed in range(count)]
        return self._draws[key]

    def check(self, case: BenchmarkCase, row: Row) -> Check:
        """Loss and gradients of ``row``, the worst of all draws; an exception is a red check, too."""
        instance = self.instance(case, row)
        count = 1 if instance is case else testing.DRAWS
        loss_error = gradient_error = 0.0
        with threads(case.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = self.draws(instance, count)[: 1 if row.compiles else None]  # a compiled step has inputs of its own
            for draw in draws:
                try:
                    outputs = self.step(instance, row, draw.inputs)()
                except Exception as error:  # a row that cannot run must not pass unseen
                    return broken(row, instance.key, f"{type(error).__name__}: {error}".splitlines()[0])
                loss_error = max(loss_error, testing.error(outputs[0].detach(), draw.truth[0], draw.scale[0]))
                found = gradient(outputs, embeddings(draw.inputs))
                if found is not None:
                    gradient_error = max(gradient_error, testing.error(found, draw.truth[1], draw.scale[1]))
                elif case.mode == GRADIENTS:
                    return broken(row, instance.key, "no gradients")
        slack = 1.0 if row.family == OURS else BASELINE_SLACK
        allowed = [
            slack * testing.tolerance(max(draw.yardstick[i] for draw in draws), case.torch_dtype) for i in (0, 1)
        ]
        half = row.family == OURS and case.torch_dtype.itemsize == 2
        if half and case.torch_dtype in named(row.name).rounds_coefficients:
            rounded = testing.FACTOR * max(draw.rounded for draw in draws) + torch.finfo(case.torch_dtype).eps
            allowed[1] = max(allowed[1], rounded)
        return Check(row.name, instance.key, loss_error, allowed[0], gradient_error, allowed[1])


def _draw(case: BenchmarkCase, seed: int) -> Draw:
    """One draw. ``testing`` multiplies the incoming gradient by the number of values under the mean."""
    inputs = case.inputs(seed)
    name = next(k for k in inputs if k in testing.DIFFERENTIABLE)
    count = 1 if case.problem.loss == "cacr_momentum_loss" else case.problem.shape.get("V", 1)
    count *= case.problem.shape["B"]
    whole = count if case.problem.options.get("reduction") == "sum" else 1  # the loss is as many times the mean
    count = 1 if "reduction" in case.problem.options else count
    truth, scale = testing.true_quantities(case.problem, inputs)
    single = testing.rounded(inputs, torch.float32, case.device) if case.dtype == "float64" else inputs
    exact = testing.true_quantities(case.problem, single)[0] if single is not inputs else truth
    eager = testing.eager_quantities(case.problem, single, torch.float32)
    yardstick = [testing.error(eager[k], exact[k], scale[k]) for k in ("loss", name)]
    if case.dtype == "float64":  # where the definition is the truth, see ``testing``
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        yardstick = [ratio * (testing.FACTOR + 1) / testing.FACTOR * y for y in yardstick]
    rounded = 0.0
    if case.torch_dtype.itemsize == 2:
        with rounded_coefficients(case.torch_dtype, positives=case.problem.loss == "supervised_cacr_loss"):
            gradient = testing.eager_quantities(case.problem, inputs, torch.float32)[name].to(case.torch_dtype)
        rounded = testing.error(gradient, truth[name], scale[name])
    return Draw(
        inputs,
        (whole * truth["loss"], truth[name] / count),
        (whole * scale["loss"], scale[name] / count),
        (yardstick[0], yardstick[1]),
        rounded,
    )


def agree(row: Row, case: BenchmarkCase, outputs: Sequence[Tensor], like: Tensor, others: Sequence[Tensor]) -> Check:
    """Roughly the same numbers as another row at the size that is timed: catches what only large shapes show."""
    rough = ROUGH.get(case.dtype, 1e-3)
    loss, other = outputs[0].detach().double(), others[0].detach().double()
    error = (loss - other).abs().max().item() / max(1.0, other.abs().max().item())
    mine, theirs = gradient(outputs, like), gradient(others, like)
    gradient_error = 0.0
    if mine is not None and theirs is not None:
        gradient_error = testing.error(mine.detach().double(), theirs.detach().double())
    tolerance = 1e-9 if case.dtype == "float64" else 1e-3  # the loss of half inputs is float32
    return Check(row.name, f"{case.key} (full size)", error, tolerance, gradient_error, rough)
