"""What a backend says of itself, in one value; its operators are declared from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..operators import aligned, cacr, contrast, detached_keys, repulsion
from ..types import Pairing

_DECLARE = {
    "aligned": aligned.register,
    "cacr": cacr.register,
    "contrast": contrast.register,
    "detached_keys": detached_keys.register,
    "repulsion": repulsion.register,
}
_CONSISTS_OF = {"aligned": ("aligned", "aligned_backward"), "contrast": ("contrast", "contrast_backward")}


class Size(NamedTuple):
    """How large a loss is, for the choice that ``"auto"`` makes."""

    similarities: float  # P N M; infinite where the keys get no gradient
    features: int
    dtype: torch.dtype  # in which the backends that take half types read the features


class Backend(NamedTuple):
    """One way to compute the losses: all that is known of it, but for the code.

    Attributes:
        name: as users write it.
        summary: one line about it.
        why_not: ``why_not(device)`` is ``None`` if it can run on tensors of that device (``None``: on some device of
            this machine), else a sentence.
        device: type of the devices that its kernels are made for; ``None``: any.
        operators: which of ``aligned``, ``cacr``, ``contrast``, ``detached_keys`` and ``repulsion`` it has. With
            ``contrast`` it can compute all losses; without any operator it computes them by the definition.
        implement: called with the name of every operator (``contrast`` comes with ``contrast_backward``) after
            ``<operator>_<backend>`` was declared, to register what computes it; ``None``: a compiled library does.
        variants: what is added to the names of its operators where they exist again, with other products.
        variant: which of these features of a dtype take now; ``""``: none of them.
        half_types: whether its operators take float16 and bfloat16 as they are.
        rounds_coefficients: the half types to which what multiplies such features in a gradient is rounded.
        fuses: which views ``(shape [V, B, D], pairing)`` the operator ``cacr`` takes.
        suits: which sizes ``"auto"`` takes it for, if another backend with kernels can run there, too.
        tests_only_on: types of devices on which it runs for tests, so that ``"auto"`` passes it by.
        last_resort: whether ``"auto"`` warns when it is left with this one.
        n_by_m_arrays: whether its memory grows with queries times keys.
        check_first: whether ``"auto"`` checks it before its first use (``self_check.py``), and what a good verdict of a
            device depends on, beside the versions of torch and of this package.
        products: how it multiplies float32 now, where that can change.
    """

    name: str
    summary: str
    why_not: Callable[[torch.device | None], str | None]
    device: str | None = None
    operators: tuple[str, ...] = ()
    implement: Callable[[str], None] | None = None
    variants: tuple[str, ...] = ()
    variant: Callable[[torch.dtype], str] = lambda dtype: ""
    half_types: bool = False
    rounds_coefficients: tuple[torch.dtype, ...] = ()
    fuses: Callable[[tuple[int, ...], Pairing], bool] = lambda shape, pairing: True
    suits: Callable[[Size], bool] = lambda size: True
    tests_only_on: tuple[str, ...] = ()
    last_resort: bool = False
    n_by_m_arrays: bool = False
    check_first: Callable[[torch.device], dict[str, str]] | None = None
    products: Callable[[], str] = lambda: ""


def registered(backend: Backend) -> Backend:
    """The backend, after its operators were declared and implemented."""
    for family in backend.operators:
        for variant in ("", *backend.variants):
            _DECLARE[family](backend.name + variant)
        for name in _CONSISTS_OF.get(family, (family,)):
            if backend.implement is not None:
                backend.implement(name)
    return backend


def about_gpu(device: torch.device) -> dict[str, str]:
    """What kernels for a GPU depend on there, for ``check_first``."""
    about = torch.cuda.get_device_properties(device)
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        driver = ""
    kind = about.gcnArchName if torch.version.hip else f"sm_{about.major}{about.minor}"
    return {"device": f"{about.name}, {kind}", "driver": driver}


def any_device(device: torch.device | None) -> str | None:
    """``why_not`` of a backend in plain PyTorch."""
    if device is not None and device.type == "meta":
        return "tensors of the device meta hold no data; shapes alone can be computed with FakeTensorMode"
    return None
