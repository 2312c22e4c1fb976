"""The reference pages that are made from declarations are what their makers write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Maker: page.
PAGES = {"tools/messages_page.py": "docs/reference/messages.md"}


@pytest.mark.parametrize("maker", PAGES)
def test_page_is_up_to_date(maker: str, tmp_path: Path) -> None:
    """What `make pages` would write is what is there."""
    written = tmp_path / "page.md"
    subprocess.run([sys.executable, ROOT / maker, written], check=True, cwd=ROOT)
    assert written.read_text() == (ROOT / PAGES[maker]).read_text()
