"""Backends that ``"auto"`` takes on trust check themselves first: a small problem, by the backend and in plain PyTorch.

Once a process for each operator, arithmetic and device, at the first call. One problem is made of random rows, whatever
the data are, and one of the first queries and keys of that call, unless Python may not look at them (while a compiler
traces, inside ``torch.func``). Values and gradients are compared with the definition in float64: NaN equals NaN, and
what is allowed is twice the promise, with the error of the definition in the arithmetic itself as the yardstick. A
backend that fails is left out for the rest of the process, and one warning says what differed. Where the check itself
cannot be made, for want of memory say, the backend is taken as it is, with a warning.

Good verdicts are kept for later processes under everything that they depend on: ``Backend.check_first`` says that of
the device. Nothing is checked for a backend that was named, while a CUDA graph is captured, or under
``CACR_SELF_CHECK=0``.

In a group of processes each checks its own device, and its warnings name its rank. Verdicts are not exchanged: a rank
that has one from disk would not wait for the others, which then would for ever. Ranks that are served by different
backends send the same rows and gradients.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._version import __version__
from ..operators.cacr import cacr, loss_and_parts
from ..operators.contrast import contrast, plain_contrast
from ..operators.detached_keys import detached_keys
from ..operators.registry import Target, are_plain, constant_while_compiling, line_of_user
from ..operators.repulsion import definition as repulsion_by_definition
from ..operators.repulsion import repulsion
from ..types import ALL, OTHER, PAIRINGS, SAME_NOT_SELF, CACROptions, ContrastSpec, arithmetic_dtype
from .entry import Backend
from .kept import cache_dir, write

VARIABLE = "CACR_SELF_CHECK"
SIMILARITIES = 1 << 20  # of the problem: ten arrays of them in float64 are 80 MiB
OPERATIONS = 1e10  # of the problem: five products of all similarities
FEATURES = 1 << 22  # of its queries and of its keys: 32 MiB in float64
VIEWS = 3
ROWS = 131  # of problems of random rows
FEATURES_OF_RANDOM, OF_HALF_TYPES = (100,), (100, 128, 160)  # half types: whole tiles, too, and coefficients in blocks
FACTOR, EPSILONS = 2.0, 8.0  # the promise: so many times the yardstick, and so many eps
TWICE = 2.0
TAU = 1.5

Found = dict[str, Tensor]


class Subject(NamedTuple):
    """What a verdict is about."""

    backend: str
    operator: str
    dtype: torch.dtype  # of the features
    products: str  # how float32 is multiplied
    normalize: bool
    device: torch.device


_verdicts: dict[Subject, bool] = {}
_warned: set[tuple[str, torch.device]] = set()
_lock = threading.RLock()


class UndecidedError(Exception):
    """The check could not be made; that says nothing of the backend."""


def _after_fork() -> None:
    """A child has no thread that would give the lock back."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- the question ----------------------------------------------------------------------------------------------------
def passes(backend: Backend, operators: Sequence[str], rows: Sequence[Tensor], dtype: torch.dtype, raw: bool) -> bool:
    """Whether ``"auto"`` may take ``backend`` for a loss that calls these operators; checks it if nobody knows.

    Args:
        backend: with a ``check_first``.
        operators: names of its operators.
        rows: the features of the loss: queries first, keys last.
        dtype: in which the operators read them.
        raw: whether they are raw rows of a loss of unit vectors.
    """
    device = rows[0].device
    if torch.compiler.is_compiling():
        return passes_on_random_rows(backend.name, tuple(operators), device, dtype, raw)
    return _passes(backend, operators, list(rows), device, dtype, raw)


@constant_while_compiling
def passes_on_random_rows(
    name: str, operators: tuple[str, ...], device: torch.device, dtype: torch.dtype, raw: bool
) -> bool:
    """The same for a compiler, for which the answer is a constant of the code."""
    from .table import named  # which imports the backends

    return _passes(named(name), operators, [], device, dtype, raw)


def _passes(
    backend: Backend, operators: Sequence[str], rows: list[Tensor], device: torch.device, dtype: torch.dtype, raw: bool
) -> bool:
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for operator in operators:
        products = backend.products() if dtype == torch.float32 else ""
        subject = Subject(backend.name, operator, dtype, products, raw, device)
        verdict = _verdicts.get(subject)
        if verdict is None:
            if os.environ.get(VARIABLE, "") == "0" or _capturing(device):
                continue
            with _lock:
                verdict = _verdicts.get(subject)
                if verdict is None:
                    verdict = _verdicts[subject] = _verdict(backend, subject, rows)
        if not verdict:
            return False
    return True


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """No verdict of this process counts any more; those on disk do."""
    with _lock:
        _verdicts.clear()
        _warned.clear()


