"""``python -m cacr_kernels.verify`` (``cacr-verify``): are the backends right on this machine?

For each backend and dtype, every case of :mod:`cacr_kernels.testing`: loss and gradients against the float64 reference,
beside the error of the eager form; then ``gradcheck`` of the backend itself in float64. Exit status: 0 all right, 1 a
check failed, 2 the arguments cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, testing
from ._version import __version__
from .backends import library as _extension
from .backends.table import TABLE
from .backends.table import available_backends as backends

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Row(NamedTuple):
    """The worst check of a group: the one whose error is the largest share of its tolerance."""

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


def group_of(case: testing.Case) -> str:
    """The line of the table a case belongs to."""
    if case.loss == "cacr_loss":
        return f"cacr_loss {case.options.get('pairing', 'unordered')} {case.options.get('cost', 'sqeuclidean')}"
    return case.loss


def check_group(
    backend: str, dtype: str, group: str, cases: list[testing.Case], device: str, advance: Callable[[], None]
) -> Row:
    """Compares all cases of a group, calling ``advance`` after each; an exception counts as a failure."""
    checks = failures = 0
    worst = ("", "", -1.0, 0.0, 1.0)
    for case in cases:
        try:
            results = testing.compare(case, backend, DTYPES[dtype], device)
        except Exception as error:  # a backend under test may fail in any way; it is reported, not hidden
            results = [testing.Result(f"{type(error).__name__}: {error}", math.inf, 0.0, 0.0)]
        for r in results:
            checks += 1
            failures += not r.ok
            share = r.error / r.tolerance if r.tolerance > 0 else math.inf
            if share > (worst[2] / worst[4] if worst[4] > 0 else math.inf):
                worst = (r.quantity, case.name, r.error, r.yardstick, r.tolerance)
        advance()
    return Row(backend, dtype, group, checks, failures, *worst)


class Numeric(NamedTuple):
    """One ``gradcheck``: a loss, its keywords, how many views, keys and so on, and which temperatures are tensors."""

    label: str
    loss: str
    options: dict[str, Any]
    sizes: tuple[int, ...] = ()
    taus: tuple[str, ...] = ("tau_pos", "tau_neg")

    def run(self, backend: str, device: str) -> bool:
        """``torch.autograd.gradcheck`` of the backend itself in float64, w.r.t. embeddings and temperatures."""
        g = torch.Generator().manual_seed(1)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).div(shape[-1] ** 0.5).to(device)

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
        for name, value in zip(self.taus, (0.8, 1.3), strict=False):
            leaves[name] = torch.tensor(value, dtype=torch.float64, device=device)

        def f(*tensors: Tensor) -> Tensor:
            arguments = dict(zip(leaves, tensors, strict=True)) | fixed | self.options
            result: Tensor = getattr(functional, self.loss)(**arguments, backend=backend)
            return result

        inputs = tuple(leaf.requires_grad_() for leaf in leaves.values())
        return bool(torch.autograd.gradcheck(f, inputs, raise_exception=False))


def numeric_checks() -> list[Numeric]:
    """Every loss where its gradient is a derivative of its value.

    It is not where weights that vary are detached. ``cacr_queue_loss`` is checked with constant weights instead
    (temperature 0; all of its attraction), or with nothing detached (weight_grad="full", no queue);
    ``cacr_momentum_loss`` with one view, so that p = 1, and under "sqeuclidean" with one negative, so that w = 1. The
    rest of these two is compared with the reference, whose own derivation is tested.
    """
    checks = []
    for pairing in ("unordered", "ordered", "pooled"):
        for cost in ("sqeuclidean", "rbf"):
            checks.append(Numeric(f"cacr_loss {pairing} {cost}", "cacr_loss", {"pairing": pairing, "cost": cost}))
        for reduction in ("none", "sum"):
            options = {"pairing": pairing, "reduction": reduction}
            checks.append(Numeric(f"cacr_loss {pairing} {reduction}", "cacr_loss", options))
    name, neg = "cacr_queue_loss", ("tau_neg",)
    for weight_grad in ("in_batch", "none"):
        constant: dict[str, Any] = {"weight_grad": weight_grad, "tau_pos": 0.0, "tau_neg": 0.0}
        checks.append(Numeric(f"{name} {weight_grad}, constant weights", name, constant, (6,), ()))
    full: dict[str, Any] = {"weight_grad": "full", "tau_pos": 0.0}
    checks += [
        Numeric(f"{name} in_batch, no queue", name, {"weight_grad": "in_batch", "tau_pos": 0.0}, (0,), neg),
        Numeric(f"{name} full", name, full, (6,), neg),
        Numeric(f"{name} full, queue only", name, full | {"in_batch": False}, (6,), neg),
        Numeric(f"{name} full none", name, full | {"reduction": "none"}, (6,), neg),
    ]
    name = "cacr_momentum_loss"
    for cost, sizes in (("rbf", (1, 5, 9)), ("sqeuclidean", (1, 2, 2))):
        for reduction in ("mean", "none"):
            single: dict[str, Any] = {"cost": cost, "reduction": reduction, "normalize": True}
            checks.append(Numeric(f"{name} {cost} {reduction}", name, single, sizes, ("temperature",)))
    name = "supervised_cacr_loss"
    checks += [Numeric(f"{name} {r}", name, {"reduction": r}) for r in ("mean", "none", "sum")]
    return [*checks, Numeric(f"{name} reference set", name, {}, (9,))]


def run_checks(
    names: Iterable[str], device: str, quick: bool, progress: Progress
) -> tuple[list[Row], list[dict[str, Any]]]:
    """All comparisons and gradchecks."""
    rows, numeric = [], []
    groups: dict[str, list[testing.Case]] = {}
    for case in testing.cases(quick):
        groups.setdefault(group_of(case), []).append(case)
    checks, names = numeric_checks(), list(names)
    progress.start(len(names) * (len(DTYPES) * sum(map(len, groups.values())) + len(checks)))
    for name in names:
        for dtype in DTYPES:
            for group, cases in groups.items():
                progress.now(f"{name} {dtype} {group}")
                rows.append(check_group(name, dtype, group, cases, device, progress.advance))
        for check in checks:
            progress.now(f"{name} gradcheck {check.label}")
            try:
                problem = "" if check.run(name, device) else "numerical and analytical gradients differ"
            except Exception as error:  # as in check_group
                problem = f"{type(error).__name__}: {error}"
            numeric.append({"backend": name, "check": check.label, "ok": not problem, "problem": problem})
            progress.advance()
    return rows, numeric


class Progress:
    """Says on stderr what is being checked and how far it is; silent unless that is a terminal."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._text = ""
        self._bar: Any = None
        self._visible = sys.stderr.isatty()

    def start(self, total: int) -> None:
        """``total``: how often ``advance`` will be called."""
        self._total = total
        if not self._visible:
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=total)

    def now(self, text: str) -> None:
        """What comes next."""
        self._text = text
        self._show(0)

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        self._show(1)

    def _show(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, description=self._text)
        elif self._visible:
            percent = 100 * self._done // max(1, self._total)
            print(f"\r\x1b[K{percent:3d} %  {self._text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves no trace on the terminal."""
        if self._bar is not None:
            self._bar.stop()
        elif self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def print_table(rows: list[Row]) -> None:
    """One line per backend, dtype and group; with rich if it is installed, else plain text."""
    header = ["backend", "dtype", "loss", "checks", "worst error", "eager", "tolerance", "of", ""]
    lines = [
        [
            r.backend,
            r.dtype,
            r.group,
            str(r.checks),
            f"{r.error:.1e}",
            f"{r.yardstick:.1e}",
            f"{r.tolerance:.1e}",
            r.quantity,
            f"{r.failures} FAILED" if r.failures else "ok",
        ]
        for r in rows
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        for line in [header, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(*header, title="largest share of the tolerance in each group")
    for line in lines:
        table.add_row(*line, style="bold red" if "FAILED" in line[-1] else None)
    console = Console()
    (console if console.is_terminal else Console(width=170)).print(table)


def environment(device: str) -> dict[str, Any]:
    """What the report was made with."""
    return {
        "cacr_kernels": __version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "instruction_set": _extension.active_isa(),
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="cacr-verify", description="Compare the backends with the float64 reference.")
    parser.add_argument("--backend", action="append", help="check only this backend (may be repeated)")
    parser.add_argument("--device", default="cpu", help="device of the tensors (default: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    return parser.parse_args(argv)


def usable(asked: list[str] | None, device: str) -> tuple[list[str], list[str]]:
    """Backends to check, and why others are not; raises ``ValueError`` for one that was asked for and cannot run."""
    where = torch.device(device)
    torch.empty(0, device=where)
    reasons = {b.name: b.why_not(where) for b in TABLE if b.name != "reference"}
    for name in asked or []:
        if name not in reasons:
            raise ValueError(f"--backend {name}: unknown or not to be checked; accepted: {', '.join(reasons)}")
        if reasons[name] is not None:
            raise ValueError(f"--backend {name} cannot run here: {reasons[name]}")
    chosen = [name for name, why in reasons.items() if why is None and (not asked or name in asked)]
    return chosen, [f"{name} is not checked: {why}" for name, why in reasons.items() if why is not None and not asked]


def main(argv: list[str] | None = None) -> int:
    """Runs the checks and prints the table; returns the exit status."""
    options = arguments(argv)
    try:
        names, skipped = usable(options.backend, options.device)
        if options.json:
            Path(options.json).touch()  # now, not after minutes
    except (ValueError, RuntimeError, OSError, AssertionError) as error:  # torch asserts that it knows CUDA
        print(f"cacr-verify: {error}", file=sys.stderr)
        return 2
    progress = Progress()
    with contextlib.closing(progress), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, numeric = run_checks(names, options.device, options.quick, progress)
    about = environment(options.device)
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print_table(rows)
    wrong = [r for r in rows if r.failures]
    wrong_numeric = [n for n in numeric if not n["ok"]]
    for r in wrong:
        print(f"FAILED {r.backend} {r.dtype}: {r.quantity} of {r.case}: error {r.error:.2e} > {r.tolerance:.2e}")
    for n in wrong_numeric:
        print(f"FAILED {n['backend']} gradcheck: {n['check']}: {n['problem']}")
    for line in skipped:
        print(line)
    if options.json:
        report = {"environment": about, "backends": backends(), "ok": not (wrong or wrong_numeric)}
        rows_json = [r._asdict() | {"ok": r.failures == 0} for r in rows]
        text = json.dumps(report | {"checks": rows_json, "gradcheck": numeric}, indent=1)
        Path(options.json).write_text(text, encoding="utf-8")
    count = sum(r.checks for r in rows)
    verdict = "all within tolerance" if not (wrong or wrong_numeric) else "NOT within tolerance"
    print(f"{' and '.join(names)}: {count} checks, {len(numeric)} gradchecks: {verdict}")
    return 1 if wrong or wrong_numeric else 0


if __name__ == "__main__":
    sys.exit(main())
