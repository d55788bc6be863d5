"""README and pages: their snippets run, their links lead somewhere, README says at once what a reader has to know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^(?:```python|<!-- before the example:)\n(.*?)^(?:```|-->)$", re.DOTALL | re.MULTILINE)
WITHOUT_SNIPPETS = {"docs/api.md", "docs/backends.md", "docs/benchmarks.md", "docs/installing.md", "docs/precision.md"}
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


@each_page
def test_snippets_run(page: str) -> None:
    """One after the other, as a reader would type them; what a reader has already stands in a comment before."""
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
