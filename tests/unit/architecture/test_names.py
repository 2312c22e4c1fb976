"""One name, one thing: a class name of the shipped code means the same wherever a reader meets it."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ROOMS = (ROOT / "vfiouser_oob", ROOT / "protocol", ROOT / "agents")
# Names that two rooms need which must not share code, each with the published standard that says what it is.
SAME_THING = {
    "AdminOpcode": "NVM Express 1.4, figure 139: driver and controller must not share their bytes",
    "IoOpcode": "NVM Express 1.4, figure 346: as above",
}


def class_names(paths: dict[str, str]) -> dict[str, list[str]]:
    """The modules that define a class, for each class name."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in paths.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(path)
    return found


def shipped() -> dict[str, list[str]]:
    """Those of the shipped code."""
    paths = [path for room in ROOMS for path in sorted(room.rglob("*.py"))]
    return class_names({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths})


def repeated(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those that are defined more than once."""
    return {name: places for name, places in found.items() if len(places) > 1}


def test_no_class_name_occurs_twice() -> None:
    """Rename the inner one in the field's terms; the public interface and the specification's terms keep theirs."""
    assert {} == {name: places for name, places in repeated(shipped()).items() if name not in SAME_THING}


def test_what_may_occur_twice_does() -> None:
    """An exception that nobody needs any more goes."""
    assert SAME_THING.keys() == repeated(shipped()).keys()


def test_a_name_that_occurs_twice_is_found() -> None:
    """Also inside of another class, and in one module."""
    twice = {
        "a.py": "class Peer: ...",
        "b.py": "class Outer:\n class Peer: ...",
        "c.py": "class _Own: ...",
    }
    assert {"Peer": ["a.py", "b.py"]} == repeated(class_names(twice))
