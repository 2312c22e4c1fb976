"""One exported PCI function: its device, its socket, and its clients one after the other."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import trio

from vfiouser_oob.control.events import EventHub
from vfiouser_oob.devices.base import BackendSession, DeviceBackend
from vfiouser_oob.migration.engine import MigrationEngine
from vfiouser_oob.migration.port import attach
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.server.connection import Connection
from vfiouser_oob.server.containment import Contained, root_cause
from vfiouser_oob.server.refusal import turn_away
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.listener import EXHAUSTED, EXHAUSTED_WAIT_S, Listener
from vfiouser_oob.transport.peer import Peer, peer_of
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.capabilities import Capabilities
from vfiouser_protocol.constants import Command

#: How long a new client waits for the one before it, whose end we may not have seen yet.
HANDOVER_S = 1.0


#: Builds a function's migration engine, given its name, where changes are announced, and its logger.
EngineMaker: TypeAlias = Callable[[str, EventHub, Logger], MigrationEngine]


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
        migration: builds its migration engine from events and logger; None if it cannot be migrated.
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
        migration: EngineMaker | None = None,
    ) -> None:
        self.name = name
        self.backend = backend
        self.reply_budget_s = reply_budget_s
        self.activity = activity
        #: Descriptors of its clients, also of those that have gone.
        self.account = Account(f"the client of {name}")
        self.log = log.bind(function=name)
        self.counts = [0] * (max(Command) + 1)
        self.connection: Connection | None = None
        self.address = ""
        self.failed: str | None = None
        self.last_error: str | None = None
        self.since = time.time()
        self.clients_served = 0
        self._events = events
        self._allow_uids = allow_uids
        self._vacant = trio.Event()
        self.engine = None if migration is None else migration(name, events, self.log)

    # Serving

    async def run_migration(self) -> None:
        """Run the migration's own tasks, if the function can be migrated."""
        if self.engine is not None:
            with Contained() as outcome:
                await self.engine.run()
            if outcome.error is not None:
                self.failed = f"its migration died: {outcome.error}"
                self.log.exception("bug: a migration failed unexpectedly", outcome.error)
                self.note_error(self.failed)
                if self.connection is not None:
                    self.connection.fail(self.failed)

    async def attach_migration(self, connection: Connection, backend: BackendSession, client: Capabilities) -> None:
        """Connect a client to the function's migration, if it has any.

        Args:
            connection: the client.
            backend: the device as opened for it.
            client: what it announced.

        Raises:
            BackendUnavailable: the function must not run now.
        """
        if self.engine is not None:
            connection.migrate_by(await attach(self.engine, backend, self.name, client))

    async def run_device(self) -> None:
        """Run the device's own tasks; a device that dies takes its function out of service, and nothing else."""
        with Contained() as outcome:
            await self.backend.run()
        if outcome.error is not None:
            self.failed = f"the device's task died: {root_cause(outcome.error)}"
            self.log.exception("device failed; its function is out of service", root_cause(outcome.error))
            self.note_error(self.failed)
            if self.connection is not None:
                self.connection.fail(self.failed)
            self._announce("device-failed", reason=self.failed)

    async def serve(self, listener: Listener) -> None:
        """Accept clients until cancelled.

        Args:
            listener: the function's socket; it stays the caller's.
        """
        self.address = listener.address
        async with trio.open_nursery() as nursery:
            while True:
                await self._closing()
                sock = await self._accept(listener)
                if sock is None:
                    continue
                refusal = await self._refusal(_peer_or_none(sock))
                if refusal is None:
                    await nursery.start(self._serve_client, sock)
                else:
                    nursery.start_soon(turn_away, sock, refusal, self.account)

    async def serve_connected(self, sock: socket.socket) -> None:
        """Serve one client on a socket that is connected already, and return when it has gone."""
        self.address = "(inherited connection)"
        async with trio.open_nursery() as nursery:
            await nursery.start(self._serve_client, sock)

    async def _closing(self) -> None:
        """Wait while the descriptors of earlier clients cannot be closed: a new one could only bring more of them."""
        if self.account.held_up:
            text = f"no client is accepted until {self.account.held} descriptors of earlier ones can be closed"
            self.log.error(text)
            self.note_error(text)
        while self.account.held_up:  # noqa: ASYNC110 - the threads that close know nothing of the event loop
            await trio.sleep(EXHAUSTED_WAIT_S)

    async def _accept(self, listener: Listener) -> socket.socket | None:
        try:
            return await listener.accept()
        except OSError as error:
            if error.errno in EXHAUSTED:
                self.log.error("cannot accept a client now", error=error.strerror)
                self.note_error(f"cannot accept a client: {error.strerror}")
                await trio.sleep(EXHAUSTED_WAIT_S)
            return None

    async def _refusal(self, peer: Peer | None) -> int | None:
        """Decide about a new client, waiting for the one before it to be gone.

        Returns:
            None for a client that is welcome, otherwise the errno that it is turned away with.
        """
        if self._allow_uids is not None and (peer is None or peer.uid not in self._allow_uids):
            self.log.warning("client refused: its user may not connect", client=peer, allowed=self._allow_uids)
            self.note_error(f"{peer} may not connect")
            return errno.EACCES
        with trio.move_on_after(HANDOVER_S):
            while self.connection is not None:
                await self._vacant.wait()
        if self.connection is not None:
            self.log.warning("client refused: the function is in use", client=peer, by=self.connection.peer)
            self.note_error(f"{peer} was refused: {self.connection.peer} uses the function")
            return errno.EBUSY
        return None

    async def _serve_client(
        self, sock: socket.socket, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        peer = _peer_or_none(sock)
        try:
            connection = self.connection = Connection(self, sock, peer, self.log)
        except (OSError, ValueError) as error:  # it costs this client, and nobody else
            self.log.error("client cannot be served; disconnected", client=peer, error=error)
            self.note_error(f"{peer} cannot be served: {error}")
            task_status.started()
            return
        self._vacant = trio.Event()
        self.clients_served += 1
        self._announce("client-connected", client=str(peer))
        task_status.started()
        reason = "the daemon is stopping"
        try:
            with Contained() as outcome:
                reason = await connection.run()
            if outcome.error is not None:
                reason = "an error of ours"
                self.log.exception("bug: a connection failed unexpectedly", outcome.error)
                self.note_error(f"connection failed: {outcome.error}")
        finally:
            self.connection = None
            self._vacant.set()
            self.phase_changed()
            self.log.info("client detached", client=peer, reason=reason)
            self._announce("client-disconnected", client=str(peer), reason=reason)

    def close(self) -> None:
        """Give the device back."""
        self.backend.close()

    # Reporting

    def note_error(self, text: str) -> None:
        """Remember the last error, for `status`."""
        self.last_error = text

    def phase_changed(self) -> None:
        """Note when the phase changed, and tell watchers."""
        self.since = time.time()
        self._announce("phase", phase=self.phase)

    def _announce(self, kind: str, **fields: Any) -> None:
        self._events.publish(kind, function=self.name, **fields)

    @property
    def phase(self) -> str:
        """What the function is doing."""
        if self.failed is not None:
            return "failed"
        return "listening" if self.connection is None else self.connection.phase

    def __repr__(self) -> str:
        return f"Function({self.name!r}, {self.phase})"


def _peer_or_none(sock: socket.socket) -> Peer | None:
    try:
        return peer_of(sock)
    except OSError:
        return None
