"""The documentation site: which pages it has, and what its configuration does to links and docstrings.

`make docs` builds it with every warning an error; CI runs that.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import vfiouser_oob.client
from vfiouser_oob.devices import model

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def conf() -> dict[str, Any]:
    """What the configuration of Sphinx declares."""
    return runpy.run_path(str(DOCS / "conf.py"))


def test_every_module_of_the_protocol_is_described() -> None:
    """The API page has each module of the protocol, and no other."""
    page = (DOCS / "reference/api/protocol.md").read_text()
    found = re.findall(r"^\.\. automodule:: vfiouser_protocol\.(\w+)$", page, re.MULTILINE)
    assert len(found) == len(set(found))
    assert {path.stem for path in (ROOT / "protocol/vfiouser_protocol").glob("*.py")} - {"__init__"} == set(found)


@pytest.mark.parametrize(("page", "module"), [("client", vfiouser_oob.client), ("device-model", model)])
def test_names_that_come_from_the_protocol_are_listed(page: str, module: Any) -> None:
    """A name that a page leaves to the protocol's page is named."""
    text = (DOCS / f"reference/api/{page}.md").read_text()
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, type) and thing.__module__.startswith("vfiouser_protocol."):
            assert f"`{name}`" in text, name


@pytest.mark.parametrize(
    ("page", "link", "made"),
    [
        ("index", "README.md: [x](docs/howto/install.md#container)", "[x](howto/install.md#container)"),
        ("index", "README.md: [x](CHANGELOG.md)", "[x](about/changelog.md)"),
        ("index", "README.md: [x](LICENSE)", "[x](<path:../LICENSE>)"),
        ("about/agents", "agents/README.md: [x](../docs/reference/adapters.md)", "[x](../reference/adapters.md)"),
        ("explanation/trust", "docs/explanation/trust.md: [x](../../SECURITY.md)", "[x](../about/security.md)"),
        ("howto/systemd", "docs/howto/systemd.md: [x](kernel-vfio.md#steps)", "[x](kernel-vfio.md#steps)"),
        ("howto/systemd", "docs/howto/systemd.md: [x](no-such-page.md)", "[x](no-such-page.md)"),
        ("explanation/scale", "docs/explanation/scale.md: ![x](scale.svg)", "![x](scale.svg)"),
        ("howto/systemd", "docs/howto/systemd.md: [x](https://a.example/b.md#c)", "[x](https://a.example/b.md#c)"),
        ("howto/systemd", "docs/howto/systemd.md: [x](#here)", "[x](#here)"),
    ],
)
def test_links_lead_to_the_site_s_pages(conf: dict[str, Any], page: str, link: str, made: str) -> None:
    """A link through the repository becomes one to a page, or to a copy of the file; a broken one stays broken."""
    source, text = link.split(": ", 1)
    assert made == conf["relink"](text, ROOT / source, page)


def test_a_specification_is_a_section(conf: dict[str, Any]) -> None:
    """`Spec:` with its text on the same line and on those behind it becomes a section like `Raises:`."""
    before = ["Do it.", "", "Spec: one, two", "    three.", "", "More."]
    assert ["Do it.", "", "Spec:", "    one, two", "    three.", "", "More."] == conf["spec_section"](before)


def test_the_glossary_is_in_order() -> None:
    """Terms stand in alphabetical order, once, each with one sentence."""
    tables = (DOCS / "reference/glossary.md").read_text().split("\n## ")[1:]
    rows = [re.findall(r"^\| (?!term|-)(.+?) \| (.+) \|$", table, re.MULTILINE) for table in tables]
    for table in rows:
        assert sorted(table, key=lambda row: row[0].lower()) == table
        for term, meaning in table:
            assert re.fullmatch(r"[^.]+(\.[^ .][^.]*)*\.", meaning), term
    terms = [term for table in rows for term, _ in table]
    assert len(terms) == len(set(terms)) > 40
