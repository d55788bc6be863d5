"""The steps that all public losses share: check, choose a backend, prepare the tensors, reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends.entry import Backend, Size
from .backends.table import choose
from .operators.registry import Target, tracing
from .types import (
    REDUCTIONS,
    CACRParts,
    Pairing,
    Reduction,
    Terms,
    arithmetic_dtype,
    view_pair_count,
    widest_dtype,
)


def check_shared(normalize: object, reduction: object, return_parts: object) -> None:
    """Refuses what is no value of the keywords that all losses have."""
    checks.flag("normalize", normalize)
    checks.option("reduction", reduction, REDUCTIONS)
    checks.flag("return_parts", return_parts)


def choose_backend(
    backend: object, tensors: Sequence[Tensor], normalize: bool, similarities: float
) -> tuple[Backend, Target]:
    """The entry of the backend that computes the loss, and where its operators run.

    ``similarities``: how many are computed; infinite against keys that get no gradient.
    """
    first, dtype = tensors[0], tensors[0].dtype
    halves = dtype in (torch.float16, torch.bfloat16) and not normalize and all(t.dtype == dtype for t in tensors)
    size = Size(similarities, first.shape[-1], dtype if halves else arithmetic_dtype(*tensors))
    chosen = choose(backend, first.device, size)
    return chosen, Target(chosen.name, chosen.operators, dtype if halves and chosen.half_types else None)


def similarities_of_views(views: Tensor, pairing: Pairing) -> float:
    """How many similarities :func:`cacr_kernels.cacr_loss` computes."""
    V, B = views.shape[:2]
    rows = V * B if pairing == "pooled" else B
    return view_pair_count(V, pairing) * rows * rows


def similarities_of_embeddings(tensors: Sequence[Tensor]) -> float:
    """How many similarities :func:`cacr_kernels.supervised_cacr_loss` computes."""
    return tensors[0].shape[0] * tensors[-1].shape[0]


def as_variables(device: torch.device, *values: float | Tensor) -> tuple[Any, ...]:
    """``values``; while compiling, numbers as 0-dim tensors.

    A number would be a constant of the compiled code, which a schedule compiles again at every step.
    """
    if not torch.compiler.is_compiling():
        return values
    one = torch.ones((), dtype=widest_dtype(device), device=device)
    return tuple(x if isinstance(x, Tensor) else x * one for x in values)


def prepare(tensors: list[Tensor], normalize: bool) -> list[Tensor]:
    """One dtype for all: float64 if any input is, else float32; half types are computed in float32.

    Temperatures, being 0-dimensional, do not count. Keys of an encoder that ran in inference mode are copied: autograd
    would not keep them.
    """
    dtype = arithmetic_dtype(*tensors)
    # Dynamo takes an argument of torch.func.grad for one that needs no gradient; of a cast it knows better.
    tracing = torch.compiler.is_compiling()
    tensors = [t.to(dtype) if tracing or t.dtype != dtype else t for t in tensors]
    if not tracing and not torch.is_inference_mode_enabled():
        tensors = [t.clone() if t.is_inference() else t for t in tensors]
    return [reference.unit_rows(t) for t in tensors] if normalize else tensors


def connected(terms: Terms, *temperatures: float | Tensor) -> Terms:
    """The same terms, in whose graph every temperature is: one without effect gets zero, not ``None``.

    Batches without negatives leave one out, and DDP stops at a parameter that is in no graph. An empty sum adds
    nothing, whatever the temperature is.
    """
    attraction = terms.attraction
    for tau in temperatures:
        if isinstance(tau, Tensor) and (tau.requires_grad or tracing()):
            attraction = attraction + tau.expand(0).sum().to(attraction)
    return terms._replace(attraction=attraction)


def reduce(terms: Terms, reduction: Reduction, return_parts: bool, dtype: torch.dtype) -> Any:
    """The terms cancel in their sum: it is taken in the dtype they come in, float64 from ``contrast``."""
    attraction, repulsion = terms.attraction.mean(), terms.repulsion.mean()
    if reduction == "mean":
        loss = attraction + repulsion
    else:
        loss = terms.attraction + terms.repulsion
        loss = loss.sum() if reduction == "sum" else loss
    if not return_parts:
        return loss.to(dtype)
    parts = attraction.detach(), repulsion.detach(), terms.attraction_entropy, terms.repulsion_entropy
    return CACRParts(loss.to(dtype), *(part.to(dtype) for part in parts))
