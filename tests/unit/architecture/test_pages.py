"""The reference pages that are made from declarations are what their makers write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Page: maker.
PAGES = {
    "docs/reference/messages.md": "tools/messages_page.py",
    "docs/reference/configuration.md": "tools/config_page.py",
    "docs/reference/config.schema.json": "tools/config_page.py",
    "docs/reference/control-socket.md": "tools/verbs_page.py",
    "docs/reference/metrics.md": "tools/metrics_page.py",
    "docs/explanation/architecture.md": "tools/rooms_map.py",
    "docs/explanation/scale.md": "tools/scale_page.py",
    "docs/explanation/scale.svg": "tools/scale_page.py",
}


@pytest.mark.parametrize("page", PAGES)
def test_page_is_up_to_date(page: str, tmp_path: Path) -> None:
    """What `make pages` would write is what is there."""
    written = tmp_path / Path(page).name
    subprocess.run([sys.executable, ROOT / PAGES[page], written], check=True, cwd=ROOT)
    assert written.read_text() == (ROOT / page).read_text()


def test_every_room_says_what_it_is() -> None:
    """No room is without a sentence, and the map names the packages that there are."""
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    rooms = [
        path.parent for base in ("vfiouser_oob", "agents", "protocol") for path in (ROOT / base).rglob("__init__.py")
    ]
    for room in rooms:
        found = re.search(rf"^\| `{room.relative_to(ROOT).as_posix()}/` \| (.+) \|$", page, re.MULTILINE)
        assert found is not None, room
        assert len(found[1].split()) > 3, room
