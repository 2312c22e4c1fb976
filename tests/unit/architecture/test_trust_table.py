"""The table of docs/explanation/trust.md names tests that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TRUST = ROOT / "docs" / "explanation" / "trust.md"


def rows() -> list[list[str]]:
    """The cells of the table, row by row, without its head."""
    lines = TRUST.read_text().split("| who | could |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def functions(files: Iterable[Path]) -> set[str]:
    """The names of all functions in some files."""
    found = set()
    for path in files:
        nodes = ast.walk(ast.parse(path.read_text()))
        found |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


def test_each_row_names_its_proof() -> None:
    """Each promise names tests or attacks; only what is said not to be prevented has none."""
    known = functions((ROOT / "tests").rglob("test_*.py"))
    attacks = functions((ROOT / "tests" / "support" / "hostilekit" / "attacks").glob("*.py"))
    assert len(rows()) > 15
    for who, could, _, how, proofs in rows():
        names = re.findall(r"(\*?)`(\w+)`", proofs)
        assert names or how.startswith("**not"), f"{who} could {could}: nothing proves that this is prevented"
        for star, name in names:
            assert name in (attacks if star else known), f"{who} could {could}: there is no {name}"
