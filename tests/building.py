"""What tests compile is kept in ``build/`` until a source, the command or the compiler changes; for all workers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


@cache
def _digest(places: tuple[str, ...]) -> bytes:
    """Of all sources in files and folders of the repository."""
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for source in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if source.suffix in SUFFIXES:
                digest.update(source.relative_to(ROOT).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.digest()


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock lies beside ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kept(target: Path, command: Sequence[str], places: Sequence[str]) -> Path:
    """The file that ``command``, completed by ``-o`` and its name, makes of the sources in ``places`` as they are."""
    parts = [_digest(tuple(places)), _version(command[0]).encode(), *(word.encode() for word in command)]
    key, stamp = hashlib.sha256(b"\0".join(parts)).hexdigest(), target.with_name(f"{target.name}.key")
    with locked(target):
        if not (target.exists() and stamp.exists() and stamp.read_text() == key):
            stamp.unlink(missing_ok=True)
            done = subprocess.run([*command, "-o", str(target)], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}"
            stamp.write_text(key)
    return target
