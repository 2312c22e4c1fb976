"""The guard rails of the house: where files may lie, how large they may grow, what may import what."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {
    "vfiouser_oob": ROOT / "vfiouser_oob",
    "vfiouser_conformance": ROOT / "protocol" / "vfiouser_conformance",
    "vfiouser_protocol": ROOT / "protocol" / "vfiouser_protocol",
    "vfiouser_agents": ROOT / "agents" / "vfiouser_agents",
    "vfiouser_soc": ROOT / "agents" / "vfiouser_soc",
}
MODULE_CAP = 800
FUNCTION_CAP = 80
MODULE_GOAL = 500
# Modules above the goal, each with the reason why splitting it would make it worse.
LARGE_MODULES: dict[str, str] = {}
# The places that catch everything. The server has one more, a context manager: `server/containment.py`.
CATCH_ALL = {"vfiouser_oob/cli/main.py"}


def modules() -> Iterator[Path]:
    """Every module of the five packages."""
    for package in PACKAGES.values():
        yield from sorted(package.rglob("*.py"))


def relative(path: Path) -> str:
    """A path as it stands in the repository."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("room", ["protocol", "agents", "tests", "examples"])
def test_no_python_directly_in_a_room(room: str) -> None:
    """`protocol`, `agents` … never become importable modules that would collide with other people's."""
    assert [] == [relative(path) for path in (ROOT / room).glob("*.py")]


def test_tests_are_no_packages() -> None:
    """Test modules are imported by path: a package would make their names depend on the working directory."""
    support = ROOT / "tests" / "support"
    inits = [path for path in (ROOT / "tests").rglob("__init__.py") if support not in path.parents]
    assert [] == [relative(path) for path in inits]


def test_test_modules_have_names_of_their_own() -> None:
    """No two test modules share a file name, so that a name in a report says which one it is."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [] == [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    """Every package tells type checkers of its users that its annotations count."""
    assert (PACKAGES[package] / "py.typed").is_file()


def test_modules_stay_small() -> None:
    """No module is above the cap; each above the goal is listed with a reason, and no other is."""
    lines = {relative(path): len(path.read_text().splitlines()) for path in modules()}
    assert [] == [name for name, count in lines.items() if count > MODULE_CAP]
    assert sorted(LARGE_MODULES) == sorted(name for name, count in lines.items() if count > MODULE_GOAL)


def test_functions_stay_small() -> None:
    """No function is longer than a screen and a half."""
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_CAP:
                    found.append(f"{relative(path)}:{node.lineno} {node.name} has {length} lines")
    assert [] == found


def test_only_few_places_catch_everything() -> None:
    """`except Exception` hides bugs; the places that need it are listed."""
    found = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler) or "Exception" not in caught_names(node):
                continue
            # Cleaning up or explaining, and raising, hides nothing.
            if not isinstance(node.body[-1], ast.Raise):
                found.add(relative(path))
    assert found == CATCH_ALL


def caught_names(handler: ast.ExceptHandler) -> set[str]:
    """The names in an except clause; a bare one counts as catching everything."""
    if handler.type is None:
        return {"Exception"}
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return names | ({"Exception"} if "BaseException" in names else set())


def test_the_version_is_written_once() -> None:
    """The version number stands in one file, and the metadata takes it from there."""
    metadata = (ROOT / "pyproject.toml").read_text()
    assert 'path = "vfiouser_oob/_version.py"' in metadata
    assert re.search(r"^version\s*=", metadata, re.MULTILINE) is None
    assigned = [path for path in modules() if re.search(r"^__version__ = ", path.read_text(), re.MULTILINE)]
    assert [ROOT / "vfiouser_oob" / "_version.py"] == assigned


def test_imports_go_only_down() -> None:
    """The import contracts of pyproject.toml hold; the tool that checks them is the one `make check` uses."""
    paths = [ROOT, ROOT / "protocol", ROOT / "agents"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* kept, 0 broken", done.stdout)


def test_no_double_imports_in_the_whole_session() -> None:
    """Nothing was imported as `protocol.…` or `agents.…`, which would be second, different module objects."""
    assert [] == [name for name in sys.modules if name.split(".")[0] in {"protocol", "agents"}]
