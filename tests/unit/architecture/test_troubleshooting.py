"""What a real function's backend says when something is wrong stands in the how-to's table, and nothing else does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOWTO = ROOT / "docs/howto/kernel-vfio.md"
SOURCES = sorted(
    path
    for folder in (ROOT / "vfiouser_oob/devices/kernel_vfio",)
    for path in [*folder.glob("*.py"), ROOT / "vfiouser_oob/cli/bind.py", ROOT / "vfiouser_oob/cli/unbind.py"]
)
ERRORS = {"BackendUnavailable", "DeviceBusy", "CommandError", "CommandFailed"}
#: Tables of reasons that become part of an error's text.
REASONS = {"_REASONS", "_HINTS"}
#: Names of texts that become part of a line in the log.
REMARKS = {"note"}
#: What stands for the part of a message that is known at run time only.
ANYTHING = "…"


def rendered(node: ast.expr) -> str | None:
    """The text of a literal or an f-string, with a mark for what is put in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join((rendered(part) if isinstance(part, ast.Constant) else None) or ANYTHING for part in node.values)
    return None


def name_of(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def texts(tree: ast.AST) -> Iterator[str]:
    """The messages of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and name_of(node.func) in ERRORS | {"warning"}:
            text = rendered(node.args[0])
            if text is not None:
                yield text
        elif isinstance(node, ast.AnnAssign) and name_of(node.target) in REASONS and isinstance(node.value, ast.Dict):
            yield from filter(None, map(rendered, node.value.values))
        elif isinstance(node, ast.Assign) and {name_of(target) for target in node.targets} & REMARKS:
            yield from filter(None, [rendered(node.value)])
        elif isinstance(node, ast.FunctionDef) and node.name.endswith("_reason"):
            returned = [
                line.value for line in ast.walk(node) if isinstance(line, ast.Return) and line.value is not None
            ]
            yield from filter(None, map(rendered, returned))


def messages() -> list[str]:
    """Every message, without those that are nothing but another one passed on."""
    found = {text for path in SOURCES for text in texts(ast.parse(path.read_text()))}
    return sorted(text for text in found if re.search(r"[a-z]", text))


def patterns() -> list[str]:
    """The first column of the table."""
    section = re.search(r"^## When it does not work\n(.*?)^## ", HOWTO.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    return [
        pattern
        for row in re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE)
        for pattern in re.findall(r"`([^`]+)`", row)
    ]


def fits(pattern: str, message: str) -> bool:
    """Whether the parts of a pattern stand in a message in their order."""
    return re.search(".*".join(map(re.escape, pattern.split(ANYTHING))), message, re.DOTALL) is not None


@pytest.mark.parametrize("message", messages())
def test_each_message_is_explained(message: str) -> None:
    """Whoever searches the how-to for what the log says finds the cause and what to do."""
    assert [pattern for pattern in patterns() if fits(pattern, message)], f"no row of {HOWTO.name} fits {message!r}"


@pytest.mark.parametrize("pattern", patterns())
def test_each_row_is_about_a_message_that_there_is(pattern: str) -> None:
    """A row whose message was changed or taken away would be found by nobody."""
    known = [*messages(), "… took longer than … s"]
    assert [message for message in known if fits(pattern, message)], f"nothing says {pattern!r} any more"
