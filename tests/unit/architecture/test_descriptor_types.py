"""No bare number of a descriptor crosses a room of the daemon: who closes it would be anybody's guess."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DESCRIPTOR = re.compile(r"(^|_)fds?$")
#: Where numbers are what it is about, each with the reason.
NUMBERS = {
    "vfiouser_oob/transport/fds.py": "turns numbers into owners",
    "vfiouser_oob/transport/reaper.py": "closes numbers that nobody else has any more",
    "vfiouser_oob/transport/activity.py": "watches sockets by number; they stay their connection's",
    "vfiouser_oob/transport/listener.py": "takes over what a parent process left at a number",
    "vfiouser_oob/systemd/listen.py": "takes over what the service manager left at a number",
    "vfiouser_oob/config/schema.py": "the number is configuration",
    "vfiouser_oob/cli/serve.py": "the number is configuration",
    "vfiouser_oob/memory/files.py": "a mapping is made of a number within one call",
    "vfiouser_oob/client/mapping.py": "a mapping is made of a number within one call",
    "vfiouser_oob/observability/status.py": "counts them",
    "vfiouser_oob/observability/measured.py": "counts them",
    "agents/vfiouser_soc/nvme/stores.py": "a file of its own, used in one module",
}
#: Rooms that have to do with descriptors of other processes.
ROOMS = ("transport", "server", "client", "devices", "memory", "migration")
FOREIGN = tuple(f"vfiouser_oob/{room}/" for room in ROOMS)
#: Rooms that speak to the kernel, or that are programs of their own.
OUTSIDE = (
    "vfiouser_oob/devices/kernel_vfio/",
    "vfiouser_oob/lab/bench/",
    "vfiouser_oob/lab/demo/",
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """The daemon's modules, by their path."""
    for path in sorted([*(ROOT / "vfiouser_oob").rglob("*.py"), *(ROOT / "agents" / "vfiouser_soc").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name not in NUMBERS and not name.startswith(OUTSIDE):
            yield name, ast.parse(path.read_text())


def numbers_of(tree: ast.Module) -> Iterator[str]:
    """What is named like a descriptor and typed like a number: parameters, fields, results."""
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            pairs = [(each.arg, each.annotation) for each in (*arguments.args, *arguments.kwonlyargs)]
            pairs.append((node.name, node.returns))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            pairs = [(node.target.id, node.annotation)]
        for name, annotation in pairs:
            if annotation is not None and DESCRIPTOR.search(name) and re.search(r"\bint\b", ast.unparse(annotation)):
                yield f"{name}: {ast.unparse(annotation)} (line {node.lineno})"  # type: ignore[attr-defined]


def test_descriptors_cross_rooms_as_owners() -> None:
    """Parameters, fields and results that are descriptors are `OwnedFd` or lent, never numbers."""
    found = [f"{name}: {what}" for name, tree in modules() for what in numbers_of(tree)]
    assert not found, found


def test_only_the_owner_closes() -> None:
    """`os.close` of a number is for `fds` and `reaper` alone; everywhere else an owner is closed."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if name.startswith(FOREIGN) and isinstance(node, ast.Call) and ast.unparse(node.func) == "os.close"
    ]
    assert not found, found
