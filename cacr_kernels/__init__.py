"""CACR, contrastive attraction and contrastive repulsion (Zheng et al., TMLR 2023), on any device.

>>> import torch
>>> from cacr_kernels import CACRLoss
>>> views = [torch.randn(8, 16, requires_grad=True) for _ in range(2)]
>>> CACRLoss()(*views).backward()
"""

from ._version import __version__
from .backends.table import available_backends
from .chunked import chunked_backward
from .functional import cacr_loss, cacr_momentum_loss, cacr_queue_loss, supervised_cacr_loss
from .modules import CACRLoss, CACRMomentumLoss, CACRQueueLoss, SupervisedCACRLoss
from .types import CACRParts
from .weights import CACRWeights, cacr_weights

__all__ = [
    "CACRLoss",
    "CACRMomentumLoss",
    "CACRParts",
    "CACRQueueLoss",
    "CACRWeights",
    "SupervisedCACRLoss",
    "__version__",
    "available_backends",
    "cacr_loss",
    "cacr_momentum_loss",
    "cacr_queue_loss",
    "cacr_weights",
    "chunked_backward",
    "supervised_cacr_loss",
]
