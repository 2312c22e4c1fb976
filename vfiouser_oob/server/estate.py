"""What one function leaves to the daemon after this one: a journal, and descriptors that the service manager keeps.

    client ──► sockets, each with its memory ─┐
    device ──► ranges, files, eventfds ───────┼──► journal (records) and store (descriptors)
    migration ──► whether one is under way ───┘

Everything is taken down when it happens, before the client hears of it. So nothing has to be done at the end, and it
does not matter which end that is.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vfiouser_oob import __version__
from vfiouser_oob.config.schema import FunctionConfig
from vfiouser_oob.migration.inherited import LogMark, StreamMark, V1Mark
from vfiouser_oob.migration.record import MigrationRecord
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.journal.journal import Journal
from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.persist.successor.descriptors import eventfd_name, function_name
from vfiouser_oob.persist.successor.notes import Inheritance, KeptStream
from vfiouser_oob.persist.successor.things import (
    AgreedThing,
    AssignedThing,
    ClientThing,
    ConfigThing,
    FunctionThing,
    LineThing,
    MigrationThing,
    ProgressThing,
    RangeThing,
    RegionThing,
    SnapshotThing,
    Thing,
    TwinThing,
    UpstreamThing,
    VectorThing,
    VfioThing,
)
from vfiouser_oob.server.progress import write_log, write_registers, write_stream
from vfiouser_oob.systemd.fd_store import FdStore
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds
from vfiouser_oob.transport.peer import Peer
from vfiouser_protocol.capabilities import Negotiated, VersionCapabilities

#: Kinds of records that are about the client that is served.
_OF_SERVED = (
    RegionThing,
    TwinThing,
    AgreedThing,
    UpstreamThing,
    RangeThing,
    AssignedThing,
    ConfigThing,
    VectorThing,
    LineThing,
    SnapshotThing,
    VfioThing,
    ProgressThing,
)
_CLIENT_END, _SERVER_END = 0, 1
_NOTHING = Negotiated(0, b"", VersionCapabilities(), VersionCapabilities(), False, False, None)
_TWIN = 1
#: What the socket that a client has connected is called.
MAIN = "main"


def identity_of(config: FunctionConfig) -> str:
    """What a function is configured to be, as a digest: a daemon that is told otherwise keeps no client of it."""
    about = (config.device.describe(), config.dma.value, config.retain_state, config.migration)
    agent = None if config.agent is None else (config.agent.kind, config.agent.function)
    return hashlib.sha256(repr((about, agent)).encode()).hexdigest()[:32]


@dataclass(eq=False)
class Arrival:
    """A client that has just come, or that another process has left.

    Args:
        notes: where is taken down what becomes of it.
        heir: what another process has left.
        memory: of its socket, likewise; None if it has none yet.
    """

    notes: ClientNotes
    heir: Heir | None = None
    memory: StreamMemory | None = None


@dataclass(eq=False)
class Heir:
    """A client that another process has left to us.

    Args:
        main: its socket.
        notes: where is taken down what becomes of it.
        agreed: what was negotiated with it; None if it was not told yet.
        twin: its second socket.
        inheritance: what its device needs.
        config: what it wrote to configuration space.
        regions: memory behind regions, by index.
        progress: how far it has come with a migration.
    """

    main: KeptStream
    notes: ClientNotes
    agreed: Negotiated | None = None
    twin: KeptStream | None = None
    inheritance: Inheritance = field(default_factory=Inheritance)
    config: Sequence[ConfigThing] = ()
    regions: Mapping[int, OwnedFd] = field(default_factory=dict)
    progress: list[ProgressThing] = field(default_factory=list)

    def close(self) -> None:
        """Close what nobody took."""
        for stream in [self.main, *([] if self.twin is None else [self.twin])]:
            stream.close()
        self.inheritance.close()
        close_fds(self.regions.values())


class Estate:
    """What one function leaves.

    Args:
        function: its name.
        identity: what it is configured to be.
        store: where descriptors are kept.
        journal: its records; owned from now on.
        log: a logger.
    """

    def __init__(self, function: str, identity: str, store: FdStore, journal: Journal, log: Logger) -> None:
        self.store = store
        self.function = function
        #: Clients that a process before us has left, to be gone on with.
        self.heirs: list[Heir] = []
        #: What is left of the migration of one of them; None: it was under way with none that is there still.
        self.migration_left: MigrationRecord | None = None
        #: What else is kept of the function, by name.
        self.others: list[str] = []
        self._journal = journal
        self._log = log
        self._lost = False
        self.put(FunctionThing(function, identity, __version__))

    @staticmethod
    def journal_name(function: str) -> str:
        """The name of a function's journal."""
        return function_name(function, "journal")

    @property
    def journal(self) -> Journal:
        """The records."""
        return self._journal

    def put(self, thing: Thing) -> None:
        """Take something down."""
        try:
            self._journal.put(thing.KIND, thing.key, thing.to_record())
        except OSError as error:
            self._lose(error)

    def drop(self, thing: Thing) -> None:
        """Something is not so any more."""
        try:
            self._journal.drop(thing.KIND, thing.key)
        except OSError as error:
            self._lose(error)

    def forget(self, kind: type[Thing]) -> None:
        """Nothing of a kind is so any more."""
        try:
            self._journal.forget(kind.KIND)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """What is in the journal is old from now on, so nobody must go on with it."""
        if not self._lost:
            self._lost = True
            self.store.discard(self.journal_name(self.function))
            self._log.error(
                "a restart will disconnect the client: the daemon cannot write its state down", error=error.strerror
            )

    @property
    def usable(self) -> bool:
        """Whether another process could go on with it."""
        return not self._lost and self.journal_name(self.function) in self.store.names

    def accepted(self, sock: HasFileno) -> ClientNotes:
        """A client has been accepted: from here on it is not lost, which is to be said before anything else is done.

        Args:
            sock: its socket; it stays the caller's.

        Returns:
            Where is taken down what becomes of it.
        """
        notes = ClientNotes(self, secrets.randbits(32))
        notes.keep(MAIN, sock)
        return notes

    def migration(self, record: MigrationRecord) -> None:
        """What the function's migration is from now on."""
        self.put(MigrationThing(record.to_json()))

    def abolish(self) -> None:
        """Nobody goes on with the function: nothing of it is kept any more."""
        for name in (self.journal_name(self.function), *self.others):
            self.store.discard(name)

    def close(self) -> None:
        """Close what is ours; the manager has its own."""
        for heir in self.heirs:
            heir.close()
        self.heirs = []
        self._journal.close()


