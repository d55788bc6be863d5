"""The ordered table of backends, and the choice among them."""

from __future__ import annotations

import warnings

import torch

from ..operators.registry import line_of_user, refuse_vmap
from . import cpu, cuda, reference, triton
from . import torch as plain
from .entry import Backend, Size, registered

# Slowest first. "auto" takes the last that can run on the tensors' device and suits the size of the loss.
TABLE = tuple(
    registered(backend) for backend in (reference.BACKEND, plain.BACKEND, triton.BACKEND, cuda.BACKEND, cpu.BACKEND)
)


def available_backends() -> dict[str, str | None]:
    """What can run on this machine.

    ``"auto"`` takes the last that can run on the tensors' device. Where both can, it takes ``"cuda"`` for losses of up
    to 2^35 multiply-adds of bfloat16, or what takes as long, and ``"triton"`` for larger ones, for float64 and for keys
    without a gradient (queue, momentum). That is reckoned, not timed.

    Returns:
        Every backend by name, from the slowest to the fastest, with the reason why it cannot run here, or ``None``.

    Example:
        >>> import cacr_kernels
        >>> cacr_kernels.available_backends()["torch"] is None
        True
    """
    return {backend.name: backend.why_not(None) for backend in TABLE}


def select(name: str, device: torch.device, size: Size | None = None) -> str:
    """The name of the backend that ``name`` stands for on ``device``, for a loss of that size (``None``: a small one).

    Raises ``ValueError`` for an unknown name, and for a backend named explicitly that cannot run there.
    """
    return choose(name, device, size).name


def choose(name: object, device: torch.device, size: Size | None) -> Backend:
    """The entry of the backend that :func:`select` names."""
    backend = _fastest(device, size) if is_auto(name) else check(name, device)
    if backend.operators:
        refuse_vmap(f"backend={backend.name!r}")
    return backend


def last_resort(device: torch.device) -> Backend:
    """What serves on ``device`` where kernels are not to be trusted: plain PyTorch."""
    return next(backend for backend in TABLE if backend.last_resort and backend.why_not(device) is None)


def check(name: object, device: torch.device | None = None) -> Backend:
    """The entry of a name.

    Refuses what is no backend, and one that cannot run on ``device`` (``None``: on any device of this machine).
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__} {name!r}")
    backend = named(name)
    reason = backend.why_not(device)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run here: {reason}")
    return backend


def named(name: str) -> Backend:
    """The entry of a name, whether or not it can run here."""
    for backend in TABLE:
        if backend.name == name:
            return backend
    names = "auto", *(backend.name for backend in TABLE)
    raise ValueError(f"backend={name!r} is unknown; accepted: {', '.join(map(repr, names))}")


def device_type_of(name: str) -> str:
    """Type of the devices on which a backend is tried: the CPU if it can run there, else what its kernels are for."""
    backend = named(name)
    return "cpu" if backend.device is None or backend.why_not(torch.device("cpu")) is None else backend.device


def check_option(name: object) -> None:
    """Refuses what is neither ``"auto"`` nor a backend that can run on some device of this machine."""
    if not is_auto(name):
        check(name)


def is_auto(name: object) -> bool:
    """Whether the backend is to be chosen here."""
    return isinstance(name, str) and name == "auto"


def _fastest(device: torch.device, size: Size | None) -> Backend:
    unsuited: Backend | None = None
    for backend in reversed(TABLE):
        if device.type in backend.tests_only_on or backend.why_not(device) is not None:
            continue
        if size is not None and not backend.suits(size):
            unsuited = unsuited or backend
            continue
        if not backend.last_resort:
            return backend
        if unsuited is not None:
            return unsuited
        _warn_slow(device)
        return backend
    reasons = dict.fromkeys(str(backend.why_not(device)) for backend in TABLE)
    raise ValueError(f"backend='auto' finds none that can run on {device.type}: {'; '.join(reasons)}")


_warned: set[str] = set()


def _warn_slow(device: torch.device) -> None:
    if device.type in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device.type)
    reasons = ((backend.name, backend.why_not(device)) for backend in TABLE)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons if reason is not None)
    warnings.warn(
        f"cacr_kernels: only the plain PyTorch backend can run on {device.type} ({listed})",
        RuntimeWarning,
        stacklevel=line_of_user(),
    )
