"""The folder in which what was found out about a machine is kept for later processes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """``CACR_CACHE_DIR``, else ``cacr_kernels`` in the user's folder of caches."""
    if given := os.environ.get("CACR_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():
        return Path(base, "cacr_kernels")
    try:
        return Path.home() / ".cache" / "cacr_kernels"
    except RuntimeError:  # a user without a home
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
        return Path(tempfile.gettempdir(), f"cacr_kernels-{user}")


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes all of it or nothing, whoever else writes; ``OSError`` where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        try:
            json.dump(data, file, indent=1)
            file.close()
            Path(file.name).replace(path)
        finally:
            Path(file.name).unlink(missing_ok=True)
