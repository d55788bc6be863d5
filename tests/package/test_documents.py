"""README and pages: their snippets run, their links lead somewhere, README says at once what a reader has to know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^(?:```python|<!-- before the example:)\n(.*?)^(?:```|-->)$", re.DOTALL | re.MULTILINE)
WITHOUT_SNIPPETS = {
    f"docs/{name}.md" for name in ("api", "backends", "benchmarks", "experiment", "installing", "precision")
}
LINK = re.compile(r"\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Those that GitHub and MyST make of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/several_processes.md"])
def test_snippets_run(page: str) -> None:
    """One after the other, as a reader would type them; what a reader has already stands in a comment before.

    The example of several processes is run by ``tests/distributed/test_verify.py``.
    """
    text = text_of(page)
    names: dict[str, object] = {"__name__": page}
    found = list(SNIPPET.finditer(text))
    assert bool(found) == (page not in WITHOUT_SNIPPETS)
    assert len(found) == text.count("```python") + text.count("<!-- before the example")
    for snippet in found:
        line = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * line + snippet[1], str(ROOT / page), "exec"), names)


@each_page
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(without_code(text_of(page))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_readme_is_short_and_says_its_status_first() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 120
    assert "No GPU has run the GPU kernels yet" in " ".join(lines[:10])


def test_every_variable_of_the_environment_is_explained() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "cacr_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    read = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()"(CACR_\w+)"|^VARIABLE = "(CACR_\w+)\"""", re.MULTILINE)
    names = {
        name for path in sources for pair in read.findall(path.read_text(encoding="utf-8")) for name in pair if name
    }
    explained = text_of("docs/backends.md") + text_of("docs/installing.md")
    assert len(names) > 5
    assert [name for name in sorted(names) if f"`{name}" not in explained] == []


def messages(path: Path) -> str:
    """The strings of a source, a line each; what is put into them as ``{}``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_messages_of_an_installation_that_fails_are_those_of_the_code() -> None:
    code = [ROOT / "setup.py", *(ROOT / "cacr_kernels" / "backends").glob("*.py")]
    said = "\n".join(map(messages, code)).replace("cacr_kernels: only", "only")
    rows = text_of("docs/installing.md").split("| what you see | what to do |\n|---|---|\n")[1].split("\n\n")[0]
    quoted = [text for row in rows.splitlines() for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(quoted) > 10
    for text in quoted:
        written = re.sub(r"cacr_kernels\._C_\w+|^nvcc(?= does)|(?<=CUDA )1\d|(?<=cuda:)0", "{}", text)
        assert all(part.strip() in said for part in written.split("…")), text
