"""What the operators ``torch.ops.cacr_kernels.*`` share: their namespace, how they are declared, and where they run.

    aligned_<backend>            costs between the views of the same instances
    aligned_backward_<backend>   their gradients
    cacr_<backend>               cacr_loss of all views with its gradients, in one go (the fused path)
    contrast_<backend>           row statistics of one or two softmaxes (the general path)
    contrast_backward_<backend>  their gradients
    detached_keys_<backend>      row statistics and what the gradients of queries are made of, in one sweep
    detached_keys_backward       these gradients
    repulsion_<backend>          mean repulsion from the keys of all processes with its gradients, in one go

Each file beside this one declares one operator: schema, fake, autograd formula and second derivative, for all backends.
The package works without the compiled libraries. Derivatives of derivatives are taken from the reference itself: a
gradient penalty gets them in eager mode and under ``torch.compile`` alike.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

from ..types import CACROptions, ContrastSpec, arithmetic_dtype
from . import _torch_private

NAMESPACE = "cacr_kernels"
F = TypeVar("F", bound=Callable[..., Any])
N = TypeVar("N")

vjp: Any = torch.func.vjp  # its annotations leave out how many values it returns


# ---- operators -------------------------------------------------------------------------------------------------------
def operator(name: str) -> Any:
    """The operator ``torch.ops.cacr_kernels.<name>`` for tensors."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# The library of every operator. The namespace outlives this module where an editor imports the package anew.
_libraries: dict[str, torch.library.Library] = vars(getattr(torch.ops, NAMESPACE)).setdefault("libraries", {})


def define(qualified: str, schema: str) -> None:
    """A new operator ``namespace::name``; one of an earlier import ends, but for what compiled libraries registered."""
    if qualified in _libraries:
        _torch_private.destroy(_libraries.pop(qualified))
    library = torch.library.Library(qualified.partition("::")[0], "FRAGMENT")
    torch.library.define(qualified, schema, lib=library)
    _libraries[qualified] = library


