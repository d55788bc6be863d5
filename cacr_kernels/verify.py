"""``python -m cacr_kernels.verify`` (``cacr-verify``): are the backends right on this machine?

For each backend and dtype, every case of :mod:`cacr_kernels.testing`: loss and gradients against the float64 reference,
beside the error of the eager form; then ``gradcheck`` of the backend itself in float64. Exit status: 0 all right, 1 a
check failed, 2 the arguments cannot be used. With ``--distributed`` see :mod:`cacr_kernels.verify_distributed`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, testing, verify_distributed
from ._version import __version__
from .backends import self_check
from .backends.library import active_isa
from .backends.table import TABLE, available_backends, named
from .report import group_of, print_columns

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Row(NamedTuple):
    """A line of the table: a group of checks, and the one whose error is the largest share of its tolerance."""

    backend: str
    dtype: str
    group: str
    checks: int
    failures: int
    quantity: str
    case: str
    error: float
    yardstick: float
    tolerance: float


def results_of(case: testing.Case, backend: str, dtype: str, device: str) -> list[testing.Result]:
    """All checks of a case; an exception counts as a failure that carries its message."""
    try:
        return testing.compare(case, backend, DTYPES[dtype], device)
    except Exception as error:  # a backend under test may fail in any way; it is reported, not hidden
        return [testing.Result(f"{type(error).__name__}: {error}", math.inf, 0.0, 0.0)]


def share_of_tolerance(result: testing.Result) -> float:
    """The error in units of the tolerance; what is not a number is infinitely wrong."""
    if math.isnan(result.error) or result.tolerance <= 0:
        return math.inf
    return result.error / result.tolerance


def check_group(
    backend: str, dtype: str, group: str, cases: list[testing.Case], device: str, advance: Callable[[], None]
) -> Row:
    """Compares all cases of a group with the reference, calling ``advance`` after each."""
    found = []
    for case in cases:
        found += [(case, result) for result in results_of(case, backend, dtype, device)]
        advance()
    case, worst = max(found, key=lambda check: share_of_tolerance(check[1]))
    failures = sum(not result.ok for _, result in found)
    numbers = worst.error, worst.yardstick, worst.tolerance
    return Row(backend, dtype, group, len(found), failures, worst.quantity, case.name, *numbers)


class Gradcheck(NamedTuple):
    """A ``torch.autograd.gradcheck``: of which loss, with which options, sizes and tensor temperatures.

    ``sizes``: queue entries of the queue loss, V, B and M of the momentum loss, references of the supervised loss.
    """

    label: str
    loss: str
    options: dict[str, Any]
    sizes: tuple[int, ...] = ()
    temperatures: tuple[str, ...] = ("tau_pos", "tau_neg")

    def run(self, backend: str, device: str) -> bool:
        """Whether the gradients w.r.t. embeddings and temperatures are those of finite differences, in float64."""
        leaves, fixed = self.tensors(device)

        def loss_of(*tensors: Tensor) -> Tensor:
            arguments = dict(zip(leaves, tensors, strict=True)) | fixed | self.options
            result: Tensor = getattr(functional, self.loss)(**arguments, backend=backend)
            return result

        inputs = tuple(leaf.requires_grad_() for leaf in leaves.values())
        return bool(torch.autograd.gradcheck(loss_of, inputs, raise_exception=False))

    def tensors(self, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Arguments that are differentiated, and arguments that are not."""
        generator = torch.Generator().manual_seed(1)

        def make(*shape: int) -> Tensor:
            rows = torch.randn(shape, generator=generator, dtype=torch.float64)
            return rows.div(shape[-1] ** 0.5).to(device)

        fixed: dict[str, Tensor] = {}
        if self.loss == "cacr_loss":
            leaves = {"views": make(3, 5, 4)}
        elif self.loss == "cacr_queue_loss":
            leaves, fixed = {"queries": make(3, 5, 4)}, {"keys": make(3, 5, 4), "queue": make(*self.sizes, 4)}
        elif self.loss == "cacr_momentum_loss":
            V, B, M = self.sizes
            leaves, fixed = {"queries": make(V, B, 4)}, {"keys": make(M, 4)}
        else:
            leaves, fixed = {"embeddings": make(7, 4)}, {"labels": torch.arange(7, device=device) % 3}
            if self.sizes:
                (M,) = self.sizes
                leaves["ref_embeddings"], fixed["ref_labels"] = make(M, 4), torch.arange(M, device=device) % 4
        for name, value in zip(self.temperatures, (0.8, 1.3), strict=False):
            leaves[name] = torch.tensor(value, dtype=torch.float64, device=device)
        return leaves, fixed