def _verdict(backend: Backend, subject: Subject, rows: list[Tensor]) -> bool:
    if _is_kept(backend, subject):
        return True
    try:
        wrong = _elsewhere(lambda: check(subject, rows if are_plain(rows) else []), subject.device)
    except UndecidedError as error:
        _say(
            f"the self-check of backend {subject.backend!r} on {_place(subject)} could not be made, and it is used as "
            f"it is: {error}"
        )
        return True
    if wrong is None:
        keep(backend, subject)
        return True
    _warn(subject, wrong)
    return False


def _elsewhere(function: Callable[[], str | None], device: torch.device) -> str | None:
    """What ``function`` returns, called in a thread of its own.

    So neither the modes nor the transforms of the caller are active: autocast, inference mode, fake tensors,
    ``torch.func.grad``, a default device. It works on the caller's stream, where the rows are made.
    """
    found: list[str | None] = []
    raised: list[BaseException] = []
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def call() -> None:
        try:
            with contextlib.ExitStack() as stack:
                if stream is not None:
                    stack.enter_context(torch.cuda.device(device))
                    stack.enter_context(torch.cuda.stream(stream))
                found.append(function())
        except BaseException as error:  # it belongs to the caller
            raised.append(error)

    thread = threading.Thread(target=call, name="cacr_kernels self-check")
    try:
        thread.start()
    except RuntimeError as error:
        raise UndecidedError(f"no thread can be started ({error})") from error
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


def _warn(subject: Subject, wrong: str) -> None:
    at = subject.backend, subject.device
    if at in _warned:
        return
    _warned.add(at)
    _say(
        f"backend {subject.backend!r} does not pass its self-check on {_place(subject)}, and "
        f"backend='torch' serves in this process: {wrong}. Please report that, with what `python -m cacr_kernels` and "
        f"`python -m cacr_kernels.verify --device {subject.device.type}` print. {VARIABLE}=0 in the environment leaves "
        "the check out"
    )


def _place(subject: Subject) -> str:
    """The device, and of several processes which one has it."""
    if not (dist.is_available() and dist.is_initialized()):
        return str(subject.device)
    return f"{subject.device} of rank {dist.get_rank()} of {dist.get_world_size()}"


def _say(message: str) -> None:
    warnings.warn(f"cacr_kernels: {message}", RuntimeWarning, stacklevel=line_of_user())


# ---- the check -------------------------------------------------------------------------------------------------------
def check(subject: Subject, rows: list[Tensor]) -> str | None:
    """What is wrong with an operator, or ``None``; raises where the device cannot be used any more.

    The rows of the user may hide a fault: zeros, a single instance, NaN. Random ones come first.
    """
    with torch.autograd.set_detect_anomaly(False):  # NaN in the user's data is no anomaly of the check
        for features in OF_HALF_TYPES if subject.dtype.itemsize == 2 else FEATURES_OF_RANDOM:
            if (wrong := _check(subject, [], features)) is not None:
                return wrong
        return _check(subject, rows) if rows else None


def _check(subject: Subject, rows: list[Tensor], features: int = 0) -> str | None:
    try:
        q, k = small(subject, rows, features)
        truth = by_definition(subject, q.double(), k.double())
        yardstick = by_definition(subject, q.float(), k.float())
    except Exception as error:
        _raise_if_lost(subject, error)
        raise UndecidedError(f"plain PyTorch raises {type(error).__name__}: {str(error)[:500]}") from error
    try:
        found = by_backend(subject, q.to(arithmetic_dtype(q)), k.to(arithmetic_dtype(k)))
        return difference(subject, truth, yardstick, found, scales(q, k, subject.normalize))
    except torch.OutOfMemoryError as error:
        raise UndecidedError(str(error)[:500]) from error
    except Exception as error:  # of a compiler, a launch, anything that a kernel may do
        _raise_if_lost(subject, error)
        return f"{subject.operator} in {subject.dtype} raises {type(error).__name__}: {str(error)[:500]}"


def _raise_if_lost(subject: Subject, error: Exception) -> None:
    """A CUDA error that stays: every later call of this process would fail, whatever it is."""
    if subject.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(subject.device)
    except Exception as stays:
        raise RuntimeError(
            f"cacr_kernels: after the self-check of backend {subject.backend!r} ({subject.operator}, {subject.dtype}) "
            f"this process cannot use {subject.device} any more: {error}. Start it again with backend='torch', which "
            "leaves the GPU kernels out, and please report this"
        ) from stays


