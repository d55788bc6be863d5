"""The public losses: check, choose a backend, prepare the tensors, compute, reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks, losses, reference
from .backends.entry import Backend
from .distributed import averaged, group_of, in_order_of_ranks, labels_of_all, ranks_of
from .operators.aligned import aligned_cost
from .operators.cacr import cacr
from .operators.registry import Target
from .operators.second_derivative import refuse_second_derivative_of_compiled
from .steps import (
    as_variables,
    asked_terms,
    check_shared,
    checked_ref_index,
    choose_backend,
    connected,
    prepare,
    reduce,
    similarities_of_embeddings,
    similarities_of_views,
    without_weight_zero,
)
from .types import (
    COSTS,
    PAIRINGS,
    WEIGHT_GRADS,
    CACROptions,
    CACRParts,
    Cost,
    KeySets,
    Numbers,
    Pairing,
    Reduction,
    Terms,
    Views,
    WeightGrad,
    arithmetic_dtype,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .types import MomentumKeywords, QueueKeywords, SupervisedKeywords, ViewsKeywords


@overload
def cacr_loss(
    views: Views, *more: Tensor, return_parts: Literal[False] = ..., **options: Unpack[ViewsKeywords]
) -> Tensor: ...
@overload
def cacr_loss(
    views: Views, *more: Tensor, return_parts: Literal[True], **options: Unpack[ViewsKeywords]
) -> CACRParts: ...
@overload
def cacr_loss(
    views: Views, *more: Tensor, return_parts: bool, **options: Unpack[ViewsKeywords]
) -> Tensor | CACRParts: ...


def cacr_loss(
    views: Tensor | Sequence[Tensor],
    *more: Tensor,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    pairing: Pairing = "unordered",
    cost: Cost = "sqeuclidean",
    rbf_scale: float = 2.0,
    tau_plus: float = 0.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    gather_distributed: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """Contrastive attraction and contrastive repulsion of V views of B instances.

    With c the squared Euclidean distance and w softmax weights, each over its own set::

        attraction = alpha mean_{v,b} sum_u w c(z[v,b], z[u,b]),   u != v,    w = softmax_u(+tau_pos c)
        repulsion  = -beta mean_pairs mean_b sum_j w c,            j != b,    w = softmax_j(-tau_neg c)
        loss       = attraction + repulsion

    and for ``cost="rbf"``: repulsion = +beta mean_pairs log(mean_b sum_j w exp(-rbf_scale c)). With ``tau_plus`` > 0::

        repulsion  = mean_pairs mean_b (-beta sum_j w c - tau_plus c(z[x,b], z[y,b])) / (1 - tau_plus)

    Args:
        views: tensor [V, B, D], or a sequence of V >= 2 tensors [B, D], on one device; float16, bfloat16, float32 or
            float64. ``views[v, b]`` is view v of instance b.
        more: the other views, if ``views`` is only the first: ``cacr_loss(z0, z1)`` is ``cacr_loss([z0, z1])``.
        tau_pos, tau_neg: inverse temperatures >= 0 (per unit of squared distance); numbers, or 0-dim or
            one-element tensors, which receive gradients. 0 gives uniform weights.
        alpha, beta: weights of the two terms. A term whose weight is 0 is not computed, unless ``return_parts`` asks
            for its entropy.
        pairing: ``"unordered"`` (published): queries of view x, negatives of view y, x < y; ``"ordered"``: all x != y;
            ``"pooled"``: one softmax per query over the other instances of all views, its own included.
        cost: of the repulsion, ``"sqeuclidean"`` or ``"rbf"``.
        rbf_scale: s in exp(-s c), >= 0.
        tau_plus: in [0, 1), the share of negatives taken to be of the query's own class (published: ``with_debiased``);
            for ``cost="sqeuclidean"`` with ``"unordered"`` or ``"ordered"``.
        normalize: L2-normalise the features first.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: values [V, B] whose mean is the loss. rbf is mean only.
        return_parts: return :class:`CACRParts` instead of the loss alone.
        gather_distributed: the instances of all ranks are one batch, see *Several processes* below.
        process_group: whose ranks; by default those of all processes.
        backend: ``"auto"``, or a name from :func:`cacr_kernels.available_backends`.

    Returns:
        The loss, float32 or, if an input is, float64; :class:`CACRParts` if ``return_parts``.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: anything else, naming the argument, what was given and what is accepted.

    Several processes: with ``gather_distributed=True`` the queries of a rank meet the keys of all W ranks, which pass
    equal shapes and dtypes. A rank returns W times the share of its own queries in the mean-reduced loss of the whole
    batch (under rbf that loss), so that the mean over the ranks is what one process would return, and the gradient that
    ``DistributedDataParallel`` or ``fully_shard`` averages is its gradient. ``"none"`` gives rows whose mean over all
    ranks is the loss, ``"sum"`` their sum; parts and entropies are those of this rank's queries (under rbf attraction
    and repulsion are those of all). The backward averages gradients of temperatures over the ranks, inside and outside
    the wrapped module. Who *adds* gradients over the ranks (an all-reduce by hand) divides the loss by W, but not under
    ``"sum"``. Megatron-LM with a loss per token adds, and divides by the tokens that the ranks report: there a rank
    reports one token and divides nothing. Forward and backward have to run on every rank. Shapes are compared first
    where the ranks communicate on the host (gloo) or ``torch.distributed.get_debug_level()`` is not ``OFF``, but not in
    compiled code or while a CUDA graph is captured.

    Source: Zheng et al., TMLR 2023 (arXiv 2105.03746), L_CA + L_CR; published code ``our_loss1`` + ``our_loss2``.

    Example:
        >>> import torch, cacr_kernels
        >>> z = torch.nn.functional.normalize(torch.eye(4).repeat(2, 1, 1), dim=-1)
        >>> round(cacr_kernels.cacr_loss(z).item(), 4)
        -2.0
    """
    given = [views, *more] if more else views
    given, tau_pos, tau_neg = refuse_second_derivative_of_compiled(given, tau_pos, tau_neg)
    z = checks.views("views", given, at_least=2)
    tau_pos = checks.temperature("tau_pos", tau_pos, z.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, z.device)
    alpha, beta = checks.real("alpha", alpha), checks.real("beta", beta)
    checks.option("pairing", pairing, PAIRINGS)
    checks.option("cost", cost, COSTS)
    rbf_scale = checks.non_negative("rbf_scale", rbf_scale)
    tau_plus = checks.tau_plus("tau_plus", tau_plus, pairing, cost)
    check_shared(normalize, reduction, return_parts)
    checks.reduction_of_rbf(cost, reduction)
    group = group_of(gather_distributed, process_group, {"views": z})
    weights = alpha, beta or tau_plus
    asked = asked_terms(*weights, return_parts, group)
    wants_fused = group is None and reduction != "none" and asked[1]

    def fuses(b: Backend) -> bool:
        return wants_fused and "cacr" in b.operators and b.fuses(z.shape, pairing)

    def calls(b: Backend) -> tuple[str, ...]:
        return ("cacr",) if fuses(b) else ("contrast",) if group is None else ("contrast", "repulsion")

    chosen, on = choose_backend(backend, [z], similarities_of_views(z, pairing), group, normalize, calls=calls)
    fused = fuses(chosen)
    with checks.without_autocast(z.device):
        (z,), keys, _ = prepare([z], normalize and not on.normalize, group, gathered=0, as_is=fused)
        tau_pos, tau_neg = averaged(group, z.device, tau_pos, tau_neg)
        tau_pos, tau_neg, alpha, beta, rbf_scale = as_variables(z.device, tau_pos, tau_neg, alpha, beta, rbf_scale)
        if fused:
            given_numbers = tau_pos, tau_neg, alpha, beta / (1 - tau_plus), rbf_scale
            found = _fused(on, z, given_numbers, (pairing, cost, normalize))
            extra = _debiasing(z, pairing, tau_plus, bool(normalize), on).mean() if tau_plus else None
            rows = 1 if reduction == "mean" else z.shape[0] * z.shape[1]
            return _result(*found, extra, rows, return_parts)
        numbers = Numbers(tau_pos, tau_neg, alpha, beta / (1 - tau_plus) if on.operators else beta, *asked)
        one_sweep = keys is not None and reduction != "none" and cost == "sqeuclidean" and "repulsion" in on.operators
        options: Any = {"pairing": pairing, "cost": cost, "rbf_scale": rbf_scale}
        options |= {"keys": None if keys is None or one_sweep else keys(), "ranks": ranks_of(group)}
        if on.operators:
            if keys is not None and one_sweep:
                terms = losses.cacr_of_ranks(on, z.contiguous(), keys, numbers, pairing)
            else:
                terms = losses.cacr(on, z.contiguous(), numbers, **options)
            if tau_plus:
                more_rows = _debiasing(z, pairing, tau_plus, bool(normalize), on)
                terms = terms._replace(repulsion=terms.repulsion + more_rows)
        else:
            terms = reference.cacr(z, numbers, tau_plus=tau_plus, **options)
        terms = without_weight_zero(terms, *weights, z, group)
        return reduce(connected(terms, *numbers[:2]), reduction, return_parts, z.dtype)


@overload
def cacr_queue_loss(
    queries: Views, keys: Views, queue: Tensor, *, return_parts: Literal[False] = ..., **options: Unpack[QueueKeywords]
) -> Tensor: ...
@overload
def cacr_queue_loss(
    queries: Views, keys: Views, queue: Tensor, *, return_parts: Literal[True], **options: Unpack[QueueKeywords]
) -> CACRParts: ...
@overload
def cacr_queue_loss(
    queries: Views, keys: Views, queue: Tensor, *, return_parts: bool, **options: Unpack[QueueKeywords]
) -> Tensor | CACRParts: ...


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
    gather_distributed: bool = False,
    process_group: Any = None,
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
        tau_pos, tau_neg, alpha, beta, normalize, reduction, return_parts, gather_distributed, process_group, backend:
            see :func:`cacr_loss`. Queries are gathered, the queue is not: it has to be the same on all ranks.

    Returns:
        The loss or :class:`CACRParts`, as :func:`cacr_loss`; values [V, B], or [B] with ``reduction="none"``.

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.

    Source: the published MoCo v2 code with ``K`` and ``unif_intra_batch``.

    Example:
        >>> import torch, cacr_kernels
        >>> basis = torch.eye(8)
        >>> cacr_kernels.cacr_queue_loss(basis[:4], basis[:4], basis[4:]).item()
        -2.0
    """
    numbers = tau_pos, tau_neg, alpha, beta
    ranks = gather_distributed, process_group
    options = QueueOptions(*numbers, in_batch, weight_grad, normalize, reduction, return_parts, *ranks, backend)
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
    gather_distributed: bool
    process_group: Any
    backend: str


