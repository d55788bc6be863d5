"""The operator ``repulsion``: keys that are not the queries, with the gradients of both, against the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from cacr_kernels import reference
from cacr_kernels.backends import table
from cacr_kernels.operators import repulsion
from cacr_kernels.operators.registry import Target, operator
from cacr_kernels.types import PAIRINGS, Numbers
from tests.operators.test_ops import as_fake, assert_close, assert_like, both_dtypes, quiet_opcheck, randn

BACKENDS = ("cpu", "torch")
ALL_WANTED = (True, True, True)

both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Shape(NamedTuple):
    """V views of B queries and of M keys."""

    V: int
    B: int
    M: int
    D: int


SMALL = Shape(3, 4, 11, 5)
SHAPES = {
    "small": SMALL,
    "two views": Shape(2, 5, 7, 3),
    "one query a view": Shape(2, 1, 3, 4),
    "no other rank": Shape(3, 5, 5, 2),
    "no negatives": Shape(2, 1, 1, 3),
    "one feature": Shape(2, 3, 6, 1),
    "panels and tiles": Shape(2, 67, 301, 17),
    "large keys": Shape(2, 37, 2311, 129),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
each_pairing = pytest.mark.parametrize("pairing", range(len(PAIRINGS)), ids=PAIRINGS)


def tensors(shape: Shape, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """Views, keys that begin with them, and a temperature."""
    keys = 2 * randn(shape.V, shape.M, shape.D, dtype=dtype)
    tau = torch.tensor([-1.3], dtype=torch.float64)
    found = keys[:, : shape.B].clone(), keys, tau
    return tuple(x.requires_grad_(requires_grad) for x in found)


def truth(views: Tensor, keys: Tensor, tau: Tensor, pairing: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Mean cost and entropy of the repulsion of the whole loss, by the reference in float64."""
    z, k = (reference.unit_rows(x) if normalize else x for x in (views.double(), keys.double()))
    numbers = Numbers(1.0, -tau[0], 0.0, -1.0)
    terms = reference.cacr(z, numbers, pairing=PAIRINGS[pairing], cost="sqeuclidean", rbf_scale=1.0, keys=k)
    return terms.repulsion.mean(), terms.repulsion_entropy


def check(backend: str, inputs: tuple[Tensor, ...], pairing: int, normalize: bool) -> None:
    """Value, entropy and all gradients."""
    mine = operator(f"repulsion_{backend}")(*inputs, pairing, normalize, *ALL_WANTED)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    value, entropy = truth(*wide, pairing, normalize)
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    assert [x.dtype for x in mine] == [torch.float64] * 2 + [dtype] * 2 + [torch.float64]
    count = inputs[0].shape[0] * inputs[0].shape[1]  # of queries, whose mean it is
    scaled = [x if i < 2 else count * x for i, x in enumerate(mine)]
    true = [value.detach(), entropy, *grad(count * value, wide)]
    if inputs[0].dtype in table.named(backend).rounds_coefficients:
        for x, y in zip(scaled[2:4], true[2:4], strict=True):
            assert (x - y).abs().max() <= torch.finfo(inputs[0].dtype).eps * y.abs().max()
        del scaled[2:4], true[2:4]
    assert_close(scaled, true, dtype)


@both_backends
@both_dtypes
@each_pairing
@each_shape
@pytest.mark.parametrize("normalize", [False, True])
def test_against_the_definition(shape: Shape, pairing: int, dtype: torch.dtype, normalize: bool, backend: str) -> None:
    check(backend, tensors(shape, dtype), pairing, normalize)


@both_backends
@each_pairing
def test_only_what_is_wanted(pairing: int, backend: str) -> None:
    """Each output is the same, whatever else is asked for."""
    inputs, compute = tensors(SHAPES["panels and tiles"]), operator(f"repulsion_{backend}")
    whole = compute(*inputs, pairing, True, *ALL_WANTED)
    for number in range(7):
        wanted = [bool(number & 1 << i) for i in range(3)]
        *found, of_views, of_keys, of_tau = compute(*inputs, pairing, True, *wanted)
        assert_close(found, whole[:2], torch.float64)
        for mine, all_of_it, is_wanted in zip((of_views, of_keys, of_tau), whole[2:], wanted, strict=True):
            assert_close([mine], [all_of_it if is_wanted else all_of_it[:0].new_empty(0)], torch.float64)


def test_slices_beyond_the_workspace(threads: Any) -> None:
    """Statistics come first where the gradients of all threads do not fit: two sweeps, the same numbers."""
    inputs = tensors(Shape(2, 259, 60_000, 64), torch.float32)
    found = []
    for count in (1, 8):
        threads(count)
        found.append(operator("repulsion_cpu")(*inputs, 0, True, *ALL_WANTED))
    largest = [x.abs().max() for x in found[0]]
    assert_close(*([x / m for x, m in zip(some, largest, strict=True)] for some in found), torch.float32)


