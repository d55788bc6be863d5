"""Backend "torch" computes blocks of queries and keys; only large problems have several, but for these small ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cacr_kernels import supervised_cacr_loss
from cacr_kernels.backends import torch as blocks
from cacr_kernels.types import OTHER, ContrastSpec
from tests.agreement import assert_agree, each_loss, run, small_inputs


@pytest.fixture(params=[1, 7, 30, 90])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs of a block: parts of the keys of one query, a few queries with all keys, some pairs of views."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    monkeypatch.setattr(blocks, "FEWEST", 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_loss
def test_losses(loss: str, reduction: str, block: None) -> None:
    tensors = small_inputs(loss)
    expected = run(loss, tensors, "reference", reduction=reduction)
    assert_agree(run(loss, tensors, "torch", reduction=reduction), expected, 1e-10)


@pytest.mark.parametrize("options", [{"cost": "rbf"}, {"pairing": "pooled"}, {"pairing": "ordered"}], ids=str)
def test_options_of_views(options: dict[str, Any], block: None) -> None:
    tensors = small_inputs("cacr")
    assert_agree(run("cacr", tensors, "torch", **options), run("cacr", tensors, "reference", **options), 1e-10)


def test_small_pairs_of_views_are_taken_together() -> None:
    """Of V views there are V^2 pairs: of these 2,016 of 16 rows with 128 features, 64 are one block."""
    index = [x for x in range(64) for _ in range(x)], [y for x in range(64) for y in range(x)]
    spec = ContrastSpec(None, None, [OTHER], *index)
    z = torch.empty(64, 16, 128)
    found = list(blocks.blocks(spec, z, z))
    assert len(found) == 32
    assert [i for part in found for i in range(2016)[part.pairs]] == list(range(2016))
    assert len(list(blocks.blocks(spec, z.to("meta"), z.to("meta")))) == 2016  # a device must not be waited for


def test_an_embedding_is_not_its_own_positive(block: None) -> None:
    """Of a class of all: in any block of queries, in any block of keys."""
    z = torch.randn(13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for labels in (torch.zeros(13, dtype=torch.int64), torch.arange(13) % 2):
        found, expected = (supervised_cacr_loss(z, labels, backend=backend) for backend in ("torch", "reference"))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, expected)))
