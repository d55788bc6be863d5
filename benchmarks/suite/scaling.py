"""Several processes: a step of a module on 1, 2 and 4 of them, what its collectives take, and what is sent.

The processes start once, over gloo, one thread each. A row is the step (loss and gradients) of one batch on the first
of them; all rows of all batches take turns in rounds, as in ``measure``, and the time of a round is that of its slowest
rank. The share of the collectives is measured in steps of their own: the time in which a rank starts a collective or
waits in one, for other ranks that are late too. Four processes on two cores are late by design.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark.utils.timer import timer as clock

from benchmarks.host import cores, quantile
from cacr_kernels import CACRLoss, distributed

from .cases import BenchmarkCase
from .gate import Check, Gate, agree, embeddings, threads
from .measure import Budget, Timing, order, plan
from .peak import Peaks
from .results import figures, record
from .rows import OURS, Row, Step
from .runner import Progress, RedGateError

PROCESSES = (1, 2, 4)
MOST = max(PROCESSES)
WATCHED = 7  # steps in which collectives are timed and bytes are counted
ONE = "1 process"
MIB = 2**20


# ---- what is watched -------------------------------------------------------------------------------------------------
# Bytes that a rank has to send, of W ranks, for a tensor of ``x`` bytes that it passes; more is the backend's choice.
NEEDED: dict[str, Callable[[float, int], float]] = {
    "all_gather_into_tensor": lambda x, W: (W - 1) * x,
    "reduce_scatter_tensor": lambda x, W: (W - 1) / W * x,
    "all_reduce": lambda x, W: 2 * (W - 1) / W * x,
    "wait_tensor": lambda x, W: 0.0,
}


class Collectives(TorchDispatchMode):
    """Counts the seconds that this rank spends in collectives, and the bytes that these need it to send."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seconds, self.bytes = size, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" not in func.namespace:
            return func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in NEEDED:
            raise NotImplementedError(f"{func}: NEEDED does not say how much it sends")
        begin = clock()
        found = func(*args, **(kwargs or {}))
        self.seconds += clock() - begin
        self.bytes += NEEDED[name](args[0].nbytes, self.size)
        return found


def written() -> int | None:
    """Bytes that this process has handed to files and sockets so far; ``None`` where the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


class Watched(NamedTuple):
    """One step of one rank: its seconds, those in collectives, bytes that these need, and bytes sent."""

    seconds: float
    collectives: float
    needed: float
    sent: float | None


# ---- rows: numbers of processes --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GroupRow(Row):
    """The first ``size`` processes, which share a batch; ``group`` is theirs, ``None`` outside these processes."""

    size: int = 1
    group: Any = None

    def part(self, x: Tensor) -> Tensor:
        """The instances of this rank, of [V, B, D]."""
        each = x.shape[1] // self.size
        return x[:, dist.get_rank() * each :][:, :each] if self.size > 1 else x

    def own_step(self, case: BenchmarkCase, inputs: dict[str, Tensor]) -> Step:
        """What is timed: the module with the views of this rank."""
        views = self.part(inputs["views"]).detach().clone().requires_grad_()
        shared: Any = {"gather_distributed": True, "process_group": self.group} if self.size > 1 else {}
        module = CACRLoss(**case.problem.options, **shared)

        def step() -> tuple[Tensor, ...]:
            views.grad = None
            loss = module(views)
            loss.backward()
            assert views.grad is not None
            return loss, views.grad

        return step

    def step(self, case: BenchmarkCase, inputs: dict[str, Tensor]) -> Step:
        """What is checked: loss and gradients of the whole batch, as the ranks find them together."""
        own = self.own_step(case, inputs)

        def step() -> tuple[Tensor, ...]:
            loss, gradient = own()
            if self.size == 1:
                return loss, gradient
            losses, gradients = self.of_all(loss.detach()), self.of_all(gradient)
            return torch.stack(losses).mean(), torch.cat(gradients, dim=1) / self.size

        return step

    def of_all(self, x: Tensor) -> list[Tensor]:
        """What each rank passes as ``x``."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous(), group=self.group)
        return found


def group_rows(make_group: Callable[[int], Any] = lambda size: None) -> list[GroupRow]:
    """A row for each number of processes."""

    def row(size: int) -> GroupRow:
        name = ONE if size == 1 else f"{size} processes"
        summary = "a module with gather_distributed=True"
        return GroupRow(name, OURS, summary, lambda case: None, module, size=size, group=make_group(size))

    return [row(size) for size in PROCESSES]


def module(case: BenchmarkCase) -> CACRLoss[Tensor]:
    """The loss of a case in one process."""
    return CACRLoss(**case.problem.options)


class GroupGate(Gate):
    """The gate, with instances that can be dealt out to all ranks; every rank of a group calls it at once."""

    def instance(self, case: BenchmarkCase, row: Row) -> BenchmarkCase:
        """The smaller instance that is checked."""
        return case.smaller(batch=15 * MOST)


# ---- in each process -------------------------------------------------------------------------------------------------
class Spent(NamedTuple):
    """Seconds of a call of one rank: by the clock, and of the processor in all its threads."""

    wall: float
    cpu: float


class Found(NamedTuple):
    """What a rank knows: red checks, errors of the green ones, and its times by (case, row), by round."""

    red: list[Check]
    checks: dict[tuple[str, str], Check]
    spent: dict[tuple[str, str], dict[int, Spent]]
    watched: dict[tuple[str, str], list[Watched]]


