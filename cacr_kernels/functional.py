"""The public losses: check, promote, normalise, compute with one backend, reduce."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize

from . import checks, losses, reference
from .backends import cuda as _cuda
from .backends.table import select
from .operators import ops
from .operators.autograd import fused_cacr
from .types import CACRParts, Cost, Pairing, Reduction, Terms, WeightGrad

FUSED = ("triton", "cuda", "cpu")  # backends with the operator cacr_<backend>
NARROW = ("triton", "cuda")  # backends whose operators take half types as they are


@overload
def cacr_loss(
    views: Tensor | Sequence[Tensor],
    *,
    tau_pos: float | Tensor = ...,
    tau_neg: float | Tensor = ...,
    alpha: float = ...,
    beta: float = ...,
    pairing: Pairing = ...,
    cost: Cost = ...,
    rbf_scale: float = ...,
    normalize: bool = ...,
    reduction: Reduction = ...,
    return_parts: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def cacr_loss(
    views: Tensor | Sequence[Tensor],
    *,
    tau_pos: float | Tensor = ...,
    tau_neg: float | Tensor = ...,
    alpha: float = ...,
    beta: float = ...,
    pairing: Pairing = ...,
    cost: Cost = ...,
    rbf_scale: float = ...,
    normalize: bool = ...,
    reduction: Reduction = ...,
    return_parts: bool,
    backend: str = ...,
) -> Any: ...


def cacr_loss(
    views: Tensor | Sequence[Tensor],
    *,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    pairing: Pairing = "unordered",
    cost: Cost = "sqeuclidean",
    rbf_scale: float = 2.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    backend: str = "auto",
) -> Any:
    """Contrastive attraction and contrastive repulsion of V views of B instances.

    With c the squared Euclidean distance and w softmax weights, each over its own set::

        attraction = alpha mean_{v,b} sum_u w c(z[v,b], z[u,b]),   u != v,    w = softmax_u(+tau_pos c)
        repulsion  = -beta mean_pairs mean_b sum_j w c,            j != b,    w = softmax_j(-tau_neg c)
        loss       = attraction + repulsion

    and for ``cost="rbf"``: repulsion = +beta mean_pairs log(mean_b sum_j w exp(-rbf_scale c)).

    Args:
        views: tensor [V, B, D], or a sequence of V >= 2 tensors [B, D], on one device; float16, bfloat16, float32 or
            float64. ``views[v, b]`` is view v of instance b.
        tau_pos, tau_neg: inverse temperatures >= 0 (per unit of squared distance); numbers, or 0-dim tensors, which
            receive gradients. 0 gives uniform weights.
        alpha, beta: weights of the two terms.
        pairing: ``"unordered"`` (published): queries of view x, negatives of view y, x < y; ``"ordered"``: all x != y;
            ``"pooled"``: one softmax per query over the other instances of all views, its own included.
        cost: of the repulsion, ``"sqeuclidean"`` or ``"rbf"``.
        rbf_scale: s in exp(-s c), >= 0.
        normalize: L2-normalise the features first.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: values [V, B] whose mean is the loss. rbf is mean only.
        return_parts: return :class:`CACRParts` instead of the loss alone.
        backend: ``"auto"``, or a name from :func:`cacr_kernels.backends`.

    Returns:
        The loss, float32 or, if an input is, float64.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: anything else, naming the argument, what was given and what is accepted.

    Source: Zheng et al., TMLR 2023 (arXiv 2105.03746), L_CA + L_CR; published code ``our_loss1`` + ``our_loss2``.

    Example:
        >>> import torch, cacr_kernels
        >>> z = torch.nn.functional.normalize(torch.eye(4).repeat(2, 1, 1), dim=-1)
        >>> round(cacr_kernels.cacr_loss(z).item(), 4)
        -2.0
    """
    z = checks.views("views", views, at_least=2)
    tau_pos = checks.temperature("tau_pos", tau_pos, z.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, z.device)
    alpha, beta = checks.real("alpha", alpha), checks.real("beta", beta)
    checks.option("pairing", pairing, ops.PAIRINGS)
    checks.option("cost", cost, ("sqeuclidean", "rbf"))
    rbf_scale = checks.non_negative("rbf_scale", rbf_scale)
    _check_shared(normalize, reduction, return_parts)
    if cost == "rbf" and reduction != "mean":
        raise ValueError(f"reduction={reduction!r} is not defined for cost=\"rbf\" (a log of a mean); accepted: 'mean'")
    V, rows = z.shape[0], z.shape[1] * (z.shape[0] if pairing == "pooled" else 1)
    name = _select(backend, [z], normalize, _cuda.pairs_of_views(V, pairing) * rows * rows)
    with _no_autocast(z.device):
        narrow = _narrow(name, [z], normalize)
        (z,) = _prepare([z], normalize)
        tau_pos, tau_neg, alpha, beta, rbf_scale = checks.variables(z.device, tau_pos, tau_neg, alpha, beta, rbf_scale)
        options: Any = {"alpha": alpha, "beta": beta, "pairing": pairing, "cost": cost, "rbf_scale": rbf_scale}
        if name in FUSED and reduction == "mean" and not (name == "cuda" and _cuda.too_many_views(z.shape, pairing)):
            return _fused(name, narrow, z, tau_pos, tau_neg, options, return_parts)
        if name == "reference":
            terms = reference.cacr(z, tau_pos, tau_neg, **options)
        else:
            terms = losses.cacr(losses.Contrast(name, narrow), z.contiguous(), tau_pos, tau_neg, **options)
        return _reduce(terms, reduction, return_parts, z.dtype)


def cacr_queue_loss(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    queue: Tensor,
    *,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    in_batch: bool = True,
    weight_grad: WeightGrad = "in_batch",
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    backend: str = "auto",
) -> Any:
    """CACR with momentum keys and a queue of negatives, MoCo v2 style.

    ::

        attraction = alpha mean_{v,b} sum_u w c(q[v,b], k[u,b]),   u != v,   weights w detached
        repulsion  = -beta mean_{v,b} sum_j w c(q[v,b], n_j),      n in queue + {q[v,j] : j != b}, one softmax

    Args:
        queries: [V, B, D], V >= 2 (or a sequence of V tensors [B, D]); carry gradient.
        keys: like ``queries``, from the momentum encoder; detached.
        queue: [K, D], K >= 0, keys of earlier batches; detached.
        in_batch: whether the other queries of the batch and view are negatives too.
        weight_grad: which softmax logits of the repulsion are differentiated: ``"in_batch"`` (published; those of the
            queue are not), ``"full"``, ``"none"``.
        tau_pos, tau_neg, alpha, beta, normalize, reduction, return_parts, backend: see :func:`cacr_loss`;
            ``reduction="none"`` gives [V, B].

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.

    Source: the published MoCo v2 code with ``K`` and ``unif_intra_batch``.
    """
    q, k = checks.views("queries", queries, at_least=2), checks.views("keys", keys, at_least=2)
    checks.same_device("keys", k, "queries", q)
    checks.same_shape("keys", k, "queries", q)
    n = checks.float_tensor("queue", queue, "[K, D]")
    checks.same_device("queue", n, "queries", q)
    checks.same_dim("queue", n, "queries", q)
    tau_pos = checks.temperature("tau_pos", tau_pos, q.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, q.device)
    alpha, beta = checks.real("alpha", alpha), checks.real("beta", beta)
    checks.flag("in_batch", in_batch)
    checks.option("weight_grad", weight_grad, ("in_batch", "full", "none"))
    _check_shared(normalize, reduction, return_parts)
    name = _select(backend, [q, k, n], normalize)
    with _no_autocast(q.device):
        narrow = _narrow(name, [q, k, n], normalize)
        q, k, n = _prepare([q, k.detach(), n.detach()], normalize)
        tau_pos, tau_neg, alpha, beta = checks.variables(q.device, tau_pos, tau_neg, alpha, beta)
        options: Any = {"alpha": alpha, "beta": beta, "in_batch": in_batch, "weight_grad": weight_grad}
        if name == "reference":
            terms = reference.queue(q, k, n, tau_pos, tau_neg, **options)
        else:
            terms = losses.queue(
                losses.Contrast(name, narrow),
                q.contiguous(),
                k.contiguous(),
                n.contiguous(),
                tau_pos,
                tau_neg,
                **options,
            )
        return _reduce(terms, reduction, return_parts, q.dtype)


def cacr_momentum_loss(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    cost: Cost = "rbf",
    key_offset: int = 0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    backend: str = "auto",
) -> Any:
    """CACR with momentum keys of all ranks, MoCo v3 style, with one temperature T > 0.

    With k+ = keys[key_offset + b] and p_v = softmax_v(|q_v - k+|^2 / T), detached, per instance b::

        "rbf":          sum_v p_v 2T (logsumexp_j(q_v.k_j / T) - q_v.k+ / T)
        "sqeuclidean":  sum_v p_v (|q_v - k+|^2 - sum_{j != +} w_j |q_v - k_j|^2) / 2,   w = softmax_j(q_v.k_j / T)
    with w detached too.

    Args:
        queries: [V, B, D], V >= 1 (or a sequence of V tensors [B, D]); unit vectors, or set ``normalize``.
        keys: [M, D], M >= key_offset + B, of all ranks; detached; unit vectors, or set ``normalize``.
        temperature: T > 0 (a divisor here, as published), a number or a 0-dim tensor.
        cost: ``"rbf"`` or ``"sqeuclidean"``.
        key_offset: index of the key that belongs to query 0 (rank times B).
        normalize, reduction, return_parts, backend: see :func:`cacr_loss`; ``reduction="none"`` gives [B].

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.

    Source: the published ``cacr_rbfloss`` and ``cacr_euclideanloss`` (the latter summed over instances).
    """
    q = checks.views("queries", queries, at_least=1)
    k = checks.nonempty("keys", checks.float_tensor("keys", keys, "[M, D]"), "[M, D]")
    checks.same_device("keys", k, "queries", q)
    checks.same_dim("keys", k, "queries", q)
    temperature = checks.temperature("temperature", temperature, q.device, positive=True)
    checks.option("cost", cost, ("sqeuclidean", "rbf"))
    if k.shape[0] < q.shape[1]:
        raise ValueError(f"keys must hold at least the B = {q.shape[1]} keys of the queries, got M = {k.shape[0]}")
    checks.integer("key_offset", key_offset, 0, k.shape[0] - q.shape[1])
    _check_shared(normalize, reduction, return_parts)
    name = _select(backend, [q, k], normalize)
    with _no_autocast(q.device):
        narrow = _narrow(name, [q, k], normalize)
        q, k = _prepare([q, k.detach()], normalize)
        (temperature,) = checks.variables(q.device, temperature)
        if name == "reference":
            terms = reference.momentum(q, k, temperature, cost=cost, key_offset=key_offset)
        else:
            terms = losses.momentum(
                losses.Contrast(name, narrow),
                q.contiguous(),
                k.contiguous(),
                temperature,
                cost=cost,
                key_offset=key_offset,
            )
        return _reduce(terms, reduction, return_parts, q.dtype)


def supervised_cacr_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    backend: str = "auto",
) -> Any:
    """CACR with labels: positives share the query's label (not itself), negatives have another.

    The attraction is averaged over the queries that have a positive, the repulsion over those that have a negative.

    Args:
        embeddings: [N, D], the queries, and the keys too unless a reference set is given.
        labels: [N], of any integer dtype.
        ref_embeddings, ref_labels: [M, D] and [M], the keys; both or none. They receive gradient like the embeddings.
        tau_pos, tau_neg, alpha, beta, normalize, reduction, return_parts, backend: see :func:`cacr_loss`;
            ``reduction="none"`` gives [N].

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.
    """
    z = checks.nonempty("embeddings", checks.float_tensor("embeddings", embeddings, "[N, D]"), "[N, D]")
    y = checks.labels("labels", labels, "embeddings", z)
    if (ref_embeddings is None) != (ref_labels is None):
        given, missing = (
            ("ref_labels", "ref_embeddings") if ref_embeddings is None else ("ref_embeddings", "ref_labels")
        )
        raise ValueError(f"{missing} must be given together with {given}, got None")
    tensors = [z]
    if ref_embeddings is not None:
        r = checks.nonempty("ref_embeddings", checks.float_tensor("ref_embeddings", ref_embeddings, "[M, D]"), "[M, D]")
        checks.same_device("ref_embeddings", r, "embeddings", z)
        checks.same_dim("ref_embeddings", r, "embeddings", z)
        as_int64 = checks.labels("ref_labels", ref_labels, "ref_embeddings", r)
        checks.comparable("ref_labels", ref_labels, "labels", labels)  # type: ignore[arg-type]
        ref_labels = as_int64
        tensors.append(r)
    tau_pos = checks.temperature("tau_pos", tau_pos, z.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, z.device)
    alpha, beta = checks.real("alpha", alpha), checks.real("beta", beta)
    _check_shared(normalize, reduction, return_parts)
    name = _select(backend, tensors, normalize, z.shape[0] * tensors[-1].shape[0])
    with _no_autocast(z.device):
        narrow = _narrow(name, tensors, normalize)
        z, *ref = _prepare(tensors, normalize)
        tau_pos, tau_neg, alpha, beta = checks.variables(z.device, tau_pos, tau_neg, alpha, beta)
        arguments: Any = (ref[0] if ref else None, ref_labels, tau_pos, tau_neg)
        if name == "reference":
            terms = reference.supervised(z, y, *arguments, alpha=alpha, beta=beta)
        else:
            compare = losses.Contrast(name, narrow)
            terms = losses.supervised(compare, z, y, *arguments, alpha=alpha, beta=beta)
        return _reduce(terms, reduction, return_parts, z.dtype)


# ---- shared steps ----------------------------------------------------------------------------------------------------
def _check_shared(normalize: object, reduction: object, return_parts: object) -> None:
    checks.flag("normalize", normalize)
    checks.option("reduction", reduction, ("mean", "sum", "none"))
    checks.flag("return_parts", return_parts)


def _select(backend: object, tensors: list[Tensor], normalize: bool, similarities: int | None = None) -> str:
    """``similarities``: how many are computed; ``None``: against keys that get no gradient."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__} {backend!r}")
    device, work = tensors[0].device, math.inf
    if similarities is not None and device.type == "cuda":
        work = _cuda.work(similarities, tensors[0].shape[-1], _half(tensors, normalize) or _accurate(tensors))
    return select(backend, device, work)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The losses choose their own precision, also inside ``torch.autocast``."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _half(tensors: list[Tensor], normalize: bool) -> torch.dtype | None:
    """The half type that all embeddings have and keep."""
    dtype = tensors[0].dtype
    halves = dtype in (torch.float16, torch.bfloat16) and all(t.dtype == dtype for t in tensors)
    return dtype if halves and not normalize else None


