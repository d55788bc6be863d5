"""How Sphinx builds the pages: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cacr_kernels import __version__  # noqa: E402

project = "cacr_kernels"
author = "The cacr_kernels authors"
copyright = author  # noqa: A001 a name that Sphinx asks for
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "fieldlist", "linkify"]
myst_heading_anchors = 3
myst_linkify_fuzzy_links = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|Tensor|nn)\b.*|optional")]
exclude_patterns = ["_build"]

autodoc_mock_imports = ["pytorch_metric_learning", "sentence_transformers"]  # what the pages say of them needs neither
autodoc_typehints = "none"  # docstrings say shapes; signatures are of the functions, not of their overloads
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_preprocess_types = False
napoleon_use_param = False  # names that share an explanation stay together

html_theme = "furo"
html_title = f"cacr_kernels {__version__}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
highlight_language = "text"


def plain_bases(app: Any, name: str, obj: type, options: Any, bases: list[Any]) -> None:
    """Modules are ``torch.nn.Module``; what is between says nothing to a reader."""
    bases[:] = [base for base in bases if not str(base).startswith("cacr_kernels.modules._Loss")] or [object]


def setup(app: Any) -> None:
    """Registers what is said above as a function."""
    app.connect("autodoc-process-bases", plain_bases)
