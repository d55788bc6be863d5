"""What docs/backends.md says of each loss on each backend, checked by calls: its table, and the sentence below it.

The calls run on fake tensors, which have shapes but no data, and every backend is taken to be able to run. So the test
checks the same cells on every machine. Sizes are large enough for an array of N x M to show.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import cacr_kernels
from cacr_kernels import cacr_loss, cacr_momentum_loss, cacr_queue_loss, supervised_cacr_loss

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"
N = 4096  # queries, and at least as many keys
MATRIX = N * N // 4  # no call needs a tensor of so many elements unless it stores an N x M array
SMALL = 64  # queries of a call whose memory is not looked at
BACKENDS = tuple(cacr_kernels.available_backends())
Shapes = dict[str, tuple[int, ...]]


class Call(NamedTuple):
    """A loss with the shapes of its tensors for n queries, its options, and the temperatures that are tensors."""

    function: Callable[..., Tensor]
    shapes: Callable[[int], Shapes]
    options: dict[str, Any] = {}  # noqa: RUF012 a default that nobody changes
    temperatures: tuple[str, ...] = ("tau_pos", "tau_neg")

    def arguments(self, n: int = SMALL, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Fresh tensors: embeddings and temperatures with gradient, and labels."""
        tensors = {
            name: torch.zeros(shape, dtype=torch.int64)
            if name.endswith("labels")
            else torch.zeros(shape, dtype=dtype, requires_grad=True)
            for name, shape in self.shapes(n).items()
        }
        return tensors | {name: torch.ones((), requires_grad=True) for name in self.temperatures} | self.options


def views(n: int) -> Shapes:
    return {"views": (2, n, 8)}