def check(cases: list[BenchmarkCase], rows: list[GroupRow]) -> list[Check]:
    """Errors of every row against float64, then at full size beside one process."""
    gate, found = GroupGate(), []
    for case in cases:
        inputs, alone = case.inputs(), rows[0].step(case, case.inputs())()
        for row in rows:
            dist.barrier()
            if dist.get_rank() < row.size:
                found.append(gate.check(case, row)._replace(case=case.key))
                outputs = row.step(case, inputs)()
                rough = agree(row, case, outputs, embeddings(inputs), alone)
                found += [] if rough.ok else [rough]
    return found


def measure(steps: dict[tuple[str, str], tuple[GroupRow, Step]], budget: Budget) -> dict[Any, dict[int, Spent]]:
    """Seconds per call of this rank by round, where it takes part."""
    first: dict[Any, float] = {}
    for key, (row, step) in steps.items():
        dist.barrier()
        if dist.get_rank() < row.size:
            step()
            begin = clock()
            step()  # as often on every rank: whether a call was slow, each of them would decide for itself
            first[key] = clock() - begin
    planned: list[Any] = [plan(first, budget) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(planned)  # rank 0 takes part in all
    rounds, calls, by_row = planned[0]
    found: dict[Any, dict[int, Spent]] = {key: {} for key in steps}
    for r in range(rounds):
        for key in order(list(steps), r):
            row, step = steps[key]
            dist.barrier()
            if r >= by_row[key] or dist.get_rank() >= row.size:
                continue
            step()  # the caches are those of the row before; and the ranks begin together
            begin, cpu = clock(), time.process_time()
            for _ in range(calls[key]):
                step()
            found[key][r] = Spent((clock() - begin) / calls[key], (time.process_time() - cpu) / calls[key])
    return found


def watch(row: GroupRow, step: Step) -> Watched:
    """A step in which collectives are timed."""
    before = written()
    with Collectives(row.size) as collectives:
        begin = clock()
        step()
        seconds = clock() - begin
    after = written()
    sent = None if before is None or after is None else float(after - before)
    return Watched(seconds, collectives.seconds, collectives.bytes, sent)


def _work(rank: int, folder: str, cases: list[BenchmarkCase], budget: Budget) -> None:
    here = torch.device("cpu")
    with threads(1), distributed.connected(here, Path(folder) / "store", rank, MOST):
        rows = group_rows(lambda size: dist.new_group(list(range(size))))
        checks = check(cases, rows)
        verdicts: list[Any] = [None] * MOST
        dist.all_gather_object(verdicts, [c for c in checks if not c.ok])
        red = [c for of_rank in verdicts for c in of_rank]
        found = Found(red, {(c.case, c.row): c for c in checks}, {}, {})
        if not red:
            steps = {
                (case.key, row.name): (row, row.own_step(case, case.inputs()) if rank < row.size else lambda: ())
                for case in cases
                for row in rows
            }
            found = found._replace(spent=measure(steps, budget), watched={key: [] for key in steps})
            for _ in range(WATCHED):
                for key, (row, step) in steps.items():
                    dist.barrier()
                    if rank < row.size:
                        found.watched[key].append(watch(row, step))
        torch.save(tuple(found), f"{folder}/rank{rank}.pt")


# ---- in the process of the command -----------------------------------------------------------------------------------
def run(
    cases: list[BenchmarkCase], budget: Budget, environment: dict[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    """All results. Raises ``RedGateError`` if any number of processes computes something else than one."""
    whole = Budget(budget.seconds * len(cases), budget.slow_share)
    progress(f"{MOST} processes measure {len(cases)} batches", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (folder, cases, whole), nprocs=MOST)
        ranks = [Found(*torch.load(f"{folder}/rank{rank}.pt", weights_only=False)) for rank in range(MOST)]
    if ranks[0].red:
        raise RedGateError(ranks[0].red)
    peaks = Peaks()
    for case in cases:
        peaks.see(case.arithmetic, 1, "cpu")
    rows = group_rows()
    return [_result(case, row, ranks, environment, peaks) for case in cases for row in rows]


def slowest(ranks: list[Found], case: BenchmarkCase, row: GroupRow) -> tuple[Timing, Timing]:
    """Seconds by round of the rank that took longest, and of the one that needed the processor longest."""
    of_ranks = [found.spent[case.key, row.name] for found in ranks[: row.size]]
    wall = {r: max(spent[r].wall for spent in of_ranks) for r in of_ranks[0]}
    return Timing(wall), Timing({r: max(spent[r].cpu for spent in of_ranks) for r in of_ranks[0]})


def _result(
    case: BenchmarkCase, row: GroupRow, ranks: list[Found], environment: dict[str, Any], peaks: Peaks
) -> dict[str, Any]:
    alone = group_rows()[0]
    wall, cpu = slowest(ranks, case, row)
    values = figures(case, row, wall, slowest(ranks, case, alone)[0])
    values["cpu_ms"] = 1e3 * cpu.quantile(0.5)
    watched = [step for found in ranks[: row.size] for step in found.watched[case.key, row.name]]
    values["processes"] = row.size
    values["collective_share"] = quantile([w.collectives / w.seconds for w in watched], 0.5)
    values["needed_mib"] = max(w.needed for w in watched) / MIB
    sent = [w.sent for w in watched if w.sent is not None]
    values["sent_mib"] = quantile(sent, 0.5) / MIB if sent else None
    peak = peaks.highest(case.arithmetic, 1, "cpu")
    of_all = peak.gflops * min(row.size, cores())
    values |= {"peak_gflops": of_all, "peak_source": peak.source, "fraction": values["gflops"] / of_all}
    check = ranks[0].checks[case.key, row.name]
    values |= {"loss_error": check.loss_error, "gradient_error": check.gradient_error}
    return record(case, row, row.name == ONE, environment, **values)
