"""What each loss supports on each backend, found by calling it: the tables of the README.

Every call runs on fake tensors, which have shapes but no data. So the tables are the same on every machine, whether or
not a backend can run there; sizes are large enough for an array of N x M to show.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from . import checks, functional
from .operators.registry import NAMESPACE
from .types import CACRParts, Reduction

BEGIN = "<!-- made by `python -m cacr_kernels --table README.md` -->"
END = "<!-- end of what was made -->"
N = 4096  # queries, and at least as many keys
V, B, D = 2, N // 2, 8  # with views V x B = N
_TABLE: Any = importlib.import_module(f"{__package__}.backends.table")  # not the function of that name


class Case(NamedTuple):
    """A row: how the call reads, and what it is."""

    text: str
    function: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    options: dict[str, Any] = {}  # noqa: RUF012 a default that nobody changes
    taus: tuple[str, ...] = ("tau_pos", "tau_neg")

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Fresh tensors: embeddings and temperatures that learn, and labels."""
        tensors = {
            name: torch.zeros(shape, dtype=torch.int64)
            if name.endswith("labels")
            else torch.zeros(shape, dtype=dtype, requires_grad=True)
            for name, shape in self.shapes.items()
        }
        return tensors | {name: torch.ones((), requires_grad=True) for name in self.taus} | self.options


_VIEWS = {"views": (V, N, D)}
_QUEUE = {"queries": (V, B, D), "keys": (V, B, D), "queue": (2 * N, D)}
_MOMENTUM = {"queries": (V, B, D), "keys": (2 * N, D)}
_OWN = {"embeddings": (N, D), "labels": (N,)}
_REFERENCES = {"ref_embeddings": (2 * N, D), "ref_labels": (2 * N,)}
_CACR, _SUPERVISED = functional.cacr_loss, functional.supervised_cacr_loss
CASES = (
    Case("`cacr_loss`", _CACR, _VIEWS),
    Case('`cacr_loss(pairing="ordered")`', _CACR, _VIEWS, {"pairing": "ordered"}),
    Case('`cacr_loss(pairing="pooled")`', _CACR, {"views": (V, B, D)}, {"pairing": "pooled"}),
    Case('`cacr_loss(cost="rbf")`', _CACR, _VIEWS, {"cost": "rbf"}),
    Case('`cacr_loss(reduction="none")`', _CACR, _VIEWS, {"reduction": "none"}),
    Case("`cacr_queue_loss`", functional.cacr_queue_loss, _QUEUE),
    Case('`cacr_queue_loss(weight_grad="full")`', functional.cacr_queue_loss, _QUEUE, {"weight_grad": "full"}),
    Case("`cacr_momentum_loss`", functional.cacr_momentum_loss, _MOMENTUM, {}, ("temperature",)),
    Case(
        '`cacr_momentum_loss(cost="sqeuclidean")`',
        functional.cacr_momentum_loss,
        _MOMENTUM,
        {"cost": "sqeuclidean"},
        ("temperature",),
    ),
    Case("`supervised_cacr_loss`", _SUPERVISED, _OWN),
    Case(
        "`supervised_cacr_loss(ref_embeddings=)`",
        _SUPERVISED,
        _OWN | {"ref_embeddings": (2 * N, D), "ref_labels": (2 * N,)},
    ),
)