def pooled_views(n: int) -> Shapes:
    return {"views": (2, n // 2, 8)}


def queue(n: int) -> Shapes:
    return {"queries": (2, n // 2, 8), "keys": (2, n // 2, 8), "queue": (2 * n, 8)}


def momentum(n: int) -> Shapes:
    return {"queries": (2, n // 2, 8), "keys": (2 * n, 8)}


def labelled(n: int) -> Shapes:
    return {"embeddings": (n, 8), "labels": (n,)}


def with_references(n: int) -> Shapes:
    return labelled(n) | {"ref_embeddings": (2 * n, 8), "ref_labels": (2 * n,)}


CALLS = {
    "cacr_loss": Call(cacr_loss, views),
    'cacr_loss(pairing="ordered")': Call(cacr_loss, views, {"pairing": "ordered"}),
    'cacr_loss(pairing="pooled")': Call(cacr_loss, pooled_views, {"pairing": "pooled"}),
    'cacr_loss(cost="rbf")': Call(cacr_loss, views, {"cost": "rbf"}),
    'cacr_loss(reduction="sum")': Call(cacr_loss, views, {"reduction": "sum"}),
    'cacr_loss(reduction="none")': Call(cacr_loss, views, {"reduction": "none"}),
    "cacr_queue_loss": Call(cacr_queue_loss, queue),
    'cacr_queue_loss(weight_grad="full")': Call(cacr_queue_loss, queue, {"weight_grad": "full"}),
    "cacr_momentum_loss": Call(cacr_momentum_loss, momentum, {}, ("temperature",)),
    'cacr_momentum_loss(cost="sqeuclidean")': Call(
        cacr_momentum_loss, momentum, {"cost": "sqeuclidean"}, ("temperature",)
    ),
    "supervised_cacr_loss": Call(supervised_cacr_loss, labelled),
    "supervised_cacr_loss(ref_embeddings=)": Call(supervised_cacr_loss, with_references),
}

NO_SIMILARITIES = {"gradient_of", "aligned", "aligned_backward"}  # a few numbers a row
TILES = {"contrast", "contrast_backward"}
DETACHED = {"detached_keys", "detached_keys_backward"}
OPERATORS = {  # what a cell says: the operators that are called
    "plain": (set(),),
    "one operator": ({"cacr"},),
    "one sweep": ({"cacr"}, DETACHED),
    "tiles": (TILES,),
    "one sweep, batch in tiles": (TILES | DETACHED,),
}


class Recorder(TorchDispatchMode):
    """The operators of the package that are called, and the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cacr_kernels":
            self.operators.add(func._opname)
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.numel() == x.untyped_storage().nbytes() // x.element_size():
                self.largest = max(self.largest, x.numel())
        return out


each_call = pytest.mark.parametrize("text", CALLS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Fake tensors on which every backend can run."""
    table = importlib.import_module("cacr_kernels.backends.table")
    everywhere = tuple(backend._replace(why_not=lambda device: None) for backend in table.TABLE)
    monkeypatch.setattr(table, "TABLE", everywhere)
    with FakeTensorMode(shape_env=ShapeEnv()), Recorder() as found:
        yield found


def table_of_the_page() -> dict[str, dict[str, str]]:
    """The cells by the call of their row and the heading of their column."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| loss and its gradients | `reference`"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


TABLE = table_of_the_page()


def gradients_of(call: Call, arguments: dict[str, Any], backend: str, **options: Any) -> dict[str, Tensor]:
    """The gradients of all arguments that receive one."""
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    loss = call.function(**arguments, backend=backend).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, **options)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def test_rows_and_columns() -> None:
    """Every loss has a row and every backend a column, and each row has a call that checks it."""
    assert list(TABLE) == list(CALLS)
    assert {name for name in cacr_kernels.__all__ if name.endswith("_loss")} <= TABLE.keys()
    assert all(tuple(row) == (*BACKENDS, "gradients flow to") for row in TABLE.values())


@each_backend
@each_call
def test_cells(text: str, backend: str, recorder: Recorder) -> None:
    """How the loss and its gradients are computed, and which arguments receive a gradient."""
    call = CALLS[text]
    gradients = gradients_of(call, call.arguments(N), backend)
    way, stored, _ = TABLE[text][backend].partition(", N × M")
    called = {name.removesuffix(f"_{backend}") for name in recorder.operators} - NO_SIMILARITIES
    assert called in OPERATORS[way]
    assert bool(stored) == (recorder.largest >= MATRIX)
    told = TABLE[text]["gradients flow to"].replace("`", "").replace("; 0 to ", ", ")  # no values to tell zeros by
    assert sorted(told.split(", ")) == sorted(gradients)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_stored_matrix_shows(backend: str, recorder: Recorder) -> None:
    arguments = CALLS["cacr_loss"].arguments(N)
    cacr_loss(**arguments, backend=backend)
    assert (recorder.largest >= MATRIX) == (backend == "reference")
    queries = arguments["views"].flatten(0, 1)
    (queries @ queries.T).mean()
    assert recorder.largest >= MATRIX


@each_backend
@each_call
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("recorder")
def test_every_dtype(text: str, backend: str, dtype: torch.dtype) -> None:
    arguments = CALLS[text].arguments(dtype=dtype)
    loss = CALLS[text].function(**arguments, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss.sum(), leaves, allow_unused=True), strict=True):
        assert gradient is None or gradient.dtype == leaf.dtype


@each_backend
@each_call
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("recorder")
def test_every_reduction_but_of_rbf(text: str, backend: str, reduction: str) -> None:
    arguments = CALLS[text].arguments() | {"reduction": reduction, "backend": backend}
    if text == 'cacr_loss(cost="rbf")':
        with pytest.raises(ValueError, match="reduction"):
            CALLS[text].function(**arguments)
        return
    loss = CALLS[text].function(**arguments)
    assert (loss.dim() > 0) == (reduction == "none")
    assert loss.requires_grad


@each_backend
@each_call
@pytest.mark.usefixtures("recorder")
def test_parts(text: str, backend: str) -> None:
    parts: Any = CALLS[text].function(**CALLS[text].arguments(), return_parts=True, backend=backend)
    assert [part.requires_grad for part in parts] == [True, False, False, False, False]


@each_backend
@each_call
@pytest.mark.usefixtures("recorder")
def test_second_derivatives(text: str, backend: str) -> None:
    arguments = CALLS[text].arguments()
    name, gradient = next(iter(gradients_of(CALLS[text], arguments, backend, create_graph=True).items()))
    (second,) = torch.autograd.grad(gradient.square().sum(), arguments[name])
    assert second.shape == arguments[name].shape


@each_backend
@each_call
@pytest.mark.usefixtures("recorder")
def test_vmap_with_the_reference_only(text: str, backend: str) -> None:
    call, shapes = CALLS[text], CALLS[text].shapes(SMALL)
    arguments = call.arguments()
    fixed = {name: x for name, x in arguments.items() if name not in shapes}

    def loss_of(*tensors: Tensor) -> Tensor:
        return call.function(**dict(zip(shapes, tensors, strict=True)), **fixed, backend=backend)

    batches = [arguments[name].expand(3, *shape) for name, shape in shapes.items()]
    if backend == "reference":
        assert torch.func.vmap(loss_of)(*batches).shape[0] == 3
    else:
        with pytest.raises((RuntimeError, ValueError), match="vmap"):
            torch.func.vmap(loss_of)(*batches)
