"""Other packages, the optional extra ``baselines``: KeOps for the same loss, and other losses for orientation.

Those of lightly and pytorch-metric-learning are modules that normalise what they get, so they belong beside modules.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from cacr_kernels import testing

from . import eager
from .cases import BenchmarkCase

Loss = Callable[..., Tensor]

MODULES = {
    "pykeops": "pykeops.torch",
    "lightly": "lightly.loss",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
}
TEMPERATURE = 0.5
os.environ.setdefault("PYKEOPS_VERBOSE", "0")


@functools.cache  # what a library defines goes with it
def _name_torchvision_operators() -> torch.library.Library:
    """Lets torchvision be imported beside a CPU build of torch.

    PyPI has it for CUDA only: its compiled operators do not load, and importing it then fails where it describes two
    of them. Nothing here calls any, so their names suffice.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@functools.cache
def load(package: str) -> ModuleType:
    """The part of the package that is measured."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # KeOps tells that there is no GPU
        warnings.simplefilter("ignore")
        if package == "lightly":
            try:
                importlib.import_module("torchvision")
            except RuntimeError:
                _name_torchvision_operators()
        return importlib.import_module(MODULES[package])


def why_not(package: str) -> str | None:
    """Why the package cannot be used here, or ``None``."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (extra baselines)"
    try:
        load(package)
    except Exception as error:  # whatever a package does that was built for another torch
        return f"{package} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def no_ntxent(problem: testing.Case) -> str | None:
    """Why the problem is not compared with NT-Xent, or ``None``."""
    pairs = problem.loss == "cacr_loss" and not {"pairing", "cost"} & problem.options.keys()
    return None if pairs and problem.shape["V"] == 2 else "a loss of two views"


def keops(case: BenchmarkCase) -> Loss:
    """``cacr_loss`` with squared Euclidean cost on symbolic N x M arrays."""
    lazy = load("pykeops").LazyTensor
    options = dict(case.problem.options)
    tau_pos, tau_neg = options["tau_pos"], options["tau_neg"]
    ordered = options.get("pairing") == "ordered"

    def loss(views: list[Tensor]) -> Tensor:
        views = [eager.single(view) for view in views]
        V = len(views)
        index = torch.arange(len(views[0]), dtype=views[0].dtype, device=views[0].device)[:, None]
        same = (0.25 - (lazy(index[:, None]) - lazy(index[None])) ** 2).step()
        terms = []
        for q, k in ((views[x], views[y]) for x in range(V) for y in range(V) if x < y or (ordered and x != y)):
            c = ((lazy(q[:, None]) - lazy(k[None])) ** 2).sum(-1)
            terms.append((-tau_neg * c - 1e6 * same).sumsoftmaxweight(c, axis=1).mean())
        return eager.attraction(views, None, tau_pos) - torch.stack(terms).mean()

    return loss


def lightly(case: BenchmarkCase) -> Loss:
    """NT-Xent of two views by lightly."""
    criterion = load("lightly").NTXentLoss(temperature=TEMPERATURE)
    return lambda views: criterion(eager.single(views[0]), eager.single(views[1]))


def metric_learning(case: BenchmarkCase) -> Loss:
    """NT-Xent of two views by pytorch-metric-learning."""
    criterion = load("pytorch_metric_learning").NTXentLoss(temperature=TEMPERATURE)
    labels = torch.arange(case.problem.shape["B"], device=case.device).repeat(2)
    return lambda views: criterion(torch.cat([eager.single(view) for view in views]), labels)


def cosine(case: BenchmarkCase) -> Loss:
    """The negative cosine of two views (SimSiam, BYOL) by lightly: no negatives, so no product of B x B."""
    criterion = load("lightly").NegativeCosineSimilarity()
    return lambda views: criterion(eager.single(views[0]), eager.single(views[1]))


def supcon(case: BenchmarkCase) -> Loss:
    """SupCon by pytorch-metric-learning, of labels or of two views."""
    criterion = load("pytorch_metric_learning").SupConLoss(temperature=TEMPERATURE)
    if case.problem.loss == "supervised_cacr_loss":
        return lambda embeddings, labels: criterion(eager.single(embeddings), labels)
    labels = torch.arange(case.problem.shape["B"], device=case.device).repeat(2)
    return lambda views: criterion(torch.cat([eager.single(view) for view in views]), labels)


def own_ntxent(case: BenchmarkCase) -> Loss:
    """NT-Xent in a few lines of PyTorch, as a module."""
    return lambda views: eager.ntxent(views, TEMPERATURE)
