"""``python -m cacr_kernels.verify`` (``cacr-verify``): are the backends right on this machine?

For each backend and dtype, every case of :mod:`cacr_kernels.testing`: loss and gradients against the float64 reference,
beside the error of the eager form; then ``gradcheck`` of the backend itself in float64. Exit status: 0 all right, 1 a
check failed, 2 the arguments cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension, functional, testing
from ._version import __version__
from .backends import TABLE, backends

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


def check_group(backend: str, dtype: str, group: str, cases: list[testing.Case], device: str) -> Row:
    """Compares all cases of a group; an exception counts as a failure."""
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
    return Row(backend, dtype, group, checks, failures, *worst)


def gradchecks(backend: str, device: str) -> list[tuple[str, Callable[[], bool]]]:
    """``torch.autograd.gradcheck`` on the backend itself, float64, embeddings and temperatures."""

    def check(loss: str, **options: Any) -> Callable[[], bool]:
        def run() -> bool:
            g = torch.Generator().manual_seed(1)
            tau = torch.tensor([0.8, 1.3], dtype=torch.float64, device=device, requires_grad=True)

            def make(*shape: int) -> Tensor:
                return torch.randn(shape, generator=g, dtype=torch.float64).div(shape[-1] ** 0.5).to(device)

            z = make(3, 5, 4) if loss != "supervised_cacr_loss" else make(7, 4)
            extra: dict[str, tuple[Any, ...]] = {
                "cacr_loss": (),
                "cacr_queue_loss": (make(3, 5, 4), make(6, 4)),
                "cacr_momentum_loss": (make(9, 4),),
                "supervised_cacr_loss": (torch.arange(7, device=device) % 3,),
            }
            function = getattr(functional, loss)

            def f(z: Tensor, tau: Tensor) -> Tensor:
                if loss == "cacr_momentum_loss":
                    kw: dict[str, Any] = {"temperature": tau[0], "normalize": True}
                else:
                    kw = {"tau_pos": tau[0], "tau_neg": tau[1]}
                result: Tensor = function(z, *extra[loss], **kw, backend=backend, **options)
                return result

            arguments = (z.requires_grad_(), tau)
            return bool(torch.autograd.gradcheck(f, arguments, raise_exception=False))

        return run

    found = []
    for pairing in ("unordered", "ordered", "pooled"):
        for cost in ("sqeuclidean", "rbf"):
            found.append((f"cacr_loss {pairing} {cost}", check("cacr_loss", pairing=pairing, cost=cost)))
        found.append((f"cacr_loss {pairing} rows", check("cacr_loss", pairing=pairing, reduction="none")))
    # Detached weights are not derivatives of the value, so that only these can be checked numerically.
    found.append(("supervised_cacr_loss", check("supervised_cacr_loss")))
    return found


def run_checks(
    names: Iterable[str], device: str, quick: bool, progress: Callable[[str], None]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """All comparisons and gradchecks."""
    rows, numeric = [], []
    groups: dict[str, list[testing.Case]] = {}
    for case in testing.cases(quick):
        groups.setdefault(group_of(case), []).append(case)
    for name in names:
        for dtype in DTYPES:
            for group, cases in groups.items():
                progress(f"{name} {dtype} {group}")
                rows.append(check_group(name, dtype, group, cases, device))
        for label, check in gradchecks(name, device):
            progress(f"{name} gradcheck {label}")
            numeric.append({"backend": name, "check": label, "ok": check()})
    return rows, numeric


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """A line that shows what is being checked; only on a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    finally:
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
    except (ValueError, RuntimeError) as error:
        print(f"cacr-verify: {error}", file=sys.stderr)
        return 2
    with progress_line() as progress, warnings.catch_warnings():
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
        print(f"FAILED {n['backend']} gradcheck: {n['check']}")
    for line in skipped:
        print(line)
    if options.json:
        report = {"environment": about, "backends": backends(), "ok": not (wrong or wrong_numeric)}
        rows_json = [r._asdict() | {"ok": r.failures == 0} for r in rows]
        with open(options.json, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(report | {"checks": rows_json, "gradcheck": numeric}, file, indent=1)
    count = sum(r.checks for r in rows)
    verdict = "all within tolerance" if not (wrong or wrong_numeric) else "NOT within tolerance"
    print(f"{count} checks, {len(numeric)} gradchecks: {verdict}")
    return 1 if wrong or wrong_numeric else 0


if __name__ == "__main__":
    sys.exit(main())
