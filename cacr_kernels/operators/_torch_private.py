"""Every private name of torch that this package uses.

Where a name is missing in some version of torch, what stands in for it is right and only slower.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function
from torch.fx.experimental import proxy_tensor

__all__ = [
    "all_reduce",
    "arrived",
    "backward_keeps_graph",
    "below_autograd",
    "constant_while_compiling",
    "destroy",
    "exporting",
    "inside_backward",
    "inside_vmap",
    "is_batched",
    "is_saved",
    "is_shared",
    "is_traced",
    "let_inductor_keep",
    "needs_functorch",
    "plain_apply",
    "positional",
    "proxies_are_active",
    "reduce_scatter",
    "start_all_gather",
    "transforms_are_active",
    "unwrapped",
    "without_transforms",
]

F = TypeVar("F", bound=Callable[..., Any])

_BelowAutograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)

# Whether the backward that is running keeps its graph, so that it may run a second time.
backward_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)

# Whether a transform of torch.func (grad, vjp, vmap) is running.
transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# Whether a tensor belongs to a transform of torch.func, which may have ended.
_is_wrapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda x: True)

_unwrap: Callable[[Tensor], Tensor] | None = getattr(torch._C._functorch, "get_unwrapped", None)

# Whether a tensor is a batch of the vmap behind autograd.grad(is_grads_batched=True), which no transform shows.
is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: True)

# The transforms of torch.func that are running, or None. Without it the Functions themselves refuse vmap.
_interpreters: Callable[[], Any] = getattr(torch._C._functorch, "get_interpreter_stack", lambda: None)


# The mode in which make_fx runs what it records, or None.
_proxy_mode: Callable[[], Any] = getattr(proxy_tensor, "get_proxy_mode", lambda: None)

_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

# Operations on tensors outside all transforms of torch.func, while some are running.
without_transforms: Any = getattr(torch._C, "_DisableFuncTorch", contextlib.nullcontext)


def inside_backward() -> bool:
    """Whether autograd is running a backward, in which a checkpoint computes a forward again."""
    return _graph_task() != -1


def exporting() -> bool:
    """Whether ``torch.export`` traces what runs.

    Dynamo of torch 2.11 takes ``torch.compiler.is_exporting()`` for true in all that it compiles.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def unwrapped(x: Tensor) -> Tensor:
    """The tensor without what transforms of torch.func put around it."""
    while _unwrap is not None and _is_wrapped(x):
        x = _unwrap(x)
    return x


def _storage_users(x: Tensor) -> int:
    return int(torch._C._storage_Use_Count(x.untyped_storage()._cdata))


_ALONE = (
    _storage_users(torch.empty(1, dtype=torch.float32, device="cpu")) if hasattr(torch._C, "_storage_Use_Count") else -1
)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler stands behind ``x``, whose sizes may be symbols."""
    return isinstance(x, FakeTensor | FunctionalTensor) or any(isinstance(n, torch.SymInt) for n in x.shape)


def is_shared(x: Tensor) -> bool:
    """Whether other tensors use the memory of ``x``, such as one that a graph has saved."""
    return _ALONE < 0 or _storage_users(x) > _ALONE


def is_saved(x: Tensor) -> bool:
    """Whether somebody beside Python holds ``x`` itself, not only its memory: a graph that saved it, or a view."""
    holders: Callable[[], int] = getattr(x, "_use_count", lambda: 1)
    return holders() > 1


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Says that an operator which a Function calls has no graph to record, which saves 36 us a call.

    Dynamo, which traces a Function in a backward (compiled autograd), does not know of it.
    """
    below: contextlib.AbstractContextManager[Any]
    below = contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else _BelowAutograd()
    return below


def proxies_are_active() -> bool:
    """Whether ``make_fx`` records what is called, with tensors that have values and may not be asked for them."""
    return _proxy_mode() is not None


def inside_vmap() -> bool:
    """Whether the caller runs under ``torch.func.vmap``."""
    levels = _interpreters()
    return bool(levels) and any(str(level.key()).endswith("Vmap") for level in levels)


def needs_functorch(*tensors: Tensor | None) -> bool:
    """Whether ``Function.apply`` has to look for transforms of torch.func, for a call with these tensors."""
    return transforms_are_active() or any(x is not None and _is_wrapped(x) for x in tensors)


def plain_apply(function: type[Function]) -> Any:
    """``function.apply`` without its search for transforms of torch.func, which takes 15 us a call."""
    return super(Function, function).apply  # type: ignore[misc]


def destroy(library: torch.library.Library) -> None:
    """Takes back all that was registered through a library."""
    library._destroy()


def constant_while_compiling(function: F) -> F:
    """As ``torch.compiler.assume_constant_result``, which imports Dynamo: that takes as long as importing torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def let_inductor_keep(functions: list[str], key: Callable[[], str]) -> None:
    """Graphs that hold these functions may be kept on disk, and found there while ``key`` gives the same."""
    from torch._inductor import config

    known: dict[str, str] | None = getattr(config, "unsafe_marked_cacheable_functions", None)
    if known is not None and not known.keys() >= set(functions):
        config.unsafe_marked_cacheable_functions = known | dict.fromkeys(functions, key())


class _Bound(NamedTuple):
    """Positional arguments in the form of ``inspect.BoundArguments``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """A forward has no defaults."""


class _Positional(inspect.Signature):
    """The signature of a function without defaults, whose ``bind`` takes positional arguments as they are."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Positional arguments are trusted, all others are bound as usual."""
        return super().bind(*args, **kwargs) if kwargs else _Bound(args, {})


def positional(forward: F) -> F:
    """``forward`` of a Function with a signature that costs nothing: ``apply`` binds it in every call, 0.1 ms."""
    signature = _Positional(list(inspect.signature(forward).parameters.values()))
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


# ---- collectives that a compiler traces; ``group`` is the name of a process group ------------------------------------
def _start(name: str, *arguments: Any) -> Tensor:
    """Calls a functional collective; its result may be read after ``arrived``."""
    started: Tensor = getattr(torch.ops._c10d_functional, name)(*arguments)
    return started


def arrived(x: Tensor) -> Tensor:
    """The result of a collective that was started: the host waits on a CPU, the current stream on a GPU."""
    result: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return result


def start_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """``x`` [n, ...] of all ``size`` ranks as [size n, ...], once it has ``arrived``."""
    return _start("all_gather_into_tensor", x, size, group)


def reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """Of ``x`` [size n, ...] the part [n, ...] of this rank, added over all ranks."""
    return arrived(_start("reduce_scatter_tensor", x, "sum", size, group))


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over all ranks."""
    return arrived(_start("all_reduce", x, "sum", group))
