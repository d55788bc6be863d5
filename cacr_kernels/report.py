"""How the commands group and print what they checked."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import Case


def group_of(case: Case) -> str:
    """The loss of a case, for ``cacr_loss`` with pairing and cost: cases of one group share a line of the table."""
    if case.loss == "cacr_loss":
        return f"cacr_loss {case.options.get('pairing', 'unordered')} {case.options.get('cost', 'sqeuclidean')}"
    return case.loss


def print_columns(lines: Sequence[tuple[str, ...]]) -> None:
    """Prints lines of cells, each column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
