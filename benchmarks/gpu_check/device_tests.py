"""The tests that a GPU is needed for, by pytest in as many processes as there are cores (``selection.py``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from . import devices
from .child import Context, leave
from .lines import NOTE

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 40
FILES = (
    "tests/device/test_gpu.py",
    "tests/losses/test_vectors.py",
    "tests/losses/test_functional_bad_numbers.py",
    "tests/losses/test_extremes.py",
    "tests/losses/test_functional_inputs.py",
    "tests/losses/test_functional_numbers.py",
    "tests/losses/test_functional.py",
    "tests/losses/test_modules.py",
    "tests/operators/test_autocast.py",
    "tests/operators/test_contexts.py",
    "tests/compile/test_compiled_modules.py",
)
NEEDED = ("pytest", "hypothesis")


def why_not() -> str | None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} missing" if missing else devices.why_none()


def arguments(names: tuple[str, ...] = FILES) -> list[str]:
    """Of pytest. Warnings are no failures here: other versions of packages than those of CI warn of other things."""
    files = [str(ROOT / name) for name in names]
    return [*files, "--rootdir", str(ROOT), "-q", "-W", "default", "-p", "no:cacheprovider", "-p", "no:randomly"]


def run(context: Context) -> None:
    if (reason := why_not()) is not None:
        return context.skip(reason)
    import pytest

    from .selection import Selection

    few, names = devices.interprets(), FILES
    if few:
        names = FILES[:1]
        context.lines.write(NOTE, text=f"kernels are interpreted: of {FILES[0]} each test once for a backend")
    elif devices.absent():
        names = tuple(name for name in FILES if not name.startswith("tests/compile"))
        context.lines.write(NOTE, text="without tests/compile: what Inductor makes needs a GPU that is there")
    status = pytest.main(arguments(names), plugins=[Selection(context, SECONDS, few)])
    # Failed tests are results; what is left is a step that did not do its work.
    leave(0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED) else 1)
    return None
