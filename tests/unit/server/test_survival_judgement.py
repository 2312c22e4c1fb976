"""What a daemon makes of what another one has left: clients go on, or are turned out in words and nothing is worse."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from vfiouser_agents.api import Role
from vfiouser_oob.config.schema import FunctionConfig, UpstreamDevice
from vfiouser_oob.migration.inherited import StreamMark
from vfiouser_oob.migration.record import Begun, MigrationRecord
from vfiouser_oob.persist.successor.things import MigrationThing, ProgressThing, RangeThing
from vfiouser_oob.server.estate import Estate
from vfiouser_oob.server.progress import Progress
from vfiouser_oob.server.survival import Survival
from vfiouser_oob.systemd.fd_store import FdStore
from vfiouser_oob.systemd.mailbox import Mailbox
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds
from vfiouser_protocol.capabilities import Negotiated, VersionCapabilities
from vfiouser_protocol.constants import DeviceState

CONFIG = FunctionConfig(name="f0", device=UpstreamDevice(socket=Path("/run/device.sock")), socket=Path("/run/f0.sock"))
AGREED = Negotiated(1, b"{}\0", VersionCapabilities(), VersionCapabilities(), False, False, None)


class Manager(Mailbox):
    """A service manager that keeps everything, played in this process."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.kept: dict[str, OwnedFd] = {}

    def send(self, data: bytes, fds: Sequence[HasFileno] = ()) -> bool:
        """Do what the message says."""
        fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
        name = fields["FDNAME"]
        if "FDSTOREREMOVE" in fields:
            if name in self.kept:
                self.kept.pop(name).close()
        elif name not in self.kept:
            self.kept[name] = OwnedFd(os.dup(fds[0].fileno()))
        return True

    def begin(self) -> Survival:
        """A daemon is started with what is kept."""
        return Survival(FdStore(self, 100), {name: fd.duplicate() for name, fd in self.kept.items()})


@pytest.fixture
def manager() -> Iterator[Manager]:
    """A manager, which gives up at the end what it has."""
    manager = Manager()
    yield manager
    close_fds(manager.kept.values())


def leave(manager: Manager, *configs: FunctionConfig) -> None:
    """A daemon serves a client of each function with a range of memory, and is killed."""
    for config in configs or (CONFIG,):
        leave_one(manager, config)


def leave_one(manager: Manager, config: FunctionConfig) -> None:
    """A client of one function."""
    survival = manager.begin()
    survival.works = True
    estate = survival.estate_of(config)
    assert estate is not None
    ours, theirs = socket.socketpair()
    with ours, theirs, OwnedFd(os.memfd_create("guest")) as memory:
        notes = estate.accepted(ours)
        notes.begin(None).close()
        notes.server_connected(theirs).close()
        notes.server_agreed(AGREED, None)
        notes.agreed(AGREED, None)
        notes.mapped(RangeThing(4096, 4096, 3, 0, "vfu/file/1-2-2"), memory)
    estate.migration(MigrationRecord())
    estate.close()
    survival.close()


def go_on(manager: Manager, config: FunctionConfig = CONFIG) -> int:
    """Another daemon begins; returns how many clients it goes on with."""
    survival = manager.begin()
    estate = survival.estate_of(config)
    assert estate is not None
    survival.settle()
    count = len(estate.heirs)
    for heir in estate.heirs:
        assert heir.agreed == AGREED
        assert [thing.address for thing, _ in heir.inheritance.ranges] == [4096]
    estate.close()
    return count


def journal(manager: Manager) -> int:
    """Number of the kept journal."""
    return manager.kept[Estate.journal_name("f0")].fileno()


def damaged(manager: Manager) -> None:
    """The head of the journal is damaged."""
    os.pwrite(journal(manager), b"XXXX", 0)


def newer(manager: Manager) -> None:
    """The journal is of a version that is not known."""
    os.pwrite(journal(manager), b"\2", 8)


def newer_record(manager: Manager) -> None:
    """One record of it is."""
    survival = manager.begin()
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    estate.journal.put(5, (4096).to_bytes(8, "big"), msgpack.packb((9, 1)))
    estate.close()
    survival.close()


