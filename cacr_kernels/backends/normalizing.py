"""The flag ``normalize`` for implementations of operators that take unit vectors only.

They get them, and their gradients become those of the raw rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..operators import cacr, contrast, detached_keys, repulsion
from ..reference import of_raw_rows, unit_rows
from ..types import arithmetic_dtype

Kernel = Callable[..., Any]
SCHEMAS = cacr.SCHEMAS | contrast.SCHEMAS | detached_keys.SCHEMAS | repulsion.SCHEMAS
GRADIENTS = {"cacr": [(0, 2)], "contrast_backward": [(0, 0), (1, 1)], "repulsion": [(0, 2), (1, 3)]}
FLAG = ", bool normalize"


def schema_without_flag(name: str) -> str:
    """The schema of an operator, without ``normalize``."""
    return SCHEMAS[name].replace(FLAG, "")


def position(name: str) -> int:
    """Where ``normalize`` stands among the arguments of an operator."""
    return SCHEMAS[name][: SCHEMAS[name].index(FLAG)].count(",") + 1


def with_flag(name: str, kernel: Kernel) -> Kernel:
    """What computes the operator ``name`` of raw rows, too, from a ``kernel`` that takes no flag."""
    at, features = position(name), 1 if name == "cacr" else 2  # which of its first arguments are rows
    gradients = GRADIENTS.get(name, [])  # of which input, which output

    def compute(*arguments: Any) -> Any:
        given, normalize, rest = arguments[:at], arguments[at], arguments[at + 1 :]
        if not normalize:
            return kernel(*given, *rest)
        rows = [_unit(x) for x in given[:features]]
        outputs = list(kernel(*rows, *given[features:], *rest))
        for i, j in gradients:
            if outputs[j].numel():
                outputs[j] = of_raw_rows(outputs[j], given[i].to(outputs[j].dtype))
        return tuple(outputs)

    return compute


def _unit(x: Tensor | None) -> Tensor | None:
    return x if x is None else unit_rows(x.detach().to(arithmetic_dtype(x)))