class QueueCall(NamedTuple):
    """A call of the queue loss, checked: ``compute(*arguments)`` are its terms, ``entering()`` the keys to store."""

    device: torch.device
    compute: Callable[..., Terms]
    arguments: tuple[Any, ...]
    reduced: Callable[[Terms], Any]
    entering: Callable[[], Tensor | None]


def queue_call(
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    queue: Tensor,
    valid: Tensor | None,
    options: QueueOptions,
    entering: Tensor | None = None,
) -> QueueCall:
    """:func:`cacr_queue_loss` with the first ``valid`` rows of the queue: a 0-dim int64 tensor, ``None`` for all.

    ``entering`` [V, B, D]: keys that the caller stores afterwards, with those of all ranks; they travel with the
    queries. The caller computes, so that from a loss to its operator there are few calls.
    """
    tau_pos, tau_neg, alpha, beta, in_batch, weight_grad, normalize, reduction, return_parts, *ranks, backend = options
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
    in_batch = bool(in_batch)
    checks.option("weight_grad", weight_grad, WEIGHT_GRADS)
    check_shared(normalize, reduction, return_parts)
    gather_distributed, process_group = ranks
    group = group_of(gather_distributed, process_group, {"queries": q})

    def calls(b: Backend) -> tuple[str, ...]:
        sweep = "detached_keys" if "detached_keys" in b.operators else "contrast"
        return (sweep, "contrast") if in_batch else (sweep,)

    _, on = choose_backend(backend, [q, k, n], math.inf, normalize=normalize, calls=calls)
    with checks.without_autocast(q.device):
        tensors = [q, k.detach(), n.detach()]
        unit = normalize and not on.normalize
        (q, k, n), batch, stored = prepare(tensors, unit, group, gathered=0 if in_batch else None, beside=entering)
        tau_pos, tau_neg = averaged(group, q.device, tau_pos, tau_neg)
        asked = asked_terms(alpha, beta, return_parts, group)
        numbers = Numbers(*as_variables(q.device, tau_pos, tau_neg, alpha, beta))._replace(
            attracts=asked[0], repels=asked[1]
        )
    arguments: tuple[Any, ...] = q, k, n, numbers
    compute: Callable[..., Terms] = reference.queue
    if on.operators:
        arguments = on, *(t.contiguous() for t in (q, k, n)), numbers
        compute = losses.queue

    def reduced(terms: Terms) -> Any:
        if one_direction:
            terms = terms._replace(attraction=terms.attraction[0], repulsion=terms.repulsion[0])
        terms = without_weight_zero(terms, alpha, beta, q[0] if one_direction else q, group)
        return reduce(connected(terms, *numbers[:2]), reduction, return_parts, q.dtype)

    def keys_of_all() -> Tensor | None:
        if group is None or entering is None:
            return entering
        return in_order_of_ranks(entering, group) if stored is None else stored()

    negatives: Any = in_batch if batch is None else batch if on.operators else batch()
    options_of_queue: Any = {"in_batch": negatives, "weight_grad": weight_grad, "valid": valid}
    return QueueCall(q.device, partial(compute, **options_of_queue), arguments, reduced, keys_of_all)


