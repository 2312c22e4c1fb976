"""What every VM test needs: the assets, and a folder whose path is short enough for UNIX sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbed.assets import Assets, locate


@pytest.fixture(scope="session")
def assets() -> Assets:
    """The built assets; missing ones are an error that names `make vm-assets`, never a skip."""
    found = locate()
    print(f"\nVM tests with QEMU {found.qemu_version}, Linux {found.kernel_version}")  # noqa: T201
    return found


@pytest.fixture
def workdir(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A short-named folder for sockets and logs; moved into `tmp_path` at the end, for a later look."""
    folder = Path(tempfile.mkdtemp(prefix="vmbed-"))
    yield folder
    for path in folder.rglob("*"):
        if path.is_socket():
            path.unlink()
    shutil.move(folder, tmp_path / "vmbed")
