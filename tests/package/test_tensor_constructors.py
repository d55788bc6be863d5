"""Tensors that the package makes say where and of what type: the user's defaults are not for them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cacr_kernels

PACKAGE = Path(cacr_kernels.__file__).parent
CONSTRUCTORS = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"}
CONSTRUCTORS |= {"rand", "randint", "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros"}
# Not run in a user's process, or what a module registers, which follows the defaults as parameters do.
EXCEPT = {"verify.py", "testing.py", "cases.py", "__main__.py"}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in EXCEPT]


def silent(source: str) -> list[str]:
    """Calls of a constructor of torch without ``device=`` or ``dtype=``."""
    found = []
    tree = ast.parse(source)
    registered = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("register_buffer")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node in registered:
            continue
        if ast.unparse(node.func.value) == "torch" and node.func.attr in CONSTRUCTORS:
            missing = {"device", "dtype"} - {keyword.arg for keyword in node.keywords}
            if missing:
                found.append(f"line {node.lineno}: {ast.unparse(node)} without {sorted(missing)}")
    return found


def test_what_is_found() -> None:
    assert silent("torch.zeros(3, device=d)") == ["line 1: torch.zeros(3, device=d) without ['dtype']"]
    assert not silent("torch.zeros_like(x) + x.new_zeros(3) + tl.zeros(3) + torch.ones(1, device=d, dtype=t)")
    assert not silent("self.register_buffer('queue', torch.zeros(3))")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_constructors(path: Path) -> None:
    assert not silent(path.read_text(encoding="utf-8"))
