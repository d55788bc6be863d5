"""Ends all processes of a session: compilers that ninja starts have process groups of their own, but no session."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

PASSES = 20  # a process may start another while the list is read


def members(session: int) -> list[int]:
    """The living processes of the session, as Linux lists them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, _, _, its_session = entry.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(entry.parent.name))
    return found


def end(session: int) -> None:
    """Kills the processes of the session; the one that asks for it comes last."""
    own = os.getpid()
    for _ in range(PASSES):
        others = [process for process in members(session) if process != own]
        for process in others:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if not others:
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):  # where there is no /proc
        os.killpg(session, signal.SIGKILL)
