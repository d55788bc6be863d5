"""Checks of the public arguments: once, here. ``TypeError`` for a wrong type or dtype, ``ValueError`` for all else."""

from __future__ import annotations

import contextlib
import functools
import numbers
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from .backends.table import check_option as check_backend
from .operators.registry import constant_while_compiling, line_of_user
from .types import Cost, Pairing, Reduction, WeightGrad, widest_dtype

F = TypeVar("F", bound=Callable[..., Any])

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST = 1e30  # inverse temperature
INTEGERS = (*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a {value.dtype} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {reprlib.repr(value)}"  # not all the data that may be in it


def float_tensor(name: str, x: Any, shape: str, hint: str = "") -> Tensor:
    """A floating-point tensor with the dimensions that ``shape`` names, as in ``"[V, B, D]"``; ``hint`` if not so."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {_what(x)}")
    not_nested(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}{hint}")
    return x


def not_nested(name: str, x: Tensor) -> None:
    """Refuses a nested tensor, which has no sizes to speak of."""
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested tensor of layout {x.layout}")


def nonempty(name: str, x: Tensor, shape: str) -> Tensor:
    """No dimension of size 0."""
    if 0 in x.shape:
        raise ValueError(f"{name} {shape} must not have an empty dimension, got {list(x.shape)}")
    return x


def embeddings(name: str, value: Any, shape: str, labels_name: str) -> Tensor:
    """One row for each label; of several views how to make rows."""
    hint = ""
    if isinstance(value, Tensor) and not value.is_nested and value.dim() == 3:
        first, second, _ = value.shape
        hint = (
            f"; pass {name}.flatten(0, 1) with {labels_name}.repeat({first}) if it is [V, B, D], "
            f"with {labels_name}.repeat_interleave({second}) if it is [B, V, D]"
        )
    return nonempty(name, float_tensor(name, value, shape, hint), shape)


def views(name: str, value: Any, at_least: int) -> Tensor:
    """One tensor [V, B, D], or a sequence of V tensors [B, D], as one tensor; where one view is enough also [B, D]."""
    if isinstance(value, Tensor):
        x = _views_in_one(name, value, at_least)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        x = _stacked(name, value, at_least)
    else:
        raise TypeError(f"{name} must be a tensor [V, B, D] or a sequence of tensors [B, D], got {_what(value)}")
    if x.shape[0] < at_least:
        raise ValueError(f"{name} must hold at least {at_least} views, got V = {x.shape[0]}")
    return nonempty(name, x, "[V, B, D]")


def _views_in_one(name: str, value: Tensor, at_least: int) -> Tensor:
    not_nested(name, value)
    if value.dim() == 2 and at_least == 1:
        value = value[None]
    if value.dim() == 2:
        raise ValueError(
            f"{name} must have shape [V, B, D], got {list(value.shape)}; "
            "if it is [2B, D], the second views after the first, pass .view(2, B, D)"
        )
    x = float_tensor(name, value, "[V, B, D]")
    if x.shape[0] > x.shape[1] > 1:
        warn_once(
            f"{name} [V, B, D] hold V = {x.shape[0]} views of B = {x.shape[1]} instances; "
            "if they are [B, V, D], pass .transpose(0, 1)",
            kind="axis order",
        )
    return x


def _stacked(name: str, value: Sequence[Any], at_least: int) -> Tensor:
    if not value:
        raise ValueError(f"{name} must hold at least {at_least} views, got an empty {type(value).__name__}")
    parts = [float_tensor(f"{name}[{i}]", z, "[B, D]") for i, z in enumerate(value)]
    for i, z in enumerate(parts):
        if z.shape != parts[0].shape:
            raise ValueError(
                f"{name}[{i}] must have the shape of {name}[0], {list(parts[0].shape)}, got {list(z.shape)}"
            )
        same_device(f"{name}[{i}]", z, f"{name}[0]", parts[0])
    dtype = parts[0].dtype
    for z in parts[1:]:
        if z.dtype != dtype:
            dtype = torch.promote_types(dtype, z.dtype)
    with without_autocast(parts[0].device):  # whose rule for stack refuses float16 on a CPU
        return torch.stack([z.to(dtype) for z in parts])


_has_autocast: dict[str, bool] = {}  # by device type


@constant_while_compiling
def _autocast_available(device_type: str) -> bool:
    """Whether there is an autocast to leave; Dynamo of torch 2.11 cannot ask."""
    if device_type not in _has_autocast:
        _has_autocast[device_type] = torch.amp.is_autocast_available(device_type)
    return _has_autocast[device_type]


def queries_and_keys(queries: Any, keys: Any) -> tuple[Tensor, Tensor]:
    """Of the queue loss: two or more views, or one tensor [B, D] each as one view."""
    if isinstance(queries, Tensor) and queries.dim() == 2:
        if isinstance(keys, Tensor) and not keys.is_nested and keys.dim() != 2:
            raise ValueError(
                f"keys must have shape [B, D], got {list(keys.shape)}, as queries have {list(queries.shape)}; or give "
                "both as [V, B, D]"
            )
        q, k = float_tensor("queries", queries, "[B, D]"), float_tensor("keys", keys, "[B, D]")
        same_shape("keys", k, "queries", q)
        return nonempty("queries", q, "[B, D]")[None], k[None]
    return views("queries", queries, at_least=2), views("keys", keys, at_least=2)


_warned: set[str] = set()


def warn_once(message: str, kind: str | None = None) -> None:
    """Says something once in a process; ``kind``: of messages of one kind only the first."""
    if torch.compiler.is_compiling() or (kind or message) in _warned:
        return
    _warned.add(kind or message)
    warnings.warn(f"cacr_kernels: {message}", UserWarning, stacklevel=line_of_user())


def keys_without_gradient(loss: str, keys: object) -> None:
    """Warns once of keys that require a gradient, which the loss gives to queries alone."""
    rows = keys if isinstance(keys, Sequence) and not isinstance(keys, str) else (keys,)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in rows):
        warn_once(
            f"the keys of {loss} get no gradient, but these require one: pass keys.detach(), or take CACRLoss if their "
            "encoder is to learn",
            kind=f"keys of {loss}",
        )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The losses choose their own precision, also inside ``torch.autocast``."""
    if _autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuses tensors on two devices."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuses tensors of two shapes."""
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(x.shape)}")