def small(subject: Subject, rows: list[Tensor], features: int = 0) -> tuple[Tensor, Tensor]:
    """Queries [V, N, D] and keys [V, M, D] of the problem: the first of ``rows``, or random ones of ``features``."""
    if not rows:
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(2, 2, ROWS, features, generator=generator, dtype=torch.float32, device="cpu")
        drawn /= features**0.5
        q, k = (x.to(subject.device, subject.dtype) for x in drawn)
        return q, k
    q, k = (x.detach() if x.dim() == 3 else x.detach()[None] for x in (rows[0], rows[-1]))
    views, features = min(VIEWS, q.shape[0]), q.shape[2]
    most = min(SIMILARITIES, OPERATIONS / (10 * features)) / views**2
    m = max(1, min(k.shape[1], int(most**0.5), FEATURES // (views * features)))
    n = max(1, min(q.shape[1], int(most / m), FEATURES // (views * features)))
    q = q[:views, :n].to(subject.dtype).clone()
    k = k[:views, :m].to(subject.dtype)
    return q, k.expand(views, -1, -1).clone() if k.shape[0] == 1 else k.clone()


def _spec(q: Tensor, k: Tensor, normalize: bool) -> ContrastSpec:
    """Two softmaxes over the classes that three labels make, for every view."""
    q_id, k_id = (torch.arange(x.shape[1], dtype=torch.int32, device=x.device) % 3 for x in (q, k))
    index = list(range(q.shape[0])), list(range(k.shape[0]))
    index = index if len(index[1]) == len(index[0]) else (index[0], [0] * len(index[0]))
    return ContrastSpec(q_id, k_id, [SAME_NOT_SELF, OTHER], *index, normalize=normalize)


def _options(normalize: bool) -> CACROptions:
    return CACROptions(TAU, TAU, 1.0, 1.0, 0, False, 2.0, normalize)


def _temperatures(q: Tensor, *numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").to(q.device).requires_grad_()


def _with_gradients(value: Tensor, leaves: dict[str, Tensor], others: Found) -> Found:
    gradients = torch.autograd.grad(value.sum() / value.shape[-1] if value.dim() else value, list(leaves.values()))
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"value": value.detach(), **{n: x.detach() for n, x in others.items()}, **named}


def by_definition(subject: Subject, q: Tensor, k: Tensor) -> Found:
    """Values and gradients in plain PyTorch, in the dtype of the rows."""
    q, k = q.requires_grad_(), k.requires_grad_()
    if subject.operator == "cacr":
        loss, parts = loss_and_parts(q, None, _options(subject.normalize))
        return _with_gradients(loss, {"views": q}, {"attraction and repulsion": parts[:2]})
    if subject.operator == "repulsion":
        value, entropy, *gradients = repulsion_by_definition((0, subject.normalize), q, k, _temperatures(q, -TAU))
        names = ("value", "entropy", "gradient of views", "gradient of keys", "gradient of tau")
        return dict(zip(names, (x.detach() for x in (value, entropy, *gradients)), strict=True))
    spec = _spec(q, k, subject.normalize)
    if subject.operator == "detached_keys":
        tau = _temperatures(q, -TAU)
        value, lse = plain_contrast(q, k.detach(), tau, spec._replace(kinds=[ALL]))
        return _with_gradients(value, {"queries": q, "tau": tau}, {"lse": lse})
    tau = _temperatures(q, TAU, -TAU)
    value, lse = plain_contrast(q, k, tau, spec)
    return _with_gradients(value, {"queries": q, "keys": k, "tau": tau}, {"lse": lse})


def by_backend(subject: Subject, q: Tensor, k: Tensor) -> Found:
    """The same by the operator of a backend."""
    half = subject.dtype if subject.dtype in (torch.float16, torch.bfloat16) else None
    on = Target(subject.backend, (subject.operator,), half, subject.normalize)
    q, k = q.requires_grad_(), k.requires_grad_()
    if subject.operator == "cacr":
        loss, parts = cacr(on, q, None, _options(subject.normalize), (True, False))
        return _with_gradients(loss, {"views": q}, {"attraction and repulsion": parts[:2]})
    if subject.operator == "repulsion":
        tau = _temperatures(q, -TAU)
        value, entropy = repulsion(on, q, k, tau, PAIRINGS[0])
        return _with_gradients(value, {"views": q, "keys": k, "tau": tau}, {"entropy": entropy})
    spec = _spec(q, k, subject.normalize)
    if subject.operator == "detached_keys":
        tau = _temperatures(q, -TAU)
        value, lse = detached_keys(on, q, k.detach(), tau, spec._replace(kinds=[ALL]))
        return _with_gradients(value, {"queries": q, "tau": tau}, {"lse": lse})
    tau = _temperatures(q, TAU, -TAU)
    value, lse = contrast(on, q, k, tau, spec)
    return _with_gradients(value, {"queries": q, "keys": k, "tau": tau}, {"lse": lse})


# ---- the measure -----------------------------------------------------------------------------------------------------
def scales(q: Tensor, k: Tensor, normalize: bool) -> Found:
    """What an error is compared with at least: costs of rows that are close cancel, and so do their gradients."""
    lengths = torch.cat([x.double().norm(dim=-1).flatten() for x in (q, k)])
    longest = lengths.max() if not normalize else torch.ones_like(lengths[0])
    steepest = longest if not normalize else 1 / lengths.clamp(min=1e-12).min()
    return {"value": longest**2, "gradient of row": 2 * steepest / max(q.shape[1], k.shape[1]), "tau": longest**4}


def difference(subject: Subject, truth: Found, yardstick: Found, found: Found, least: Found) -> str | None:
    """The first quantity that is further from the truth than is allowed, in words; or ``None``."""
    eps, single = (torch.finfo(x).eps for x in (found["value"].dtype, torch.float32))
    eps = eps if subject.dtype == torch.float64 else single
    ratio = eps / single  # the errors of float64 itself are not to be seen
    for name, exact in truth.items():
        kind = "value" if "gradient" not in name else "tau" if name.endswith("tau") else "gradient of row"
        finite = exact.isfinite() & yardstick[name].isfinite()
        if not (found[name].isfinite() | ~finite).all():
            return f"{name} of {subject.operator} in {subject.dtype} is not finite where it should be"
        if (exact.isnan() & yardstick[name].isnan() & ~found[name].isnan()).any():
            return f"{name} of {subject.operator} in {subject.dtype} is a number where it should be NaN"
        size = max(exact[finite].abs().max().item() if finite.any() else 0.0, least[kind].item())
        eager, error = (
            (x[finite].double() - exact[finite]).abs().max().item() / size if finite.any() and size > 0 else 0.0
            for x in (yardstick[name].double(), found[name].double())
        )
        allowed = TWICE * (FACTOR * ratio * eager + EPSILONS * eps)
        if subject.dtype in (torch.float16, torch.bfloat16) and "gradient" in name:
            allowed += TWICE * torch.finfo(subject.dtype).eps  # of coefficients that are rounded once
        if not error <= allowed:
            return (
                f"{name} of {subject.operator} in {subject.dtype} differs from the definition in float64 by "
                f"{error:.1e} of its size, where {allowed:.1e} is allowed"
            )
    return None


# ---- verdicts of earlier processes -----------------------------------------------------------------------------------
def _path(backend: Backend, subject: Subject) -> tuple[Path, dict[str, str]] | None:
    """The file of a good verdict, and what it holds under; ``None`` where that is not known."""
    if backend.check_first is None:
        return None
    try:
        device = backend.check_first(subject.device)
    except Exception:  # a driver or package that does not say what it is: nothing is kept
        return None
    about = {
        "backend": subject.backend,
        "operator": subject.operator,
        "arithmetic": f"{subject.dtype} {subject.products}".strip(),
        "normalize": str(subject.normalize),
        "torch": torch.__version__,
        "cacr_kernels": __version__,
        **device,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / f"self-check-{subject.backend}-{digest}.json", about


def _is_kept(backend: Backend, subject: Subject) -> bool:
    place = _path(backend, subject)
    try:
        return place is not None and json.loads(place[0].read_text(encoding="utf-8"))["good"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def keep(backend: Backend, subject: Subject) -> None:
    """Later processes need not check that."""
    place = _path(backend, subject)
    if place is not None:
        with contextlib.suppress(OSError):  # then they check again
            write(place[0], {"good": True, "key": place[1]})


def keep_verified(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """``verify`` has found that the operators of a backend are right there, in these types of features.

    Those that one process calls: the repulsion from the keys of several is checked at its first call.
    """
    if backend.check_first is None:
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for dtype in dtypes:
        products = backend.products() if dtype == torch.float32 else ""
        for operator in set(backend.operators) - {"repulsion"}:
            for normalize in (False, True):
                keep(backend, Subject(backend.name, operator, dtype, products, normalize, device))
