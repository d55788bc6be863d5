"""``python -m cacr_kernels.verify --distributed``: do several processes compute the loss of one?

    torchrun --nproc-per-node 4 -m cacr_kernels.verify --distributed     with the backend of the device: gloo or nccl
    python -m cacr_kernels.verify --distributed --processes 4            starts the processes itself

Every case is one batch. Its parts go to the ranks, and what they return is put together: values, gradients of
features, and gradients of temperatures, which have to be the same on all ranks. In float64 the result is compared with
one process (to ``EXACT``), in float32 with the definition, by the rule of :mod:`cacr_kernels.testing`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import distributed, functional, testing
from .cases import Maker
from .report import group_of, print_columns
from .testing import DIFFERENTIABLE, TEMPERATURES, Case

EXACT = 1e-12  # in float64, relative to the largest entry
V, B, D, K = 3, 4, 5, 7  # of one rank
REFERENCES, EXTRA = 6, 2  # of one rank; momentum keys beside those of the queries


class Row(NamedTuple):
    """The quantity of a case whose error is the largest share of its tolerance."""

    backend: str
    dtype: str
    group: str
    case: str
    quantity: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it is right (not if the error is NaN)."""
        return self.error <= self.tolerance


def cases(world: int) -> list[Case]:
    """Every loss with every option that changes what is gathered, reduced or counted; batches of ``world`` parts."""
    found = [*_of_views(world), *_of_queues(world)]
    taus: dict[str, Any] = {"tau_pos": 1.3, "tau_neg": 0.7}
    for cost in ("rbf", "sqeuclidean"):
        for reduction in ("mean", "sum", "none"):
            shape = {"V": V, "B": world * B, "D": D, "M": world * (B + EXTRA)}
            options = {"temperature": 0.8, "cost": cost, "reduction": reduction}
            found.append(Case("cacr_momentum_loss", shape, options))
    for references in (0, REFERENCES):
        for reduction in ("mean", "sum", "none"):
            shape = {"B": world * B, "D": D, "M": world * references, "C": 3}
            found.append(Case("supervised_cacr_loss", shape, taus | {"reduction": reduction}))
    for reduction in ("mean", "sum", "none"):
        shape, options = {"B": world * B, "D": D, "M": 0, "C": 3}, taus | {"reduction": reduction, "ignore_index": 1}
        found.append(Case("supervised_cacr_loss", shape, options))
    shape = {"B": world * B, "D": D, "M": world * REFERENCES, "C": 3}
    for options in (taus, taus | {"ignore_index": 2}):
        found.append(Case("supervised_cacr_loss", shape, options, data=_with_queries_in_the_reference_set(world)))
    # labels that one rank alone has, and queries without a positive
    found.append(Case("supervised_cacr_loss", {"B": world * B, "D": D, "M": 0, "C": world * B}, taus))
    found.append(Case("supervised_cacr_loss", {"B": world, "D": D, "M": 0, "C": 2}, taus))
    return found


def _with_queries_in_the_reference_set(world: int) -> Maker:
    """Every other query is a row of the part of the reference set that its rank holds."""

    def inputs(seed: int) -> dict[str, Tensor]:
        shape = {"B": world * B, "D": D, "M": world * REFERENCES, "C": 3}
        i = torch.arange(world * B, dtype=torch.int64, device="cpu")
        rows = i // B * REFERENCES + i % B
        found = testing.make_inputs(Case("supervised_cacr_loss", shape, {}), seed)
        return found | {"ref_index": torch.where(i % 2 == 0, rows, -1)}

    return inputs


def _of_views(world: int) -> Iterator[Case]:
    taus: dict[str, Any] = {"tau_pos": 1.3, "tau_neg": 0.7, "alpha": 0.9, "beta": 1.1}
    for pairing in ("unordered", "ordered", "pooled"):
        for cost in ("sqeuclidean", "rbf"):
            options = taus | {"pairing": pairing, "cost": cost}
            yield Case("cacr_loss", {"V": V, "B": world * B, "D": D}, options)
            yield Case("cacr_loss", {"V": 2, "B": world * B, "D": D}, options | {"normalize": True}, data="long")
            # of two ranks each query has one negative, and temperatures no effect but what is rounded
            yield Case("cacr_loss", {"V": 2, "B": world, "D": D}, options, learnable=world > 2)
        if pairing != "pooled":
            yield Case("cacr_loss", {"V": V, "B": world * B, "D": D}, taus | {"pairing": pairing, "tau_plus": 0.1})
        for reduction in ("sum", "none"):
            yield Case(
                "cacr_loss", {"V": V, "B": world * B, "D": D}, taus | {"pairing": pairing, "reduction": reduction}
            )


