"""Write the map of the rooms into `docs/explanation/architecture.md`, from what each package says of itself.

    python tools/rooms_map.py [FILE]

A test fails when the page is not what this writes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
BEGIN, END = "<!-- rooms: written by `make pages` from the packages' docstrings -->", "<!-- end of rooms -->"
#: The packages, from the highest to the lowest; each may import those behind it.
PACKAGES = (
    "agents/vfiouser_soc",
    "vfiouser_oob",
    "agents/vfiouser_agents",
    "protocol/vfiouser_conformance",
    "protocol/vfiouser_protocol",
)


def rooms(package: Path) -> Iterator[tuple[str, str]]:
    """Each room of a package: its path in the repository, and the sentence that says what it is."""
    for module in sorted(package.rglob("__init__.py")):
        docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
        yield module.parent.relative_to(ROOT).as_posix(), " ".join(docstring.split("\n\n")[0].split()).rstrip(".")


def table() -> str:
    """Return the map."""
    lines = ["| room | what lives there |", "|---|---|"]
    lines += [f"| `{room}/` | {what} |" for package in PACKAGES for room, what in rooms(ROOT / package)]
    return "\n".join(lines)


def main() -> None:
    """Write the page with today's map in it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