def same_dim(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Both with the same number D of features."""
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(f"{name} must have D = {other.shape[-1]} features like {other_name}, got {x.shape[-1]}")


def temperature(name: str, value: Any, device: torch.device, *, positive: bool = False) -> float | Tensor:
    """A number >= 0 (> 0 if ``positive``), or a tensor of one number, as a 0-dim one.

    The value of a tensor is not looked at: that would synchronise.
    """
    if isinstance(value, Tensor):
        not_nested(name, value)
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number, or a 0-dim or one-element tensor, got shape {list(value.shape)}"
            )
        if value.device != device and value.device.type != "cpu":
            accepted = "cpu" if device.type == "cpu" else f"{device} or the CPU"
            raise ValueError(f"{name} must be on {accepted}, got {value.device}")
        return value.reshape(()).to(widest_dtype(device))  # 0-dim: does not promote what it multiplies
    if positive and not real(name, value) > 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")
    number = non_negative(name, value)
    if positive and number < 1 / LARGEST:
        raise ValueError(f"{name} must be at least {1 / LARGEST:g}, got {value!r}")
    return number


def real(name: str, value: Any) -> float:
    """A finite number as a Python float."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
            raise TypeError(f"{name} must be a number, got {_what(value)}")
        value = value if isinstance(value, int | float) else float(value)  # of NumPy, say
    if not -sys.float_info.max <= value <= sys.float_info.max:  # integers may be larger
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high] as a Python one."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {_what(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return value if isinstance(value, int) else int(value)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer, of Python or NumPy; ``True`` and ``False`` are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def option(name: str, value: Any, accepted: Sequence[str]) -> None:
    """One of the accepted strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {_what(value)}")
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(map(repr, accepted))}")


def flag(name: str, value: Any) -> None:
    """Refuses what is neither ``True`` nor ``False``, of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_what(value)}")


def process_group(name: str, value: Any) -> None:
    """Refuses what is neither ``None`` nor a group of processes; without ``torch.distributed`` there is none."""
    distributed: Any = torch.distributed
    if distributed.is_available() and value is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must be one that this process belongs to")
    if value is not None and not (distributed.is_available() and isinstance(value, distributed.ProcessGroup)):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {_what(value)}")


def labels(name: str, value: Any, of: str, embeddings: Tensor) -> Tensor:
    """Integer labels, one for each embedding, as int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {_what(value)}")
    not_nested(name, value)
    if value.dtype not in INTEGERS:
        how = "" if value.is_complex() else f"; pass {name}.long()"
        if value.shape == embeddings.shape:  # a second view
            how = f"; views are rows of one tensor: torch.cat([z0, z1]), with {name}.repeat(2)"
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}{how}")
    count = embeddings.shape[0]
    if value.dim() != 1 or value.shape[0] != count:
        how = ""
        if value.shape == (count, 1):
            how = f"; pass {name}.squeeze(1)"
        elif value.dim() == 1 and value.shape[0] and count % value.shape[0] == 0:
            views = count // value.shape[0]
            how = f"; if the rows are {views} views one after another, pass {name}.repeat({views})"
        raise ValueError(f"{name} must have shape [{count}], one for each of {of}, got {list(value.shape)}{how}")
    same_device(name, value, of, embeddings)
    return value.view(torch.int64) if value.dtype == torch.uint64 else value.to(torch.int64)


def ref_index(value: Any, embeddings: Tensor, ref_embeddings: Tensor | None) -> Tensor:
    """Rows of the reference set, one for each embedding, as int64."""
    if ref_embeddings is None:
        raise ValueError(f"ref_index must be given together with ref_embeddings, got {_what(value)} and None")
    return labels("ref_index", value, "embeddings", embeddings)


def rows_or_none(name: str, value: Tensor, count: int) -> None:
    """Refuses what is neither -1 nor one of ``count`` rows; it looks at the values."""
    low, high = (int(x) for x in value.aminmax())
    if low < -1 or high >= count:
        raise ValueError(f"{name} must be in [-1, {count - 1}], got {low if low < -1 else high}")


def label(name: str, value: Any) -> int | None:
    """An integer, of NumPy too, or ``None``."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | numbers.Integral):
        raise TypeError(f"{name} must be an integer or None, got {_what(value)}")
    return int(value)


