"""How a carrier meets QEMU: who may come, how many, and who is the one that is served.

Usually QEMU comes to us. Whoever comes has to say something sensible within seconds before it counts (`Seat.take`), so
those who only sit there keep nobody out. One is served at a time. Where QEMU listens, we come to it, again and again.
"""

from __future__ import annotations

import abc
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import trio

from vfiouser_oob.observability import log
from vfiouser_oob.transport.listener import Listener
from vfiouser_oob.transport.peer import Peer, peer_of
from vfiouser_oob.transport.reaper import Account
from vfiouser_oob.vm.carriers.peer_socket import PeerGone, PeerSocket

#: Seconds until a newcomer has opened the conversation.
OPENING_S = 5.0
#: Seconds for which a newcomer waits for the one before it, whose end may not have been read yet.
HANDOVER_S = 1.0
#: Connections at a time: one that is served, and newcomers.
CONNECTIONS_MAX = 8
#: Seconds after which QEMU's socket is tried again.
AGAIN_S = 0.25

Converse: TypeAlias = Callable[[PeerSocket, Peer], Awaitable[None]]


class Seat:
    """The place of the one that is served."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        #: Who has it, for whoever is turned away.
        self.holder: Peer | None = None

    async def take(self, peer: Peer) -> None:
        """Take the place.

        Args:
            peer: who wants it.

        Raises:
            PeerGone: somebody else has it and stays.
        """
        with trio.move_on_after(HANDOVER_S):
            await self._lock.acquire()
            self.holder = peer
            return
        raise PeerGone(f"{self.holder} is connected already")

    def leave(self) -> None:
        """Give the place up, if this task has it."""
        if self._lock.statistics().owner is trio.lowlevel.current_task():
            self.holder = None
            self._lock.release()


class Meeting(abc.ABC):
    """What is the same whoever comes to whom.

    Args:
        name: which carrier of which VM, for logs.
        allow_uids: users that may be the peer; None allows all.
    """

    def __init__(self, name: str, allow_uids: frozenset[int] | None) -> None:
        self._allow_uids = allow_uids
        self._log = log.get("carrier").bind(carrier=name)
        self._noise = log.RateLimited(self._log)
        self._account = Account(name)
        self._connections = 0
        self.seat = Seat()

    @property
    def account(self) -> Account:
        """Where its peers' descriptors are counted."""
        return self._account

    @abc.abstractmethod
    async def serve(self, converse: Converse, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled.

        Args:
            converse: serves one connection; `PeerGone` ends it.
            task_status: told when QEMU can be met.
        """

    async def _serve_one(self, sock: socket.socket, converse: Converse) -> None:
        connection = PeerSocket(sock, self._account)
        try:
            peer = self._checked(sock)
            await converse(connection, peer)
        except PeerGone as gone:
            self._noise.info("connection ended", reason=gone)
        except OSError as error:
            self._noise.warning("a connection cannot be served now", error=error.strerror)
        finally:
            self.seat.leave()
            connection.close()
            self._connections -= 1

    def _checked(self, sock: socket.socket) -> Peer:
        try:
            peer = peer_of(sock)
        except OSError as error:
            raise PeerGone(f"the kernel does not say who it is: {error.strerror}") from error
        if self._allow_uids is not None and peer.uid not in self._allow_uids:
            raise PeerGone(f"{peer} may not connect (allowed: {sorted(self._allow_uids)})")
        if self._connections > CONNECTIONS_MAX:
            raise PeerGone(f"{peer} tried to connect while {CONNECTIONS_MAX} others are connected")
        return peer


class CarrierPort(Meeting):
    """Accepts for one carrier.

    Args:
        listener: the socket; owned from now on.
        name: which carrier of which VM, for logs.
        allow_uids: users that may connect; None allows whoever the socket's permissions let in.
        connected: a connection that another daemon has accepted; owned from now on.
    """

    def __init__(
        self,
        listener: Listener,
        name: str,
        allow_uids: frozenset[int] | None = None,
        connected: socket.socket | None = None,
    ) -> None:
        super().__init__(name, allow_uids)
        self._listener = listener
        self._connected = connected

    async def serve(self, converse: Converse, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                if self._connected is not None:
                    self._connections += 1
                    nursery.start_soon(self._serve_one, self._connected, converse)
                while True:
                    sock = await self._listener.next_client(self._not_accepted)
                    self._connections += 1
                    nursery.start_soon(self._serve_one, sock, converse)
        finally:
            self._listener.close()

    def _not_accepted(self, reason: str) -> None:
        self._noise.warning("cannot accept a connection now", error=reason)


class CarrierCaller(Meeting):
    """Connects for one carrier, to a socket that QEMU listens on.

    Args:
        path: where.
        name: which carrier of which VM, for logs.
        allow_uids: users that may listen there; None allows all.
    """

    def __init__(self, path: Path, name: str, allow_uids: frozenset[int] | None = None) -> None:
        super().__init__(name, allow_uids)
        self._path = path

    async def serve(self, converse: Converse, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect until cancelled."""
        task_status.started()
        while True:
            sock = self._connected()
            if sock is not None:
                self._connections += 1
                await self._serve_one(sock, converse)
            await trio.sleep(AGAIN_S)

    def _connected(self) -> socket.socket | None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._noise.warning("cannot connect now", error=error.strerror)
            return None
        # To a UNIX socket nobody has to wait: it is done, or nobody listens, or its queue is full.
        if not sock.connect_ex(os.fspath(self._path)):
            return sock
        sock.close()
        return None


def first_of(errors: BaseExceptionGroup[Exception]) -> BaseException:
    """Return the first error that is no group: of what ends a conversation, it is the reason."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