def gradchecks() -> list[Gradcheck]:
    """Every loss where its gradient is a derivative of its value.

    It is not where weights that vary are detached. ``cacr_queue_loss`` is checked with constant weights instead
    (temperature 0; all of its attraction), or with nothing detached (weight_grad="full", no queue);
    ``cacr_momentum_loss`` with one view, so that p = 1, and under "sqeuclidean" with one negative, so that w = 1. The
    rest of these two is compared with the reference, whose own derivation is tested.
    """
    checks = []
    for pairing in ("unordered", "ordered", "pooled"):
        for cost in ("sqeuclidean", "rbf"):
            checks.append(Gradcheck(f"cacr_loss {pairing} {cost}", "cacr_loss", {"pairing": pairing, "cost": cost}))
        for reduction in ("none", "sum"):
            options = {"pairing": pairing, "reduction": reduction}
            checks.append(Gradcheck(f"cacr_loss {pairing} {reduction}", "cacr_loss", options))
    name, neg = "cacr_queue_loss", ("tau_neg",)
    for weight_grad in ("in_batch", "none"):
        constant: dict[str, Any] = {"weight_grad": weight_grad, "tau_pos": 0.0, "tau_neg": 0.0}
        checks.append(Gradcheck(f"{name} {weight_grad}, constant weights", name, constant, (6,), ()))
    full: dict[str, Any] = {"weight_grad": "full", "tau_pos": 0.0}
    checks += [
        Gradcheck(f"{name} in_batch, no queue", name, {"weight_grad": "in_batch", "tau_pos": 0.0}, (0,), neg),
        Gradcheck(f"{name} full", name, full, (6,), neg),
        Gradcheck(f"{name} full, queue only", name, full | {"in_batch": False}, (6,), neg),
        Gradcheck(f"{name} full none", name, full | {"reduction": "none"}, (6,), neg),
    ]
    name = "cacr_momentum_loss"
    for cost, sizes in (("rbf", (1, 5, 9)), ("sqeuclidean", (1, 2, 2))):
        for reduction in ("mean", "none"):
            single: dict[str, Any] = {"cost": cost, "reduction": reduction, "normalize": True}
            checks.append(Gradcheck(f"{name} {cost} {reduction}", name, single, sizes, ("temperature",)))
    name = "supervised_cacr_loss"
    checks += [Gradcheck(f"{name} {r}", name, {"reduction": r}) for r in ("mean", "none", "sum")]
    return [*checks, Gradcheck(f"{name} reference set", name, {}, (9,))]


class Progress:
    """Says on stderr what is being checked and how far it is.

    On a terminal that is one line which changes. In a file or a pipe it is a line now and then.
    """

    PAUSE = 10.0  # seconds between two lines in a file

    def __init__(self, total: int) -> None:
        self._total, self._done, self._text = total, 0, ""
        self._terminal = sys.stderr.isatty()
        self._last = -math.inf

    def now(self, text: str) -> None:
        """Shows what is checked next."""
        self._text = text
        self._show()

    def advance(self) -> None:
        """Counts one of ``total`` steps as done."""
        self._done += 1
        self._show()

    def close(self) -> None:
        """Clears the line of a terminal, so that what is printed next starts at its beginning."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        line = f"{100 * self._done // max(1, self._total):3d} %  {self._text}"
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif (now := time.monotonic()) - self._last >= self.PAUSE:
            self._last = now
            print(line, file=sys.stderr, flush=True)


def run_checks(names: list[str], device: str, quick: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """All comparisons with the reference and all gradchecks of the backends ``names``."""
    groups: dict[str, list[testing.Case]] = {}
    for case in testing.cases(quick):
        groups.setdefault(group_of(case), []).append(case)
    checks = gradchecks()
    comparisons = len(DTYPES) * sum(len(cases) for cases in groups.values())
    rows, numeric = [], []
    with contextlib.closing(Progress(len(names) * (comparisons + len(checks)))) as progress:
        for name in names:
            for dtype in DTYPES:
                for group, cases in groups.items():
                    progress.now(f"{name} {dtype} {group}")
                    rows.append(check_group(name, dtype, group, cases, device, progress.advance))
            for check in checks:
                progress.now(f"{name} gradcheck {check.label}")
                numeric.append(run_gradcheck(name, check, device))
                progress.advance()
    return rows, numeric


def run_gradcheck(backend: str, check: Gradcheck, device: str) -> dict[str, Any]:
    """The outcome of one gradcheck, as the report has it."""
    try:
        problem = "" if check.run(backend, device) else "numerical and analytical gradients differ"
    except Exception as error:  # as in results_of
        problem = f"{type(error).__name__}: {error}"
    return {"backend": backend, "check": check.label, "ok": not problem, "problem": problem}


def print_table(rows: list[Row]) -> None:
    """One line per backend, dtype and group, in columns."""
    lines = [("backend", "dtype", "loss", "checks", "worst error", "eager", "tolerance", "of", "")]
    for r in rows:
        numbers = (f"{r.error:.1e}", f"{r.yardstick:.1e}", f"{r.tolerance:.1e}")
        verdict = f"{r.failures} FAILED" if r.failures else "ok"
        lines.append((r.backend, r.dtype, r.group, str(r.checks), *numbers, r.quantity, verdict))
    print_columns(lines)


def environment(device: str) -> dict[str, Any]:
    """Versions, device, threads and instruction set that the report was made with."""
    return {
        "cacr_kernels": __version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "instruction_set": active_isa(),
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command, or an exit with its usage."""
    parser = argparse.ArgumentParser(prog="cacr-verify", description="Compare the backends with the float64 reference.")
    parser.add_argument("--backend", action="append", help="check only this backend (may be repeated)")
    parser.add_argument("--device", default="cpu", help="device of the tensors (default: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--distributed", action="store_true", help="compare several processes with one; see torchrun")
    parser.add_argument("--processes", type=int, metavar="N", help="start N processes for --distributed, no torchrun")
    return parser.parse_args(argv)


