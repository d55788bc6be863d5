"""A backend that is wrong on one rank only: that rank says so, and its results are those of the others."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cacr_kernels
from cacr_kernels.backends import self_check, table
from cacr_kernels.backends.entry import Backend, registered
from cacr_kernels.operators.registry import implement, operator

from .processes import in_processes

pytestmark = pytest.mark.skipif(
    cacr_kernels.available_backends()["cpu"] is not None, reason="needs the compiled CPU library"
)
RANKS, BAD = 2, 1
V, B, D = 2, 5, 3
TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 1e-2}


class Found(NamedTuple):
    """Of a loss on one rank, by "auto" and by the definition: the loss and the gradient of the rows."""

    by_auto: tuple[Tensor, Tensor]
    expected: tuple[Tensor, Tensor]


def spoiled(name: str) -> None:
    """The operator is that of the CPU, wrong on one rank."""

    def compute(*arguments: Any) -> Any:
        found = operator(f"{name}_cpu")(*arguments)
        return (found[0] * 1.01, *found[1:]) if dist.get_rank() == BAD else found

    implement(f"{name}_spoiled", compute)


def losses() -> dict[str, Any]:
    labels = torch.arange(B) % 2
    return {
        "cacr": lambda z, **o: cacr_kernels.cacr_loss(z, **o),
        "ordered": lambda z, **o: cacr_kernels.cacr_loss(z, pairing="ordered", reduction="sum", **o),
        "rbf": lambda z, **o: cacr_kernels.cacr_loss(z, cost="rbf", **o),
        "queue": lambda z, **o: cacr_kernels.cacr_queue_loss(z, z.detach(), z.new_ones(4, D), **o),
        "supervised": lambda z, **o: cacr_kernels.supervised_cacr_loss(z[0], labels, **o),
    }


def on_a_rank(folder: str) -> tuple[list[str], dict[tuple[torch.dtype, str], Found]]:
    """In float64 and in a half type, which the backends take in different types."""
    os.environ["CACR_CACHE_DIR"] = f"{folder}/of rank {dist.get_rank()}"
    os.environ.pop("CACR_SELF_CHECK", None)
    operators = ("cacr", "contrast", "detached_keys", "repulsion")
    about = {"check_first": lambda device: {"device": "made up"}}
    backend = Backend("spoiled", "for tests", lambda device: None, operators=operators, implement=spoiled, **about)
    table.TABLE = (*table.TABLE, registered(backend))
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randn(V, B, D, dtype=torch.float64, generator=generator)
    found = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for dtype, (name, loss) in itertools.product(TOLERANCE, losses().items()):
            results = []
            for options in ({}, {"backend": "reference"}):
                z = rows.to(dtype, copy=True).requires_grad_()
                value = loss(z, gather_distributed=True, **options)
                value.backward()
                assert z.grad is not None
                results.append((value.detach(), z.grad))
            found[dtype, name] = Found(*results)
    assert {subject.backend for subject in self_check._verdicts} == {"spoiled"}
    return [str(w.message) for w in said], found


def test_one_rank_of_two_has_a_bad_device(tmp_path: Path) -> None:
    ranks = in_processes(RANKS, tmp_path, on_a_rank, str(tmp_path))
    told = [[text for text in said if "self-check" in text] for said, _ in ranks]
    assert told[1 - BAD] == []
    (warning,) = told[BAD]
    assert "does not pass its self-check on cpu of rank 1 of 2, and backend='torch' serves" in warning
    for _, found in ranks:
        assert len(found) == len(TOLERANCE) * len(losses())
        for (dtype, name), (by_auto, expected) in found.items():
            for mine, theirs in zip(by_auto, expected, strict=True):
                error = (mine - theirs).abs().max() / theirs.abs().max()
                assert error < TOLERANCE[dtype], f"{name} {dtype}"
