"""What holds for all integration tests."""

from __future__ import annotations

import pytest

import forkserver
from vfiouser_oob.lab.demo import children


@pytest.fixture(autouse=True)
def programs_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that a test starts itself are forks of a process that has imported them; those of `demo` are not."""
    monkeypatch.setattr(children, "start_process", forkserver.start_process)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules with slow tests first, of all rooms: begun last, one of them is what all processors wait for."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
