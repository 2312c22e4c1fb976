"""Sockets in directories that others may write to, and sockets that somebody waits for."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from vfiouser_oob.transport.listener import EXHAUSTED, Listener, ListenError, listen_on_path

#: Tries in a race; the attacker won every second one when the file was changed under its own name.
TRIES = 300
#: What an attacker runs: as soon as the file is there, it is a link to another one.
SWAPPER = """
import os, sys
path, target = sys.argv[1:]
print("ready", flush=True)
while True:
    try:
        for name in os.listdir(os.path.dirname(path)):
            victim = os.path.join(os.path.dirname(path), name)
            try:
                os.rename(victim, path + "-away")
                os.symlink(target, victim)
            except OSError:
                continue
    except OSError:
        continue
"""


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def test_group_and_mode(tmp_path: Path) -> None:
    """The socket appears with what was asked for, under its own name, and nothing else is left."""
    group = grp.getgrgid(os.getgid()).gr_name
    listener = listen_on_path(tmp_path / "f.sock", 0o640, group)
    assert (0o640, os.getgid()) == (mode_of(tmp_path / "f.sock"), (tmp_path / "f.sock").stat().st_gid)
    assert ["f.sock"] == os.listdir(tmp_path)
    assert str(tmp_path / "f.sock") == listener.address
    listener.close()
    assert not os.listdir(tmp_path)


def test_longest_path(tmp_path: Path) -> None:
    """The way through a directory of its own costs nothing of the longest path that a client can connect to."""
    path = tmp_path / ("x" * (107 - len(str(tmp_path)) - 1))
    listener = listen_on_path(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()


def test_nobody_elses_file_is_changed(tmp_path: Path) -> None:
    """Somebody who swaps files in the socket's directory cannot make us change another file's mode."""
    directory = tmp_path / "shared"
    directory.mkdir()
    target = tmp_path / "target"
    target.write_text("")
    target.chmod(0o600)
    path = directory / "f.sock"
    command = [sys.executable, "-c", SWAPPER, str(path), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as swapper:
        assert swapper.stdout is not None
        swapper.stdout.readline()
        try:
            for _ in range(TRIES):
                try:
                    listen_on_path(path, 0o666).close()
                except OSError:  # also a ListenError: the attacker can keep us from listening, and no more
                    pass
                assert 0o600 == mode_of(target)
        finally:
            swapper.kill()


def wait_and_connect(path: Path, results: list[int]) -> None:
    """Connect as soon as the file is there."""
    while not path.exists():
        pass
    with socket.socket(socket.AF_UNIX) as client:
        results.append(client.connect_ex(str(path)))


def test_the_file_is_there_when_it_can_be_used(tmp_path: Path) -> None:
    """A client that waits for the file is never refused."""
    results: list[int] = []
    for number in range(50):
        path = tmp_path / f"{number}.sock"
        waiting = threading.Thread(target=wait_and_connect, args=(path, results))
        waiting.start()
        listener = listen_on_path(path)
        waiting.join()
        listener.close()
    assert [0] * 50 == results


def taken_by_a_file(path: Path) -> None:
    """Put a file where the socket is to be."""
    path.write_text("mine")


def taken_by_a_link(path: Path) -> None:
    """Put a dangling link where the socket is to be."""
    path.symlink_to("nowhere")


@pytest.mark.parametrize("take", [taken_by_a_file, taken_by_a_link])
def test_nobodys_place_is_taken(tmp_path: Path, take: Callable[[Path], None]) -> None:
    """What is there and is no socket stays there."""
    path = tmp_path / "f.sock"
    take(path)
    with pytest.raises(ListenError, match="is not a socket"):
        listen_on_path(path)
    assert ["f.sock"] == os.listdir(tmp_path)


def test_a_group_that_we_may_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names mode and group, and nothing is left behind."""

    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    with pytest.raises(ListenError, match="mode 0o660 and group 0: Operation not permitted"):
        listen_on_path(tmp_path / "f.sock", group="0")
    assert not os.listdir(tmp_path)


class Refusing(Listener):
    """A listener whose system has an error for each of the first clients.

    Args:
        errors: their numbers.
        lasting: as for a listener.
    """

    def __init__(self, *errors: int, lasting: bool = False) -> None:
        self.taken, other = socket.socketpair()
        super().__init__(other, None, lasting=lasting)
        self._errors = list(errors)

    async def accept(self) -> socket.socket | None:
        """Fail as often as was asked for, then find nobody once, then somebody."""
        await trio.lowlevel.checkpoint()
        if not self._errors:
            return self.taken
        number = self._errors.pop(0)
        if not number:
            return None
        raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Close both ends."""
        self.taken.close()
        super().close()


@pytest.mark.parametrize("lasting", [False, True])
async def test_who_left_before_being_accepted_is_nobodys_error(lasting: bool) -> None:
    """Neither the client that has gone nor one that a rule refused is told of, or ends what listens."""
    told: list[str] = []
    listener = Refusing(errno.ECONNABORTED, errno.EPERM, errno.EPROTO, 0, lasting=lasting)
    assert await listener.next_client(told.append) is listener.taken
    assert told == []
    listener.close()


@pytest.mark.parametrize("number", sorted(EXHAUSTED))
async def test_what_is_exhausted_is_told_and_waited_for(number: int, autojump_clock: object) -> None:
    """The next try comes after a pause."""
    told: list[str] = []
    listener = Refusing(number, number)
    start = trio.current_time()
    assert await listener.next_client(told.append) is listener.taken
    assert told == [os.strerror(number)] * 2
    assert trio.current_time() > start
    listener.close()


async def test_a_socket_of_no_use_ends_its_owner_unless_it_lasts(autojump_clock: object) -> None:
    """Both are told of it."""
    told: list[str] = []
    listener = Refusing(errno.EINVAL)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        await listener.next_client(told.append)
    listener.close()
    lasting = Refusing(errno.EINVAL, lasting=True)
    assert await lasting.next_client(told.append) is lasting.taken
    assert told == [os.strerror(errno.EINVAL)] * 2
    lasting.close()
