"""The `vfio-user` backend: a function that another vfio-user server provides.

Descriptors are passed on in both directions (regions down, memory and eventfds up), so the data path bypasses this
process; only what has no descriptor is relayed as messages. There is one upstream connection per client connection, so
the upstream server sees clients come and go as we do. Migration commands are never forwarded: that is the agent's work.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

import trio

from vfiouser_agents.causes import words_of
from vfiouser_oob.client.client import Client, ClientRegion
from vfiouser_oob.client.keeping import ConnectionKeeping
from vfiouser_oob.devices.base import (
    BackendSession,
    BackendUnavailable,
    ClientLink,
    DeviceBackend,
)
from vfiouser_oob.devices.server_watch import ServerWatch
from vfiouser_oob.devices.upstream_description import describe_server
from vfiouser_oob.devices.upstream_memory import DmaRelay
from vfiouser_oob.devices.upstream_parts import REPEATABLE
from vfiouser_oob.devices.upstream_recovery import ReachedServer
from vfiouser_oob.devices.upstream_session import UpstreamSession
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.notes import Inheritance
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.errors import VfioUserError

#: What is left of a client's message when nothing is sent for it any more: a round trip on this machine, with room.
_SEND_GUARD_S = 0.01


class UpstreamBackend(DeviceBackend):
    """A function behind another vfio-user server.

    Args:
        path: the upstream server's socket.
        activity: the daemon's sockets, for bounded spinning.
        dma_by_message: give the upstream server no memory files, so that all its DMA comes as messages.
        max_write: bytes of data in one message to the upstream server.
        retain_state: let a client find what the one before left, as far as the upstream server keeps it.
        reset_when_lost: go on with an upstream server that was started anew, after a reset of the device.
    """

    def __init__(
        self,
        path: Path,
        activity: Activity,
        *,
        dma_by_message: bool = False,
        max_write: int,
        retain_state: bool = False,
        reset_when_lost: bool = False,
    ) -> None:
        self._reset_when_lost = reset_when_lost
        self.path = path
        self.summary = f"vfio-user:{path}"
        self._activity = activity
        self._account = Account(f"the upstream server {path}")
        self._dma_by_message = dma_by_message
        self._max_write = max_write
        self._retain_state = retain_state
        self._server = ServerWatch(path)
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()

    survives = True
    repeatable = REPEATABLE

    @property
    def unavailable(self) -> str | None:
        """Why the upstream server cannot be used, as far as is known."""
        return self._server.reason

    @property
    def unavailable_since(self) -> float | None:
        """Since when that is so."""
        return self._server.since

    async def run(self) -> None:
        """Run the upstream connections' tasks; they outlive the client's, to leave the device in order."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running.set()
            await trio.sleep_forever()

    async def open(self, link: ClientLink) -> BackendSession:
        """Connect upstream and learn what the device has."""
        try:
            reached = await self._reach(link)
        except BackendUnavailable as error:
            self._server.lost(str(error))
            raise
        self._server.found()
        return self._begin(link, reached)

    async def _reach(self, link: ClientLink) -> ReachedServer:
        try:
            sock = await self._connect()
            keeping: ConnectionKeeping | None = None
            if link.notes is not None:
                keeping = ConnectionKeeping(link.notes.server_connected(sock), link.notes.server_agreed)
        except OSError as error:
            raise self._unusable(error) from error
        return await self._learn(*self._client(link, sock, keeping))

    def _client(
        self, link: ClientLink, sock: socket.socket, keeping: ConnectionKeeping | None
    ) -> tuple[Client, DmaRelay]:
        relay = DmaRelay(link)
        try:
            client = Client(
                sock,
                dma_server=relay,
                activity=self._activity,
                send_guard_s=_SEND_GUARD_S,
                max_write_size=self._max_write,
                account=self._account,
                keeping=keeping,
            )
        except OSError as error:
            raise self._unusable(error) from error
        return client, relay

    def _unusable(self, error: OSError | VfioUserError) -> BackendUnavailable:
        return BackendUnavailable(f"the upstream server {self.path} cannot be used: {words_of(error)}")

    async def resume(self, link: ClientLink, inheritance: Inheritance) -> BackendSession:
        """Go on with a connection to the upstream server."""
        if link.notes is None or inheritance.agreed is None or not inheritance.streams:
            raise BackendUnavailable("the connection to the upstream server was not kept")
        try:
            (sock, memory), *twins = [stream.take() for stream in inheritance.streams]
            keeping = ConnectionKeeping(
                memory, link.notes.server_agreed, inheritance.agreed, twins[0] if twins else None
            )
            client, relay = self._client(link, sock, keeping)
        except (OSError, UnusableRecord) as error:
            raise BackendUnavailable(f"the connection to the upstream server cannot be used: {error}") from error
        return self._begin(link, await self._learn(client, relay), inheritance)

    async def _learn(self, client: Client, relay: DmaRelay) -> ReachedServer:
        """Run a connection and learn what the device has; behind the answers nothing comes that was due to others."""
        await self._running.wait()
        assert self._nursery is not None
        try:
            await self._nursery.start(client.run)
        except (OSError, VfioUserError) as error:
            raise self._unusable(error) from error
        regions: list[ClientRegion] = []
        try:
            description = await describe_server(client, regions)
        except BaseException as error:
            for region in regions:
                region.close()
            client.close()
            if isinstance(error, VfioUserError):
                raise BackendUnavailable(f"the upstream server {self.path} is unusable: {error}") from error
            raise
        return ReachedServer(client, description, regions, relay)

    def _begin(
        self, link: ClientLink, reached: ReachedServer, inheritance: Inheritance | None = None
    ) -> BackendSession:
        assert self._nursery is not None
        session = UpstreamSession(
            reached,
            link,
            by_message=self._dma_by_message,
            retain_state=self._retain_state,
            again=partial(self._reach, link) if self._reset_when_lost else None,
        )
        if inheritance is not None:
            session.restore(inheritance)
        self._nursery.start_soon(session.watch, link, self._server)
        return session

    async def _connect(self) -> socket.socket:
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock:
            await sock.connect(os.fspath(self.path))
            return socket.socket(fileno=sock.detach())
