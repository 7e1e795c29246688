"""The site: every page of the repository, and the docstrings. `make docs` builds it, from the repository's root.

Sources are read where they lie, so that one relative link serves the repository and the site.
"""
from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinylora_kernels._version import __version__  # noqa: E402

project = "tinylora_kernels"
version = release = __version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "docs/api/*.rst", "bench/results/**.md", "examples/*.md"]
exclude_patterns = [".*", "build", "dist", "tests", "site"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 3  # as GitHub makes them
suppress_warnings = ["myst.header"]  # a page may begin with a picture
highlight_language = "none"  # what is in a fence without a language is a terminal's, or a formula
smartquotes_action = "D"  # dashes alone: quotes and dots are code's
default_role = "code"  # docstrings write `v` as Markdown does

autodoc_mock_imports = ["peft", "transformers"]  # for the signatures of the integrations
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"tinylora_kernels {version}"
html_extra_path = ["_root"]  # index.html, which leads to docs/index.html
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"

SOURCE = re.compile(r"^<!-- source: (\S+) -->$", re.MULTILINE)
# A paragraph set off by an indent, code or a formula; and a table, lines whose first word has a column of its own.
SET_OFF = re.compile(r"(?<=\n\n)(?: {4}.*\n)+(?:\n(?: {4}.*\n)+)*")
TABLE = re.compile(r"(?:^ {8}\S+ {2,}\S.*\n){2,}", re.MULTILINE)


def show_sources(app, page: str, text: list[str]) -> None:
    """A program in place of the comment `<!-- source: file.py -->`: read in the repository, it is one click away."""
    text[0] = SOURCE.sub(r"```{literalinclude} \1\n:language: python\n```", text[0])


def keep_layout(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Docstrings set code, formulae and tables off as Markdown does; to reStructuredText they are code blocks."""

    def as_code(found: re.Match[str]) -> str:
        text = textwrap.dedent(found[0])
        depth = found[0].index(text[0]) // 8 * 8 * " "  # of the text above: a paragraph's 0, an argument's 8
        language = "python" if re.search(r"^\w+ = .*\)$|\):|^\w+\(", text, re.MULTILINE) else "none"
        return f"\n{depth}.. code-block:: {language}\n\n{textwrap.indent(text, depth + 4 * ' ')}\n"

    text = SET_OFF.sub(as_code, "\n".join(lines) + "\n")
    lines[:] = TABLE.sub(as_code, text).splitlines()


def setup(app) -> None:
    app.connect("source-read", show_sources)
    app.connect("autodoc-process-docstring", keep_layout, priority=100)  # before napoleon
