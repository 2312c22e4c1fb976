"""One exported PCI function: its device, its socket, and its clients one after the other."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import trio

from vfiouser_agents.causes import words_of
from vfiouser_oob.devices.base import BackendSession, DeviceBackend
from vfiouser_oob.memory.recorder import WriteRecorder
from vfiouser_oob.migration.inherited import KeptClient
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.server.attached import Attached
from vfiouser_oob.server.connection import ClientConnection
from vfiouser_oob.server.containment import Contained, root_cause
from vfiouser_oob.server.context import FunctionContext
from vfiouser_oob.server.device_link import DeviceLink
from vfiouser_oob.server.estate import Arrival, Estate, Heir
from vfiouser_oob.server.refusal import TurnedAway, turn_away
from vfiouser_oob.server.trim import give_back, resident
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.listener import EXHAUSTED_WAIT_S, Listener
from vfiouser_oob.transport.peer import Peer, peer_of
from vfiouser_protocol.capabilities import VersionCapabilities

if TYPE_CHECKING:
    from vfiouser_oob.migration.port import MigrationPort
    from vfiouser_oob.migration.runner import MigrationRunner

#: How long a new client waits for the one before it, whose end we may not have seen yet.
HANDOVER_S = 1.0
#: Seconds beyond another whole reply budget after which a message that is not answered shows that something hangs.
OVERDUE_S = 5.0
#: Connections that may say nothing at one time; QEMU says its VERSION at once.
_MOST_SILENT = 16


#: Builds a function's migration, given its name, where changes are announced, and its logger.
MigrationMaker: TypeAlias = "Callable[[str, EventHub, Logger], MigrationRunner]"


class Function:
    """A function and all that belongs to it; one client at a time.

    Args:
        name: its name.
        backend: its device; owned from now on.
        reply_budget_s: seconds within which each client message is answered.
        activity: the daemon's sockets.
        events: where changes are announced.
        log: a logger; the function's name is added.
        allow_uids: user ids that may connect; None allows whoever the socket's permissions let in.
        migration: builds its migration from events and logger; None if it cannot be migrated.
        recorded: whether what it writes to its client's memory is recorded from the beginning, as is needed in a VM
            whose VMM has no migration interface.
        estate: what it leaves to the daemon after this one; None: nothing.
    """

    def __init__(
        self,
        name: str,
        backend: DeviceBackend,
        *,
        reply_budget_s: float,
        activity: Activity,
        events: EventHub,
        log: Logger,
        allow_uids: tuple[int, ...] | None = None,
        migration: MigrationMaker | None = None,
        recorded: bool = False,
        estate: Estate | None = None,
    ) -> None:
        self.estate = estate
        self.name = name
        self.backend = backend
        self.context = FunctionContext(name, reply_budget_s, activity, events, log)
        self.log = self.context.log
        self.connection: ClientConnection | None = None
        self.address = ""
        self.failed: str | None = None
        self.since = time.time()
        #: The phase that watchers were told last.
        self._shown = "listening"
        self.clients_served = 0
        #: User ids that may connect.
        self.allow_uids = allow_uids
        #: Whether it accepts no new client, because an administrator said so.
        self.draining = False
        #: Whether what it writes to its client's memory is recorded; for clients that attach from now on.
        self.recorded = recorded
        self._vacant = trio.Event()
        #: Set and replaced when its phase changes, and when it ends.
        self._changed = trio.Event()
        #: Whether its life is over.
        self.retired = False
        #: All connections, the oldest first; at most one of them is served, the others have said nothing yet or wait.
        self._connections: dict[ClientConnection, trio.CancelScope] = {}
        #: Those of them that an administrator disconnects.
        self._turned_out: set[ClientConnection] = set()
        #: Clients that may not connect, and are being told so.
        self._turning_away = 0
        self.migration = None if migration is None else migration(name, events, self.log)

    # Serving

    def out_of_service(self, reason: str, error: Exception) -> None:
        """Note that the function is of no use any more; its client gets EIO.

        Args:
            reason: why, for `status`.
            error: what has happened.
        """
        self.failed = reason
        self.since = time.time()
        self.log.exception("a function is out of service", error, reason=reason)
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        self.context.note_error(reason)
        if self.connection is not None:
            self.connection.link.fail(reason)
        self.phase_changed()

    def condemn(self, reason: str) -> None:
        """Take the function out of service, since it cannot be relied on any more; its client gets EIO.

        Args:
            reason: why, for `status`.
        """
        self.failed = reason
        self._fail(reason)

    def overdue(self) -> str | None:
        """What should have been answered long ago, in words; None if nothing should."""
        attached = self.attached
        late_s = 0.0 if attached is None else trio.current_time() - attached.dispatcher.head_deadline
        if late_s < self.context.reply_budget_s + OVERDUE_S:
            return None
        return f"a message of its client should have been answered {late_s:.0f} s ago"

    async def run_migration(self) -> None:
        """Run the migration's own tasks, if the function can be migrated."""
        if self.migration is not None:
            with Contained() as outcome:
                await self.migration.run()
            if outcome.error is not None:
                self.failed = f"its migration died: {words_of(outcome.error)}"
                self.log.exception("bug: a migration failed unexpectedly", outcome.error)
                self._fail(self.failed)

    async def attach_migration(
        self, backend: BackendSession, client: VersionCapabilities, kept: KeptClient | None = None
    ) -> MigrationPort | None:
        """Connect a client to the function's migration.

        Args:
            backend: the device as opened for it.
            client: what it announced.
            kept: what of it outlives the daemon; None: nothing.

        Returns:
            The client's way into the migration; None if the function has none.

        Raises:
            BackendUnavailable: the function must not run now.
        """
        if self.recorded:
            backend.memory.recorder = WriteRecorder()
        if self.migration is None:
            return None
        from vfiouser_oob.migration.port import attach

        return await attach(self.migration, backend, self.name, client, kept)

    async def run_device(self) -> None:
        """Run the device's own tasks; a device that dies takes its function out of service, and nothing else."""
        with Contained() as outcome:
            await self.backend.run()
        if outcome.error is not None:
            self.failed = f"the device's task died: {words_of(outcome.error)}"
            self.log.exception("device failed; its function is out of service", root_cause(outcome.error))
            self._fail(self.failed)
            self.context.announce("device-failed", reason=self.failed)

    async def serve(self, listener: Listener) -> None:
        """Accept clients until cancelled.

        Args:
            listener: the function's socket; it stays the caller's.
        """
        self.address = listener.address
        async with trio.open_nursery() as nursery:
            while True:
                await self._closing()
                sock = await listener.next_client(self._not_accepted)
                arrival = None if self.estate is None else Arrival(self.estate.accepted(sock))
                peer = _peer_or_none(sock)
                if self._may_connect(peer):
                    nursery.start_soon(self._serve_client, sock, peer, arrival)
                    continue
                if arrival is not None:
                    arrival.notes.gone()
                if self._turning_away < _MOST_SILENT:
                    nursery.start_soon(self._turn_away, sock, errno.EBUSY if self.draining else errno.EACCES)
                else:
                    sock.close()

    async def serve_connected(self, sock: socket.socket) -> None:
        """Serve one client on a socket that is connected already, and return when it has gone."""
        self.address = "(inherited connection)"
        await self._serve_client(sock, _peer_or_none(sock))

    def heirs(self) -> Sequence[Heir]:
        """Clients that another process has left; each is to be served once."""
        if self.estate is None:
            return ()
        heirs, self.estate.heirs = self.estate.heirs, []
        return heirs

    async def serve_heir(self, heir: Heir, *, task_status: trio.TaskStatus[None]) -> None:
        """Go on with a client that another process has served.

        Args:
            heir: the client.
            task_status: told when it has its place, before others that may come.
        """
        memory: StreamMemory | None = None
        try:
            if heir.main.memory is None:
                sock = heir.main.take_socket()
            else:
                sock, memory = heir.main.take()
        except (OSError, UnusableRecord) as error:
            self.context.noise.warning("client turned out: it cannot be gone on with", reason=str(error))
            self.context.note_error(f"the restart disconnected a client: {error}")
            heir.notes.gone()
            heir.close()
            task_status.started()
            await self._give_up_left(heir)
            return
        task_status.started()
        try:
            await self._serve_client(sock, _peer_or_none(sock), Arrival(heir.notes, heir, memory))
        finally:
            heir.close()
        await self._give_up_left(heir)

    async def _give_up_left(self, heir: Heir) -> None:
        """If a client that another process has served could not be gone on with, its function does not wait for it."""
        if self.migration is not None and heir.agreed is not None:
            await self.migration.give_up_left()

    async def settled(self) -> None:
        """Wait until every client that another process has left is served, or has gone."""
        for connection in [each for each in self._connections if each.inherited]:
            await connection.settled()

    async def leave(self) -> None:
        """Leave the client to the daemon after this one, at the end of what is being answered."""
        if self.estate is None or not self.estate.usable:
            return
        async with trio.open_nursery() as leaving:
            for connection in self._connections:
                leaving.start_soon(connection.leave)

    async def _closing(self) -> None:
        """Wait while the descriptors of earlier clients cannot be closed: a new one could only bring more of them."""
        if self.context.account.held_up:
            held = self.context.account.held
            text = f"the function accepts no client until the daemon can close {held} descriptors of earlier ones"
            self.log.error(text)
            self.context.note_error(text)
        while self.context.account.held_up:  # noqa: ASYNC110 - the threads that close know nothing of the event loop
            await trio.sleep(EXHAUSTED_WAIT_S)

    def _not_accepted(self, reason: str) -> None:
        self.context.noise.warning("cannot accept a client now", error=reason)
        self.context.note_error(f"cannot accept a client: {reason}")

    async def _turn_away(self, sock: socket.socket, number: int) -> None:
        self._turning_away += 1
        try:
            await turn_away(sock, number, self.context.account)
        finally:
            self._turning_away -= 1

    def _may_connect(self, peer: Peer | None) -> bool:
        if self.draining:
            self.context.noise.warning("client refused: the function is drained", client=peer)
            return False
        if self.allow_uids is None or (peer is not None and peer.uid in self.allow_uids):
            return True
        self.context.noise.warning("client refused: its user may not connect", client=peer, allowed=self.allow_uids)
        self.context.note_error(f"{peer} may not connect")
        return False

    async def claim(self, connection: ClientConnection, deadline: float) -> None:
        """Make a client the one that is served, waiting for the one before it to be gone.

        Args:
            connection: a client that has said what it wants; until then it keeps nobody out.
            deadline: by trio's clock, when it has to be answered.

        Raises:
            TurnedAway: another client uses the function.
        """
        with trio.move_on_at(min(deadline, trio.current_time() + HANDOVER_S)):
            while self.connection is not None:
                await self._vacant.wait()
        if self.connection is not None:
            raise TurnedAway(f"{connection.peer} was refused: {self.connection.peer} uses the function", errno.EBUSY)
        if self.draining:
            raise TurnedAway(f"{connection.peer} was refused: the function is drained", errno.EBUSY)
        self.connection = connection
        self.context.client = connection.peer
        self._vacant = trio.Event()
        self.clients_served += 1
        self.context.announce("client-connected", client=str(connection.peer))

    def _leave(self, connection: ClientConnection, reason: str) -> None:
        """Note that a connection has ended, and let the next client in if it was the one that was served."""
        if self.connection is not connection:
            self.log.debug("client left before it was served", client=connection.peer, reason=reason)
            return
        self.connection = self.context.client = None
        self._vacant.set()
        self.phase_changed()
        self.context.visits.info("client detached", client=connection.peer, reason=reason)
        self.context.announce("client-disconnected", client=str(connection.peer), reason=reason)

    # Administration

    @property
    def user(self) -> str | None:
        """The client that is served, in words; None without one."""
        return None if self.connection is None else str(self.connection.peer or "an unknown client")

    def drain(self) -> None:
        """Take no new client; the one that is served stays."""
        self.draining = True
        self.phase_changed()

    def reopen(self) -> None:
        """Take clients again."""
        self.draining = False
        self.phase_changed()

    async def vacated(self) -> None:
        """Wait until no client is served."""
        while self.connection is not None:
            await self._vacant.wait()

    def level_changed(self) -> None:
        """Another log level counts from now on."""
        for connection in self._connections:
            connection.level_changed()

    def disconnect(self) -> str | None:
        """Turn the client out that is served; the next one may come.

        Returns:
            Who it was; None if there was none.
        """
        user = self.user
        if self.connection is not None:
            self._turned_out.add(self.connection)
            self._connections[self.connection].cancel()
        return user

    async def _serve_client(self, sock: socket.socket, peer: Peer | None, arrival: Arrival | None = None) -> None:
        memory = resident()
        with trio.CancelScope() as scope:
            try:
                connection = ClientConnection(self, sock, peer, arrival)
            except (OSError, ValueError) as error:  # it costs this client, and nobody else
                self.context.noise.warning("client cannot be served; disconnected", client=peer, error=error)
                self.context.note_error(f"{peer} cannot be served: {error}")
                return
            self._make_room_for(connection, scope)
            reason = "the daemon is stopping"
            try:
                with Contained() as outcome:
                    reason = await connection.run()
                if outcome.error is not None:
                    reason = self._explain(outcome.error)
            finally:
                del self._connections[connection]
                if connection in self._turned_out:
                    self._turned_out.remove(connection)
                    reason = "an administrator disconnected it"
                self._leave(connection, reason)
                del connection
                give_back(memory)

    def _make_room_for(self, connection: ClientConnection, scope: trio.CancelScope) -> None:
        """Let a newcomer in; where too many say nothing, the one that has been silent longest goes."""
        self._connections[connection] = scope
        silent = [each for each in self._connections if not each.spoken]
        if len(silent) > _MOST_SILENT:
            self.context.noise.warning(
                "client disconnected: too many clients send nothing", client=silent[0].peer, silent=_MOST_SILENT
            )
            self._connections[silent[0]].cancel()

    def _explain(self, error: Exception) -> str:
        """Report what ended a connection, beside its client's own doing; returns it in words."""
        cause = root_cause(error)
        if isinstance(cause, OSError):
            self.context.noise.warning("connection ended: the system refused", error=cause.strerror or str(cause))
            self.context.note_error(f"connection failed: {cause.strerror or cause}")
            return f"the system refused: {cause.strerror or cause}"
        self.log.exception("bug: a connection failed unexpectedly", error)
        self.context.note_error(f"connection failed: {words_of(error)}")
        return "an internal error"

    # Reporting

    @property
    def last_error(self) -> str | None:
        """What went wrong last, for `status`."""
        last = self.context.trouble.last
        return None if last is None else last.text

    @property
    def counts(self) -> Sequence[int]:
        """Commands received, by number."""
        return self.context.counts

    @property
    def attached(self) -> Attached | None:
        """What the client that is served consists of; None without one."""
        return None if self.connection is None else self.connection.attached

    def phase_changed(self) -> None:
        """Note when the phase changed, and tell watchers."""
        phase = self.phase
        if not phase == self._shown == "failed":
            self.since = time.time()
        self._shown = phase
        self._tell_changed()
        self.context.announce("phase", phase=phase)

    def retire(self) -> None:
        """Note that nobody is served any more, for those who wait for a change."""
        self.retired = True
        self._tell_changed()

    def _tell_changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        """Wait until its phase changes, or its life ends."""
        await self._changed.wait()

    def device_lost(self, link: DeviceLink, reason: str) -> None:
        """Note that the device of a client is lost, and tell watchers.

        Args:
            link: the client as the device saw it.
            reason: what happened to the device.
        """
        if self.connection is not None and self.connection.link is link and self.failed is None:
            self.context.announce("device-failed", reason=reason)
            self.phase_changed()

    @property
    def broken(self) -> str | None:
        """Why the function does nothing for its client; None if it does, or there is none."""
        lost = None if self.connection is None else self.connection.link.lost
        return self.failed or lost

    @property
    def phase(self) -> str:
        """What the function is doing."""
        if self.broken is not None:
            return "failed"
        if self.connection is None:
            return "drained" if self.draining else "listening"
        return self.connection.phase

    def __repr__(self) -> str:
        return f"Function({self.name!r}, {self.phase})"


def _peer_or_none(sock: socket.socket) -> Peer | None:
    try:
        return peer_of(sock)
    except OSError:
        return None
