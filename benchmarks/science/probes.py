"""What frozen features know: a linear probe and nearest neighbours, fitted to the balanced pool."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR, NEAREST = "linear", "knn"
ITERATIONS = 100


def linear_probe(x: Tensor, y: Tensor, scored: Tensor, classes: int) -> Tensor:
    """Classes [M] that logistic regression gives to ``scored`` [M, D], fitted to ``x`` [N, D] with classes ``y`` [N].

    Features are standardised; the penalty is |W|^2 / (2 N), as C = 1 in scikit-learn.
    """
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, scored = (x - mean) / std, (scored - mean) / std
    weight = torch.zeros(classes, x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(scored, weight, bias).argmax(dim=1).detach()


def nearest(x: Tensor, y: Tensor, scored: Tensor, classes: int, neighbours: int) -> Tensor:
    """Classes [M] by a vote of the nearest neighbours by cosine, of equals the one that is nearer."""
    x, scored = F.normalize(x, dim=1), F.normalize(scored, dim=1)
    found = []
    rank = torch.arange(neighbours, 0, -1, device=x.device, dtype=x.dtype) * (0.5 / neighbours**2)
    for some in scored.split(1024):
        near = y[(some @ x.T).topk(neighbours, dim=1).indices]  # [m, k]
        votes = (F.one_hot(near, classes) * (1.0 + rank)[:, None]).sum(dim=1)
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def balanced_accuracy(predicted: Tensor, truth: Tensor, classes: int) -> float:
    """The mean of the recalls of all classes."""
    return sum(float((predicted[truth == c] == c).float().mean()) for c in range(classes)) / classes
