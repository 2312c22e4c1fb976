"""How Sphinx makes the documentation site out of the pages in this folder and the packages' docstrings.

`make docs` runs it; every warning is an error there, and a link that leads nowhere is a warning.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from pygments.lexers.special import TextLexer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "protocol"), str(ROOT / "agents")]

from vfiouser_oob._version import __version__ as release  # noqa: E402

project = "vfiouser-oob"
version = release
html_title = f"{project} {release}"
html_theme = "furo"
toc_object_entries = False
html_show_copyright = False
html_show_sourcelink = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_enable_extensions = ["colon_fence"]
# Pages link to each other's headings as GitHub and GitLab name them.
myst_heading_anchors = 4
# A fence without a language is shown as it is.
highlight_language = "text"

# Docstrings put code into single backticks.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Spec", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}

# An annotation `type[…]` could mean any of our fields of that name; a reference that is not found still warns.
suppress_warnings = ["ref.python"]

#: Files above this folder that have a page here, which includes them.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "about/changelog.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "SECURITY.md": "about/security.md",
    "protocol/README.md": "about/protocol.md",
    "agents/README.md": "about/agents.md",
}
DOCS = Path(__file__).resolve().parent
#: Pages and pictures, which the site shows; a link to any other file becomes one to a copy.
SHOWN = {".md", ".png", ".svg"}
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")
_SPEC = re.compile(r"^( *)Spec: (.+)$")


def spec_section(lines: list[str]) -> list[str]:
    """Make `Spec: text`, which says what a rule rests on, a section, as napoleon wants it.

    Args:
        lines: a docstring.
    """
    made: list[str] = []
    indent = 0
    inside = False
    for line in lines:
        found = _SPEC.match(line)
        if found is not None:
            inside, indent = True, len(found[1])
            made += [f"{found[1]}Spec:", f"{found[1]}    {found[2]}"]
        elif inside and line.strip() and len(line) - len(line.lstrip()) > indent:
            made.append(" " * (indent + 4) + line.strip())
        else:
            inside = inside and not line.strip()
            made.append(line)
    return made


def relink(text: str, source: Path, page: str) -> str:
    """Make the links of a file, which lead through the repository, links of the site's page that shows it.

    Args:
        text: the file's text.
        source: where the file is.
        page: the name of the page, without `.md`.
    """
    folder = PurePosixPath(page).parent

    def replaced(found: re.Match[str]) -> str:
        path, fragment = source.parent.joinpath(found[1]).resolve(), found[2] or ""
        inside = PAGES.get(path.relative_to(ROOT).as_posix())
        target = DOCS / inside if inside else path
        place = os.path.relpath(target, DOCS / folder)
        if target.suffix in SHOWN and target.is_relative_to(DOCS):
            return f"]({place}{fragment})"
        return f"](<path:{place}>)" if path.is_file() else found[0]

    return _LINK.sub(replaced, text)


def after_reading(app: Any, page: str, content: list[str]) -> None:
    """Change the links of a page."""
    content[0] = relink(content[0], Path(app.env.doc2path(page)), page)


def after_including(app: Any, path: Path, _page: str, content: list[str]) -> None:
    """Change the links of a file that a page includes."""
    content[0] = relink(content[0], DOCS / path, app.env.docname)


def skip_what_is_elsewhere(app: Any, _what: str, _name: str, thing: Any, skip: bool, _options: Any) -> bool | None:
    """Describe a name where it is declared, if that module has its place here, not again where it is imported."""
    home = str(getattr(thing, "__module__", ""))
    here = app.env.current_document.autodoc_module
    elsewhere = home.startswith(("vfiouser_protocol.", "vfiouser_agents.")) and home != here
    return True if elsewhere else None


def before_napoleon(_app: Any, _what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """Change a docstring in place, before it is read."""
    lines[:] = spec_section(lines)


def setup(app: Any) -> None:
    """Hook into Sphinx."""
    app.add_lexer("hex", TextLexer)
    app.connect("source-read", after_reading)
    app.connect("include-read", after_including)
    app.connect("autodoc-skip-member", skip_what_is_elsewhere)
    # before napoleon
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
