"""The public losses: check, choose a backend, prepare the tensors, compute, reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks, losses, reference
from .operators.cacr import cacr
from .operators.registry import Target
from .operators.second_derivative import refuse_second_derivative_of_compiled
from .steps import (
    as_variables,
    check_shared,
    choose_backend,
    connected,
    prepare,
    reduce,
    similarities_of_embeddings,
    similarities_of_views,
)
from .types import (
    COSTS,
    PAIRINGS,
    WEIGHT_GRADS,
    CACROptions,
    CACRParts,
    Cost,
    Numbers,
    Pairing,
    Reduction,
    Terms,
    WeightGrad,
)


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
        tau_pos, tau_neg: inverse temperatures >= 0 (per unit of squared distance); numbers, or 0-dim or
            one-element tensors, which receive gradients. 0 gives uniform weights.
        alpha, beta: weights of the two terms.
        pairing: ``"unordered"`` (published): queries of view x, negatives of view y, x < y; ``"ordered"``: all x != y;
            ``"pooled"``: one softmax per query over the other instances of all views, its own included.
        cost: of the repulsion, ``"sqeuclidean"`` or ``"rbf"``.
        rbf_scale: s in exp(-s c), >= 0.
        normalize: L2-normalise the features first.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: values [V, B] whose mean is the loss. rbf is mean only.
        return_parts: return :class:`CACRParts` instead of the loss alone.
        backend: ``"auto"``, or a name from :func:`cacr_kernels.available_backends`.

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
    views, tau_pos, tau_neg = refuse_second_derivative_of_compiled(views, tau_pos, tau_neg)
    z = checks.views("views", views, at_least=2)
    tau_pos = checks.temperature("tau_pos", tau_pos, z.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, z.device)
    alpha, beta = checks.real("alpha", alpha), checks.real("beta", beta)
    checks.option("pairing", pairing, PAIRINGS)
    checks.option("cost", cost, COSTS)
    rbf_scale = checks.non_negative("rbf_scale", rbf_scale)
    check_shared(normalize, reduction, return_parts)
    checks.reduction_of_rbf(cost, reduction)
    chosen, on = choose_backend(backend, [z], normalize, similarities_of_views(z, pairing))
    with checks.without_autocast(z.device):
        (z,) = prepare([z], normalize)
        tau_pos, tau_neg, alpha, beta, rbf_scale = as_variables(z.device, tau_pos, tau_neg, alpha, beta, rbf_scale)
        if reduction == "mean" and "cacr" in on.operators and chosen.fuses(z.shape, pairing):
            return _fused(on, z, (tau_pos, tau_neg, alpha, beta, rbf_scale), (pairing, cost), return_parts)
        numbers = Numbers(tau_pos, tau_neg, alpha, beta)
        options: Any = {"pairing": pairing, "cost": cost, "rbf_scale": rbf_scale}
        if on.operators:
            terms = losses.cacr(on, z.contiguous(), numbers, **options)
        else:
            terms = reference.cacr(z, numbers, **options)
        return reduce(connected(terms, *numbers[:2]), reduction, return_parts, z.dtype)


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
        queries: [V, B, D], V >= 2 (or a sequence of V tensors [B, D]); carry gradient. Or one tensor [B, D], whose
            positives are the keys [B, D]: mean and gradient are those of ``[q, q], [k, k]`` at half the cost.
        keys: like ``queries``, from the momentum encoder; detached.
        queue: [K, D], K >= 0, keys of earlier batches; detached.
        in_batch: whether the other queries of the batch and view are negatives too.
        weight_grad: which softmax logits of the repulsion are differentiated: ``"in_batch"`` (published; those of the
            queue are not), ``"full"``, ``"none"``.
        tau_pos, tau_neg, alpha, beta, normalize, reduction, return_parts, backend: see :func:`cacr_loss`;
            ``reduction="none"`` gives [V, B], or [B].

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.

    Source: the published MoCo v2 code with ``K`` and ``unif_intra_batch``.
    """
    options = QueueOptions(
        tau_pos, tau_neg, alpha, beta, in_batch, weight_grad, normalize, reduction, return_parts, backend
    )
    call = queue_call(queries, keys, queue, None, options)
    with checks.without_autocast(call.device):
        return call.reduced(call.compute(*call.arguments))


