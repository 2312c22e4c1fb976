"""What holds for all integration tests."""

from __future__ import annotations

import pytest

import forkserver
from vfiouser_oob.lab.demo import children


@pytest.fixture(autouse=True)
def programs_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that a test starts itself are forks of a process that has imported them; those of `demo` are not."""
    monkeypatch.setattr(children, "start_process", forkserver.start_process)
