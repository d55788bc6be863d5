"""Plugin of pytest: a device that is not there, on which "triton" and "cuda" can run and CPU tensors are refused.

``pytest -p tests.device.absent_gpu``: the table of backends says what it says on a machine with a GPU, ``device_of``
of the tests names the device "absent", and its tensors wrap tensors of the host, which do the work (the operators of
both backends run as those of the CPU). So a test that hands CPU tensors to a GPU backend, or mixes the tensors of two
devices, fails here as it would there.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cacr_kernels.backends import table

NAME = "absent"
GPU_BACKENDS = ("triton", "cuda")
MIXING = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor")  # operations that take tensors of two devices
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
HALF = (torch.float16, torch.bfloat16)  # which the operators of the CPU do not take


class AbsentTensor(Tensor):
    """A tensor of the device that is not there; ``host`` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> AbsentTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[return-value]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class AbsentDevice(TorchDispatchMode):
    """Makes tensors there when an operation is asked to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation on the host, its results on the device that it would give them."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [isinstance(x, AbsentTensor) for x in leaves]
    asked = kwargs.get("device")
    name = func._schema.name
    if any(there) and name not in MIXING and not name.startswith("aten::index"):
        mixed = [x for x, far in zip(leaves, there, strict=True) if not far and x.dim()]
        if mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found two, {NAME} and cpu: {name}")
    goes_there = any(there) if asked is None else torch.device(asked).type == NAME
    if asked is None and name == "aten::copy_":
        goes_there = there[0]
    if goes_there and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    out = on_host(func, *tree_map(_host, (args, kwargs)))
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    return tree_map(lambda x: AbsentTensor(x) if goes_there and isinstance(x, Tensor) else x, out)


def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    """What ``torch.tensor`` calls below all modes."""
    return AbsentTensor(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Likewise."""
    _host(target).copy_(_host(source))
    return target


def _host(x: Any) -> Any:
    if isinstance(x, AbsentTensor):
        return x.host
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def on_host(func: Any, args: Any, kwargs: Any) -> Any:
    """The result on the host; operators of GPU backends run as those of the CPU, which have the same schemas."""
    namespace, _, name = func._schema.name.partition("::")
    base, _, backend = name.rpartition("_")
    if namespace != "cacr_kernels" or backend not in GPU_BACKENDS:
        return func(*args, **kwargs)
    operator = getattr(torch.ops.cacr_kernels, f"{base}_cpu").default
    if not any(isinstance(x, Tensor) and x.dtype in HALF for x in args):
        return operator(*args, **kwargs)
    shapes = func(*tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, args), **kwargs)
    found = operator(*(x.float() if isinstance(x, Tensor) and x.dtype in HALF else x for x in args), **kwargs)
    return tree_map(lambda x, like: x.to(like.dtype), found, shapes)


def _why_not(device: torch.device | None) -> str | None:
    return None if device is None or device.type == NAME else f"this backend works on {NAME} tensors, not {device.type}"


def pytest_configure(config: pytest.Config) -> None:
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [*HALF]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.library.impl("aten::empty_strided", "PrivateUse1", empty_strided)
    torch.library.impl("aten::_copy_from", "PrivateUse1", copy_from)
    AUTOCAST.fallback(torch.library.fallthrough_kernel)
    table.TABLE = tuple(
        backend._replace(why_not=_why_not, device=NAME, check_first=None) if backend.name in GPU_BACKENDS else backend
        for backend in table.TABLE
    )


BEYOND = {  # what tensors that wrap others cannot do
    "schedule": "Dynamo does not look into them",
    "inference": "they cannot be made in inference mode",
    "no_grad": "likewise",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the backend "triton", of each one case for every loss: the device of tensors depends on no more."""
    kept: dict[Any, pytest.Item] = {}
    for item in items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") == "triton" and not any(word in item.name for word in BEYOND):
            kept.setdefault((item.path, item.function.__name__, parameters.get("loss")), item)  # type: ignore[attr-defined]
    chosen = {id(item) for item in kept.values()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept.values()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """One thread does all derivatives: those of a device would be those of a device that exists."""
    with AbsentDevice(), torch.autograd.set_multithreading_enabled(False):
        return (yield)
