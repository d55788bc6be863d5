"""One public loss on several backends: run it, and compare everything that comes out with the reference in float64.

What fails says what, where, by how much, and how to run it alone.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import cacr_kernels
from cacr_kernels import CACRParts, testing
from cacr_kernels.backends import table

BACKENDS = [
    name for name, reason in cacr_kernels.available_backends().items() if reason is None and name != "reference"
]
LOSSES: dict[str, Callable[..., Any]] = {
    "cacr": cacr_kernels.cacr_loss,
    "queue": cacr_kernels.cacr_queue_loss,
    "momentum": cacr_kernels.cacr_momentum_loss,
    "supervised": cacr_kernels.supervised_cacr_loss,
}
# One draw of inputs that is right is enough for make test.
DRAWS = testing.DRAWS if os.environ.get("CACR_TEST_ALL") == "1" else 1
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_loss = pytest.mark.parametrize("loss", LOSSES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers whose rows have a length of about 1, float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=g) / shape[-1] ** 0.5


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(randn(*shape, seed=seed), dim=-1)


def device_of(backend: str) -> str:
    return table.device_type_of(backend)


ON_CPU = [backend for backend in BACKENDS if device_of(backend) == "cpu"]  # for tests that make CPU tensors


def there(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """On the device that the backend works on."""
    return {name: t.to(device_of(backend)) for name, t in tensors.items()}


def small_inputs(loss: str, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a call by name; no two sizes are equal."""
    if loss == "cacr":
        return {"views": unit(3, 7, 5, seed=seed)}
    if loss == "queue":
        queries, keys = unit(3, 7, 5, seed=seed), unit(3, 7, 5, seed=seed + 1)
        return {"queries": queries, "keys": keys, "queue": unit(11, 5, seed=seed + 2)}
    if loss == "momentum":
        return {"queries": unit(3, 7, 5, seed=seed), "keys": unit(13, 5, seed=seed + 1)}
    labels, ref_labels = torch.arange(7) % 3, torch.arange(9) % 4
    own = {"embeddings": unit(7, 5, seed=seed), "labels": labels}
    return own | {"ref_embeddings": unit(9, 5, seed=seed + 1), "ref_labels": ref_labels}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


class Outcome(NamedTuple):
    """What a call gave, on the CPU; a gradient is ``None`` where nothing flows."""

    parts: CACRParts
    gradients: dict[str, Tensor | None]


def run(loss: str, tensors: dict[str, Tensor], backend: str, **options: Any) -> Outcome:
    """The parts and the gradients of all floating tensors, for a random incoming gradient of about 1 per query."""
    device = device_of(backend)
    arguments = {name: t.detach().to(device, copy=True) for name, t in tensors.items()}
    leaves = {name: t.requires_grad_() for name, t in arguments.items() if t.is_floating_point()}
    parts = LOSSES[loss](**arguments, **options, return_parts=True, backend=backend)
    assert isinstance(parts, CACRParts)
    incoming = torch.rand(parts.loss.shape, generator=torch.Generator().manual_seed(1)).to(parts.loss) + 0.5
    if not parts.loss.dim() and options.get("reduction", "mean") == "mean":
        incoming = incoming * next(iter(leaves.values())).shape[:-1].numel()
    found = torch.autograd.grad(parts.loss, list(leaves.values()), incoming, allow_unused=True)
    gradients = {name: g if g is None else g.cpu() for name, g in zip(leaves, found, strict=True)}
    return Outcome(CACRParts(*(part.detach().cpu() for part in parts)), gradients)


# ---- what a failure says ---------------------------------------------------------------------------------------------
VARIABLES = ("TRITON_INTERPRET", "CACR_CPU_ISA", "CACR_DISABLE_EXTENSION")  # which change what a test tests


def again() -> str:
    """The command that runs the current test alone."""
    name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    variables = [f"{v}={os.environ[v]}" for v in VARIABLES if v in os.environ]
    return shlex.join([*variables, "python", "-m", "pytest", name])