def test_any_number_of_threads(threads: Any) -> None:
    inputs = tensors(SHAPES["panels and tiles"])
    found = []
    for count in (1, 3):
        threads(count)
        found.append(operator("repulsion_cpu")(*inputs, 2, True, *ALL_WANTED))
        again = operator("repulsion_cpu")(*inputs, 2, True, *ALL_WANTED)
        assert all(map(torch.equal, found[-1], again))
    assert_close(*found, torch.float64)


@both_backends
def test_bad_numbers_show(backend: str) -> None:
    for place in range(3):
        for bad in (torch.nan, torch.inf):
            inputs = tensors(SMALL)
            inputs[place].view(-1)[-1] = bad
            value, *_ = operator(f"repulsion_{backend}")(*inputs, 2, False, *ALL_WANTED)
            assert not value.isfinite(), (place, bad)


# ---- autograd --------------------------------------------------------------------------------------------------------
def loss_of(inputs: tuple[Tensor, ...], backend: str, normalize: bool = True) -> Tensor:
    on = Target(backend, ("repulsion",), None, normalize)
    return repulsion.repulsion(on, *inputs, PAIRINGS[1])[0]  # type: ignore[arg-type, misc]


@both_backends
def test_gradients(backend: str) -> None:
    """In a larger graph, a second time, and where only some are wanted."""
    inputs = tensors(SMALL, requires_grad=True)
    expected = grad(truth(*inputs, 1, True)[0].sin(), inputs)
    loss = loss_of(inputs, backend).sin()
    for _ in range(2):
        assert_close(grad(loss, inputs, retain_graph=True), expected, torch.float64)
    for i, x in enumerate(inputs):
        some = tuple(y if y is x else y.detach() for y in inputs)
        assert_close(grad(loss_of(some, backend).sin(), x), expected[i : i + 1], torch.float64)


@both_backends
def test_second_derivatives(backend: str) -> None:
    """Of a penalty on the gradient, and the gradient itself where it is differentiated."""
    inputs = tensors(SMALL, requires_grad=True)
    found = []
    for loss in (loss_of(inputs, backend), truth(*inputs, 1, True)[0]):
        first = grad(loss.sin(), inputs, create_graph=True)
        penalty = sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(first)) + loss
        found.append((*first, *grad(penalty, inputs)))
    assert_close(*found, torch.float64)


@both_backends
def test_gradients_that_were_not_known_in_forward(backend: str) -> None:
    inputs = tensors(SMALL, requires_grad=True)
    call = repulsion.Call((1, True), (False, True, False), Target(backend, ("repulsion",), None, True))
    value, _ = repulsion.one_sweep(*inputs, call)
    assert_close(grad(value, inputs), grad(truth(*inputs, 1, True)[0], inputs), torch.float64)


@both_backends
def test_autograd_of_every_output(backend: str) -> None:
    """The registered formula: value and gradients are outputs, each differentiable, in any mixture."""
    inputs = tensors(SMALL, requires_grad=True)
    gg = [randn(*x.shape, seed=3 + i) for i, x in enumerate(inputs)]

    def mixture(value: Tensor, *found: Tensor) -> Tensor:
        return value.sin() + sum((g * x).sum() for g, x in zip(gg, found, strict=True))

    value, _ = truth(*inputs, 2, True)
    expected = grad(mixture(value, *grad(value, inputs, create_graph=True)), inputs)
    value, _, *found = operator(f"repulsion_{backend}")(*inputs, 2, True, *ALL_WANTED)
    assert_close(grad(mixture(value, *found), inputs), expected, torch.float64)
    value, *_ = operator(f"repulsion_{backend}")(*inputs, 2, True, True, False, False)
    assert_close(grad(value, inputs), grad(truth(*inputs, 2, True)[0], inputs), torch.float64)


@quiet_opcheck
@pytest.mark.parametrize(
    "backend", ["cpu", *(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("torch", "cpu_bf16"))]
)
@pytest.mark.parametrize("wanted", [ALL_WANTED, pytest.param((True, False, False), marks=pytest.mark.exhaustive)])
def test_opcheck(wanted: tuple[bool, ...], backend: str) -> None:
    given = zip(tensors(SMALL), wanted, strict=True)
    inputs = [x.requires_grad_(is_wanted) for x, is_wanted in given]
    torch.library.opcheck(operator(f"repulsion_{backend}"), (*inputs, 2, True, *wanted))


@both_backends
@both_dtypes
def test_fakes(dtype: torch.dtype, backend: str) -> None:
    for wanted in (ALL_WANTED, (True, False, False), (False, True, True), (False, False, False)):
        arguments = (*tensors(SMALL, dtype), 2, False, *wanted)
        assert_like(repulsion.fake(*as_fake(arguments)), operator(f"repulsion_{backend}")(*arguments))