def usable(asked: list[str] | None, device: str) -> tuple[list[str], list[str]]:
    """Backends to check, and why others are not; raises ``ValueError`` for one that was asked for and cannot run."""
    where = torch.device(device)
    torch.empty(0, device=where)
    reasons = {b.name: b.why_not(where) for b in TABLE if b.operators}  # without any it is the definition
    for name in asked or []:
        if name not in reasons:
            raise ValueError(f"--backend {name}: unknown or not to be checked; accepted: {', '.join(reasons)}")
        if reasons[name] is not None:
            raise ValueError(f"--backend {name} cannot run here: {reasons[name]}")
    chosen = [name for name, why in reasons.items() if why is None and (not asked or name in asked)]
    return chosen, [f"{name} is not checked: {why}" for name, why in reasons.items() if why is not None and not asked]


def main(argv: list[str] | None = None) -> int:
    """Runs the checks, prints the results, writes the report; returns the exit status."""
    options = parse_arguments(argv)
    try:
        names, skipped = usable(options.backend, options.device)
        if options.json:
            Path(options.json).touch()  # now, not after minutes
        if options.distributed or options.processes is not None:
            order = verify_distributed.Order(names, options.device, options.quick, options.json)
            return verify_distributed.main(order, options.processes)
    except (ValueError, RuntimeError, OSError, AssertionError) as error:  # torch asserts that it knows CUDA
        print(f"cacr-verify: {error}", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, numeric = run_checks(names, options.device, options.quick)
    about = environment(options.device)
    good = print_results(about, rows, numeric)
    for line in skipped:
        print(line)
    if options.json:
        report = {
            "environment": about,
            "backends": available_backends(),
            "ok": good,
            "checks": [r._asdict() | {"ok": r.failures == 0} for r in rows],
            "gradcheck": numeric,
        }
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    if not options.quick:
        keep_verdicts(rows, numeric, torch.device(options.device))
    count = sum(r.checks for r in rows)
    verdict = "all within tolerance" if good else "NOT within tolerance"
    print(f"{' and '.join(names)}: {count} checks, {len(numeric)} gradchecks: {verdict}")
    return 0 if good else 1


def keep_verdicts(rows: list[Row], numeric: list[dict[str, Any]], device: torch.device) -> None:
    """Spares ``"auto"`` the self-check of the backends that are right in every type."""
    wrong = {r.backend for r in rows if r.failures} | {n["backend"] for n in numeric if not n["ok"]}
    for name in {r.backend for r in rows} - wrong:
        self_check.keep_verified(named(name), device, list(DTYPES.values()))


def print_results(about: dict[str, Any], rows: list[Row], numeric: list[dict[str, Any]]) -> bool:
    """Prints the table and a line for every failure; returns whether there is none."""
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print_table(rows)
    wrong = [r for r in rows if r.failures]
    wrong_gradients = [n for n in numeric if not n["ok"]]
    for r in wrong:
        print(f"FAILED {r.backend} {r.dtype}: {r.quantity} of {r.case}: error {r.error:.2e} > {r.tolerance:.2e}")
    for n in wrong_gradients:
        print(f"FAILED {n['backend']} gradcheck: {n['check']}: {n['problem']}")
    return not (wrong or wrong_gradients)


if __name__ == "__main__":
    sys.exit(main())