def worst_entry(actual: Tensor, expected: Tensor) -> str:
    """Where the two are furthest apart."""
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)}, should be {list(expected.shape)}"
    distance = testing.distance(actual, expected.to(actual.device)).masked_fill(actual == expected, 0.0)
    distance = distance.nan_to_num(nan=math.inf, posinf=math.inf)
    if not distance.numel():
        return "no entries"
    at = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    return f"entry {list(at)} is {actual[at].item():.9g}, should be {expected[at].item():.9g}"


def assert_within(actual: Tensor, expected: Tensor, tolerance: float, scale: float = 1.0, what: str = "") -> None:
    """``max |actual - expected| <= tolerance scale``; infinities have to be the same ones."""
    if actual.shape == expected.shape:
        finite = expected.isfinite()
        a, e = actual.double()[finite], expected.double()[finite]
        error = (a - e).abs().max().item() / scale if a.numel() else 0.0
        if error <= tolerance and torch.equal(actual[~finite].double(), expected[~finite].double()):
            return
    else:
        error = math.inf
    raise AssertionError(
        f"{what}: {worst_entry(actual, expected)}; error {error:.3g} of {scale:.3g}, tolerance {tolerance:.3g}\n"
        f"again: {again()}"
    )


def assert_agree(actual: Outcome, expected: Outcome, tolerance: float, what: str = "") -> None:
    """Within ``tolerance`` of the terms, and of the largest gradient of each tensor (and of 1)."""
    size = max(1.0, *(part.abs().max().item() for part in expected.parts))
    for name, x, y in zip(CACRParts._fields, actual.parts, expected.parts, strict=True):
        assert_within(x, y, tolerance, size, f"{what} {name}")
    for name, y in expected.gradients.items():
        x = actual.gradients[name]
        if y is None:
            assert x is None or not x.any(), f"{what} d/d{name}: {x}, should be zero\nagain: {again()}"
            continue
        x = torch.zeros_like(y) if x is None else x
        assert_within(x, y, tolerance, max(1.0, y.abs().max().item()), f"{what} d/d{name}")


def assert_within_budget(
    case: testing.Case,
    backend: str,
    dtype: torch.dtype = torch.float32,
    draws: int = DRAWS,
    device: str | None = None,
) -> None:
    """The promise of ``cacr_kernels.testing``; what fewer ``draws`` miss is decided by the usual number.

    ``device`` is that of the backend, but for an emulated one.
    """
    device = device or device_of(backend)
    if draws < testing.DRAWS:
        few = testing.measure(case, testing.expect(case, dtype, device, draws), backend, dtype)
        if all(result.ok for result in few):
            return
    missed = [result for result in testing.compare(case, backend, dtype, device) if not result.ok]
    if missed:
        raise AssertionError(explained(case, backend, dtype, device, missed))


def explained(case: testing.Case, backend: str, dtype: torch.dtype, device: str, missed: list[testing.Result]) -> str:
    """``missed`` with the draw and the entry that are furthest off."""
    draws, asked = testing.expect(case, dtype, device).draws, testing._as_asked_for(case, dtype)
    found = [testing.actual_quantities(asked, draw.inputs, backend) for draw in draws]
    errors = [draw.errors(quantities) for draw, quantities in zip(draws, found, strict=True)]
    lines = [f"{case.name}, {dtype}, backend {backend!r}:"]
    for result in missed:
        name = result.quantity.removeprefix("gradient of ")
        seed = max(range(len(draws)), key=lambda i, name=name: errors[i][name])
        where = worst_entry(found[seed][name], draws[seed].truth[name])
        lines.append(
            f"{result.quantity}: error {result.error:.3g}, tolerance {result.tolerance:.3g} (relative to "
            f"{draws[seed].scale[name]:.3g}); of seeds 0 to {len(draws) - 1} seed {seed} is worst: {where}"
        )
    return "\n".join([*lines, f"again: {again()}"])


def compare(loss: str, tensors: dict[str, Tensor], tolerance: float = 1e-10, **options: Any) -> None:
    """All backends against the reference in float64, on ``tensors`` as they are."""
    expected = run(loss, cast(tensors, torch.float64), "reference", **options)
    for backend in BACKENDS:
        assert_agree(run(loss, tensors, backend, **options), expected, tolerance, backend)