def memory_name(stream: str) -> str:
    """The name of a socket's memory, by that of the socket."""
    return f"{stream}.m"


class ClientNotes:
    """Takes down what another process has to know of one client.

    Args:
        estate: the function's.
        number: of the client.
    """

    def __init__(self, estate: Estate, number: int) -> None:
        self.number = number
        self._estate = estate
        self._names: list[str] = []
        self._files: dict[int, str] = {}
        self._eventfds: dict[tuple[int, int, int], str] = {}
        self._client: ClientThing | None = None
        self._served = False
        #: The memory of its socket.
        self._stream: StreamMemory | None = None

    def resumed(self, memory: StreamMemory) -> None:
        """The client's socket is followed, perhaps again.

        Args:
            memory: its memory; it stays the caller's.
        """
        self._stream = memory

    def adopt(
        self,
        thing: ClientThing | None,
        names: Sequence[str],
        files: dict[int, str],
        vectors: Sequence[VectorThing] = (),
        *,
        served: bool,
    ) -> None:
        """Know what another process has taken down.

        Args:
            thing: the client; None if it was only accepted.
            names: what is kept of it, without the files of its memory and its eventfds.
            files: those, by address of the range.
            vectors: its eventfds.
            served: whether it is the client that is served.
        """
        store = self._estate.store
        self._client, self._names, self._files, self._served = thing, list(names), files, served
        self._eventfds = {(each.index, each.vector, each.action): each.eventfd for each in vectors}
        for name in (*names, *files.values(), *self._eventfds.values()):
            store.adopt(name)

    def begin(self, peer: Peer | None) -> StreamMemory:
        """Make a memory for the client's socket, which is kept already.

        Args:
            peer: who it is.

        Raises:
            OSError: there is no memory.
        """
        main = function_name(self._estate.function, f"{self.number:x}.{MAIN}")
        memory = self._memory(main)
        who = peer or Peer(0, 0, 0, "")
        self._client = ClientThing(self.number, main, memory_name(main), who.pid, who.uid, who.gid)
        self._estate.put(self._client)
        return memory

    def keep_stream(self, part: str, sock: HasFileno) -> tuple[str, StreamMemory]:
        """Keep a socket, and make a memory for it.

        Args:
            part: what it is to the client.
            sock: the socket; it stays the caller's.

        Returns:
            Its name, and its memory.

        Raises:
            OSError: there is no memory.
        """
        name = self.keep(part, sock)
        return name, self._memory(name)

    def _memory(self, stream: str) -> StreamMemory:
        memory = StreamMemory.create(f"vfiouser-{stream.rpartition('.')[2]}")
        self._keep(memory_name(stream), memory)
        return memory

    def keep(self, part: str, fd: HasFileno) -> str:
        """Keep a descriptor of the client; returns its name.

        Args:
            part: what it is to the client.
            fd: it; it stays the caller's.
        """
        name = function_name(self._estate.function, f"{self.number:x}.{part}")
        self._keep(name, fd)
        return name

    def _keep(self, name: str, fd: HasFileno) -> None:
        self._estate.store.keep(name, fd)
        self._names.append(name)

    def agreed(self, agreed: Negotiated, twin: HasFileno | None) -> StreamMemory | None:
        """The client is about to be told what was negotiated.

        Args:
            agreed: that.
            twin: our end of its second socket.

        Returns:
            The memory of that one.

        Raises:
            OSError: there is no memory.
        """
        memory: StreamMemory | None = None
        if twin is not None:
            name, memory = self.keep_stream("twin", twin)
            self._estate.put(TwinThing(name, memory_name(name)))
        self._served = True
        self._estate.put(AgreedThing.of(agreed, _CLIENT_END, self.number))
        return memory

    def begin_anew(self) -> None:
        """The client had not been told yet what was agreed: nothing of that counts."""
        for kind in _OF_SERVED:
            self._estate.forget(kind)
        own = {self._client.main, self._client.memory} if self._client is not None else set()
        shared = (*self._files.values(), *self._eventfds.values())
        for name in (*(name for name in self._names if name not in own), *shared):
            self._estate.store.drop(name)
        self._names, self._files, self._eventfds = [name for name in self._names if name in own], {}, {}
        self._served = False

    # What the device says

    def server_connected(self, sock: HasFileno) -> StreamMemory:
        """A connection to the server behind the function."""
        self._served = True
        name, memory = self.keep_stream("server", sock)
        self._estate.put(UpstreamThing(0, name, memory_name(name)))
        return memory

    def server_lost(self) -> None:
        """The connection to the server behind the function has ended."""
        self._estate.forget(UpstreamThing)
        self._estate.drop(AgreedThing.of(_NOTHING, _SERVER_END))
        for name in [name for name in self._names if ".server" in name.rpartition("/")[2]]:
            self._names.remove(name)
            self._estate.store.drop(name)

    def server_agreed(self, agreed: Negotiated, twin: HasFileno | None) -> StreamMemory | None:
        """What was negotiated with it."""
        memory: StreamMemory | None = None
        if twin is not None:
            name, memory = self.keep_stream("server-twin", twin)
            self._estate.put(UpstreamThing(_TWIN, name, memory_name(name)))
        self._estate.put(AgreedThing.of(agreed, _SERVER_END, self.number))
        return memory

    def mapped(self, thing: RangeThing, file: HasFileno | None) -> None:
        """The device may use a range."""
        if thing.file is not None and file is not None:
            self._estate.store.keep(thing.file, file)
            self._files[thing.address] = thing.file
        self._estate.put(thing)

    def unmapped(self, address: int) -> None:
        """It does not use it any more."""
        self._estate.drop(RangeThing(address, 0, 0, 0, None))
        name = self._files.pop(address, None)
        if name is not None:
            self._estate.store.drop(name)

    def assigned(self, index: int, vectors: bytes) -> None:
        """Which vectors have eventfds."""
        self._estate.put(AssignedThing(index, vectors))

    def kernel_handle(self, number: int, fd: HasFileno, space: int) -> None:
        """What the kernel has opened of the device."""
        self._served = True
        self._estate.put(VfioThing(number, self.keep(f"kernel-{number}", fd), space))

    def eventfd(self, index: int, vector: int, action: int, fd: HasFileno | None) -> None:
        """The eventfd that a vector has for an action."""
        place = index, vector, action
        old = self._eventfds.pop(place, None)
        if fd is not None:
            try:
                name = eventfd_name(fd)
            except OSError:
                name = function_name(self._estate.function, f"{self.number:x}.irq-{secrets.token_hex(4)}")
            self._estate.store.keep(name, fd)
            self._eventfds[place] = name
            self._estate.put(VectorThing(*place, name))
        elif old is not None:
            self._estate.drop(VectorThing(*place, ""))
        if old is not None:
            self._estate.store.drop(old)

    def line(self, thing: LineThing) -> None:
        """What an IRQ index remembers."""
        self._estate.put(thing)

    def snapshot(self, thing: SnapshotThing | None) -> None:
        """The device's state is in its memory, or what is there is old."""
        if thing is None:
            self._estate.forget(SnapshotThing)
        else:
            self._estate.put(thing)

    def config_written(self, offset: int, data: bytes) -> None:
        """Configuration space as last written.

        Args:
            offset: of a doubleword.
            data: its four bytes, and one byte for each that says whether it was written.
        """
        self._estate.put(ConfigThing(offset, data))

    def config_forgotten(self) -> None:
        """Nothing of it counts any more: the function was reset."""
        self._estate.forget(ConfigThing)

    def stream_moved(self, before: StreamMark, after: StreamMark) -> None:
        """The client takes a portion of the state that is being saved, once its command is answered."""
        self._estate.put(write_stream(self._number, before, after))

    def iterated(self, before: V1Mark, after: V1Mark) -> None:
        """The client goes on in the migration region, once its command is answered."""
        self._estate.put(write_registers(self._number, before, after))

    def logs(self, mark: LogMark | None) -> None:
        """Dirty pages are logged for the client, or not any more."""
        self._estate.put(write_log(mark))

    @property
    def _number(self) -> int:
        """Of the client's command that is being executed."""
        assert self._stream is not None
        return self._stream.number

    def region(self, index: int, memory: HasFileno) -> None:
        """The memory behind a region, which the client may have mapped, or other memory of the device."""
        self._served = True
        self._estate.put(RegionThing(index, self.keep(f"region-{index}", memory)))

    def gone(self) -> None:
        """The client has gone, and nobody goes on with it."""
        if self._client is not None:
            self._estate.drop(self._client)
        if self._served:
            for kind in _OF_SERVED:
                self._estate.forget(kind)
        for name in (*self._names, *self._files.values(), *self._eventfds.values()):
            self._estate.store.drop(name)
        self._names, self._files, self._eventfds = [], {}, {}
