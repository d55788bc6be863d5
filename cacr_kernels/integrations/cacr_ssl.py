"""The loss functions of the authors' published scripts, with their arguments and results.

A script that imports ``our_loss1`` and ``our_loss2`` runs on any device after one changed line::

    from cacr_kernels.integrations.cacr_ssl import our_loss1, our_loss2

Values, gradients and weights are those of the published functions. The weights, which the scripts mostly ignore, are
formed only when they are looked at. The losses of MoCo, which are methods of a model there, are functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import cacr_loss, cacr_momentum_loss, cacr_queue_loss

CHOICES = ("full", "none", "without_w1", "without_w2")


class LazyWeights:
    """A tensor that is computed when it is first used: by a method, an attribute, an index or a function of torch."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None

    def tensor(self) -> Tensor:
        """The weights, computed on the first call."""
        if self._value is None:
            assert self._compute is not None
            self._value, self._compute = self._compute(), None
        return self._value

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(_formed, args), **{name: _formed(x) for name, x in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.tensor())

    def __repr__(self) -> str:
        return repr(self.tensor())


def _operator(name: str) -> Callable[..., Any]:
    def method(self: LazyWeights, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_formed, others))

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "neg", "lt", "le", "gt", "ge"):
    setattr(LazyWeights, f"__{_name}__", _operator(f"__{_name}__"))


def _formed(x: Any) -> Any:
    if isinstance(x, LazyWeights):
        return x.tensor()
    return type(x)(map(_formed, x)) if type(x) in (list, tuple) else x


def _choice(choice: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}")
    return choice


def our_loss1(
    latent_codes_list: Sequence[Tensor], alpha: float = 1.0, tau_pos: float = 1.0, choice: str = "full"
) -> tuple[Tensor, LazyWeights]:
    """Contrastive attraction of V views [B, D], and the weights [B, V - 1] of the last view's positives.

    ::

        alpha mean_{v,b} sum_u w c(z[v,b], z[u,b]),   u != v,   w = softmax_u(tau_pos c)

    Args:
        latent_codes_list: V >= 2 tensors [B, D], as the encoder gives them: the published scripts normalise before.
        alpha, tau_pos: weight and inverse temperature.
        choice: ``"full"``; ``"none"`` and ``"without_w1"`` weigh the positives equally (the weights that are returned
            stay those of ``tau_pos``, as published); ``"without_w2"`` is ``"full"`` here.

    Returns:
        The loss, a scalar, and the weights, which are computed when they are first looked at.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_loss`.

    Source: the published ``our_loss1``.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.cacr_ssl import our_loss1
        >>> loss, weights = our_loss1([torch.eye(4), torch.eye(4).flip(0), -torch.eye(4)])
        >>> weights.shape
        torch.Size([4, 2])
    """
    tau = 0.0 if _choice(choice) in ("none", "without_w1") else tau_pos
    loss = cacr_loss(latent_codes_list, alpha=alpha, tau_pos=tau, beta=0.0)
    *others, last = latent_codes_list

    def weights() -> Tensor:
        cost = torch.stack([(last - z).square().sum(-1) for z in others], dim=1)
        return (tau_pos * cost).softmax(1)

    return loss, LazyWeights(weights)


def our_loss2(
    latent_codes_list: Sequence[Tensor],
    beta: float = 1.0,
    tau_neg: float = 1.0,
    tau_plus: float = 0.1,
    choice: str = "full",
    with_debiased: bool = False,
) -> tuple[Tensor, LazyWeights]:
    """Contrastive repulsion of V views [B, D], and the weights [B, B - 1] of the last pair of views.

    ::

        -beta mean_{x<y} mean_b sum_j w c(z[x,b], z[y,j]),   j != b,   w = softmax_j(-tau_neg c)

    Args:
        latent_codes_list: V >= 2 tensors [B, D].
        beta, tau_neg: weight and inverse temperature.
        tau_plus: of the debiasing, see :func:`cacr_kernels.cacr_loss`; counts only ``with_debiased``.
        choice: ``"full"``; ``"none"`` and ``"without_w2"`` weigh the negatives equally, and are never debiased, as
            published; ``"without_w1"`` is ``"full"`` here.
        with_debiased: whether to debias.

    Returns:
        The loss, a scalar, and the weights, which are computed when they are first looked at.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_loss`.

    Source: the published ``our_loss2``.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.cacr_ssl import our_loss2
        >>> loss, weights = our_loss2([torch.eye(4), torch.eye(4)])
        >>> loss.item(), weights.shape
        (-2.0, torch.Size([4, 3]))
    """
    uniform = _choice(choice) in ("none", "without_w2")
    tau, plus = (0.0, 0.0) if uniform else (tau_neg, tau_plus if with_debiased else 0.0)
    loss = cacr_loss(latent_codes_list, alpha=0.0, beta=beta, tau_neg=tau, tau_plus=plus)
    x, y = latent_codes_list[-2:]

    def weights() -> Tensor:
        cost = (x[:, None] - y).square().sum(-1)
        others = ~torch.eye(cost.shape[0], dtype=torch.bool, device=cost.device)
        return (-tau_neg * cost[others].view(cost.shape[0], -1)).softmax(1)

    return loss, LazyWeights(weights)


