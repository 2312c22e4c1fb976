"""Which function gets which of the sockets that systemd passed, whenever it comes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import FunctionConfig, ModelDevice
from vfiouser_oob.server.sockets import SocketShelf


def function(name: str, path: Path | None = None, fd: int | None = None) -> FunctionConfig:
    """A function."""
    return FunctionConfig(name=name, device=ModelDevice(model="test"), socket=path, fd=fd)


class Shelves:
    """Makes shelves of sockets that listen, and closes them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: list[SocketShelf] = []

    def make(self, known: list[str], **passed: list[str]) -> SocketShelf:
        """A shelf whose sockets listen at these names in the directory."""
        shelf = SocketShelf({name: [self._listen(at) for at in paths] for name, paths in passed.items()}, known)
        self.made.append(shelf)
        return shelf

    def _listen(self, name: str) -> int:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.directory / name))
        sock.listen()
        return sock.detach()


@pytest.fixture
def shelves(tmp_path: Path) -> Iterator[Shelves]:
    """The maker; what it made is closed."""
    maker = Shelves(tmp_path)
    yield maker
    for shelf in maker.made:
        shelf.close()


def taken(shelf: SocketShelf, config: FunctionConfig) -> list[str]:
    """The names of the sockets that a function takes."""
    names = []
    for fd in shelf.take(config):
        assert not os.get_inheritable(fd)
        with socket.socket(fileno=fd) as sock:
            names.append(Path(sock.getsockname()).name)
    return names


def test_by_name_then_by_path(shelves: Shelves, tmp_path: Path) -> None:
    """A socket goes to the function of its name, and one with the unit's name to the function of its path."""
    shelf = shelves.make(["nvme0", "nvme1", "own"], nvme0=["x"], unit=["y.sock"])
    assert ["x"] == taken(shelf, function("nvme0"))
    assert ["y.sock"] == taken(shelf, function("nvme1", tmp_path / "y.sock"))
    assert [] == taken(shelf, function("own", tmp_path / "z"))
    # A name counts more than a path.
    assert [] == taken(shelf, function("own", tmp_path / "x"))


def test_the_only_socket_is_for_the_only_function(shelves: Shelves) -> None:
    """One function and one socket belong together whatever they are called, but not the next function."""
    shelf = shelves.make(["f0"], unknown=["x"])
    assert ["x"] == taken(shelf, function("f0"))
    assert [] == taken(shelf, function("f1", shelves.directory / "z"))


def test_a_function_comes_again(shelves: Shelves, tmp_path: Path) -> None:
    """The socket stays while its function is away, and the next one of its name has it again."""
    shelf = shelves.make(["f0", "f1"], unit=["a", "b"])
    for _ in range(3):
        assert ["a"] == taken(shelf, function("f0", tmp_path / "a"))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "a"))


def test_a_function_without_socket(shelves: Shelves) -> None:
    """It is told which line is missing, and which sockets came for nobody; --fd needs nothing."""
    shelf = shelves.make(["f0", "f1"], other=["y"])
    with pytest.raises(ConfigError, match=r"'f0' has no socket configured, .*'other' at .*/y.* `socket = .*f0.sock\"`"):
        shelf.take(function("f0"))
    assert [] == shelf.take(function("f1", fd=7))


def test_sockets_for_nobody(shelves: Shelves, tmp_path: Path) -> None:
    """They are named, with their path."""
    shelf = shelves.make(["f0"], f0=["x"], other=["y"])
    assert [f"'other' at {tmp_path}/y"] == [str(each) for each in shelf.unclaimed([function("f0")])]
    assert [] == list(shelf.unclaimed([function("f0"), function("f1", tmp_path / "y")]))
