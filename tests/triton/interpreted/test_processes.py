"""The gathered losses on the Triton backend, in Triton's interpreter: two processes compute what one does."""

from __future__ import annotations

from pathlib import Path

import torch

from cacr_kernels import distributed
from cacr_kernels.testing import Case
from cacr_kernels.verify_distributed import Row, compare
from tests.distributed.processes import in_processes

RANKS = 2
TAUS = {"tau_pos": 1.3, "tau_neg": 0.7}
CASES = (
    Case("cacr_loss", {"V": 2, "B": RANKS * 5, "D": 7}, TAUS),
    Case("cacr_loss", {"V": 3, "B": RANKS * 3, "D": 5}, TAUS | {"pairing": "pooled", "normalize": True}),
    Case("cacr_loss", {"V": 2, "B": RANKS * 5, "D": 7}, TAUS | {"cost": "rbf"}),
    Case("cacr_queue_loss", {"V": 2, "B": RANKS * 3, "D": 5, "K": 7}, TAUS),
    Case("cacr_momentum_loss", {"V": 2, "B": RANKS * 4, "D": 5, "M": RANKS * 6}, {"temperature": 0.8, "cost": "rbf"}),
    Case("supervised_cacr_loss", {"B": RANKS * 5, "D": 7, "M": 0, "C": 3}, TAUS),
)


def on_each_rank() -> list[Row]:
    """The worst quantity of each case; rank 0 compares."""
    here = torch.device("cpu")
    return [compare(case, "triton", torch.float64, distributed.world(), here) for case in CASES]


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Values and gradients, of temperatures too, to 1e-12 in float64."""
    first, _ = in_processes(RANKS, tmp_path, on_each_rank)
    assert [(row.backend, row.dtype) for row in first] == [("triton", "float64")] * len(CASES)
    assert [row for row in first if not row.ok] == []
    assert any(row.error > 0 for row in first)