def _of_queues(world: int) -> Iterator[Case]:
    taus: dict[str, Any] = {"tau_pos": 1.3, "tau_neg": 0.7}
    shape = {"V": V, "B": world * B, "D": D, "K": K}
    for weight_grad in ("in_batch", "full", "none"):
        for in_batch in (True, False):
            yield Case("cacr_queue_loss", shape, taus | {"weight_grad": weight_grad, "in_batch": in_batch})
    for reduction in ("sum", "none"):
        yield Case("cacr_queue_loss", shape, taus | {"reduction": reduction})
    yield Case("cacr_queue_loss", shape | {"K": 0}, taus)
    yield Case("cacr_queue_loss", shape, taus | {"normalize": True}, data="long")


# ---- the parts of a batch --------------------------------------------------------------------------------------------
def part(name: str, x: Tensor, group: distributed.Group) -> Tensor:
    """What this rank holds of an argument of the whole batch."""
    if name == "queue":
        return x
    dim = 0 if x.dim() < 3 else 1
    each = x.shape[dim] // group.size
    return x.narrow(dim, group.rank * each, each)


def momentum_part(keys: Tensor, group: distributed.Group) -> tuple[Tensor, int]:
    """Of the keys, those of all queries first, what this rank passes: its own between others; and their place."""
    positive, others = keys.split([group.size * B, group.size * EXTRA])
    mine = part("keys", others, group)
    return torch.cat([mine[:1], part("keys", positive, group), mine[1:]]), 1


def quantities(case: Case, inputs: dict[str, Tensor], backend: str, group: distributed.Group) -> dict[str, Tensor]:
    """Loss and gradients of the batch ``inputs`` as the ranks find them together; compare ``actual_quantities``."""
    own = {name: part(name, x, group) for name, x in inputs.items()}
    options = dict(case.options)
    if case.loss == "cacr_momentum_loss":
        own["keys"], options["key_offset"] = momentum_part(inputs["keys"], group)
    if "ref_index" in own:
        rows = own["ref_index"]
        own["ref_index"] = torch.where(rows < 0, rows, rows - group.rank * len(own["ref_embeddings"]))
    tensors, options = testing.leaves_of(case._replace(options=options), own)
    loss = getattr(functional, case.loss)(**tensors, **options, backend=backend, gather_distributed=True)
    whole = loss.new_empty((*loss.shape[:-1], group.size * loss.shape[-1]) if loss.dim() else ())
    incoming = testing.incoming_gradient(case, inputs, whole)
    if loss.dim():
        incoming = incoming.narrow(-1, group.rank * loss.shape[-1], loss.shape[-1])
    gradients = testing.gradients_of(loss, tensors, incoming.contiguous())
    share = 1 / group.size if case.options.get("reduction", "mean") == "mean" else 1.0
    values = distributed.stacked(loss, group)
    found = {"loss": values.sum(0) * share if not loss.dim() else values.movedim(0, -2).flatten(-2)}
    for name in DIFFERENTIABLE:
        if name in gradients:
            found[name] = distributed.in_order_of_ranks(gradients[name], group) * share
    for name in TEMPERATURES:
        if name in gradients:
            of_ranks = distributed.stacked(gradients[name], group)
            same = (of_ranks == of_ranks[0]).all()
            found[name] = torch.where(same, of_ranks[0] * (share * group.size), torch.nan)
    return found


def cases_in(dtype: torch.dtype, world: int) -> list[Case]:
    """The rule for float32 knows rows and their mean, not their sum, nor rows that are ignored."""

    def known(case: Case) -> bool:
        reduction = case.options.get("reduction", "mean")
        return reduction == "mean" or (reduction == "none" and "ignore_index" not in case.options)

    return [case for case in cases(world) if dtype == torch.float64 or known(case)]


