"""How migrations that are over look to people."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiouser_oob.cli.migrations import render
from vfiouser_oob.observability.status import MigrationEntry

DONE: MigrationEntry = {
    "function": "nvme0",
    "direction": "out",
    "way": "v2",
    "began": "2026-01-01T00:02:03.104+00:00",
    "ended": "2026-01-01T00:02:03.517+00:00",
    "bytes": 67113012,
    "duration_s": 0.413,
    "bytes_per_s": 162501239.7,
    "downtime_s": 0.058,
    "outcome": "done",
    "why": None,
}
FAILED: MigrationEntry = {
    **DONE,
    "function": "nvme1",
    "direction": "in",
    "way": None,
    "downtime_s": None,
    "outcome": "failed",
    "why": "the state was refused: another firmware\x1b[2J",
}


@pytest.mark.parametrize("width", [80, 120])
def test_snapshot(width: int) -> None:
    """One row each, then why some failed; nothing is wider than the terminal, and no text of a peer steers it."""
    text = render([DONE, FAILED], width) + "\n"
    assert width >= max(map(len, text.splitlines()))
    path = Path(__file__).parent / "snapshots" / f"migrations-{width}.txt"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path} was written; look at it")
    assert path.read_text() == text


def test_none() -> None:
    """Without any there is a sentence rather than an empty table."""
    assert "no migrations yet" == render([])
