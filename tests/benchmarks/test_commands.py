"""The commands that the documents name are there, and the benchmarks keep to themselves what is private."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = tuple(sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "Makefile", "CHANGELOG.md", "benchmarks/NOTES.md", ".ci/run", *PAGES)
MODULES = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_modules_that_can_be_run(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in set(re.findall(r"-m ((?:benchmarks|cacr_kernels)[\w.]*\w)", text)):
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{name}.__main__") is not None, name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_are_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:benchmarks|tests|csrc|cacr_kernels)/[\w./]*\w\.(?:py|cpp|cu|cuh|h|md)\b", text)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_a_private_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("cacr_kernels")):
            assert [alias.name for alias in node.names if alias.name.startswith("_")] == []
