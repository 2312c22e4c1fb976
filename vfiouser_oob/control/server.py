"""The server's side of the control socket.

A peer may send anything: every line is bounded, every write has a deadline, the number of connections is
limited, and a connection that misbehaves is ended without touching the others or the functions.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from vfiouser_oob import __version__
from vfiouser_oob.control import protocol
from vfiouser_oob.control.protocol import ControlRequest, ErrorCode, RequestError
from vfiouser_oob.observability import log
from vfiouser_oob.observability.status import StatusProvider
from vfiouser_oob.transport.listener import EXHAUSTED, EXHAUSTED_WAIT_S, Listener
from vfiouser_oob.transport.peer import Peer, peer_of

CONNECTIONS_MAX = 32
# A peer that does not read its answers for so long is given up.
SEND_TIMEOUT_S = 5.0
_RECEIVE_SIZE = 4096
# Linux's socket(7) number, which Python 3.11 does not name: the peer's supplementary groups.
_SO_PEERGROUPS = 59
_GROUPS_MAX = 65536


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Who may use the control socket.

    Args:
        uids: users who may; root always may.
        gids: groups whose members may.
    """

    uids: frozenset[int] = field(default_factory=lambda: frozenset({os.geteuid()}))
    gids: frozenset[int] = frozenset()

    def allows(self, peer: Peer, groups: frozenset[int]) -> bool:
        """Whether this peer may.

        Args:
            peer: its credentials.
            groups: its supplementary groups.
        """
        return peer.uid == 0 or peer.uid in self.uids or not self.gids.isdisjoint(groups | {peer.gid})