class QueueOptions(NamedTuple):
    """What the keywords of :func:`cacr_queue_loss` say."""

    tau_pos: float | Tensor
    tau_neg: float | Tensor
    alpha: float
    beta: float
    in_batch: bool
    weight_grad: WeightGrad
    normalize: bool
    reduction: Reduction
    return_parts: bool
    backend: str


class QueueCall(NamedTuple):
    """A call of the queue loss, checked: ``compute(*arguments)`` are its terms."""

    device: torch.device
    compute: Callable[..., Terms]
    arguments: tuple[Any, ...]
    reduced: Callable[[Terms], Any]


def queue_call(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    queue: Tensor,
    valid: Tensor | None,
    options: QueueOptions,
) -> QueueCall:
    """:func:`cacr_queue_loss` with the first ``valid`` rows of the queue: a 0-dim int64 tensor, ``None`` for all.

    The caller computes, so that from a loss to its operator there are few calls.
    """
    tau_pos, tau_neg, alpha, beta, in_batch, weight_grad, normalize, reduction, return_parts, backend = options
    queries, tau_pos, tau_neg = refuse_second_derivative_of_compiled(queries, tau_pos, tau_neg)
    one_direction = isinstance(queries, Tensor) and queries.dim() == 2
    q, k = checks.queries_and_keys(queries, keys)
    checks.same_device("keys", k, "queries", q)
    checks.same_shape("keys", k, "queries", q)
    n = checks.float_tensor("queue", queue, "[K, D]")
    checks.same_device("queue", n, "queries", q)
    checks.same_dim("queue", n, "queries", q)
    tau_pos = checks.temperature("tau_pos", tau_pos, q.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, q.device)
    alpha, beta = checks.real("alpha", alpha), checks.real("beta", beta)
    checks.flag("in_batch", in_batch)
    checks.option("weight_grad", weight_grad, WEIGHT_GRADS)
    check_shared(normalize, reduction, return_parts)
    _, on = choose_backend(backend, [q, k, n], normalize, math.inf)
    with checks.without_autocast(q.device):
        q, k, n = prepare([q, k.detach(), n.detach()], normalize)
        numbers = Numbers(*as_variables(q.device, tau_pos, tau_neg, alpha, beta))
    arguments: tuple[Any, ...] = q, k, n, numbers
    compute: Callable[..., Terms] = reference.queue
    if on.operators:
        arguments, compute = (on, *(t.contiguous() for t in (q, k, n)), numbers), losses.queue

    def reduced(terms: Terms) -> Any:
        if one_direction:
            terms = terms._replace(attraction=terms.attraction[0], repulsion=terms.repulsion[0])
        return reduce(connected(terms, *numbers[:2]), reduction, return_parts, q.dtype)

    options_of_queue: Any = {"in_batch": in_batch, "weight_grad": weight_grad, "valid": valid}
    return QueueCall(q.device, partial(compute, **options_of_queue), arguments, reduced)


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
        temperature: T > 0 (a divisor here, as published), a number, or a 0-dim or one-element tensor.
        cost: ``"rbf"`` or ``"sqeuclidean"``.
        key_offset: index of the key that belongs to query 0 (rank times B).
        normalize, reduction, return_parts, backend: see :func:`cacr_loss`; ``reduction="none"`` gives [B].

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.

    Source: the published ``cacr_rbfloss`` and ``cacr_euclideanloss`` (the latter summed over instances).
    """
    queries, temperature = refuse_second_derivative_of_compiled(queries, temperature)
    q = checks.views("queries", queries, at_least=1)
    k = checks.nonempty("keys", checks.float_tensor("keys", keys, "[M, D]"), "[M, D]")
    checks.same_device("keys", k, "queries", q)
    checks.same_dim("keys", k, "queries", q)
    temperature = checks.temperature("temperature", temperature, q.device, positive=True)
    checks.option("cost", cost, COSTS)
    if k.shape[0] < q.shape[1]:
        raise ValueError(f"keys must hold at least the B = {q.shape[1]} keys of the queries, got M = {k.shape[0]}")
    checks.integer("key_offset", key_offset, 0, k.shape[0] - q.shape[1])
    check_shared(normalize, reduction, return_parts)
    _, on = choose_backend(backend, [q, k], normalize, math.inf)
    with checks.without_autocast(q.device):
        q, k = prepare([q, k.detach()], normalize)
        (temperature,) = as_variables(q.device, temperature)
        options: Any = {"cost": cost, "key_offset": key_offset}
        if on.operators:
            terms = losses.momentum(on, q.contiguous(), k.contiguous(), temperature, **options, zero_keys=normalize)
        else:
            terms = reference.momentum(q, k, temperature, **options)
        return reduce(connected(terms, temperature), reduction, return_parts, q.dtype)


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
    embeddings, ref_embeddings, tau_pos, tau_neg = refuse_second_derivative_of_compiled(
        embeddings, ref_embeddings, tau_pos, tau_neg
    )
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
    check_shared(normalize, reduction, return_parts)
    _, on = choose_backend(backend, tensors, normalize, similarities_of_embeddings(tensors))
    with checks.without_autocast(z.device):
        z, *ref = prepare(tensors, normalize)
        numbers = Numbers(*as_variables(z.device, tau_pos, tau_neg, alpha, beta))
        arguments: Any = (z, y, ref[0] if ref else None, ref_labels, numbers)
        terms = losses.supervised(on, *arguments) if on.operators else reference.supervised(*arguments)
        return reduce(connected(terms, *numbers[:2]), reduction, return_parts, z.dtype)


def _fused(on: Target, views: Tensor, given: Sequence[Any], kind: tuple[Pairing, Cost], return_parts: bool) -> Any:
    """The loss by the operator ``cacr``; ``given``: tau_pos, tau_neg, alpha, beta and rbf_scale."""
    numbers = None
    if any(isinstance(x, Tensor) for x in given):
        numbers, given = losses.vector(given, views.device), [0.0] * len(given)
    (tau_pos, tau_neg, alpha, beta, rbf_scale), (pairing, cost) = given, kind
    options = CACROptions(tau_pos, tau_neg, alpha, beta, PAIRINGS.index(pairing), cost == "rbf", rbf_scale)
    grad = torch.is_grad_enabled()
    wanted = grad and views.requires_grad, grad and numbers is not None and numbers.requires_grad
    loss, parts = cacr(on, views, numbers, options, wanted)
    if not return_parts:
        return loss
    attraction, repulsion, *entropies = parts.detach().unbind()
    return CACRParts(loss, attraction, repulsion, *(h.clamp(min=0.0) for h in entropies))


def backend_for(
    loss: str,
    tensors: Sequence[Tensor],
    *,
    backend: str = "auto",
    normalize: bool = False,
    pairing: Pairing = "unordered",
) -> str:
    """The name of the backend that computes a loss.

    Args:
        loss: the name of a public loss, ``"cacr_loss"`` say.
        tensors: its features in the order of its arguments: views; queries, keys and queue; queries and keys;
            embeddings and, if given, reference embeddings. Several views as one tensor.
        backend, normalize, pairing: as they are given to the loss.
    """
    if loss == cacr_loss.__name__:
        similarities = similarities_of_views(tensors[0], pairing)
    elif loss == supervised_cacr_loss.__name__:
        similarities = similarities_of_embeddings(tensors)
    elif loss in (cacr_queue_loss.__name__, cacr_momentum_loss.__name__):
        similarities = math.inf
    else:
        raise ValueError(f"loss={loss!r} is unknown")
    return choose_backend(backend, tensors, normalize, similarities)[0].name
