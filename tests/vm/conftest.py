"""What every VM test needs: the assets, and a folder whose path is short enough for UNIX sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbed.assets import Assets, locate
from vmbed.boots import Boots


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules whose guests run for minutes first: begun last, one of them is what all processors wait for."""
    items.sort(key=lambda item: not (isinstance(item, pytest.Function) and hasattr(item.module, "BOOTS")))


@pytest.fixture(scope="session")
def assets() -> Assets:
    """The built assets; missing ones are an error that names `make vm-assets`, never a skip."""
    found = locate()
    print(f"\nVM tests with QEMU {found.qemu_version}, Linux {found.kernel_version}")  # noqa: T201
    return found


@pytest.fixture(scope="session")
def boots(request: pytest.FixtureRequest, assets: Assets) -> Iterator[Boots]:
    """The guests that run scenarios. Those that the selected tests need begin as soon as the first one is asked for.

    A module's `BOOTS` says which of its fixtures needs which boot.
    """
    wanted = dict.fromkeys(
        boot
        for item in request.session.items
        if isinstance(item, pytest.Function)
        for fixture, boot in getattr(item.module, "BOOTS", {}).items()
        if fixture in item.fixturenames
    )
    # One of several processes that share the tests cannot tell which of them it will be given.
    with Boots(assets, [] if hasattr(request.config, "workerinput") else list(wanted)) as boots:
        yield boots


@pytest.fixture
def workdir(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A short-named folder for sockets and logs; moved into `tmp_path` at the end, for a later look."""
    folder = Path(tempfile.mkdtemp(prefix="vmbed-"))
    yield folder
    for path in folder.rglob("*"):
        if path.is_socket():
            path.unlink()
    shutil.move(folder, tmp_path / "vmbed")
