"""How clients outlive the daemon: what a process before us has left, and whether one after us will find anything.

Without a service manager that keeps descriptors there is none of it, and everything is as if this module did not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from vfiouser_oob.config.schema import FunctionConfig
from vfiouser_oob.migration.record import MigrationRecord
from vfiouser_oob.observability import log
from vfiouser_oob.persist.journal.journal import Journal, read_journal
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.descriptors import (
    DescriptorKind,
    function_name,
    function_of,
    kind_of,
    vm_name,
)
from vfiouser_oob.persist.successor.notes import Inheritance, KeptStream
from vfiouser_oob.persist.successor.rebuild import CannotRebuild, rebuild
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
from vfiouser_oob.server.estate import MAIN, ClientNotes, Estate, Heir, identity_of
from vfiouser_oob.server.ledger import JOURNAL, Ledger
from vfiouser_oob.systemd.fd_store import FdStore, StoreLost
from vfiouser_oob.systemd.listen import inherited_descriptors
from vfiouser_oob.systemd.mailbox import Mailbox
from vfiouser_oob.systemd.notify import Notifier
from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_oob.transport.listener import Listener, adopt_socket
from vfiouser_protocol.constants import RegionIndex

#: Seconds that the service manager may take to answer; it is asked when we begin and when we end.
_ANSWER_S = 1.0


class Survival:
    """What is kept for all functions of a daemon.

    Args:
        store: where descriptors are kept.
        kept: what a process before us has left there, by name; owned from now on.
        own_mailbox: of a manager that is there for nothing else, so that somebody has to run it.
    """

    def __init__(self, store: FdStore, kept: Mapping[str, OwnedFd], own_mailbox: Mailbox | None = None) -> None:
        self._own_mailbox = own_mailbox
        self._store = store
        self._kept = dict(kept)
        #: What it is, as long as nobody has taken any of it.
        self._kinds = {name: kind_of(fd) for name, fd in kept.items()}
        self._used: set[str] = set()
        self._log = log.get("survival")
        #: Whether anything is kept.
        self.works = bool(kept)

    async def find_out(self) -> None:
        """Find out whether the service manager keeps anything."""
        if self.works or not self._store.offered:
            return
        if self._store.limit is not None:
            self.works = self._store.limit > 0
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._store.run)
            with trio.move_on_after(_ANSWER_S):
                self.works = await self._kept_all()
            nursery.cancel_scope.cancel()
        if not self.works:
            self._log.warning(
                "a restart will disconnect clients: the service manager keeps no descriptors",
                what_to_do="FileDescriptorStoreMax= and NotifyAccess=main in the unit",
            )

    async def _kept_all(self) -> bool:
        try:
            return await self._store.check()
        except StoreLost as error:
            self._log.warning("the service manager could not be told everything", reason=str(error))
            return False

    async def run(self) -> None:
        """Send what the service manager did not take at once, until cancelled."""
        if self._own_mailbox is not None:
            await self._own_mailbox.run()

    async def ready(self) -> bool:
        """Whether the process after us will find everything that was kept; asked when we end."""
        if not self.works:
            return False
        kept = False
        with trio.move_on_after(_ANSWER_S):
            kept = await self._kept_all()
        if not kept:
            self._log.error(
                "clients are disconnected: some of what they need was not kept",
                what_to_do="a larger FileDescriptorStoreMax= in the unit",
            )
        return kept

    def estate_of(self, config: FunctionConfig) -> Estate | None:
        """What a function leaves, and what was left of it.

        Args:
            config: the function.

        Returns:
            None if nothing is kept.
        """
        if not self.works:
            return None
        name = Estate.journal_name(config.name)
        left = self._kept.get(name)
        try:
            if left is not None:
                estate = self._inherited(config, name, left)
                if estate is not None:
                    return estate
            journal = Journal.create(f"vfiouser-{config.name}")
        except OSError as error:
            self._log.error("a restart will disconnect the client", function=config.name, error=error.strerror)
            return None
        self._store.discard(name)
        self._store.keep(name, journal)
        self._used.add(name)
        return Estate(config.name, identity_of(config), self._store, journal, self._log)

    def _inherited(self, config: FunctionConfig, name: str, left: OwnedFd) -> Estate | None:
        """Go on with a journal; None if nothing can be made of it, which is said."""
        try:
            history = read_journal(left)
            things = _understood(history.records, self._kinds)
            record = _check(things, identity_of(config))
            journal = Journal.resume(left, history)
        except UnusableRecord as error:
            self._log.error("disconnecting clients: their records are not usable", function=config.name,
                            reason=str(error))  # fmt: skip
            return None
        self._store.adopt(name)
        self._used.add(name)
        estate = Estate(config.name, identity_of(config), self._store, journal, self._log)
        for client in (thing for thing in things if isinstance(thing, ClientThing)):
            estate.heirs.append(self._heir(estate, client, things))
        if any(heir.agreed is not None for heir in estate.heirs):
            estate.migration_left = record
        known = {thing.main for thing in things if isinstance(thing, ClientThing)}
        estate.heirs += [
            self._accepted(estate, other)
            for other in self._kept
            if function_of(other) == config.name and other.endswith(f".{MAIN}") and other not in known
        ]
        return estate

    def _accepted(self, estate: Estate, name: str) -> Heir:
        """A client that was accepted, and no more."""
        notes = ClientNotes(estate, int(name.rpartition("/")[2].partition(".")[0], 16))
        notes.adopt(None, [name], {}, served=False)
        self._used.add(name)
        return Heir(KeptStream(self._kept[name].take(), None), notes)

    def _heir(self, estate: Estate, client: ClientThing, things: Sequence[Thing]) -> Heir:
        agreed = {thing.end: thing for thing in things if isinstance(thing, AgreedThing)}
        served = 0 in agreed and agreed[0].number == client.number
        own = things if served else ()
        twin = next((thing for thing in own if isinstance(thing, TwinThing)), None)
        servers = [thing for thing in own if isinstance(thing, UpstreamThing)]
        ranges = [thing for thing in own if isinstance(thing, RangeThing)]
        names = [client.main, client.memory, *([] if twin is None else [twin.socket, twin.memory])]
        names += [name for server in servers for name in (server.socket, server.memory)]
        regions = [thing for thing in own if isinstance(thing, RegionThing)]
        names += [region.memory for region in regions]
        handles = [thing for thing in own if isinstance(thing, VfioThing)]
        names += [handle.handle for handle in handles]
        files = {thing.address: thing.file for thing in ranges if thing.file is not None}
        vectors = [thing for thing in own if isinstance(thing, VectorThing)]
        self._used.update(names, files.values(), (vector.eventfd for vector in vectors))
        notes = ClientNotes(estate, client.number)
        notes.adopt(client, names, files, vectors, served=served)
        opened = {name: self._kept[name].duplicate() for name in set(files.values())}
        memories = {region.index: self._kept[region.memory].take() for region in regions}
        inheritance = Inheritance(
            agreed[1].negotiated if served and 1 in agreed else None,
            [self._stream(server.socket, server.memory) for server in servers],
            [(thing, None if thing.file is None else opened[thing.file]) for thing in ranges],
            {thing.index: thing.vectors for thing in own if isinstance(thing, AssignedThing)},
            {index: memory for index, memory in memories.items() if index != RegionIndex.MIGRATION},
            [(vector, self._kept[vector.eventfd].duplicate()) for vector in vectors],
            [thing for thing in own if isinstance(thing, LineThing)],
            next((thing for thing in own if isinstance(thing, SnapshotThing)), None),
            [(handle, self._kept[handle.handle].take()) for handle in handles],
        )
        return Heir(
            self._stream(client.main, client.memory),
            notes,
            agreed[0].negotiated if served else None,
            None if twin is None else self._stream(twin.socket, twin.memory),
            inheritance,
            [thing for thing in own if isinstance(thing, ConfigThing)],
            {index: memory for index, memory in memories.items() if index == RegionIndex.MIGRATION},
            [thing for thing in own if isinstance(thing, ProgressThing)],
        )

    def _stream(self, sock: str, memory: str) -> KeptStream:
        return KeptStream(self._kept[sock].take(), self._kept[memory].take())

    def ledger_of(self, vm: str) -> Ledger | None:
        """What a VM leaves, and what was left of it.

        Args:
            vm: its name.

        Returns:
            None if nothing is kept.
        """
        if not self.works:
            return None
        name = vm_name(vm, JOURNAL)
        left = self._kept.get(name)
        things: list[Thing] = []
        journal: Journal | None = None
        try:
            if left is not None:
                try:
                    history = read_journal(left)
                    things = _understood(history.records, self._kinds)
                    journal = Journal.resume(left, history)
                    self._store.adopt(name)
                except UnusableRecord as error:
                    things = []
                    self._log.error("what was left of a VM cannot be used", vm=vm, reason=str(error))
            if journal is None:
                journal = Journal.create(f"vfiouser-{vm}")
                self._store.discard(name)
                self._store.keep(name, journal)
        except OSError as error:
            self._log.error("a restart in a migration will fail it", vm=vm, error=error.strerror)
            return None
        self._used.add(name)
        return Ledger(vm, self._store, journal, things, self._claim, self._log)

    def _claim(self, name: str) -> OwnedFd | None:
        """Take what was kept."""
        found = self._kept.get(name)
        if found is not None:
            self._used.add(name)
        return None if found is None else found.duplicate()

    def listener_of(self, function: str, path: Path) -> Listener | None:
        """The socket on which a function's clients connect, if a process before us has left it.

        Args:
            function: its name.
            path: where it has to be.
        """
        with suppress(OSError):
            status = path.lstat()
            left = self._kept.get(_listener_name(function, f"{status.st_dev:x}-{status.st_ino:x}"))
            if left is not None:
                return Listener(adopt_socket(left.detach()), path)
        return None

    def keep_listener(self, estate: Estate, listener: Listener) -> None:
        """Keep the socket on which a function's clients connect: who connects meanwhile then waits.

        Args:
            estate: what the function leaves.
            listener: the socket; it stays the caller's.
        """
        name = _listener_name(estate.function, listener.identity)
        estate.others.append(name)
        if name in self._kept:
            self._store.adopt(name)
        else:
            self._store.keep(name, listener.sock)
        self._used.add(name)

    def settle(self) -> None:
        """Give up what nobody goes on with; all functions have taken what is theirs."""
        unused = set(self._kept) - self._used
        for name in unused:
            self._store.discard(name)
        if unused:
            self._log.info("kept descriptors were given up, for nobody needs them", descriptors=len(unused))
        self.close()

    def close(self) -> None:
        """Close what nobody took."""
        close_fds(self._kept.values())
        self._kept = {}


def _listener_name(function: str, identity: str) -> str:
    return function_name(function, f"listener.{identity}")


async def find_survival(address: str | None, notifier: Notifier) -> tuple[dict[str, list[int]], Survival]:
    """Take over what came with the environment, and find out whether anything will be kept.

    Args:
        address: of a keeper, instead of the service manager.
        notifier: tells the service manager how far we are.

    Returns:
        Sockets of units by name, and what is kept.

    Raises:
        ConfigError: what came makes no sense.
    """
    inherited = inherited_descriptors()
    own = None if address is None else Mailbox(address)
    store = FdStore.from_environment(notifier.mailbox) if own is None else FdStore(own)
    survival = Survival(store, inherited.kept, own)
    await survival.find_out()
    return inherited.sockets, survival


def _understood(records: Mapping[int, Mapping[bytes, bytes]], kinds: Mapping[str, DescriptorKind]) -> list[Thing]:
    """What was left, if all of it can be understood and was kept.

    Raises:
        UnusableRecord: with the first reason why not.
    """
    things: list[Thing] = []
    for judged in rebuild(records, kinds):
        if isinstance(judged, CannotRebuild):
            raise UnusableRecord(str(judged))
        things.append(judged)
    return things


def _check(things: Sequence[Thing], identity: str) -> MigrationRecord | None:
    """Refuse what must not be gone on with.

    Returns:
        What is left of the function's migration; None if it has none.

    Raises:
        UnusableRecord: the function is another one, or its migration cannot be understood.
    """
    about = next((thing for thing in things if isinstance(thing, FunctionThing)), None)
    if about is None or about.identity != identity:
        raise UnusableRecord("the configuration gives the function another device now")
    migration = next((thing for thing in things if isinstance(thing, MigrationThing)), None)
    if migration is None:
        return None
    try:
        return MigrationRecord.from_json(migration.text)
    except ValueError as error:
        raise UnusableRecord(str(error)) from error
