"""What the API pages say of a call: its arguments, and the errors that it raises itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[3] / "docs" / "reference" / "api"
#: Every module that the site prints.
MODULES = [
    importlib.import_module(name)
    for page in sorted(PAGES.glob("*.md"))
    for name in re.findall(r"automodule:: (\S+)", page.read_text())
]
#: What others import: what a package lists, and what a module defines. A name that starts with an underscore is
#: nobody's.
PUBLIC = [
    thing
    for module in MODULES
    for name, thing in vars(module).items()
    if name in getattr(module, "__all__", ())
    or (not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__)
]


def calls() -> Iterator[tuple[str, Callable[..., Any], list[str]]]:
    """Each public function and method: its name, itself, and the docstrings that describe it, inherited ones too."""
    for thing in PUBLIC:
        if not getattr(thing, "__module__", "").startswith("vfiouser"):
            continue
        if inspect.isfunction(thing):
            yield thing.__name__, thing, [inspect.getdoc(thing) or ""]
        elif inspect.isclass(thing):
            for name, found in inspect.getmembers(thing, inspect.isfunction):
                if not name.startswith("_") and found.__module__.startswith("vfiouser"):
                    owners = [vars(base)[name] for base in thing.__mro__ if name in vars(base)]
                    yield f"{thing.__name__}.{name}", found, [inspect.getdoc(owner) or "" for owner in owners]


CALLS = sorted({(name, call): (name, call, docs) for name, call, docs in calls()}.values(), key=lambda row: row[0])


@pytest.mark.parametrize(("call", "docs"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_every_argument_is_described(call: Callable[..., Any], docs: list[str]) -> None:
    """By name, in `Args`, or in the sentence of a function that needs no more than one."""
    names = [name for name in inspect.signature(call).parameters if name not in ("self", "cls")]
    words = "\n".join(docs)
    unknown = [name for name in names if not re.search(rf"`{name}`|^ +{name}: ", words, re.MULTILINE)]
    assert unknown == [] or (len(names) == 1 and any(text.count("\n") == 0 and text for text in docs)), unknown


def raised(call: Callable[..., Any]) -> set[str]:
    """What the function itself makes and raises, by the name of what makes it; not what functions inside it raise."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(call)))).body
    found = set()
    rest = list(ast.iter_child_nodes(function))
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            rest.extend(ast.iter_child_nodes(node))
    return found


RAISING = [(name, names, docs) for name, call, docs in CALLS if (names := raised(call))]


@pytest.mark.parametrize(("names", "docs"), [row[1:] for row in RAISING], ids=[row[0] for row in RAISING])
def test_every_error_is_described(names: set[str], docs: list[str]) -> None:
    """In `Raises`: classes by name; of an error that something else makes, that there is one."""
    words = "\n".join(docs)
    assert "Raises:" in words
    classes = [name for name in names if name[0].isupper()]
    assert [] == [name for name in classes if not re.search(rf"^ +{name}:", words, re.MULTILINE)]
