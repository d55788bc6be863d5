"""What the tests of the benchmarks share: a tiny case, its environment, rows that need no compiler."""

from __future__ import annotations

from benchmarks.suite import cases, machine, measure, rows
from benchmarks.suite.cases import BenchmarkCase
from benchmarks.suite.rows import Row

ENVIRONMENT = machine.environment("cpu")
TINY = BenchmarkCase(cases.cacr(2, 9, 6))
BUDGET = measure.Budget(0.05)
# Rows of other packages, which are slow to import; KeOps compiles.
PACKAGES = ("keops", "ntxent lightly", "ntxent pml", "supcon pml", "cosine lightly")


def silent(text: str, weight: float) -> None:
    """A progress callback that shows nothing."""


def row_named(name: str) -> Row:
    """The row of that name."""
    return next(row for row in rows.rows() if row.name == name)


def uncompiled() -> list[Row]:
    """All rows that are quick to make."""
    return [row for row in rows.rows() if not row.compiles and row.name not in PACKAGES]