def ignore_index(value: Any, of: Tensor) -> int | None:
    """The label to ignore as int64 labels have it; ``None`` where no label ``of`` this dtype can be equal to it."""
    number = label("ignore_index", value)
    if number is None:
        return None
    if of.dtype == torch.uint64 and 0 <= number < 2**64:
        return number - 2**64 if number >= 2**63 else number
    return number if of.dtype != torch.uint64 and -(2**63) <= number < 2**63 else None


def comparable(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """int64 cannot hold all of uint64: such labels are compared with their like only."""
    if (value.dtype == torch.uint64) != (other.dtype == torch.uint64):
        raise TypeError(f"{name} must be uint64 where {other_name} are, got {value.dtype} and {other.dtype}")


# ---- options of the modules, before there is any tensor --------------------------------------------------------------
def no_temperature(of: str, value: Any) -> None:
    """Refuses the keyword of other losses, which divides where these multiply, and says what to write."""
    here = f", here {1 / (2 * value):g}" if isinstance(value, int | float) and value > 0 else ""
    raise TypeError(f"{of} takes no temperature: pass its inverse, tau_neg = 1 / (2 * temperature){here}")


def without_temperature(init: F) -> F:
    """For a constructor: refuses the keyword ``temperature``, which it has not, in words."""

    @functools.wraps(init)
    def checked(self: Any, *arguments: Any, **options: Any) -> None:
        if "temperature" in options:
            no_temperature(type(self).__name__, options["temperature"])
        init(self, *arguments, **options)

    return checked  # type: ignore[return-value]


def options(given: Mapping[str, Any]) -> None:
    """What a module holds, refused as the function refuses it; the device of the tensors is not known yet."""
    for name, value in given.items():
        _OPTIONS[name](name, value)


def non_negative(name: str, value: Any) -> float:
    """A Python number >= 0 that costs of float32 can be multiplied by: what overflowed would be NaN, not a limit."""
    number = real(name, value)
    if number < 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")
    if number > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:g}, got {value!r}")
    return number


def share(name: str, value: Any) -> float:
    """A Python number in [0, 1)."""
    number = real(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return number


def tau_plus(name: str, value: Any, pairing: str, cost: str) -> float:
    """The share of false negatives, which is defined for pairs of views and squared distances."""
    number = share(name, value)
    if number and (pairing == "pooled" or cost == "rbf"):
        other = f"pairing={pairing!r}" if pairing == "pooled" else f"cost={cost!r}"
        raise ValueError(f"{name} must be 0 with {other}, got {value!r}")
    return number


def reduction_of_rbf(cost: str, reduction: str) -> None:
    """Refuses a reduction that ``cacr_loss(cost="rbf")`` is not defined for."""
    if cost == "rbf" and reduction != "mean":
        raise ValueError(f"reduction={reduction!r} is not defined for cost=\"rbf\" (a log of a mean); accepted: 'mean'")


def _held_temperature(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and not value.is_leaf:
        raise ValueError(f"{name} of a module must be a number or a leaf tensor, got the result {_what(value)}")
    device = value.device if isinstance(value, Tensor) else torch.device("cpu")
    temperature(name, value, device, positive=name == "temperature")


def _one_of(literal: Any) -> Callable[[str, Any], None]:
    return lambda name, value: option(name, value, get_args(literal))


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "tau_pos": _held_temperature,
    "tau_neg": _held_temperature,
    "temperature": _held_temperature,
    "alpha": real,
    "beta": real,
    "rbf_scale": non_negative,
    "tau_plus": share,
    "ignore_index": label,
    "pairing": _one_of(Pairing),
    "cost": _one_of(Cost),
    "weight_grad": _one_of(WeightGrad),
    "reduction": _one_of(Reduction),
    "in_batch": flag,
    "normalize": flag,
    "return_parts": flag,
    "gather_distributed": flag,
    "process_group": process_group,
    "backend": lambda _, value: check_backend(value),
}