class _Recorder(TorchDispatchMode):
    """The operators of this package that are called, and the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.operators.add(func._opname)
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.numel() == x.untyped_storage().nbytes() // x.element_size():
                self.largest = max(self.largest, x.numel())
        return out


@contextlib.contextmanager
def _everything_can_run() -> Iterator[_Recorder]:
    """Fake tensors, and no backend that says why it cannot run; one at a time."""
    table, recorder = _TABLE.TABLE, _Recorder()
    _TABLE.TABLE = tuple(backend._replace(why_not=lambda device: None) for backend in table)
    try:
        with FakeTensorMode(shape_env=ShapeEnv()), recorder:
            yield recorder
    finally:
        _TABLE.TABLE = table


def _gradients(case: Case, arguments: dict[str, Any], backend: str, **more: Any) -> dict[str, Tensor]:
    leaves = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    loss = case.function(**arguments, backend=backend).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, **more)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


RECOMPUTES = ("triton", "cuda")  # backends whose cacr_<backend> computes similarities again for the gradients
_WORDS = {
    (): "plain",
    ("cacr",): "one sweep",
    ("contrast", "contrast_backward"): "tiles",
    ("contrast_frozen", "contrast_frozen_backward"): "one sweep",
    ("contrast", "contrast_backward", "contrast_frozen", "contrast_frozen_backward"): "one sweep, batch in tiles",
}


def way(case: Case, backend: str) -> str:
    """How loss and gradients are computed: by which operator, and whether anything of N x M elements is made."""
    with _everything_can_run() as recorder:
        _gradients(case, case.arguments(), backend)
    kinds = {name.removesuffix(f"_{backend}") for name in recorder.operators} - {"witness"}
    text = _WORDS.get(tuple(sorted(kinds)), " + ".join(sorted(kinds)))
    if kinds == {"cacr"} and backend in RECOMPUTES:
        text = "one operator"
    return f"{text}, N × M" if recorder.largest >= N * N // 4 else text


def gradients(case: Case, backend: str) -> tuple[str, ...]:
    """Names of the arguments that receive a gradient."""
    with _everything_can_run():
        return tuple(_gradients(case, case.arguments(), backend))


def _second(case: Case, backend: str) -> bool:
    arguments = case.arguments()
    first = _gradients(case, arguments, backend, create_graph=True)
    name = next(iter(first))
    (second,) = torch.autograd.grad(first[name].square().sum(), arguments[name])
    return bool(second.shape == arguments[name].shape)


def _reduction(reduction: str) -> Callable[[Case, str], bool]:
    def probe(case: Case, backend: str) -> bool:
        value: Tensor = case.function(**(case.arguments() | {"reduction": reduction}), backend=backend)
        return (value.dim() > 0) == (reduction == "none") and value.requires_grad

    return probe


def _parts(case: Case, backend: str) -> bool:
    parts: CACRParts = case.function(**case.arguments(), return_parts=True, backend=backend)
    return len(parts) == 5 and parts.loss.requires_grad and not any(x.requires_grad for x in parts[1:])


def _dtype(dtype: torch.dtype) -> Callable[[Case, str], bool]:
    def probe(case: Case, backend: str) -> bool:
        arguments = case.arguments(dtype)
        value: Tensor = case.function(**arguments, backend=backend)
        accurate = torch.float64 if dtype == torch.float64 else torch.float32
        found = _gradients(case, arguments, backend)
        return value.dtype == accurate and all(g.dtype == arguments[n].dtype for n, g in found.items())

    return probe


def _vmap(case: Case, backend: str) -> bool:
    arguments = case.arguments()
    fixed = {name: value for name, value in arguments.items() if name not in case.shapes}

    def call(*tensors: Tensor) -> Any:
        return case.function(**dict(zip(case.shapes, tensors, strict=True)), **fixed, backend=backend)

    out: Tensor = torch.func.vmap(call)(*(arguments[name].expand(3, *shape) for name, shape in case.shapes.items()))
    return out.shape[0] == 3


FEATURES: dict[str, Callable[[Case, str], bool]] = {
    **{f'`reduction="{r}"`': _reduction(r) for r in get_args(Reduction)[1:]},  # the mean is that of the table above
    "`return_parts=True`": _parts,
    "second derivatives": _second,
    "`torch.func.vmap`": _vmap,
    **{str(dtype).removeprefix("torch."): _dtype(dtype) for dtype in checks.FLOATS},
}


def supported(probe: Callable[[Case, str], bool], backend: str) -> str:
    """``yes``, ``no``, or the calls that are not supported."""
    missing = []
    for case in CASES:
        try:
            with _everything_can_run():
                good = probe(case, backend)
        except (RuntimeError, TypeError, ValueError):
            good = False
        if not good:
            missing.append(case.text)
    return "yes" if not missing else "no" if len(missing) == len(CASES) else f"not {', '.join(missing)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def markdown() -> str:
    """Both tables and what their words mean."""
    names = [backend.name for backend in _TABLE.TABLE]
    columns = [f"`{name}`" for name in names]
    ways = []
    for case in CASES:
        receivers = {gradients(case, name) for name in names}
        flow = " / ".join(", ".join(f"`{argument}`" for argument in receiver) for receiver in sorted(receivers))
        ways.append([case.text, *(way(case, name) for name in names), flow])
    features = [[name, *(supported(probe, backend) for backend in names)] for name, probe in FEATURES.items()]
    words = (
        "One sweep: loss and gradients from one pass over the similarities. Tiles: the gradients compute them again.\n"
        "One operator: as tiles, but loss and gradients come from one call that autograd does not enter.\n"
        "Plain, N × M: PyTorch operations, which hold arrays of that size."
    )
    head = ["loss and its gradients", *columns, "gradients flow to"]
    return "\n\n".join([_table(head, ways), words, _table(["in all of these", *columns], features)])


def update(path: Path) -> None:
    """Puts the tables between the markers in ``path``."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{path} must hold the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}", encoding="utf-8")