class MoCoLosses(NamedTuple):
    """Attraction and repulsion, as the published model of MoCo v2 returns them.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.cacr_ssl import MoCoLosses
        >>> MoCoLosses(torch.tensor(1.0), torch.tensor(-2.0)).combine().item()
        -1.0
    """

    loss1: Tensor
    loss2: Tensor

    def combine(self, loss1_w: float = 1, loss2_w: float = 1) -> Tensor:
        """The weighted sum of both, a scalar."""
        return loss1_w * self.loss1 + loss2_w * self.loss2


def moco_losses(
    q_list: Sequence[Tensor],
    k_list: Sequence[Tensor],
    queue: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    unif_intra_batch: bool = True,
) -> MoCoLosses:
    """The losses of the published MoCo v2, which its model computes from queries, keys and its queue.

    ::

        loss1 = alpha mean_{v,b} sum_u w c(q[v,b], k[u,b]),   u != v,   weights w detached
        loss2 = -beta mean_{v,b} sum_j w c(q[v,b], n_j),      n in queue + {q[v,j] : j != b}, one softmax

    In ``forward`` of the published ``MoCo`` this call stands for the loop over views, before the keys enter the queue::

        losses = moco_losses(q_list, k_list, self.queue, tau_pos=self.tau_pos, ...)

    There the product of the first view with the queue is kept and used for the other views, too, so that their
    repulsion is not that of their own queries. Here every view has its own. Numbers of a run of the published model
    differ by that.

    Args:
        q_list: query embeddings, V >= 2 tensors [B, D]; they are normalised.
        k_list: momentum embeddings, V tensors [B, D]; normalised and detached.
        queue: [D, K], as the published buffer: a column is a key. Unit vectors; detached.
        tau_pos, tau_neg, alpha, beta: see :func:`cacr_kernels.cacr_queue_loss`.
        unif_intra_batch: whether the other queries of the batch and view are negatives too.

    Returns:
        Two scalars, differentiable in the queries; ``combine()`` adds them.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_queue_loss`.

    Source: the published ``MoCo.forward`` of MoCo v2.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.cacr_ssl import moco_losses
        >>> basis = torch.eye(8)
        >>> losses = moco_losses([basis[:4]] * 2, [basis[:4]] * 2, basis[4:].T)
        >>> losses.loss1.item(), losses.loss2.item()
        (0.0, -2.0)
    """
    given: Any = list(q_list), list(k_list), queue.T
    options: Any = {"in_batch": unif_intra_batch, "normalize": True}
    return MoCoLosses(
        cacr_queue_loss(*given, alpha=alpha, tau_pos=tau_pos, beta=0.0, **options),
        cacr_queue_loss(*given, beta=beta, tau_neg=tau_neg, alpha=0.0, **options),
    )


def _momentum(q_list: Sequence[Tensor], k: Tensor, temperature: float, **options: Any) -> Tensor:
    options |= {"temperature": temperature, "normalize": True, "gather_distributed": True}
    loss: Tensor = cacr_momentum_loss(torch.stack(list(q_list)), k.detach(), **options)
    return loss


def cacr_rbfloss(q_list: Sequence[Tensor], k: Tensor, T: float) -> Tensor:
    """The published loss of MoCo v3 with one momentum key an instance, a mean over this rank's instances.

    ::

        mean_b sum_v p_v 2T (logsumexp_j(q_v.k_j / T) - q_v.k+ / T),   p_v = softmax_v(|q_v - k+|^2 / T)

    Args:
        q_list: query embeddings, V tensors [B, D]; they are normalised.
        k: momentum embeddings [B, D] of this rank; normalised, and gathered from all ranks where there are several.
        T: temperature, in the published code an attribute of the model.

    Returns:
        The loss, a scalar.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_momentum_loss`.

    Source: the published method of that name.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.cacr_ssl import cacr_rbfloss
        >>> cacr_rbfloss([torch.randn(8, 16), torch.randn(8, 16)], torch.randn(8, 16), T=0.2).shape
        torch.Size([])
    """
    return _momentum(q_list, k, T, cost="rbf")


def cacr_euclideanloss(q_list: Sequence[Tensor], k: Tensor, T: float) -> Tensor:
    """The same with squared distances, a *sum* over this rank's instances, as published.

    ::

        sum_b sum_v p_v (|q_v - k+|^2 - sum_{j != +} w_j |q_v - k_j|^2) / 2,   w = softmax_j(q_v.k_j / T)

    Args:
        q_list, k: V query embeddings [B, D] and momentum embeddings [B, D], see :func:`cacr_rbfloss`.
        T: temperature.

    Returns:
        The loss, a scalar.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.cacr_momentum_loss`.

    Source: the published method of that name.

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.cacr_ssl import cacr_euclideanloss
        >>> cacr_euclideanloss([torch.randn(8, 16), torch.randn(8, 16)], torch.randn(8, 16), T=0.2).shape
        torch.Size([])
    """
    return _momentum(q_list, k, T, cost="sqeuclidean", reduction="sum")
