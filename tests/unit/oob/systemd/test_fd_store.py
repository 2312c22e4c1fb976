"""Descriptors for the service manager to keep, received on a real datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from openfds import open_fds
from vfiouser_oob.systemd.fd_store import MAX_NAME, MAX_NAMES_SIZE, FdStore, StoreLost
from vfiouser_oob.systemd.mailbox import Mailbox
from vfiouser_oob.systemd.notify import Notifier
from vfiouser_oob.transport.fds import OwnedFd, close_fds


class Manager:
    """A manager as sd_notify(3) describes it, which keeps at most so many descriptors.

    Args:
        path: of its socket.
        limit: how many it keeps.
    """

    def __init__(self, path: Path, limit: int = 100) -> None:
        self.address = str(path)
        self.kept: dict[str, OwnedFd] = {}
        self.messages: list[str] = []
        self._limit = limit
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(self.address)

    async def run(self) -> None:
        """Do what it is told, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            self.take_one()

    def take_one(self) -> None:
        """Do what one message says."""
        data, numbers, _, _ = socket.recv_fds(self._sock, 4096, 253)
        text = data.decode()
        self.messages.append(text)
        fields = dict(line.split("=", 1) for line in text.split("\n"))
        fds = [OwnedFd(number) for number in numbers]
        name = fields.get("FDNAME", "stored")
        if "FDSTORE" in fields and len(self.kept) < self._limit:
            self.kept[name] = fds.pop().take()
        if "FDSTOREREMOVE" in fields and name in self.kept:
            self.kept.pop(name).close()
        close_fds(fds)

    def close(self) -> None:
        """Close everything."""
        close_fds(self.kept.values())
        self._sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A manager with room for a hundred."""
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def some_fd() -> OwnedFd:
    """A descriptor like any other."""
    return OwnedFd(os.memfd_create("some"))


def same_file(one: OwnedFd, other: OwnedFd) -> bool:
    """Whether two descriptors are of one file."""
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def test_a_descriptor_is_kept_and_dropped(manager: Manager) -> None:
    """The manager gets the descriptor under its name, and is told when it is not needed any more."""
    store = FdStore(Mailbox(manager.address))
    with some_fd() as fd:
        store.keep("vfu/a", fd)
        store.keep("vfu/b", fd, watched=True)
        for _ in range(2):
            manager.take_one()
        assert {"vfu/a", "vfu/b"} == set(manager.kept) == store.names
        assert same_file(fd, manager.kept["vfu/a"])
    store.drop("vfu/a")
    store.drop("vfu/a")
    store.drop("never")
    manager.take_one()
    assert {"vfu/b"} == set(manager.kept) == store.names
    assert [
        "FDSTORE=1\nFDNAME=vfu/a\nFDPOLL=0",
        "FDSTORE=1\nFDNAME=vfu/b",
        "FDSTOREREMOVE=1\nFDNAME=vfu/a",
    ] == manager.messages


def test_a_name_is_kept_as_long_as_anybody_uses_it(manager: Manager) -> None:
    """What two functions share is sent once, and given up when both have; so is what came from another process."""
    store = FdStore(Mailbox(manager.address))
    store.adopt("vfu/old", 2)
    with some_fd() as fd:
        store.keep("vfu/a", fd)
        store.keep("vfu/a", fd)
    store.drop("vfu/a")
    store.drop("vfu/old")
    store.drop("vfu/a")
    store.drop("vfu/old")
    store.discard("vfu/odd")
    for _ in range(4):
        manager.take_one()
    assert not store.names
    assert ["/a", "/a", "/old", "/odd"] == [text[text.rindex("/") :].split("\n")[0] for text in manager.messages]
    with pytest.raises(BlockingIOError):
        manager.take_one()


@pytest.mark.parametrize("name", ["", "a", "vfu/a:b", "vfu/ä", "vfu/\n", "vfu/" + "x" * MAX_NAME])
def test_what_is_no_name(name: str) -> None:
    """A name that systemd would not take, or that is not told from a socket's, is a mistake of ours."""
    with some_fd() as fd, pytest.raises(ValueError, match="cannot be the name"):
        FdStore(Mailbox(None)).keep(name, fd)


@pytest.mark.parametrize(("text", "limit"), [("512", 512), ("", None), ("x", None), ("9" * 30, None)])
def test_the_limit_of_a_newer_systemd_is_read(
    text: str, limit: int | None, caplog: pytest.LogCaptureFixture, manager: Manager
) -> None:
    """A limit that is exceeded is said once, with the setting that helps."""
    assert limit == FdStore.from_environment(Mailbox(None), {"FDSTORE": text}).limit
    store = FdStore(Mailbox(manager.address), limit=2)
    with some_fd() as fd:
        for number in range(5):
            store.keep(f"vfu/{number}", fd)
    (record,) = caplog.records
    assert "FileDescriptorStoreMax=" in record.message
    assert {"limit": 2, "descriptors": 3} == record.fields  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("environ", "address", "offered"),
    [
        ({"FDSTORE": "7"}, "@somebody", True),
        ({"SYSTEMD_EXEC_PID": str(os.getpid())}, "@somebody", True),
        ({"SYSTEMD_EXEC_PID": str(os.getppid())}, "@somebody", False),
        ({}, "@somebody", False),
        ({"FDSTORE": "7"}, None, False),
    ],
)
def test_only_who_may_keep_descriptors_is_asked(environ: dict[str, str], address: str | None, offered: bool) -> None:
    """A manager that neither is systemd nor says a limit hears nothing that it may not understand."""
    assert offered == FdStore.from_environment(Mailbox(address), environ).offered


