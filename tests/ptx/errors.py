"""The one exception of the interpreter: what went wrong, and at which line of the PTX."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Where a statement stands: name of the PTX, line number and the text of the statement."""

    source: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: `{' '.join(self.text.split())}`"


class PtxError(Exception):
    """PTX that cannot be read, is not modelled, or does something forbidden when it runs."""

    def __init__(self, message: str, place: Place | None = None):
        super().__init__(message if place is None else f"{place}: {message}")


class AccessError(Exception):
    """A forbidden access; ``lane`` is the thread. The machine turns it into a ``PtxError`` that names the place."""

    def __init__(self, message: str, lane: int):
        super().__init__(message)
        self.lane = lane


class DeadlockError(PtxError):
    """All living threads wait for something that cannot happen any more, or nothing ends."""
