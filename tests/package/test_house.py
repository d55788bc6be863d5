"""The rooms of the package: what each may import, what modules keep to themselves, how long a signature is."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import cacr_kernels
from cacr_kernels.backends.table import TABLE

PACKAGE = Path(cacr_kernels.__file__).parent
NAME = PACKAGE.name
MODULES = {
    ".".join([NAME, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
each_module = pytest.mark.parametrize("module", MODULES)

# ---- the map ---------------------------------------------------------------------------------------------------------
ROOT = PACKAGE.parent
EVERYWHERE = {"types", "_version"}


def in_backticks(cell: str) -> list[str]:
    """Paths as the map writes them, without a slash at the end."""
    return [name.rstrip("/") for name in re.findall(r"`([^`]+)`", cell)]


def table_below(heading: str) -> dict[str, set[str]]:
    """By room what it may import, and the other rooms of its row, from the map in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.split(heading)[1].split("\n\n")[0].splitlines()[2:]
    cells = [row.split(" | ") for row in rows]
    return {
        name: set(in_backticks(first) + in_backticks(last)) for first, *_, last in cells for name in in_backticks(first)
    }


def dotted(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix("__init__")


def lies_in(name: str, place: str, separator: str) -> bool:
    return name == place or name.startswith(place + separator)


def narrowest(name: str, rooms: Iterable[str], separator: str) -> str:
    """The room that something lies in."""
    return max((r for r in rooms if lies_in(name, r, separator)), key=len)


ROOMS = {
    dotted(name): {dotted(other) for other in others} | EVERYWHERE
    for name, others in table_below("| room of `cacr_kernels/`").items()
}
OTHER_ROOMS = table_below("| other room")


def room(module: str) -> str:
    """The first part of the name below the package."""
    return module.removeprefix(NAME).removeprefix(".").split(".")[0]


def imports(module: str) -> Iterator[tuple[str, str | None, int]]:
    """Modules of the package that a module imports, each with the name that is taken from it, if one is."""
    package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names if alias.name.split(".")[0] == NAME)
        if isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            if source.split(".")[0] == NAME:
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield (inner, None, node.lineno) if inner in MODULES else (source, alias.name, node.lineno)


def test_the_map_names_what_there_is() -> None:
    modules = {name.removeprefix(NAME).removeprefix(".") for name in MODULES}
    assert {name for name in ROOMS if name not in modules} == set()
    assert {name for name in OTHER_ROOMS if not (ROOT / name).exists()} == set()


@each_module
def test_imports_go_one_way(module: str) -> None:
    own = module.removeprefix(NAME).removeprefix(".")
    home = narrowest(own, ROOMS, ".") if own else ""
    allowed = ROOMS[home] | {home}
    wrong = {
        f"{target} (line {line})"
        for target, _, line in imports(module)
        if (inner := target.removeprefix(f"{NAME}.")) != NAME
        if not any(lies_in(inner, place, ".") for place in allowed)
    }
    assert not wrong, f"{module} imports {wrong}"


CODE = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "csrc").rglob("*"))
    if path.suffix in (".h", ".cuh", ".cpp", ".cu")
]


@pytest.mark.parametrize("path", CODE)
def test_includes_go_one_way(path: str) -> None:
    home = narrowest(path, OTHER_ROOMS, "/")
    text = (ROOT / path).read_text(encoding="utf-8")
    for name in re.findall(r'^ *#include "([^"]+)"', text, re.MULTILINE):
        target = Path(os.path.normpath((ROOT / path).parent / name)).relative_to(ROOT).as_posix()
        if name != "cuda_emulation.h":  # of tests/cuda_emulation, which compiles the kernels for the CPU
            assert target in CODE
            assert any(lies_in(target, place, "/") for place in OTHER_ROOMS[home] | {home}), f"{path} includes {target}"
    if not path.endswith("/binding.cpp") and path != "csrc/common/binding.h":
        assert not re.search(r"#include <(torch|ATen|c10)/", text), f"{path} sees torch"


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "benchmarks").rglob("*/*.py")))
def test_benchmarks_import_one_way(path: str) -> None:
    home = narrowest(path, OTHER_ROOMS, "/")
    allowed = OTHER_ROOMS[home] | {home}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            start = path.split("/")[: -node.level] if node.level else []
            source = "/".join([*start, *(node.module or "").split(".")]).rstrip("/")
            names = [f"{source}/{alias.name}" for alias in node.names]
        for name in names:
            place = name.replace(".", "/")
            ours = place.startswith("benchmarks/")
            assert not ours or any(lies_in(place, room.removesuffix(".py"), "/") for room in allowed), (
                f"{path} imports {place}"
            )


