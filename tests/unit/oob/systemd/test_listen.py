"""Inherited sockets: which are taken, what is refused, and whose they are."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vfiouser_oob.config import ConfigError, FunctionConfig, ModelDevice
from vfiouser_oob.systemd.listen import check_listening, inherited_descriptors, inherited_sockets
from vfiouser_oob.transport.fds import HasFileno
from vfiouser_oob.transport.reaper import REAPER

# Far above what the test process has open, so that descriptors can be placed in a row as systemd does.
FIRST = 900

Place = Callable[[list[socket.socket]], None]


def listening(path: Path) -> socket.socket:
    """A listening UNIX stream socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


@pytest.fixture
def place() -> Iterator[Place]:
    """Puts sockets at FIRST, FIRST + 1 … inheritable, as after an exec by systemd; closes them at the end."""
    with ExitStack() as stack:

        def put(sockets: list[socket.socket]) -> None:
            for number, sock in enumerate(sockets, start=FIRST):
                os.dup2(sock.fileno(), number)
                sock.close()
                stack.callback(os.close, number)

        yield put


def environment(count: int | str, names: str = "") -> dict[str, str]:
    """What systemd puts into the environment of this very process."""
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "OTHER": "1"}


def function(name: str, path: Path | None = None, fd: int | None = None) -> FunctionConfig:
    """A function with a socket of its own, or with none."""
    return FunctionConfig(name=name, socket=path, fd=fd, device=ModelDevice(model="nvme"))


def test_sockets_are_taken_by_name(tmp_path: Path, place: Place) -> None:
    """Sockets come grouped by name, close-on-exec, and the variables are gone for child processes."""
    place([listening(tmp_path / name) for name in "abc"])
    environ = environment(3, "nvme0:nvme1:nvme0")
    assert {"nvme0": [FIRST, FIRST + 2], "nvme1": [FIRST + 1]} == inherited_sockets(environ, first_fd=FIRST)
    assert {"OTHER": "1"} == environ
    assert not any(os.get_inheritable(fd) for fd in range(FIRST, FIRST + 3))


def test_without_names(tmp_path: Path, place: Place) -> None:
    """Without LISTEN_FDNAMES every socket has systemd's default name."""
    place([listening(tmp_path / "a")])
    assert {"unknown": [FIRST]} == inherited_sockets(environment(1), first_fd=FIRST)


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}])
def test_sockets_for_others_are_left_alone(environ: dict[str, str]) -> None:
    """Nothing is taken when the variables are absent or were meant for another process."""
    assert {} == inherited_sockets(environ, first_fd=FIRST)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (environment("x"), "LISTEN_FDS must be a number"),
        (environment(""), "LISTEN_FDS must be a number"),
        (environment("99999999999999999999"), "LISTEN_FDS must be a number up to"),
        (environment(2, "one"), "says 2 but LISTEN_FDNAMES has 1"),
        (environment(1, "closed"), "'closed'.*Bad file descriptor"),
    ],
)
def test_contradictions(environ: dict[str, str], words: str) -> None:
    """Variables that cannot be true are one clear line."""
    with pytest.raises(ConfigError, match=words):
        inherited_sockets(environ, first_fd=FIRST)


def test_only_listening_unix_stream_sockets_will_do(tmp_path: Path) -> None:
    """A file, a datagram socket, a TCP listener and a connected socket are each refused by what they are."""
    left, right = socket.socketpair()
    with (
        (tmp_path / "file").open("w") as file,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        listening(tmp_path / "good") as good,
        left,
        right,
    ):
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        check_listening(good.fileno(), "it")
        cases: dict[HasFileno, str] = {
            file: "not a socket",
            datagram: "SOCK_DGRAM",
            tcp: "AF_INET",
            left: "does not listen",
        }
        for bad, words in cases.items():
            with pytest.raises(ConfigError, match=words):
                check_listening(bad.fileno(), "it")


def test_what_was_kept_is_told_from_sockets(tmp_path: Path, place: Place) -> None:
    """Kept descriptors come by name, whatever they are, and are no sockets of units; of two of one name one is left."""
    left, right = socket.socketpair()
    more = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    place([listening(tmp_path / "a"), left, more[0], more[1]])
    environ = environment(4, "nvme0:vfu/f/main:vfu/f/twin:vfu/f/twin")
    inherited = inherited_descriptors(environ, first_fd=FIRST)
    assert {"nvme0": [FIRST]} == inherited.sockets
    assert {"vfu/f/main": FIRST + 1, "vfu/f/twin": FIRST + 3} == {
        name: fd.fileno() for name, fd in inherited.kept.items()
    }
    assert not any(os.get_inheritable(fd.fileno()) for fd in inherited.kept.values())
    right.close()
    for fd in inherited.kept.values():
        fd.detach()  # the fixture closes them
    assert REAPER.settle(10)
    os.dup2(FIRST, FIRST + 2)


def test_who_takes_only_sockets_leaves_nothing_open(tmp_path: Path, place: Place) -> None:
    """What was kept for a process that does not want it is closed."""
    left, right = socket.socketpair()
    place([listening(tmp_path / "a"), left])
    with right:
        assert {"nvme0": [FIRST]} == inherited_sockets(environment(2, "nvme0:vfu/f/main"), first_fd=FIRST)
        assert b"" == right.recv(1)
    assert REAPER.settle(10)
    os.dup2(FIRST, FIRST + 1)


def test_a_kept_descriptor_that_is_none(place: Place) -> None:
    """A number without a descriptor is one clear line."""
    with pytest.raises(ConfigError, match=r"kept descriptor 'vfu/x'.*Bad file descriptor"):
        inherited_descriptors(environment(1, "vfu/x"), first_fd=FIRST)
