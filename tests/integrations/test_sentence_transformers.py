"""The loss of sentence-transformers: its value, the trainer, the model card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from cacr_kernels.integrations.sentence_transformers import CACRLoss

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", "from", "home"]


def model() -> SentenceTransformer:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def columns(count: int, negatives: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(count, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2 + negatives)
    ]


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_definition(negatives: int) -> None:
    """Negatives of a row: the positives of the others, and all hard negatives, in one softmax."""
    given = columns(5, negatives)
    found = CACRLoss(model(), tau_neg=4.0, alpha=1.5, beta=0.7).compute_loss_from_embeddings(given)
    a, p, *hard = (torch.nn.functional.normalize(x, dim=-1) for x in given)
    rows = []
    for i in range(5):
        others = torch.cat([p[:i], p[i + 1 :], *hard])
        cost = (a[i] - others).square().sum(-1)
        rows.append(1.5 * (a[i] - p[i]).square().sum() - 0.7 * ((-4.0 * cost).softmax(0) * cost).sum())
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x, given) for x in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().sum() > 0


def test_one_column_is_refused() -> None:
    with pytest.raises(ValueError, match="needs anchors and positives, got 1"):
        CACRLoss(model()).compute_loss_from_embeddings(columns(3, 0)[:1])


def test_trainer(tmp_path: Path) -> None:
    """It learns, and the model card names the options and the paper."""
    encoder = model()
    loss = CACRLoss(encoder, tau_neg=5.0)
    rows = [(" ".join(WORDS[i : i + 3]), " ".join(WORDS[i + 1 : i + 4]), WORDS[-i]) for i in range(1, 9)]
    anchors, positives, negatives = map(list, zip(*rows, strict=True))
    data = Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})
    features = [encoder.tokenize(column) for column in (anchors, positives, negatives)]
    before = loss(features).item()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=8, per_device_train_batch_size=4, learning_rate=0.05,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(model=encoder, args=arguments, train_dataset=data, loss=loss).train()
    assert loss(features).item() < before - 0.05
    encoder.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "CACRLoss" in card
    assert '"tau_neg": 5.0' in card
    assert "Contrastive Attraction and Contrastive Repulsion" in card
