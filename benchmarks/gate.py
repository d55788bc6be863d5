"""The correctness gate: every row against the float64 reference before anything is timed.

Errors and tolerance are those of the tests (``cacr_kernels.testing``): 2 x the error of the eager form + 8 eps. The
baselines are not ours to hold to that: they get ``BASELINE_SLACK`` times as much.
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

from .cases import GRADIENTS, HALF, Case
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


class Truth(NamedTuple):
    """The float64 reference, and the reference in the dtype of the case as the yardstick."""

    exact: testing.Outcome
    eager: testing.Outcome


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
    """Checks rows; keeps truths, and the steps of compiled rows so that what is checked is what is timed."""

    def __init__(self) -> None:
        self._truths: dict[str, Truth] = {}
        self._steps: dict[tuple[str, str], Step] = {}

    def instance(self, case: Case, row: Row) -> Case:
        """What is checked: a smaller instance, or for a row compiled for one shape that shape, if affordable."""
        P, N, M, _ = case.extent
        return case if row.compiles and P * N * M <= AFFORDABLE else case.smaller()

    def step(self, case: Case, row: Row, inputs: dict[str, Tensor]) -> Step:
        """The step of a row, the same one each time for a row that compiles."""
        if not row.compiles:
            return row.step(case, inputs)
        key = case.key, row.name
        if key not in self._steps:
            self._steps[key] = row.step(case, inputs)
        return self._steps[key]

    def truth(self, case: Case, inputs: dict[str, Tensor]) -> Truth:
        """Reference in float64 and in the dtype of the case, on the same numbers."""
        key = replace(case, mode=GRADIENTS).key
        if key not in self._truths:
            double = {k: v if k == "labels" else v.double() for k, v in inputs.items()}
            found = (testing.evaluate(case.problem, x, "reference", learn_temperatures=False) for x in (double, inputs))
            self._truths[key] = Truth(*found)
        return self._truths[key]

    def check(self, case: Case, row: Row) -> Check:
        """Loss and gradients of ``row``; an exception is a red check, too."""
        case = self.instance(case, row)
        with threads(case.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = case.inputs()
            exact, eager = self.truth(case, inputs)
            try:
                outputs = self.step(case, row, inputs)()
            except Exception as error:  # a row that cannot run must not pass unseen
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                return Check(row.name, case.key, 0.0, 0.0, 0.0, 0.0, reason)
        slack = 1.0 if row.family == OURS else BASELINE_SLACK
        eps = torch.finfo(case.arithmetic).eps

        def tolerance(yardstick: float) -> float:
            return slack * (testing.FACTOR * yardstick + testing.EPSILONS * eps)

        loss = outputs[0].detach().double().cpu()
        loss_error = testing.error(loss, exact.loss, exact.scale)
        loss_tolerance = tolerance(testing.error(eager.loss, exact.loss, exact.scale))
        found = gradient(outputs, embeddings(inputs))
        if found is None:
            missing = "no gradients" if case.mode == GRADIENTS else ""
            return Check(row.name, case.key, loss_error, loss_tolerance, 0.0, 0.0, missing)
        (true,), (yard,) = exact.gradients.values(), eager.gradients.values()
        return Check(
            row.name,
            case.key,
            loss_error,
            loss_tolerance,
            testing.error(found.detach().double().cpu(), true),
            tolerance(testing.error(yard, true)),
        )


def agree(row: Row, case: Case, outputs: Sequence[Tensor], like: Tensor, others: Sequence[Tensor]) -> Check:
    """Roughly the same numbers as another row at the size that is timed: catches what only large shapes show."""
    rough = ROUGH.get(case.dtype, 1e-3)
    loss, other = outputs[0].detach().double(), others[0].detach().double()
    error = abs((loss - other).item()) / max(1.0, abs(other.item()))
    mine, theirs = gradient(outputs, like), gradient(others, like)
    gradient_error = 0.0
    if mine is not None and theirs is not None:
        gradient_error = testing.error(mine.detach().double(), theirs.detach().double())
    tolerance = rough if case.dtype not in HALF else 1e-3  # the loss of half inputs is float32
    return Check(row.name, f"{case.key} (full size)", error, tolerance, gradient_error, rough)
