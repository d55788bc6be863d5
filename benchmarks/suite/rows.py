"""What is compared: the backends of the library and the other ways to the same numbers.

Every row gets its inputs in the form that suits it best: the library one tensor [V, B, D], the eager forms a list of V
tensors [B, D]. A step computes the loss, or the loss and the gradients of all embeddings.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cacr_kernels
from cacr_kernels import testing
from cacr_kernels.backends.entry import Backend
from cacr_kernels.backends.table import TABLE
from cacr_kernels.functional import backend_for

from . import eager, others
from .cases import (
    BROADCASTING,
    COMPILED,
    CONSTANT,
    EAGER,
    GRADIENTS,
    KEPT,
    LOSS,
    NTXENT,
    PRODUCTS,
    SUM,
    BenchmarkCase,
)  # fmt: skip
from .machine import available_bytes

MODULES = {
    "cacr_loss": "CACRLoss",
    "cacr_queue_loss": "CACRQueueLoss",
    "cacr_momentum_loss": "CACRMomentumLoss",
    "supervised_cacr_loss": "SupervisedCACRLoss",
}
Step = Callable[[], tuple[Tensor, ...]]
Loss = Callable[..., Tensor]

OURS, BASELINE, LESS_WORK, OTHER = "cacr_kernels", "baseline", "products only", "another function"
BROADCAST_LIMIT = 4 * 2**30
FLOOR_NUMEL = 2**14


@dataclass(frozen=True)
class Row:
    """One way to compute a case. ``why_not`` says in a sentence why it is left out, or ``None``.

    ``loss(case)`` takes the tensors of the case by name; ``split`` hands it views as a list. ``compiles``: it is
    compiled for one shape, so it is checked at the shape that is timed. ``caches``: what it compiles is kept for later
    processes. Only ``checked`` rows compute the same loss.
    """

    name: str
    family: str
    summary: str
    why_not: Callable[[BenchmarkCase], str | None]
    loss: Callable[[BenchmarkCase], Loss]
    split: bool = True
    compiles: bool = False
    caches: bool = False

    @property
    def checked(self) -> bool:
        """Whether the numbers have to agree with the reference."""
        return self.family in (OURS, BASELINE)

    def step(self, case: BenchmarkCase, inputs: dict[str, Tensor]) -> Step:
        """The call that is timed, on leaves of its own."""
        loss, leaves, tensors = self.loss(case), [], {}
        for name, tensor in inputs.items():
            wanted = case.mode == GRADIENTS and name in testing.DIFFERENTIABLE and name not in CONSTANT
            parts = list(tensor) if self.split and tensor.dim() == 3 else [tensor]
            parts = [part.detach().clone().requires_grad_(wanted) for part in parts]
            leaves += parts if wanted else []
            tensors[name] = parts if self.split and tensor.dim() == 3 else parts[0]
        if self.family == LESS_WORK:
            return partial(loss, **tensors)  # does by hand what autograd would
        if not leaves:
            return lambda: (loss(**tensors),)

        incoming: Tensor | None = None

        def step() -> tuple[Tensor, ...]:
            nonlocal incoming
            for leaf in leaves:
                leaf.grad = None
            value = loss(**tensors)
            if case.needs_incoming and incoming is None:
                incoming = testing.incoming_gradient(case.problem, inputs, value.detach())
            value.backward(incoming)
            return value, *(leaf.grad for leaf in leaves if leaf.grad is not None)

        return step


def ours(case: BenchmarkCase) -> str:
    """The backend that ``"auto"`` takes for the case: every ratio is relative to it."""
    with FakeTensorMode():  # shapes and devices without data
        inputs = replace(case, device="cpu").inputs().values()
        features = [torch.empty_like(x, device=case.device) for x in inputs if x.is_floating_point()]
        pairing = case.problem.options.get("pairing", "unordered")
        return backend_for(case.problem.loss, features, pairing=pairing)


# ---- why a row is left out -------------------------------------------------------------------------------------------
def too_large(case: BenchmarkCase, arrays: float) -> str | None:
    """A reason if ``arrays`` arrays N x M of every problem do not fit into memory."""
    P, N, M, _ = case.extent
    need = arrays * P * N * M * case.arithmetic.itemsize
    free = available_bytes(case.device)
    return f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if need > 0.7 * free else None


def _dense(case: BenchmarkCase) -> str | None:
    return _mean_only(case) or too_large(case, 6)


def _mean_only(case: BenchmarkCase) -> str | None:
    return "measured for the mean" if "reduction" in case.problem.options else None


def _broadcasting(case: BenchmarkCase) -> str | None:
    if case.problem.loss != "cacr_loss" or case.problem.options.get("pairing") == "pooled":
        return "measured for cacr_loss of pairs of views"
    if reason := _mean_only(case):
        return reason
    P, N, M, D = case.extent
    array = N * M * D * case.arithmetic.itemsize
    if array > BROADCAST_LIMIT:
        return f"one N x M x D array has {array / 2**30:.0f} GiB, more than {BROADCAST_LIMIT >> 30}"
    return too_large(case, (P + 3) / P * D)


def _keops(case: BenchmarkCase) -> str | None:
    if case.problem.loss != "cacr_loss" or case.problem.options.get("pairing") == "pooled":
        return "measured for cacr_loss of pairs of views"
    if case.problem.options.get("cost") == "rbf":
        return "measured for the squared Euclidean cost"
    if {"reduction", "normalize"} & case.problem.options.keys():
        return "measured for the mean over unit rows"
    P, N, M, D = case.extent
    if P * N * M * D > 2**30:
        return "takes ten seconds and more per call at this size"
    return others.why_not("pykeops")


def _cosine(case: BenchmarkCase) -> str | None:
    return others.no_ntxent(case.problem) or others.why_not("lightly")


def _supcon(case: BenchmarkCase) -> str | None:
    if case.problem.loss != "supervised_cacr_loss" or "M" in case.problem.shape:
        reason = others.no_ntxent(case.problem)
        if reason:
            return f"{reason}, or of labels"
    return too_large(case, 24.0 * case.problem.shape.get("V", 1) ** 2) or others.why_not("pytorch_metric_learning")


def _ntxent(case: BenchmarkCase) -> str | None:
    return others.no_ntxent(case.problem) or too_large(case, 24.0)


def _kept(case: BenchmarkCase) -> str | None:
    return None if case.problem.loss == "cacr_queue_loss" and case.module else "a queue that the module keeps"


def _lightly(case: BenchmarkCase) -> str | None:
    similarities = 24.0  # arrays of 2 B x 2 B, in units of B x B
    return others.no_ntxent(case.problem) or too_large(case, similarities) or others.why_not("lightly")


def _metric_learning(case: BenchmarkCase) -> str | None:
    triples = 40.0 * case.problem.shape["B"]  # every positive pair beside every negative pair, in several arrays
    return others.no_ntxent(case.problem) or too_large(case, triples) or others.why_not("pytorch_metric_learning")


def _backend(backend: Backend, case: BenchmarkCase) -> str | None:
    reason = backend.why_not(torch.device(case.device))
    if reason is None and backend.n_by_m_arrays:
        D = case.problem.shape["D"]
        return too_large(case, D + 10 if case.problem.loss == "supervised_cacr_loss" else 10)
    return reason


# ---- the losses ------------------------------------------------------------------------------------------------------
def _library(name: str, case: BenchmarkCase) -> Loss:
    if case.module:
        return _module(case, backend=name)
    return partial(getattr(cacr_kernels, case.problem.loss), **case.problem.options, backend=name)


def _module(case: BenchmarkCase, **more: Any) -> Loss:
    """The module, called as users do."""
    options = case.problem.options | more
    offset = {"key_offset": options.pop("key_offset")} if "key_offset" in options else {}
    module = getattr(cacr_kernels, MODULES[case.problem.loss])(**options)
    if case.problem.loss == "cacr_loss":
        return lambda views: module(views)
    return lambda **tensors: module(**tensors, **offset)


def _kept_queue(case: BenchmarkCase) -> Loss:
    """The module that keeps its queue, filled: every call stores its keys."""
    shape = case.problem.shape
    module = cacr_kernels.CACRQueueLoss(queue_size=shape["K"], dim=shape["D"], **case.problem.options)
    filled = False

    def loss(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        nonlocal filled
        if not filled:
            module.to(device=queue.device, dtype=queue.dtype)
            rows = {"queue": queue, "queue_count": torch.full_like(module.queue_count, len(queue))}
            module.load_state_dict(module.state_dict() | rows)
            filled = True
        return module(queries, keys)

    return loss


def _eager(case: BenchmarkCase) -> Loss:
    return _normalized(partial(getattr(eager, case.problem.loss), **_without_normalize(case)), case)


def _without_normalize(case: BenchmarkCase) -> dict[str, Any]:
    return {name: value for name, value in case.problem.options.items() if name != "normalize"}


def _normalized(loss: Loss, case: BenchmarkCase) -> Loss:
    return eager.normalized(loss) if case.problem.options.get("normalize") else loss


def _compiled(case: BenchmarkCase) -> Loss:
    function = getattr(eager, case.problem.loss)
    # A code object of its own: the compiler's cache and its limit of shapes per function belong to the code object.
    code, defaults = function.__code__.replace(), function.__defaults__
    own = types.FunctionType(code, function.__globals__, function.__name__, defaults)
    own.__kwdefaults__ = function.__kwdefaults__
    loss = partial(own, **_without_normalize(case))
    if case.problem.options.get("normalize"):
        return torch.compile(eager.normalized(loss), fullgraph=True, dynamic=False)
    return partial(torch.compile(own, fullgraph=True, dynamic=False), **case.problem.options)


def _broadcast(case: BenchmarkCase) -> Loss:
    loss = partial(eager.cacr_loss, pair_cost=eager.broadcast_cost, **_without_normalize(case))
    return _normalized(loss, case)


def _products(case: BenchmarkCase) -> Loss:
    """The bare products of the textbook algorithm: similarities, again in backward, and both gradients."""
    pooled = case.problem.options.get("pairing") == "pooled"
    ordered = case.problem.options.get("pairing") == "ordered"

    def products(views: list[Tensor]) -> Any:
        views = [eager.single(view.detach()) for view in views]
        V = len(views)
        if pooled:
            z = torch.cat(views)
            pairs = [(z, z)]
        else:
            pairs = [(views[x], views[y]) for x in range(V) for y in range(V) if x < y or (ordered and x != y)]
        for q, k in pairs:
            s = torch.mm(q, k.T)
            if case.mode == GRADIENTS:
                s = torch.mm(q, k.T)
                found = torch.mm(s, k), torch.mm(s.T, q)
        return (s,) if case.mode == LOSS else found

    return products


def _floor(case: BenchmarkCase) -> str | None:
    if case.mode == LOSS or case.problem.loss != "cacr_loss":
        return "what autograd costs by itself: gradients of cacr_loss only"
    V, B, D = (case.problem.shape[k] for k in "VBD")
    return "for small problems only" if V * B * D > FLOOR_NUMEL else None


def _cacr_only(case: BenchmarkCase) -> str | None:
    return None if case.problem.loss == "cacr_loss" else "measured for cacr_loss"


def rows() -> list[Row]:
    """All rows, ours first; ``why_not`` of each says whether it can be measured in a case."""
    found = [
        Row(b.name, OURS, b.summary, partial(_backend, b), partial(_library, b.name), split=False)
        for b in reversed(TABLE)
    ]
    ntxent = "NT-Xent of "
    return [
        *found,
        Row(EAGER, BASELINE, "matmul form in PyTorch, autograd", _dense, _eager),
        Row(COMPILED, BASELINE, "torch.compile of the eager form", _dense, _compiled, compiles=True, caches=True),
        Row(BROADCASTING, BASELINE, "published formulation, N x M x D arrays", _broadcasting, _broadcast),
        Row("keops", BASELINE, "KeOps, symbolic N x M arrays", _keops, others.keops, caches=True),
        Row(PRODUCTS, LESS_WORK, "four torch.mm per pair (loss only: one), nothing else", _products_fit, _products),
        Row(SUM, OTHER, "sum of the views: what autograd costs", _floor, lambda case: _sum, split=False),
        Row(KEPT, OTHER, "the queue that the module keeps", _kept, _kept_queue, split=False),
        Row(NTXENT, OTHER, ntxent + "a few lines of PyTorch", _ntxent, others.own_ntxent),
        Row("ntxent lightly", OTHER, ntxent + "lightly", _lightly, others.lightly),
        Row("ntxent pml", OTHER, ntxent + "pytorch-metric-learning", _metric_learning, others.metric_learning),
        Row("supcon pml", OTHER, "SupCon of pytorch-metric-learning", _supcon, others.supcon),
        Row("cosine lightly", OTHER, "negative cosine of lightly", _cosine, others.cosine),
    ]


def _products_fit(case: BenchmarkCase) -> str | None:
    P = case.extent[0]
    return _cacr_only(case) or too_large(case, 3 / P)


def _sum(views: Tensor) -> Tensor:
    return views.sum()
