"""The steps that all public losses share: check, choose a backend, prepare the tensors, reduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends import self_check
from .backends.entry import Backend, Size
from .backends.table import choose, is_auto, last_resort
from .distributed import Group, gathering
from .operators.registry import Target, has_values, tracing
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
    backend: object,
    tensors: Sequence[Tensor],
    similarities: float,
    group: Group | None = None,
    normalize: bool = False,
    *,
    calls: Callable[[Backend], Sequence[str]] | None = None,
) -> tuple[Backend, Target]:
    """The entry of the backend that computes the loss, and where its operators run.

    ``similarities``: how many are computed, against the keys of one rank; infinite against keys that get no gradient.
    ``calls``: which operators of a backend the loss calls, for the self-check that ``"auto"`` makes of some; ``None``:
    it is only asked, and nothing is computed.
    """
    similarities *= 1 if group is None else group.size
    first, dtype = tensors[0], tensors[0].dtype
    halves = dtype in (torch.float16, torch.bfloat16) and all(t.dtype == dtype for t in tensors)
    size = Size(similarities, first.shape[-1], dtype if halves else arithmetic_dtype(*tensors))
    chosen = choose(backend, first.device, size)
    if calls is not None and chosen.check_first is not None and is_auto(backend):
        read_as = dtype if halves and chosen.half_types else arithmetic_dtype(*tensors)
        if not self_check.passes(chosen, calls(chosen), tensors, read_as, normalize):
            chosen = last_resort(first.device)
    half = dtype if halves and chosen.half_types else None
    name = chosen.name + chosen.variant(size.dtype)
    return chosen, Target(name, chosen.operators, half, bool(normalize and chosen.operators))


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


Arriving = Callable[[], Tensor]  # waits for the rows of all ranks


def prepare(
    tensors: list[Tensor],
    unit: bool,
    group: Group | None = None,
    *,
    gathered: int | None = None,
    as_is: bool = False,
    beside: Tensor | None = None,
) -> tuple[list[Tensor], Arriving | None, Arriving | None]:
    """One dtype for all: float64 if any input is, else float32; half types are computed in float32.

    ``unit``: as unit vectors, for what takes no raw rows. ``as_is``: in their own dtype.

    Temperatures, being 0-dimensional, do not count. Keys of an encoder that ran in inference mode are copied: autograd
    would not keep them.

    The tensor ``gathered`` of them is sent to all ranks of the group; what waits for the rows of all comes second,
    ``None`` without a group. ``beside`` goes with it as it is and without a gradient, and is, in the order of ranks,
    what the third waits for.
    """
    given, dtype = tensors, tensors[0].dtype if as_is else arithmetic_dtype(*tensors)
    # Dynamo takes an argument of torch.func.grad for one that needs no gradient; of a cast it knows better.
    tracing = torch.compiler.is_compiling()
    tensors = [t.to(dtype) if tracing or t.dtype != dtype else t for t in tensors]
    if not tracing and not torch.is_inference_mode_enabled():
        tensors = [t.clone() if t.is_inference() else t for t in tensors]
    rows = others = None
    if group is not None and gathered is not None:
        rows, others = gathering(tensors[gathered], group, wire=given[gathered].dtype, beside=beside)
    if unit:
        tensors, rows = [reference.unit_rows(t) for t in tensors], rows and _unit(rows)
    return tensors, rows, others


def _unit(rows: Arriving) -> Arriving:
    return lambda: reference.unit_rows(rows())


def checked_ref_index(value: Any, embeddings: Tensor, ref_embeddings: Tensor | None) -> Tensor | None:
    """``ref_index`` of the supervised loss as int64. Its values are looked at where that waits for no device."""
    if value is None:
        return None
    index = checks.ref_index(value, embeddings, ref_embeddings)
    if has_values(index) and ref_embeddings is not None:
        checks.rows_or_none("ref_index", index, ref_embeddings.shape[0])
    return index


def asked_terms(alpha: float, beta: float, return_parts: bool, group: Group | None) -> tuple[bool, bool]:
    """Whether attraction and repulsion have to be computed: not with weight 0, unless somebody reads their entropies.

    Not decided while compiling, where a schedule of weights is one graph, nor where other ranks wait for rows.
    """
    if return_parts or group is not None or torch.compiler.is_compiling():
        return True, True
    return alpha != 0, beta != 0


def without_weight_zero(terms: Terms, alpha: float, beta: float, rows: Tensor, group: Group | None) -> Terms:
    """The same terms; those of weight 0 are 0, whatever they would be. ``rows``: the queries.

    Not while compiling, where weights are tensors, nor of several processes, which wait for each other's gradients.
    """
    if group is not None or torch.compiler.is_compiling():
        return terms
    if alpha == 0:
        terms = terms._replace(attraction=reference.no_term(rows))
    if beta == 0:
        zeros = reference.no_term(rows)
        terms = terms._replace(repulsion=zeros if terms.repulsion.dim() else zeros.sum())
    return terms


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


def reduce(
    terms: Terms, reduction: Reduction, return_parts: bool, dtype: torch.dtype, counted: Tensor | None = None
) -> Any:
    """The terms cancel in their sum: it is taken in the dtype they come in, float64 from ``contrast``.

    ``counted``: the share of the rows that the mean of ``"none"`` is taken over, the others being 0; by default all.
    """
    attraction, repulsion = terms.attraction.mean(), terms.repulsion.mean()
    if reduction == "mean":
        loss = attraction + repulsion
    else:
        loss = terms.attraction + terms.repulsion
        loss = loss if counted is None else loss * counted.to(loss.dtype)
        loss = loss.sum() if reduction == "sum" else loss
    if not return_parts:
        return loss.to(dtype)
    parts = attraction.detach(), repulsion.detach(), *terms.entropies()
    return CACRParts(loss.to(dtype), *(part.to(dtype) for part in parts))