@overload
def cacr_momentum_loss(
    queries: Views, keys: Tensor, *, return_parts: Literal[False] = ..., **options: Unpack[MomentumKeywords]
) -> Tensor: ...
@overload
def cacr_momentum_loss(
    queries: Views, keys: Tensor, *, return_parts: Literal[True], **options: Unpack[MomentumKeywords]
) -> CACRParts: ...
@overload
def cacr_momentum_loss(
    queries: Views, keys: Tensor, *, return_parts: bool, **options: Unpack[MomentumKeywords]
) -> Tensor | CACRParts: ...


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
    gather_distributed: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """CACR with momentum keys of all ranks, MoCo v3 style, with one temperature T > 0.

    Per instance b, with the positive k+, and with p and w detached::

        k+  = keys[key_offset + b]
        p_v = softmax_v(|q_v - k+|^2 / T)
        "rbf":          sum_v p_v 2T (logsumexp_j(q_v.k_j / T) - q_v.k+ / T)
        "sqeuclidean":  sum_v p_v (|q_v - k+|^2 - sum_{j != +} w_j |q_v - k_j|^2) / 2,   w = softmax_j(q_v.k_j / T)

    Args:
        queries: [V, B, D], V >= 1 (or a sequence of V tensors [B, D], or one tensor [B, D]); unit vectors, or set
            ``normalize``.
        keys: [M, D], M >= key_offset + B, of all ranks; detached; unit vectors, or set ``normalize``.
        temperature: T > 0 (a divisor here, as published), a number, or a 0-dim or one-element tensor.
        cost: ``"rbf"`` or ``"sqeuclidean"``.
        key_offset: index of the key that belongs to query 0 (rank times B, if the caller gathered the keys).
        normalize, reduction, return_parts, gather_distributed, process_group, backend: see :func:`cacr_loss`. With
            ``gather_distributed=True`` the keys are those of this rank, in which ``key_offset`` counts; the keys of all
            ranks are gathered.

    Returns:
        The loss or :class:`CACRParts`, as :func:`cacr_loss`; values [B] with ``reduction="none"``.

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.

    Source: the published ``cacr_rbfloss`` and ``cacr_euclideanloss`` (the latter summed over instances).

    Example:
        >>> import torch, cacr_kernels
        >>> q = torch.eye(4)
        >>> round(cacr_kernels.cacr_momentum_loss([q], q, temperature=0.1).item(), 6)
        2.7e-05
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
    key_offset = checks.integer("key_offset", key_offset, 0, k.shape[0] - q.shape[1])
    check_shared(normalize, reduction, return_parts)
    group = group_of(gather_distributed, process_group, {"queries": q, "keys": k})

    def calls(b: Backend) -> tuple[str, ...]:
        return ("detached_keys",) if "detached_keys" in b.operators else ("contrast",)

    _, on = choose_backend(backend, [q, k], math.inf, normalize=normalize, calls=calls)
    with checks.without_autocast(q.device):
        (q, k), keys_of_all, _ = prepare([q, k.detach()], normalize and not on.normalize, group, gathered=1)
        k = k if keys_of_all is None else keys_of_all()
        (temperature,) = averaged(group, q.device, temperature)
        (temperature,) = as_variables(q.device, temperature)
        options: Any = {"cost": cost, "key_offset": key_offset}
        if on.operators:
            terms = losses.momentum(on, q.contiguous(), k.contiguous(), temperature, **options)
        else:
            terms = reference.momentum(q, k, temperature, **options)
        return reduce(connected(terms, temperature), reduction, return_parts, q.dtype)


@overload
def supervised_cacr_loss(
    embeddings: Tensor, labels: Tensor, *, return_parts: Literal[False] = ..., **options: Unpack[SupervisedKeywords]
) -> Tensor: ...
@overload
def supervised_cacr_loss(
    embeddings: Tensor, labels: Tensor, *, return_parts: Literal[True], **options: Unpack[SupervisedKeywords]
) -> CACRParts: ...
@overload
def supervised_cacr_loss(
    embeddings: Tensor, labels: Tensor, *, return_parts: bool, **options: Unpack[SupervisedKeywords]
) -> Tensor | CACRParts: ...


def supervised_cacr_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_index: Tensor | None = None,
    ignore_index: int | None = None,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    gather_distributed: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """CACR with labels: positives share the query's label (not itself), negatives have another.

    ::

        attraction = alpha mean_i sum_j w c(z[i], z[j]),   y[j] == y[i], j != i,   w = softmax_j(+tau_pos c)
        repulsion  = -beta mean_i sum_j w c(z[i], z[j]),   y[j] != y[i],           w = softmax_j(-tau_neg c)

    The attraction is averaged over the queries that have a positive, the repulsion over those that have a negative.

    Args:
        embeddings: [N, D], the queries, and the keys too unless a reference set is given.
        labels: [N], of any integer dtype.
        ref_embeddings, ref_labels: [M, D] and [M], the keys; both or none. They receive gradient like the embeddings.
        ref_index: [N], of any integer dtype: the row of the reference set that *is* query i, or -1. Give it where the
            reference set may hold the queries, as a bank or a gathered batch does: else such a row is a positive of
            its own query, at distance 0. It is in no set of that query. On a GPU the values are not looked at.
        ignore_index: embeddings (of the reference set, too) with this label are left out, as if they were not given:
            they are in no set and not read, and nothing flows to them.
        tau_pos, tau_neg, alpha, beta, normalize, reduction, return_parts, gather_distributed, process_group, backend:
            see :func:`cacr_loss`. Embeddings and labels are gathered, or the parts of a reference set that the ranks
            pass, in which ``ref_index`` counts; queries with positives or negatives are counted over all ranks.

    Returns:
        The loss or :class:`CACRParts`, as :func:`cacr_loss`; values [N] with ``reduction="none"``, with 0 for ignored
        embeddings; the mean of the others is the loss.

    Raises:
        TypeError, ValueError: see :func:`cacr_loss`.

    Example:
        >>> import torch, cacr_kernels
        >>> cacr_kernels.supervised_cacr_loss(torch.eye(3)[[0, 0, 1, 1]], torch.tensor([7, 7, 8, 8])).item()
        -2.0
    """
    embeddings, ref_embeddings, tau_pos, tau_neg = refuse_second_derivative_of_compiled(
        embeddings, ref_embeddings, tau_pos, tau_neg
    )
    z = checks.embeddings("embeddings", embeddings, "[N, D]", "labels")
    y = checks.labels("labels", labels, "embeddings", z)
    if (ref_embeddings is None) != (ref_labels is None):
        given, missing = (
            ("ref_labels", "ref_embeddings") if ref_embeddings is None else ("ref_embeddings", "ref_labels")
        )
        raise ValueError(f"{missing} must be given together with {given}, got None")
    ignored = checks.ignore_index(ignore_index, labels)
    tensors = [z]
    if ref_embeddings is not None:
        r = checks.embeddings("ref_embeddings", ref_embeddings, "[M, D]", "ref_labels")
        checks.same_device("ref_embeddings", r, "embeddings", z)
        checks.same_dim("ref_embeddings", r, "embeddings", z)
        as_int64 = checks.labels("ref_labels", ref_labels, "ref_embeddings", r)
        checks.comparable("ref_labels", ref_labels, "labels", labels)  # type: ignore[arg-type]
        ref_labels = as_int64
        tensors.append(r)
    own_rows = checked_ref_index(ref_index, z, ref_embeddings)
    tau_pos = checks.temperature("tau_pos", tau_pos, z.device)
    tau_neg = checks.temperature("tau_neg", tau_neg, z.device)
    alpha, beta = checks.real("alpha", alpha), checks.real("beta", beta)
    check_shared(normalize, reduction, return_parts)
    group = group_of(
        gather_distributed, process_group, {"embeddings": z, "ref_embeddings": tensors[1] if tensors[1:] else None}
    )
    similarities = similarities_of_embeddings(tensors)
    _, on = choose_backend(backend, tensors, similarities, group, normalize, calls=lambda b: ("contrast",))
    with checks.without_autocast(z.device):
        if own_rows is not None or ignored is not None:
            read = losses.rows_in_sets(y, ref_labels, own_rows, ignored, everywhere=group is None)
            tensors = [torch.where(rows[:, None], t, 0.0) for rows, t in zip(read, tensors, strict=True)]
        unit = normalize and not on.normalize
        (z, *ref), keys, _ = prepare(tensors, unit, group, gathered=len(tensors) - 1)
        tau_pos, tau_neg = averaged(group, z.device, tau_pos, tau_neg)
        asked = asked_terms(alpha, beta, return_parts, group)
        numbers = Numbers(*as_variables(z.device, tau_pos, tau_neg, alpha, beta))._replace(
            attracts=asked[0], repels=asked[1]
        )
        ranks = ranks_of(group)
        sets, everyone = KeySets(own_rows, ignored, queries_first=keys is not None and not ref), y
        if group is not None and keys is not None:
            of_all = labels_of_all(y if ref_labels is None else torch.cat([y, ref_labels]), group)
            everyone = of_all[:, : y.shape[0]].flatten()
            ref_labels = everyone if ref_labels is None else of_all[:, y.shape[0] :].flatten()
            ref = [keys()]
        arguments: Any = (z, y, ref[0] if ref else None, ref_labels, numbers)
        supervised: Callable[..., Terms] = reference.supervised
        if on.operators:
            supervised = partial(losses.supervised, on)
        terms = supervised(*arguments, sets=sets, ranks=ranks)
        counted = None if ignored is None else (everyone != ignored).sum().to(z.dtype) / everyone.shape[0]
        terms = connected(without_weight_zero(terms, alpha, beta, z, group), *numbers[:2])
        return reduce(terms, reduction, return_parts, z.dtype, counted)


def _fused(on: Target, views: Tensor, given: Sequence[Any], kind: tuple[Pairing, Cost, bool]) -> tuple[Tensor, Tensor]:
    """Loss and parts by the operator ``cacr``; ``given``: tau_pos, tau_neg, alpha, beta and rbf_scale."""
    numbers = None
    if any(isinstance(x, Tensor) for x in given):
        numbers, given = losses.vector(given, views.device), [0.0] * len(given)
    (tau_pos, tau_neg, alpha, beta, rbf_scale), (pairing, cost, normalize) = given, kind
    numbers_given = tau_pos, tau_neg, alpha, beta
    options = CACROptions(*numbers_given, PAIRINGS.index(pairing), cost == "rbf", rbf_scale, bool(normalize))
    grad = torch.is_grad_enabled()
    wanted = grad and views.requires_grad, grad and numbers is not None and numbers.requires_grad
    return cacr(on, views, numbers, options, wanted)


def _result(loss: Tensor, parts: Tensor, extra: Tensor | None, rows: int, return_parts: bool) -> Any:
    """``rows`` times the loss, or its parts, with the mean ``extra`` of the repulsion added to both."""
    if extra is not None:
        loss = loss + extra.to(loss.dtype)
    if rows != 1:
        loss = loss * rows
    if not return_parts:
        return loss
    attraction, repulsion, *entropies = parts.detach().unbind()
    if extra is not None:
        repulsion = repulsion + extra.detach().to(repulsion.dtype)
    return CACRParts(loss, attraction, repulsion, *(h.clamp(min=0.0) for h in entropies))


def _debiasing(views: Tensor, pairing: Pairing, tau_plus: float, normalize: bool, on: Target) -> Tensor:
    """What ``tau_plus`` adds to the rows [V, B] of a repulsion whose beta has been divided by 1 - tau_plus."""
    views = views.to(arithmetic_dtype(views))
    cost = aligned_cost(views, views, normalize, on)
    own = torch.stack([cost[x, y] for x, y in reference.view_pairs(views.shape[0], pairing)])
    return reference.rows_of_pairs(own, views.shape[0], pairing) * (-tau_plus / (1 - tau_plus))


def backend_for(
    loss: str,
    tensors: Sequence[Tensor],
    *,
    backend: str = "auto",
    pairing: Pairing = "unordered",
) -> str:
    """The name of the backend that computes a loss.

    Args:
        loss: the name of a public loss, ``"cacr_loss"`` say.
        tensors: its features in the order of its arguments: views; queries, keys and queue; queries and keys;
            embeddings and, if given, reference embeddings. Several views as one tensor.
        backend, pairing: as they are given to the loss.
    """
    if loss == cacr_loss.__name__:
        similarities = similarities_of_views(tensors[0], pairing)
    elif loss == supervised_cacr_loss.__name__:
        similarities = similarities_of_embeddings(tensors)
    elif loss in (cacr_queue_loss.__name__, cacr_momentum_loss.__name__):
        similarities = math.inf
    else:
        raise ValueError(f"loss={loss!r} is unknown")
    return choose_backend(backend, tensors, similarities)[0].name
