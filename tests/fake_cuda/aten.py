"""ATen on the fake device: every operator with a CUDA kernel gets that of the CPU, on the same memory.

A call allocates what comes out (what shape that has, the operator says of tensors on "meta"), and hands the rest to
the current stream. Operators whose result has a shape that depends on numbers, or is a number, wait for the stream, as
torch does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .runtime import Place, capturing, current_stream, place_of, submit, wait

# What allocates, makes views or is made of copies, so that torch's own does on the fake device what it should.
NATIVE = (
    *("as_strided", "view", "_reshape_alias", "unfold", "empty.memory_format", "empty_strided", "resize_", "alias"),
    *("set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "set_", "record_stream"),
    *("is_pinned", "_pin_memory", "_local_scalar_dense", "view_as_real", "view_as_complex", "is_set_to", "detach"),
    *("_efficientzerotensor", "_conj", "_neg_view", "copy_"),
)
RANDOM = ("normal_", "uniform_", "random_", "random_.from", "random_.to", "bernoulli_.float", "exponential_")
LIBRARY = torch.library.Library("aten", "IMPL", "CUDA")
_generators: dict[int, tuple[int, torch.Generator]] = {}


def install() -> int:
    """Registers all of them; how many there are."""
    count = 0
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another kernel
        for name in sorted(n.removeprefix("aten::") for n in names if n.startswith("aten::")):
            if name in NATIVE:
                continue
            base, _, overload = name.partition(".")
            with contextlib.suppress(AttributeError, RuntimeError):  # operators of which there is no more than a name
                operator = getattr(getattr(torch.ops.aten, base), overload or "default")
                kernel = draws(operator) if name in RANDOM else on_device(operator)
                LIBRARY.impl(name, kernel, allow_override=True)
                count += 1
        LIBRARY.impl("copy_", copy_, allow_override=True)
    torch.cuda._sleep = lambda cycles: submit(torch.cuda.current_device(), lambda: None)
    return count


def on_device(operator: Any) -> Callable[..., Any]:
    """The kernel of an operator for tensors of the fake device."""
    schema = operator._schema
    name = operator.name()
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    returned = [_written_argument(schema, r) for r in schema.returns]
    in_place = bool(written)
    tensors_only = all("Tensor" in str(r.type) for r in schema.returns)

    tensors_at = [i for i, a in enumerate(schema.arguments) if str(a.type) == "Tensor"]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args = _numbers_as_tensors(args, tensors_at)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = _device_of(name, given, kwargs)
        stored = tree_map(_stored, (args, kwargs))
        if in_place:
            by_name = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
            if any(schema.arguments[i].is_out for i in written):
                _resize_outputs(operator, args, kwargs, [by_name[schema.arguments[i].name] for i in written])
                stored = tree_map(_stored, (args, kwargs))
            submit(device, lambda: _compute(operator, name, stored, []))
            found = tuple(None if r is None else by_name[r] for r in returned)
            return found[0] if len(found) == 1 else (found or None)
        shapes = _shapes(operator, args, kwargs) if tensors_only else None
        if shapes is None:
            return _at_once(operator, name, stored, device)
        results = tree_map(lambda s: _like(s, device) if isinstance(s, Tensor) else s, shapes)
        places = [place_of(x) for x in tree_leaves(results) if isinstance(x, Tensor)]
        submit(device, lambda: _compute(operator, name, stored, places))
        return results

    return kernel


def _numbers_as_tensors(args: tuple[Any, ...], at: list[int]) -> tuple[Any, ...]:
    """Numbers that stand for tensors reach Python as numbers."""
    if not any(i < len(args) and isinstance(args[i], int | float) for i in at):
        return args
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
    made = list(args)
    for i in at:
        if i < len(args) and isinstance(args[i], int | float):
            made[i] = torch.tensor(args[i], dtype=torch.float64 if wide and isinstance(args[i], float) else None)
    return tuple(made)


def _written_argument(schema: Any, result: Any) -> str | None:
    """The argument that a result is."""
    if result.alias_info is None:
        return None
    sets = result.alias_info.before_set
    return next((a.name for a in schema.arguments if a.alias_info and a.alias_info.before_set & sets), None)


def _device_of(name: str, tensors: list[Tensor], kwargs: Any) -> int:
    """The one device that a call is about."""
    found = {x.device.index for x in tensors if x.device.type == "cuda"}
    mixed = [x for x in tensors if x.device.type == "cpu" and x.dim() and "index" not in name]
    if len(found) > 1 or (found and mixed):
        others = ", ".join(sorted({str(x.device) for x in tensors}))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {others}: {name}")
    if found:
        return int(found.pop())
    asked = kwargs.get("device")
    index = torch.device(asked).index if asked is not None else None
    return torch.cuda.current_device() if index is None else index


def _stored(x: Any) -> Any:
    """An argument, as it can be kept until the work is done."""
    if isinstance(x, Tensor):
        if x.device.type == "cuda":
            return place_of(x)
        return x.clone() if x.device.type == "cpu" else x  # a number of the host is read when it is given
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _compute(operator: Any, name: str, stored: Any, results: list[Place]) -> None:
    """By the worker."""
    places = [x for x in tree_leaves(stored, is_leaf=_is_place) if _is_place(x)]
    for place in (*places, *results):
        place.check(name)
    args, kwargs = _tensors(stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = operator(*args, **kwargs)
    leaves = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
    if results:
        for place, x in zip(results, leaves, strict=True):
            place.tensor().copy_(x)


def _is_place(x: Any) -> bool:
    return isinstance(x, Place)


def _tensors(stored: Any) -> Any:
    return tree_map(lambda x: x.tensor() if _is_place(x) else x, stored, is_leaf=_is_place)


def _meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        if not x.dim() and x.device.type == "cpu":
            return x
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def _shapes(operator: Any, args: Any, kwargs: Any) -> Any:
    """The results on "meta", or ``None`` where they depend on numbers."""
    meta_args, meta_kwargs = tree_map(_meta, (args, kwargs))
    if "device" in {a.name for a in operator._schema.arguments}:
        meta_kwargs["device"] = torch.device("meta")
    try:
        return operator(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
            return None
        raise


def _like(x: Tensor, device: int) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=torch.device("cuda", device))


def _resize_outputs(operator: Any, args: Any, kwargs: Any, outputs: list[Any]) -> None:
    """Gives ``out=`` the shape that torch gives it."""
    shapes = _shapes(operator, args, kwargs)
    for output, shape in zip(tree_leaves(outputs), tree_leaves(shapes), strict=False):
        if isinstance(output, Tensor) and isinstance(shape, Tensor) and output.size() != shape.size():
            output.resize_(shape.size())


def _at_once(operator: Any, name: str, stored: Any, device: int) -> Any:
    """The host waits, and computes."""
    wait(device)
    for place in (x for x in tree_leaves(stored, is_leaf=_is_place) if _is_place(x)):
        place.check(name)
    args, kwargs = _tensors(stored)
    found = operator(*args, **kwargs)
    return tree_map(lambda x: _uploaded(x, device) if isinstance(x, Tensor) else x, found)


def _uploaded(x: Tensor, device: int) -> Tensor:
    result = _like(x, device)
    place = place_of(result)
    submit(device, lambda: place.tensor().copy_(x))
    return result


# ---- copies and random numbers ---------------------------------------------------------------------------------------
def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten::copy_``, with torch's rules for memory of the host and for two devices."""
    if self.device.type == "cuda" and source.device.type == "cuda":
        _copy_there(self, source)
        return self
    device = (self if self.device.type == "cuda" else source).device.index
    host = source if self.device.type == "cuda" else self
    pinned = host.is_pinned()
    if capturing(device) and not pinned:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    target = place_of(self) if self is not host else self
    origin = place_of(source) if source is not host else (source if pinned and non_blocking else source.clone())

    def work() -> None:
        a = target.tensor() if isinstance(target, Place) else target
        b = origin.tensor() if isinstance(origin, Place) else origin
        for place in (target, origin):
            if isinstance(place, Place):
                place.check("copy_")
        a.copy_(b)

    submit(device, work)
    if not non_blocking or (host is self and not pinned):
        wait(device, allowed=non_blocking)
    return self


