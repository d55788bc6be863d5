"""CACR as a loss of sentence-transformers, for its trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from .. import distributed
from ..functional import supervised_cacr_loss

CITATION = """
@article{zheng2023contrastive,
    title={Contrastive Attraction and Contrastive Repulsion for Representation Learning},
    author={Zheng, Huangjie and Chen, Xu and Yao, Jiangchao and Yang, Hongxia and Li, Chunyuan and Zhang, Ya and Zhang, Hao and Tsang, Ivor and Zhou, Jingren and Zhou, Mingyuan},
    journal={Transactions on Machine Learning Research},
    year={2023},
    url={https://arxiv.org/abs/2105.03746}
}
"""  # noqa: E501


class CACRLoss(nn.Module):
    """Anchors are attracted by their positives and repelled by the documents of all other rows.

    With c the squared distance of unit vectors, a_i the anchors, p_i their positives and n the negatives::

        loss = alpha mean_i c(a_i, p_i) - beta mean_i sum_j w_ij c(a_i, n_j),   w_ij = softmax_j(-tau_neg c(a_i, n_j))

    The negatives of an anchor are the positives of the other rows and the hard negatives of all rows, its own included,
    in one softmax. All get a gradient. An anchor has one positive, so ``tau_pos`` has no effect yet.

    Coming from ``MultipleNegativesRankingLoss(scale=s)``: take ``tau_neg = s / 2``, since c = 2 - 2 cos. The loss is
    usually negative.

    Args:
        model: the ``SentenceTransformer`` to train.
        tau_pos, tau_neg, alpha, beta: see :func:`cacr_kernels.supervised_cacr_loss`.
        gather_across_devices: negatives of all processes, see :func:`cacr_kernels.cacr_loss`, *Several processes*.
        backend: see :func:`cacr_kernels.cacr_loss`.

    Inputs:
        (anchor, positive) pairs, or with any number of hard negatives: (anchor, positive, negative_1, ...). No labels.

    Returns:
        From a call the loss, a scalar; its embeddings are [B, D] in each column.

    Raises:
        TypeError, ValueError: see :func:`cacr_kernels.supervised_cacr_loss`; fewer than two columns.

    Source: Zheng et al., TMLR 2023 (arXiv 2105.03746).

    For the trainer::

        model = SentenceTransformer("all-MiniLM-L6-v2")
        trainer = SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=CACRLoss(model, tau_neg=10.0))
        trainer.train()

    Example:
        >>> import torch
        >>> from cacr_kernels.integrations.sentence_transformers import CACRLoss
        >>> loss_fn = CACRLoss(torch.nn.Identity(), tau_neg=10.0)  # in the place of a model
        >>> anchors, positives = torch.randn(2, 8, 16)
        >>> loss_fn.compute_loss_from_embeddings([anchors, positives]).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        tau_pos: float = 1.0,
        tau_neg: float = 10.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        gather_across_devices: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.tau_pos, self.tau_neg, self.alpha, self.beta = tau_pos, tau_neg, alpha, beta
        self.gather_across_devices = gather_across_devices
        self.backend = backend

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch as the trainer hands it over; ``labels`` are not used."""
        return self.compute_loss_from_embeddings([self.model(x)["sentence_embedding"] for x in sentence_features])

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of the columns' embeddings [B, D]: anchors, positives, and any number of hard negatives."""
        if len(embeddings) < 2:
            raise ValueError(f"CACRLoss needs anchors and positives, got {len(embeddings)} columns")
        anchors, positives, *negatives = embeddings
        # A row is a class of its own on all ranks; hard negatives are in the class of no anchor.
        rows = torch.arange(anchors.shape[0], dtype=torch.int64, device=anchors.device)
        if self.gather_across_devices:
            rows = rows + distributed.world().rank * anchors.shape[0]
        nobody = torch.full_like(rows, -1).repeat(len(negatives))
        return supervised_cacr_loss(
            anchors,
            rows,
            ref_embeddings=torch.cat([positives, *negatives]),
            ref_labels=torch.cat([rows, nobody]),
            tau_pos=self.tau_pos,
            tau_neg=self.tau_neg,
            alpha=self.alpha,
            beta=self.beta,
            normalize=True,
            gather_distributed=self.gather_across_devices,
            backend=self.backend,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card lists them."""
        names = ("tau_pos", "tau_neg", "alpha", "beta", "gather_across_devices")
        return {name: getattr(self, name) for name in names}

    @property
    def citation(self) -> str:
        """The paper in BibTeX, for the model card."""
        return CITATION
