"""Every kit of the tests is described where a reader looks for it."""

from __future__ import annotations

import re
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def test_the_kits_are_described() -> None:
    """The table in tests/support names every kit, and no other."""
    kits = {path.stem for path in SUPPORT.glob("*.py")} | {path.parent.name for path in SUPPORT.glob("*/__init__.py")}
    listed = re.findall(r"^\| `(\w+)` \|", (SUPPORT / "README.md").read_text(), re.MULTILINE)
    assert sorted(kits) == sorted(listed)