def not_kept(manager: Manager) -> None:
    """The store was full when the memory came."""
    manager.kept.pop("vfu/file/1-2-2").close()


def migrating(manager: Manager, record: MigrationRecord) -> None:
    """A migration was under way."""
    survival = manager.begin()
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    estate.migration(record)
    estate.close()
    survival.close()


def strange_migration(manager: Manager) -> None:
    """Its migration is of a version that is not known."""
    survival = manager.begin()
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    estate.put(MigrationThing('{"version": 99}'))
    estate.close()
    survival.close()


def test_a_client_is_gone_on_with(manager: Manager) -> None:
    """Nothing that is needed is given up, however often daemons follow each other."""
    leave(manager)
    before = set(manager.kept)
    for _ in range(3):
        assert go_on(manager) == 1
        assert set(manager.kept) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damaged, "not a journal"),
        (newer, "a newer version, 2; 1 is understood"),
        (newer_record, "of version 9; 1 is understood"),
        (not_kept, "was not kept"),
        (strange_migration, "a migration record of version 99"),
    ],
)
def test_a_client_is_turned_out_in_words(
    manager: Manager, change: Callable[[Manager], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong is said, all descriptors are given up, and the next clients can be kept again."""
    leave(manager)
    change(manager)
    assert go_on(manager) == 0
    assert set(manager.kept) == {Estate.journal_name("f0")}
    assert any(words in str(vars(record)) for record in caplog.records)
    leave(manager)
    assert go_on(manager) == 1


def test_clients_of_two_functions_are_gone_on_with(manager: Manager) -> None:
    """What one function takes of what was kept is not looked at any more for the next one."""
    other = replace(CONFIG, name="f1", socket=Path("/run/f1.sock"))
    leave(manager, CONFIG, other)
    survival = manager.begin()
    estates = [survival.estate_of(config) for config in (CONFIG, other)]
    for estate in estates:
        assert estate is not None
        assert [AGREED] == [heir.agreed for heir in estate.heirs]
        estate.close()
    survival.settle()


def test_a_migration_under_way_is_gone_on_with(manager: Manager) -> None:
    """What is known of it and how far its client has come are there, and a client that goes takes both along."""
    leave(manager)
    record = MigrationRecord(state=DeviceState.STOP_COPY, attached=True, begun=Begun(Role.SOURCE, "m1"))
    migrating(manager, record)
    survival = manager.begin()
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    assert record == estate.migration_left
    (heir,) = estate.heirs
    assert not heir.progress
    sock, memory = heir.main.take()
    with sock, memory:
        heir.notes.resumed(memory)
        heir.notes.stream_moved(StreamMark(1, 10, b"head", 3), StreamMark(1, 20, whole=True))
    estate.close()
    survival.close()
    survival = manager.begin()
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    (heir,) = estate.heirs
    number = memory.number
    assert StreamMark(1, 10, b"head", 3) == Progress(heir.progress, number).stream
    assert StreamMark(1, 20, whole=True) == Progress(heir.progress, number + 1).stream
    heir.notes.gone()
    assert ProgressThing.KIND not in {kind for kind, things in estate.journal.records.items() if things}
    estate.close()
    survival.close()


def test_nobody_goes_on_with_a_migration_without_its_client(manager: Manager) -> None:
    """What the function does is asked of its agent then."""
    survival = manager.begin()
    survival.works = True
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    estate.migration(MigrationRecord(state=DeviceState.STOP))
    estate.close()
    survival.close()
    survival = manager.begin()
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    assert estate.migration_left is None
    estate.close()
    survival.close()


def test_a_function_that_is_removed_leaves_nothing(manager: Manager) -> None:
    """Functions may come and go: the store does not fill up."""
    survival = manager.begin()
    survival.works = True
    estate = survival.estate_of(CONFIG)
    assert estate is not None
    assert manager.kept
    estate.abolish()
    estate.close()
    survival.close()
    assert not manager.kept


def test_another_configuration(manager: Manager) -> None:
    """Another device must not appear under a running guest."""
    leave(manager)
    assert go_on(manager, replace(CONFIG, device=UpstreamDevice(socket=Path("/run/other.sock")))) == 0