def _copy_there(self: Tensor, source: Tensor) -> None:
    to, of = self.device.index, source.device.index
    target, origin = place_of(self), place_of(source)
    if to != of:  # on the stream of the source, for which that of the target waits, and the other way round
        with torch.cuda.device(to):
            ready = torch.cuda.current_stream().record_event()
        with torch.cuda.device(of):
            torch.cuda.current_stream().wait_event(ready)

    def work() -> None:
        target.check("copy_")
        origin.check("copy_")
        target.tensor().copy_(origin.tensor())

    submit(of, work)
    if to != of:
        with torch.cuda.device(of):
            done = torch.cuda.current_stream().record_event()
        with torch.cuda.device(to):
            torch.cuda.current_stream().wait_event(done)


def draws(operator: Any) -> Callable[..., Any]:
    """An operator that fills a tensor with random numbers: drawn by the host, from a generator for each device."""

    def kernel(self: Tensor, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Tensor:
        device = self.device.index
        theirs = torch.cuda.default_generators[device] if generator is None else generator
        seed = theirs.initial_seed()
        if theirs not in _own or _own[theirs][0] != seed:
            _own[theirs] = seed, torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.size(), dtype=self.dtype)
        operator(drawn, *args, generator=_own[theirs][1], **kwargs)
        place = place_of(self)
        submit(device, lambda: place.tensor().copy_(drawn))
        return self

    return kernel


_own: dict[Any, tuple[int, torch.Generator]] = {}
__all__ = ["current_stream", "install"]