def test_no_circles() -> None:
    """No module imports itself, by whatever way round."""
    targets = {module: {target for target, _, _ in imports(module)} - {module} for module in MODULES}
    for module in MODULES:  # a module of a package that is imported imports that package first: that is no circle
        targets[module] -= {parent for parent in targets[module] if module.startswith(f"{parent}.")}
    left = dict(targets)
    while free := {module for module, needed in left.items() if not needed & left.keys()}:
        left = {module: needed for module, needed in left.items() if module not in free}
    assert not left, f"these import each other: {sorted(left)}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@each_module
def test_private_names_stay_at_home(module: str) -> None:
    """Nobody takes an underscored name from another module; ``_torch_private`` is for operators and collectives."""
    for target, name, line in imports(module):
        private = [part for part in target.split(".")[1:] if is_private(part)]
        if private == ["_torch_private"]:
            assert room(module) in ("operators", "distributed"), f"{module}:{line} imports {target}"
        else:
            assert private in ([], ["_version"]), f"{module}:{line} imports {target}"
        assert name is None or not is_private(name), f"{module}:{line} imports {target}.{name}"


@each_module
def test_private_names_of_torch_are_in_one_room(module: str) -> None:
    if module.endswith("._torch_private"):
        return
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{module}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("torch"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not any(is_private(part) for part in parts), f"{module}:{node.lineno}"


# ---- names of backends -----------------------------------------------------------------------------------------------
BENCHMARKS = PACKAGE.parent / "benchmarks"
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in (*MODULES.values(), *sorted(BENCHMARKS.rglob("*.py")))
    if not path.is_relative_to(PACKAGE / "backends")
}
BACKEND_NAMES = frozenset(backend.name for backend in TABLE)
DEVICE_TYPES = {backend.device for backend in TABLE}  # "cpu" and "cuda" are names of both


def names_in(node: ast.expr) -> set[str]:
    """The backends that an expression names, by itself or in a literal collection."""
    elements = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {e.value for e in elements if isinstance(e, ast.Constant) and e.value in BACKEND_NAMES}  # type: ignore[misc]


def compared_backends(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every comparison with a name of a backend, but for the types of devices."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            others = [ast.unparse(side) for side in sides if not names_in(side)]
            of_device = all(re.search(r"(^|\.)(device(\.type)?|target\[0\])$|\['device'\]$", text) for text in others)
            for name in set[str]().union(*map(names_in, sides)):
                if not (others and of_device and name in DEVICE_TYPES):
                    yield node.lineno, name
        if isinstance(node, ast.MatchValue):
            yield from ((node.value.lineno, name) for name in names_in(node.value))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.List | ast.Set):
            found = names_in(node.value)  # to be looked up in, if there is nothing else
            yield from ((node.lineno, name) for name in found if len(found) == len(node.value.elts))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_name_of_a_backend_is_compared(path: Path) -> None:
    """What backends differ in is said by their entries in the table."""
    assert list(compared_backends(SOURCES[path])) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("backend == 'triton'", ["triton"]),
        ("entry.name != 'cuda'", ["cuda"]),
        ("backend in ('cpu', 'auto')", ["cpu"]),
        ("match backend:\n    case 'torch': pass", ["torch"]),
        ("GPU = ('cuda', 'triton')", ["cuda", "triton"]),
        ("device == 'cpu' or device.type == 'cuda'", []),
        ("device == 'triton'", ["triton"]),
    ],
)
def test_comparisons_are_seen(code: str, found: list[str]) -> None:
    assert sorted(name for _, name in compared_backends(ast.parse(code))) == found


# ---- signatures ------------------------------------------------------------------------------------------------------
MOST = 8


def decorated_with(node: ast.FunctionDef, *names: str) -> bool:
    found = {ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list}
    return bool(found & set(names))


def may_be_long(module: str, owner: ast.AST, node: ast.FunctionDef) -> bool:
    """Public losses, constructors of modules, what PyTorch's schemas force, Triton kernels."""
    if room(module) == "functional" and node.name in cacr_kernels.__all__:
        return True
    if isinstance(owner, ast.ClassDef) and node.name == "__init__":
        return True
    if module.startswith(f"{NAME}.backends.triton"):
        launches = decorated_with(node, "on_device_of_first")  # has the signature of the schema
        return launches or ".kernels." in module
    return False


@each_module
def test_signatures_are_short(module: str) -> None:
    for owner in ast.walk(TREES[module]):
        for node in ast.iter_child_nodes(owner):
            if not isinstance(node, ast.FunctionDef) or may_be_long(module, owner, node):
                continue
            a = node.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
            assert count <= MOST, f"{module}:{node.lineno} {node.name} has {count} parameters"


# ---- docstrings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_docstrings_are_sentences(path: Path) -> None:
    """One of up to four words says no more than the name; such a function needs a sentence or nothing."""
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            of_a_loss = text is not None and text.startswith(":func:")
            assert text is None or of_a_loss or len(text.split()) > 4, f"{path}: {getattr(node, 'name', '')}: {text}"
