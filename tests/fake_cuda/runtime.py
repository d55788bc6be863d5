"""The fake CUDA as Python sees it: work is handed to its streams as a function, and run by its worker."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_LIBRARY = ctypes.CDLL(None)  # libcudart's names are those of the stand-in, which LD_PRELOAD has loaded
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)
_work: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)
failures: list[str] = []  # what work has raised


ILLEGAL_ADDRESS, LAUNCH_FAILURE = 700, 719


class IllegalAddressError(RuntimeError):
    """Work of a device touches what it may not."""


@_Callback
def _run(number: int) -> int:
    try:
        _work.pop(number)() if number > 0 else _captured[number]()
    except BaseException as error:  # nobody else would see it
        failures.append(traceback.format_exc())
        sys.stderr.write(failures[-1])
        return ILLEGAL_ADDRESS if isinstance(error, IllegalAddressError) else LAUNCH_FAILURE
    return 0


_captured: dict[int, Callable[[], None]] = {}  # by negative numbers: they run at every replay

for _name, _result, _arguments in (
    ("fake_submit", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int, _Callback, ctypes.c_long]),
    ("fake_wait", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int]),
    ("fake_is_capturing", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int]),
    ("fake_complaint", ctypes.c_char_p, [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t]),
    ("fake_set_order", None, [ctypes.c_char_p, ctypes.c_uint]),
    ("fake_set_sticky", None, [ctypes.c_int]),
    ("fake_work", None, []),
    ("fake_has_worker", ctypes.c_int, []),
    ("fake_close", None, []),
    ("fake_items", ctypes.c_long, []),
    ("fake_sticky", ctypes.c_int, []),
    ("cudaGetErrorString", ctypes.c_char_p, [ctypes.c_int]),
):
    _function = getattr(_LIBRARY, _name)
    _function.restype, _function.argtypes = _result, _arguments


class Place(NamedTuple):
    """A tensor's memory, without the tensor: who has the memory next is not kept from it."""

    address: int
    bytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    device: int

    def tensor(self) -> Tensor:
        """The memory as a CPU tensor."""
        if not self.bytes:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype)
        storage = torch._C._construct_storage_from_data_pointer(self.address, torch.device("cpu"), self.bytes)
        flat = torch.empty(0, dtype=self.dtype)
        return flat.set_(storage, self.offset, self.size, self.stride)

    def check(self, what: str) -> None:
        """Raises where work of that device may not touch it now."""
        if self.bytes and (wrong := _LIBRARY.fake_complaint(self.device, self.address, self.bytes)) is not None:
            raise IllegalAddressError(f"{what}: {wrong.decode()}")


def place_of(x: Tensor, device: int | None = None) -> Place:
    storage = x.untyped_storage()
    where = x.device.index if device is None else device
    address = storage.data_ptr()
    return Place(address, storage.nbytes(), x.dtype, tuple(x.size()), x.stride(), x.storage_offset(), where)


def raise_for(code: int) -> None:
    """What torch does with an error of CUDA."""
    if code:
        raise torch.AcceleratorError(f"CUDA error: {_LIBRARY.cudaGetErrorString(code).decode()}")


def current_stream(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


def submit(device: int, work: Callable[[], None], stream: int | None = None) -> None:
    """``work`` is done by the worker, in the order of the current stream of ``device``."""
    handle = current_stream(device) if stream is None else stream
    if capturing(device, handle):
        number = -next(_numbers)
        _captured[number] = work
    else:
        number = next(_numbers)
        _work[number] = work
    raise_for(_LIBRARY.fake_submit(handle, device, _run, number))


def capturing(device: int, stream: int | None = None) -> bool:
    return bool(_LIBRARY.fake_is_capturing(current_stream(device) if stream is None else stream, device))


def wait(device: int, stream: int | None = None, allowed: bool = False) -> None:
    """The host waits for a stream, as torch does where it has to read something.

    ``allowed``: torch does not count that as a synchronisation.
    """
    if not allowed and (mode := torch.cuda.get_sync_debug_mode()):
        if mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        warnings.warn("called a synchronizing CUDA operation", stacklevel=3)
    raise_for(_LIBRARY.fake_wait(current_stream(device) if stream is None else stream, device))


def set_order(name: str, seed: int = 1) -> None:
    """In which order work of several streams is done: "late", "random" or "early" (``native/device.h``)."""
    _LIBRARY.fake_set_order(name.encode(), seed)


def set_sticky(error: int) -> None:
    """As if a kernel had failed with that error of CUDA; 0 heals, which no real device does."""
    _LIBRARY.fake_set_sticky(error)


def sticky() -> int:
    return int(_LIBRARY.fake_sticky())


def items() -> int:
    """How much work has been done."""
    return int(_LIBRARY.fake_items())


def _worker() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        _LIBRARY.fake_work()


def start() -> None:
    """The worker begins; it ends with the process."""
    if _LIBRARY.fake_has_worker():
        return
    threading.Thread(target=_worker, name="fake-cuda", daemon=True).start()
    while not _LIBRARY.fake_has_worker():
        pass
    atexit.register(_LIBRARY.fake_close)
