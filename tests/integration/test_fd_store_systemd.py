"""The FD store of a real systemd: what is kept survives kill -9, and what is not kept is noticed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import systemdbed

SUPPORT = Path(systemdbed.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(systemdbed.why_not() is not None, reason=str(systemdbed.why_not()))


def unit(report: Path, count: int, room: int) -> str:
    """A service that keeps some descriptors, with room for so many."""
    return f"""
[Service]
Type=notify
Environment=PYTHONPATH={SUPPORT}
ExecStart={sys.executable} -m journalkit.kept {report} {count}
FileDescriptorStoreMax={room}
Restart=always
RestartSec=0
"""


class Reports:
    """What the service says, line by line.

    Args:
        path: where it says so.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._file = open(os.open(path, os.O_RDWR))  # noqa: SIM115  # of a pipe that never ends

    def next(self) -> dict[str, Any]:
        """Wait for the next line."""
        found: dict[str, Any] = json.loads(self._file.readline())
        return found

    def close(self) -> None:
        """Listen no more."""
        self._file.close()


@pytest.fixture
def reports(tmp_path: Path) -> Iterator[Reports]:
    """What the service says at `report`."""
    reports = Reports(tmp_path / "report")
    yield reports
    reports.close()


def test_what_is_kept_survives(tmp_path: Path, reports: Reports) -> None:
    """After a crash and after a restart the service has its journal; sockets whose peer died with it are gone."""
    with systemdbed.running(tmp_path, {"kept.service": unit(tmp_path / "report", 3, 5)}) as manager:
        manager.ctl("start", "kept.service")
        first = reports.next()
        assert ([], 0, True) == (first["found"], first["starts"], first["whole"])
        manager.ctl("kill", "--signal=KILL", "kept.service")
        second = reports.next()
        manager.ctl("restart", "kept.service")
        third = reports.next()
        for later, starts in ((second, 1), (third, 2)):
            assert (["vfu/journal"], starts, True) == (later["found"], later["starts"], later["whole"])


@pytest.mark.parametrize("room", [0, 3, 4])
def test_what_is_not_kept_is_noticed(tmp_path: Path, reports: Reports, room: int) -> None:
    """A unit without a store, or with too small a one, is found out at once."""
    with systemdbed.running(tmp_path, {"kept.service": unit(tmp_path / "report", 3, room)}) as manager:
        manager.ctl("start", "kept.service")
        assert reports.next()["whole"] is False