def declare(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """A new operator and the shapes of its results."""
    qualified = f"{NAMESPACE}::{name}"
    define(qualified, schema)
    torch.library.register_fake(qualified, fake, lib=_libraries[qualified])


def differentiate(name: str, formula: Callable[..., Any], setup: Callable[..., None] | None = None) -> None:
    """``formula(ctx, *grads)`` is the backward of an operator, ``setup(ctx, inputs, output)`` keeps what it needs."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_autograd(qualified, formula, setup_context=setup, lib=_libraries[qualified])


def implement(name: str, kernel: Callable[..., Any], keys: str | tuple[str, ...] = "CompositeExplicitAutograd") -> None:
    """Lets an operator be computed by ``kernel``, on the device types or dispatch keys ``keys``; by default on all."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.impl(qualified, keys, kernel, lib=_libraries[qualified])


class Target(NamedTuple):
    """Where operators run: a backend with the operators that it has, and how it reads features.

    ``backend``: what the names of its operators end in. ``half``: the type that the features, float32 here, came in, if
    the backend takes it as it is, else ``None``. The operators get them back in that type, which is exact. The
    Functions see float32, so that the gradients of several operators are added in float32, and a derivative of a
    derivative is taken in float32. ``normalize``: the features are raw rows of a loss of unit vectors.
    """

    backend: str
    operators: tuple[str, ...] = ()
    half: torch.dtype | None = None
    normalize: bool = False

    def operator(self, name: str) -> Any:
        """The operator ``<name>_<backend>`` of the package."""
        return operator(f"{name}_{self.backend}")

    def features(self, *tensors: Tensor | None) -> Any:
        """Tensors of features in the type in which the operators read them."""
        return [x if x is None else _in_dtype(x, self.half or arithmetic_dtype(x)) for x in tensors]


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in the dtype; a call of ``to`` that changes nothing takes 2 us."""
    return x if x.dtype == dtype else x.to(dtype)


def tracing() -> bool:
    """Whether ``torch.jit.trace`` records what is called."""
    found: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return found


def traced(on: Target) -> Target | None:
    """While ``torch.jit.trace`` runs, where the operator itself is to be called, with all gradients; else ``None``.

    A Function cannot be recorded, an operator can, and is differentiated by the formula that it is declared with. What
    is recorded must not depend on who wants a gradient: the check of the trace wants none.
    """
    return on._replace(half=None) if tracing() else None


# ---- autograd --------------------------------------------------------------------------------------------------------
class SingleProblem(Function):
    """A Function that has no rules for batches and forward-mode AD and says so in words of the public losses."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Raises ``ValueError`` with what to do instead."""
        raise ValueError(no_vmap("this backend"))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raises ``ValueError`` with what to do instead."""
        raise ValueError(
            "this backend has no forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad): "
            "take the gradient with backward() or torch.func.grad, or use backend='reference'"
        )


def apply_of(function: type[SingleProblem], *tensors: Tensor | None) -> Any:
    """``function.apply`` for these tensors, which looks for transforms of torch.func only where there are any.

    Dynamo, which traces a Function in a backward (compiled autograd), takes it as it is.
    """
    if torch.compiler.is_dynamo_compiling() or _torch_private.needs_functorch(*tensors):
        return function.apply
    return _torch_private.plain_apply(function)


def opaque(function: F) -> F:
    """``torch.compile`` takes calls of ``function`` whole and traces below them.

    What it would make of the Functions themselves is wrong for derivatives of derivatives: a gradient of
    ``torch.func.grad`` would be zero.
    """
    _opaque.append(function)
    _in_graphs.append(function)
    return function


_opaque: list[Callable[..., Any]] = []
_in_graphs: list[Callable[..., Any]] = [Target, CACROptions, ContrastSpec]


def in_graphs(kind: type[N]) -> type[N]:
    """Says that graphs of ``torch.compile`` hold values of this type, which are arguments of opaque functions."""
    _in_graphs.append(kind)
    return kind


def constant_while_compiling(function: F) -> F:
    """A compiler calls ``function`` while it traces, and takes the result for a constant."""
    return _torch_private.constant_while_compiling(function)


@constant_while_compiling
def prepare_compilers() -> None:
    """Tells compilers of the functions of this package; call it while tracing, before any of them.

    Dynamo gets to know those that it takes whole, here and not before, as it should not be imported where nothing is
    compiled. And Inductor may keep, for later processes, graphs that hold them. It cannot see what they do, and each
    process would compile the whole model anew. What was kept is used while sources and environment variables of the
    package are the same: the code follows from these and from what Inductor knows.
    """
    for function in _opaque:
        torch.compiler.allow_in_graph(function)
    _torch_private.let_inductor_keep(
        [f"{function.__module__}.{function.__name__}" for function in _in_graphs], _sources
    )


@functools.cache
def _sources() -> str:
    """Digest of the sources of the package and of its environment variables."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    found.update(repr(sorted((k, v) for k, v in os.environ.items() if k.startswith("CACR_"))).encode())
    return found.hexdigest()


def own_precision(second_order: F) -> F:
    """A second derivative is taken from the reference in its own dtype, also where ``backward`` runs under autocast."""

    @functools.wraps(second_order)
    def wrapped(*args: Any) -> Any:
        device = next(t for t in (*args, *getattr(args[0], "saved_tensors", ())) if isinstance(t, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return second_order(*args)

    return cast("F", wrapped)


def place(grads: tuple[Tensor | None, ...], at: tuple[int, ...], count: int) -> tuple[Tensor | None, ...]:
    """``count`` gradients, of which those of the inputs ``at`` are given and the others are ``None``."""
    result: list[Tensor | None] = [None] * count
    for i, grad in zip(at, grads, strict=True):
        result[i] = grad
    return tuple(result)


def has_values(x: Tensor) -> bool:
    """Whether Python may look at the values of a tensor: not while something is traced, nor on another device."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    tracing = tracing or _torch_private.proxies_are_active()
    return not tracing and x.device.type == "cpu" and type(x) is Tensor and not _torch_private.inside_vmap()


def line_of_user() -> int:
    """The ``stacklevel`` with which a warning of the function that calls this names a line of the user.

    That is the innermost frame that is neither of this package nor of torch, whose modules and wrappers call it.
    """
    passed_over = "cacr_kernels", "torch"
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in passed_over:
        level, frame = level + 1, frame.f_back
    return level


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether another computation may use these tensors: neither subclasses nor what transforms wrap, and not empty."""
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.numel() for x in tensors)
    return plain and bool(tensors) and not _torch_private.transforms_are_active()


# ---- vmap ------------------------------------------------------------------------------------------------------------
def no_vmap(what: str) -> str:
    """Why ``what`` cannot be called inside ``torch.func.vmap``."""
    return (
        f"{what} cannot run inside torch.func.vmap: its operators take one problem at a time, and jacrev, jacfwd and "
        "hessian give them several; "
        "call the loss in a loop and stack the results, or use backend='reference'"
    )


def refuse_vmap(what: str) -> None:
    """Raises ``ValueError`` inside ``torch.func.vmap``.

    Neither the kernels nor blocks of data-dependent size have the rule for batches that it needs.
    """
    if not torch.compiler.is_compiling() and _torch_private.inside_vmap():
        raise ValueError(no_vmap(what))