async def test_names_that_have_no_room_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A service whose names are too long for one variable could not be started again; so the rest is not kept."""
    manager = Manager(tmp_path / "n", limit=1000)
    store = FdStore(Mailbox(manager.address))
    names = [f"vfu/{number:05d}/" + "x" * 230 for number in range(MAX_NAMES_SIZE // 240 + 2)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store._mailbox.run)
        nursery.start_soon(manager.run)
        with some_fd() as fd:
            for name in names:
                store.keep(name, fd)
        await store.barrier()
        assert set(manager.kept) == store.names < set(names)
        assert sum(len(name) + 1 for name in store.names) <= MAX_NAMES_SIZE
        (record,) = caplog.records
        assert "no room" in record.message
        assert not await store.check()
        for name in sorted(set(names) - store.names):
            store.drop(name)
        assert await store.check()
        await store.barrier()
        assert set(manager.kept) == store.names
        nursery.cancel_scope.cancel()
    manager.close()


async def test_a_barrier_says_when_all_is_done(manager: Manager) -> None:
    """It ends when the manager has read everything before it, and not sooner."""
    store = FdStore(Mailbox(manager.address))
    done = False

    async def wait() -> None:
        nonlocal done
        await store.barrier()
        done = True

    with some_fd() as fd:
        store.keep("vfu/a", fd)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        manager.take_one()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not done
        manager.take_one()
    assert done


@pytest.mark.parametrize(("limit", "kept"), [(0, False), (2, False), (3, True)])
async def test_whether_all_is_kept_is_found_out(tmp_path: Path, limit: int, kept: bool) -> None:
    """A manager that has dropped anything is found out by a descriptor that it drops; nothing is left of that."""
    manager = Manager(tmp_path / "n", limit)
    store = FdStore(Mailbox(manager.address))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        with some_fd() as fd:
            for name in ("vfu/a", "vfu/b"):
                store.keep(name, fd)
        assert kept == await store.check()
        await store.barrier()
        nursery.cancel_scope.cancel()
    assert limit == 0 or {"vfu/a", "vfu/b"} == set(manager.kept)
    manager.close()


async def test_without_a_manager_it_is_said(tmp_path: Path) -> None:
    """Nobody who asks is told that anything was kept: there is no manager, or it has gone."""
    with some_fd() as fd:
        store = FdStore(Mailbox(None))
        store.keep("vfu/a", fd)
        with pytest.raises(StoreLost, match="no service manager"):
            await store.check()
        store = FdStore(Mailbox(str(tmp_path / "gone")))
        store.keep("vfu/a", fd)
        with pytest.raises(StoreLost, match="2 messages did not reach"):
            await store.barrier()
        with pytest.raises(StoreLost, match="messages did not reach"):
            await store.check()


async def test_a_full_queue_loses_nothing(manager: Manager) -> None:
    """What the manager does not take at once it gets later, in order, descriptors and states alike."""
    before = open_fds()
    notifier = Notifier(manager.address)
    store = FdStore(notifier.mailbox)
    with some_fd() as fd:
        for number in range(60):
            store.keep(f"vfu/{number}", fd)
            notifier.status(str(number))
    assert notifier.mailbox.waiting > 0
    assert notifier.mailbox.lost == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.mailbox.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(manager.run)
        await store.barrier()
        nursery.cancel_scope.cancel()
    assert [f"STATUS={number}" for number in range(60)] == [text for text in manager.messages if "STATUS" in text]
    assert 60 == len(manager.kept)
    assert "BARRIER=1" == manager.messages[-1]
    manager.close()
    assert set(open_fds()) <= set(before)


async def test_a_manager_that_goes_while_messages_wait(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    """They are counted as lost and said, their descriptors are closed, and who waits is told."""
    before = open_fds()
    mailbox = Mailbox(manager.address)
    store = FdStore(mailbox)
    with some_fd() as fd:
        for number in range(60):
            store.keep(f"vfu/{number}", fd)
    assert mailbox.waiting > 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mailbox.run)
        await trio.testing.wait_all_tasks_blocked()
        manager.close()
        with pytest.raises(StoreLost, match="messages did not reach"):
            await store.barrier()
        nursery.cancel_scope.cancel()
    assert mailbox.waiting == 0
    assert any("could not be told" in record.message for record in caplog.records)
    assert set(open_fds()) <= set(before)


def test_without_descriptors_it_is_said(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not have one more descriptor loses the message, and knows."""

    def refuse(number: int) -> int:
        raise OSError(24, "Too many open files")

    with some_fd() as fd:
        mailbox = Mailbox(manager.address)
        monkeypatch.setattr(os, "dup", refuse)
        assert not mailbox.send(b"FDSTORE=1", (fd,))
        assert (1, 0) == (mailbox.lost, mailbox.waiting)


def test_what_was_not_sent_is_closed(manager: Manager) -> None:
    """A process that ends closes what waits."""
    before = open_fds()
    mailbox = Mailbox(manager.address)
    with some_fd() as fd:
        for _ in range(60):
            mailbox.send(b"X=1", (fd,))
    assert mailbox.waiting
    mailbox.close()
    manager.close()
    assert set(open_fds()) <= set(before)