class LineReader:
    """Cuts a byte stream into lines of bounded length.

    Args:
        stream: where the bytes come from.
        limit: bytes of the longest line that is taken.
    """

    def __init__(self, stream: trio.SocketStream, limit: int = protocol.REQUEST_MAX) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()

    async def next_line(self) -> bytes | None:
        """The next line without its end, or None at the end of the stream.

        Raises:
            RequestError: the line is too long.
        """
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            if len(self._buffer) > self._limit:
                break
            start = len(self._buffer)
            data = await self._stream.receive_some(_RECEIVE_SIZE)
            if not data:
                return None
            self._buffer += data
        if not 0 <= end <= self._limit:
            raise RequestError(ErrorCode.BAD_REQUEST, f"the line is longer than {self._limit} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


class ControlServer:
    """Answers on the control socket until it is cancelled.

    Args:
        provider: knows the daemon's state.
        policy: who may ask.
    """

    def __init__(self, provider: StatusProvider, policy: AccessPolicy | None = None) -> None:
        self._provider = provider
        self._policy = policy or AccessPolicy()
        self._log = log.get("control")
        self._refusals = log.RateLimited(self._log)
        self._connections = 0
        self._methods: Mapping[str, Callable[[trio.SocketStream, ControlRequest], Awaitable[bool]]] = {
            "status": self._status,
            "migrations": self._migrations,
            "metrics": self._metrics,
            "watch": self._watch,
        }

    async def serve(
        self, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve on a listening socket.

        Args:
            sock: a listening UNIX stream socket; it is closed when this ends, its path stays the caller's.
            task_status: told when connections are accepted.
        """
        listener = Listener(sock, None)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    connected = await self._accept(listener)
                    if connected is not None:
                        nursery.start_soon(self._connection, connected)
        finally:
            listener.close()

    async def _accept(self, listener: Listener) -> trio.SocketStream | None:
        try:
            sock = await listener.accept()
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._refusals.warning("cannot accept a control connection now", error=error.strerror)
                await trio.sleep(EXHAUSTED_WAIT_S)
            return None
        return None if sock is None else trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def _connection(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            async with stream:
                await self._converse(stream)
        # In groups, since a watch runs in a nursery of its own.
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as errors:
            self._log.debug("control connection lost", errors=errors.exceptions)
        finally:
            self._connections -= 1

    async def _converse(self, stream: trio.SocketStream) -> None:
        peer, groups = credentials(stream)
        refusal = self._refusal(peer, groups)
        if refusal is not None:
            self._refusals.warning("control connection refused", peer=peer, reason=refusal.message)
            await _send(stream, protocol.error_message(refusal))
            return
        self._log.debug("control connection", peer=peer)
        methods = list(self._methods)
        hello = {
            "hello": protocol.NAME,
            "protocol": protocol.PROTOCOL,
            "version": __version__,
            "methods": methods,
        }
        await _send(stream, hello)
        lines = LineReader(stream)
        try:
            while (line := await lines.next_line()) is not None and await self._answer(stream, line):
                pass
        except RequestError as error:
            self._refusals.warning("control request refused", peer=peer, reason=error.message)
            await _send(stream, protocol.error_message(error))

    def _refusal(self, peer: Peer, groups: frozenset[int]) -> RequestError | None:
        if not self._policy.allows(peer, groups):
            return RequestError(ErrorCode.NOT_ALLOWED, f"user id {peer.uid} may not use this control socket")
        if self._connections > CONNECTIONS_MAX:
            return RequestError(ErrorCode.BUSY, f"{CONNECTIONS_MAX} control connections are open already")
        return None

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> bool:
        # Returns whether the conversation goes on.
        request = protocol.parse_request(line)
        method = self._methods.get(request.method)
        if method is None:
            allowed = ", ".join(self._methods)
            error = RequestError(
                ErrorCode.UNKNOWN_METHOD, f"unknown method {request.method[:40]!r} (allowed: {allowed})"
            )
            await _send(stream, protocol.error_message(error, request.id))
            return True
        return await method(stream, request)

    async def _status(self, stream: trio.SocketStream, request: ControlRequest) -> bool:
        await _send(stream, {"id": request.id, "result": self._provider.status()})
        return True

    async def _migrations(self, stream: trio.SocketStream, request: ControlRequest) -> bool:
        await _send(stream, {"id": request.id, "result": self._provider.migrations()})
        return True

    async def _metrics(self, stream: trio.SocketStream, request: ControlRequest) -> bool:
        await _send(stream, {"id": request.id, "result": self._provider.metrics()})
        return True

    async def _watch(self, stream: trio.SocketStream, request: ControlRequest) -> bool:
        # Subscribed before the snapshot is taken: a change between the two is then told twice rather than
        # never.
        async with self._provider.subscribe() as events, trio.open_nursery() as nursery:
            await _send(stream, {"id": request.id, "result": self._provider.status()})
            nursery.start_soon(_until_peer_speaks, stream, nursery.cancel_scope)
            async for event in events:
                await _send(stream, {"id": request.id, "event": event})
            nursery.cancel_scope.cancel()
        return False


async def _until_peer_speaks(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    # A watcher has nothing more to say: its end of stream (or any byte) ends the watch.
    await stream.receive_some(1)
    scope.cancel()


async def _send(stream: trio.SocketStream, message: Mapping[str, object]) -> None:
    with trio.fail_after(SEND_TIMEOUT_S):
        await stream.send_all(protocol.encode(message))


def credentials(stream: trio.SocketStream) -> tuple[Peer, frozenset[int]]:
    """Who is at the other end, and in which supplementary groups.

    Args:
        stream: a connected UNIX stream.
    """
    duplicate = socket.socket(fileno=os.dup(stream.socket.fileno()))
    with duplicate:
        peer = peer_of(duplicate)
        try:
            raw = duplicate.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * 4)
        except OSError:  # a kernel before 4.13, or a peer with more groups than Linux allows
            raw = b""
    return peer, frozenset(struct.unpack(f"{len(raw) // 4}I", raw))


async def serve_control(
    provider: StatusProvider, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer questions about a daemon until cancelled.

    Args:
        provider: the daemon.
        sock: a listening UNIX stream socket; it is closed when this ends, its path stays the caller's.
        task_status: told when connections are accepted.
    """
    await ControlServer(provider).serve(sock, task_status=task_status)