# ---- comparison ------------------------------------------------------------------------------------------------------
def compare(case: Case, backend: str, dtype: torch.dtype, group: distributed.Group, device: torch.device) -> Row:
    """The worst quantity of a case. Only rank 0 compares; the row of another has the error 0."""
    first = group.rank == 0
    errors: dict[str, tuple[float, float]] = {}
    if dtype == torch.float64:
        inputs = testing.rounded(testing.make_inputs(case), dtype, device)
        found = quantities(case, inputs, backend, group)
        if first:
            truth = testing.actual_quantities(case, inputs, backend)
            errors = {name: (testing.error(found[name], exact), EXACT) for name, exact in truth.items()}
    else:
        draws = [testing.rounded(testing.make_inputs(case, seed), dtype, device) for seed in range(testing.DRAWS)]
        actual = [quantities(case, inputs, backend, group) for inputs in draws]
        if first:
            expected = testing.expect(case, dtype, device)
            for name, yardstick in expected.yardstick.items():
                measured = [draw.errors(found)[name] for draw, found in zip(expected.draws, actual, strict=True)]
                errors[name] = max(measured), testing.tolerance(yardstick, dtype)
    name, (error, limit) = max(errors.items(), key=lambda item: _share(*item[1]), default=("loss", (0.0, EXACT)))
    return Row(backend, str(dtype).removeprefix("torch."), group_of(case), case.name, name, error, limit)


def _share(error: float, limit: float) -> float:
    return math.inf if math.isnan(error) else error / limit


# ---- the command -----------------------------------------------------------------------------------------------------
class Order(NamedTuple):
    """What is to be checked: ``quick`` is every fourth case; ``report`` is a file, if one is wanted."""

    backends: list[str]
    device: str
    quick: bool = False
    report: str | None = None


def main(order: Order, processes: int | None) -> int:
    """Compares in the processes of torchrun, or in ``processes`` that it starts; returns the exit status."""
    if processes is None:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
        if missing:
            raise ValueError("--distributed: start it with torchrun --nproc-per-node N -m, or give --processes N")
        return run_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, order)
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    multiprocessing: Any = torch.multiprocessing
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, Path(folder) / "store", order)
        try:
            multiprocessing.spawn(_process, arguments, nprocs=processes)
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
            if "exit code 1" not in str(error):
                print(f"cacr-verify: {error}", file=sys.stderr)
            return 1
    return 0


def _process(rank: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    sys.exit(run_rank(rank, *arguments))


def run_rank(rank: int, size: int, store: Path | None, order: Order) -> int:
    """What one process does; the exit status is the same on all ranks."""
    device = torch.device(order.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        torch.cuda.set_device(device)
    with distributed.connected(device, store, rank, size) as group, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows: list[Row] = []
        for backend in order.backends:
            for dtype in (torch.float64, torch.float32):
                for case in cases_in(dtype, size)[:: 4 if order.quick else 1]:
                    try:
                        rows.append(compare(case, backend, dtype, group, device))
                    except Exception:  # the others wait in a collective: they end with this process
                        print(f"FAILED on rank {rank}: {backend} {dtype} {case.name}", file=sys.stderr)
                        traceback.print_exc()
                        os._exit(1)
        failed = sum(not row.ok for row in rows)
        failures = distributed.stacked(torch.tensor([failed], dtype=torch.int64, device=device), group)
        if rank == 0:
            print_rows(rows, size)
            if order.report:
                found = {"processes": size, "ok": not failed, "checks": [r._asdict() | {"ok": r.ok} for r in rows]}
                Path(order.report).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(failures.sum().item() > 0)


def print_rows(rows: list[Row], size: int) -> None:
    """A line for each backend, dtype and group of cases, and one for each failure."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.backend, row.dtype, row.group), []).append(row)
    lines = [("backend", "dtype", "loss", "checks", "worst error", "tolerance", "of", "")]
    for (backend, dtype, group), some in groups.items():
        worst = max(some, key=lambda row: _share(row.error, row.tolerance))
        failed = sum(not row.ok for row in some)
        error, tolerance = f"{worst.error:.1e}", f"{worst.tolerance:.1e}"
        verdict = f"{failed} FAILED" if failed else "ok"
        lines.append((backend, dtype, group, str(len(some)), error, tolerance, worst.quantity, verdict))
    print_columns(lines)
    wrong = [row for row in rows if not row.ok]
    for row in wrong:
        excess = f"error {row.error:.2e} > {row.tolerance:.2e}"
        print(f"FAILED {row.backend} {row.dtype}: {row.quantity} of {row.case}: {excess}")
    verdict = "NOT what one process computes" if wrong else "what one process computes"
    print(f"{size} processes: {len(rows)} checks: {verdict}")