def _narrow(name: str, tensors: list[Tensor], normalize: bool) -> torch.dtype | None:
    """That type, if the operators of the backend multiply in it (``ops.Narrow``)."""
    return _half(tensors, normalize) if name in NARROW else None


def _accurate(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _prepare(tensors: list[Tensor], normalize: bool) -> list[Tensor]:
    """One dtype for all: float64 if any input is, else float32; half types are computed in float32.

    Temperatures, being 0-dimensional, do not count. Keys of an encoder that ran in inference mode are copied: autograd
    would not keep them.
    """
    dtype = _accurate(tensors)
    # Dynamo takes an argument of torch.func.grad for one that needs no gradient; of a cast it knows better.
    tracing = torch.compiler.is_compiling()
    tensors = [t.to(dtype) if tracing or t.dtype != dtype else t for t in tensors]
    if not tracing and not torch.is_inference_mode_enabled():
        tensors = [t.clone() if t.is_inference() else t for t in tensors]
    return [l2_normalize(t, dim=-1) for t in tensors] if normalize else tensors


def _fused(
    name: str,
    narrow: torch.dtype | None,
    views: Tensor,
    tau_pos: float | Tensor,
    tau_neg: float | Tensor,
    options: Any,
    return_parts: bool,
) -> Any:
    given: list[Any] = [tau_pos, tau_neg, options["alpha"], options["beta"], options["rbf_scale"]]
    numbers = None
    if any(isinstance(x, Tensor) for x in given):
        numbers, given = losses.vector(given, views.device), [0.0] * len(given)
    plain_tau_pos, plain_tau_neg, alpha, beta, rbf_scale = given
    grad = torch.is_grad_enabled()
    loss, parts = fused_cacr(
        name,
        views,
        numbers,
        plain_tau_pos,
        plain_tau_neg,
        alpha,
        beta,
        ops.PAIRINGS.index(options["pairing"]),
        options["cost"] == "rbf",
        rbf_scale,
        grad and views.requires_grad,
        grad and numbers is not None and numbers.requires_grad,
        narrow,
    )
    return CACRParts(loss, *parts.detach().unbind()) if return_parts else loss


def _reduce(terms: Terms, reduction: Reduction, return_parts: bool, dtype: torch.dtype) -> Any:
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
