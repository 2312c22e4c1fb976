"""The server's side of the control socket.

A peer may send anything: every line is bounded, every write has a deadline, the number of connections is
limited, and a connection that misbehaves is ended without touching the others or the functions.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from vfiouser_agents.causes import words_of
from vfiouser_oob import __version__
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.tables import NoOptions, Place, read_section
from vfiouser_oob.control import protocol
from vfiouser_oob.control.protocol import ControlRequest, ErrorCode, RequestError
from vfiouser_oob.control.verbs import VERBS, Administered, ControlRole, Handle, Verb, allowed_verbs
from vfiouser_oob.observability import log
from vfiouser_oob.server.administration import ChangeRefused
from vfiouser_oob.transport.listener import Listener
from vfiouser_oob.transport.peer import Peer, peer_of

CONNECTIONS_MAX = 32
# So many of them are kept for who may change things: whoever may only ask cannot keep an administrator out.
RESERVED = 8
# While some question is answered, and for so many times as long after it, no other one is begun: the functions' clients
# have the event loop for the rest of the time, whatever is asked.
_REST = 4
# A peer that does not read its answers for so long is given up.
SEND_TIMEOUT_S = 5.0
_RECEIVE_SIZE = 4096
# Linux's socket(7) number, which Python 3.11 does not name: the peer's supplementary groups.
_SO_PEERGROUPS = 59
# Bytes of their answer, four for each group: as much as Python's getsockopt takes.
_GROUPS_BYTES = 1024


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Who may use the control socket.

    Args:
        uids: users who may do everything; root always may.
        gids: groups whose members may ask.
    """

    uids: frozenset[int] = field(default_factory=lambda: frozenset({os.geteuid()}))
    gids: frozenset[int] = frozenset()

    def role(self, peer: Peer, groups: frozenset[int]) -> ControlRole | None:
        """What this peer may do; None for nothing at all.

        Args:
            peer: its credentials.
            groups: its supplementary groups.
        """
        if peer.uid == 0 or peer.uid in self.uids:
            return ControlRole.ADMIN
        return None if self.gids.isdisjoint(groups | {peer.gid}) else ControlRole.READER


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


@dataclass(frozen=True, slots=True)
class Asker:
    """Who is at the other end of a control connection.

    Args:
        stream: the connection.
        peer: its credentials.
        role: what it may do.
    """

    stream: trio.SocketStream
    peer: Peer
    role: ControlRole


class ControlServer:
    """Answers on the control socket until it is cancelled.

    Args:
        provider: the daemon.
        policy: who may do what; None for what the daemon says.
    """

    def __init__(self, provider: Administered, policy: AccessPolicy | None = None) -> None:
        self._provider = provider
        self._fixed_policy = policy
        self._log = log.get("control")
        self._refusals = log.RateLimited(self._log)
        self._turn = trio.Lock()
        #: Connections by what they may do.
        self._connections = dict.fromkeys(ControlRole, 0)

    async def serve(
        self, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve on a listening socket.

        Args:
            sock: a listening UNIX stream socket; it is closed when this ends, its path stays the caller's.
            task_status: told when connections are accepted.
        """
        listener = Listener(sock, None, lasting=True)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    connected = await listener.next_client(self._not_accepted)
                    nursery.start_soon(self._connection, trio.SocketStream(trio.socket.from_stdlib_socket(connected)))
        finally:
            listener.close()

    def _not_accepted(self, reason: str) -> None:
        self._refusals.warning("cannot accept a control connection now", error=reason)

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._admit(stream)
        # In groups, since a watch runs in a nursery of its own.
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as errors:
            self._log.debug("control connection lost", reason=words_of(errors))

    @property
    def _policy(self) -> AccessPolicy:
        if self._fixed_policy is not None:
            return self._fixed_policy
        rights = self._provider.administration.rights
        return AccessPolicy(rights.admins, rights.readers)

    async def _admit(self, stream: trio.SocketStream) -> None:
        peer, groups = credentials(stream)
        role = self._policy.role(peer, groups)
        if role is None:
            refusal = RequestError(ErrorCode.NOT_ALLOWED, f"user id {peer.uid} may not use this control socket")
        elif not self._has_room(role):
            refusal = RequestError(ErrorCode.BUSY, f"{CONNECTIONS_MAX} control connections are open already")
        else:
            self._connections[role] += 1
            try:
                await self._converse(Asker(stream, peer, role))
            finally:
                self._connections[role] -= 1
            return
        self._refusals.warning("control connection refused", peer=peer, reason=refusal.message)
        await _send(stream, protocol.error_message(refusal))

    def _has_room(self, role: ControlRole) -> bool:
        if sum(self._connections.values()) >= CONNECTIONS_MAX:
            return False
        return role is ControlRole.ADMIN or self._connections[ControlRole.READER] < CONNECTIONS_MAX - RESERVED

    async def _converse(self, asker: Asker) -> None:
        self._log.debug("control connection", peer=asker.peer)
        hello = {
            "hello": protocol.NAME,
            "protocol": protocol.PROTOCOL,
            "version": __version__,
            "methods": allowed_verbs(asker.role),
        }
        await _send(asker.stream, hello)
        admin = asker.role is ControlRole.ADMIN
        lines = LineReader(asker.stream, protocol.ADMIN_REQUEST_MAX if admin else protocol.REQUEST_MAX)
        try:
            while (line := await lines.next_line()) is not None and await self._answer(asker, line):
                pass
        except RequestError as error:
            self._refusals.warning("control request refused", peer=asker.peer, reason=error.message)
            await _send(asker.stream, protocol.error_message(error))

    async def _answer(self, asker: Asker, line: bytes) -> bool:
        """Answer one request; returns whether the conversation goes on."""
        request = protocol.parse_request(line)
        try:
            verb = _permitted(request, asker)
            asked = _parameters(verb, request)
        except RequestError as error:
            await _send(asker.stream, protocol.error_message(error, request.id))
            return True
        if verb.handle is None:
            await self._watch(asker.stream, request)
            return False
        if verb.role is ControlRole.ADMIN:
            self._log.info("asked by an administrator", method=request.method, peer=asker.peer)
            return await self._change(verb, verb.handle, asked, request, asker)
        await _send_line(asker.stream, await self._told(verb.handle, asked, request))
        return True

    async def _told(self, handle: Handle, asked: Any, request: ControlRequest) -> bytes:
        """The answer to a question, after which everybody else who asks has to wait a little."""
        async with self._turn:
            began = trio.current_time()
            line = protocol.encode({"id": request.id, "result": await handle(self._provider, asked)})
            await trio.sleep(_REST * (trio.current_time() - began))
        return line

    async def _change(self, verb: Verb, handle: Handle, asked: Any, request: ControlRequest, asker: Asker) -> bool:
        """Do what an administrator asks for; returns False if the one who asked has gone before it was done.

        What is begun is finished, whether or not somebody still wants to know; but for what waits for others.
        """
        answers: list[dict[str, Any]] = []
        async with trio.open_nursery() as nursery:
            if verb.waits:
                nursery.start_soon(_until_peer_speaks, asker.stream, nursery.cancel_scope)
            try:
                answers.append({"result": await handle(self._provider, asked)})
            except (ChangeRefused, ConfigError) as refusal:
                self._log.warning("refused", method=request.method, peer=asker.peer, reason=str(refusal))
                answers.append({"error": {"code": ErrorCode.FAILED.value, "message": str(refusal)}})
            nursery.cancel_scope.cancel()
        for answer in answers:
            await _send(asker.stream, {"id": request.id, **answer})
        return bool(answers)

    async def _watch(self, stream: trio.SocketStream, request: ControlRequest) -> None:
        # Subscribed before the snapshot is taken: a change between the two is then told twice rather than
        # never.
        async with self._provider.subscribe() as events, trio.open_nursery() as nursery:
            handle = VERBS["status"].handle
            assert handle is not None
            await _send_line(stream, await self._told(handle, NoOptions(), request))
            nursery.start_soon(_until_peer_speaks, stream, nursery.cancel_scope)
            async for event in events:
                await _send(stream, {"id": request.id, "event": event})
            nursery.cancel_scope.cancel()


def _permitted(request: ControlRequest, asker: Asker) -> Verb:
    """The verb of a request; raises RequestError if there is none, or this peer may not."""
    verb = VERBS.get(request.method)
    if verb is None:
        allowed = ", ".join(allowed_verbs(asker.role))
        raise RequestError(ErrorCode.UNKNOWN_METHOD, f"unknown method {request.method[:40]!r} (allowed: {allowed})")
    if verb.role > asker.role:
        raise RequestError(
            ErrorCode.NOT_ALLOWED,
            f"user id {asker.peer.uid} may not use {request.method}; only root and admin_uids may",
        )
    return verb


def _parameters(verb: Verb, request: ControlRequest) -> Any:
    """The verb's particulars, checked; raises RequestError."""
    try:
        return read_section(verb.parameters, request.params, Place(request.method))
    except ConfigError as error:
        raise RequestError(ErrorCode.BAD_PARAMETERS, error.message) from None


async def _until_peer_speaks(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    # A watcher has nothing more to say: its end of stream (or any byte) ends the watch.
    await stream.receive_some(1)
    scope.cancel()


async def _send(stream: trio.SocketStream, message: Mapping[str, object]) -> None:
    await _send_line(stream, protocol.encode(message))


async def _send_line(stream: trio.SocketStream, line: bytes) -> None:
    with trio.fail_after(SEND_TIMEOUT_S):
        await stream.send_all(line)


def credentials(stream: trio.SocketStream) -> tuple[Peer, frozenset[int]]:
    """Who is at the other end, and in which supplementary groups.

    Args:
        stream: a connected UNIX stream.
    """
    duplicate = socket.socket(fileno=os.dup(stream.socket.fileno()))
    with duplicate:
        peer = peer_of(duplicate)
        try:
            raw = duplicate.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        except OSError:  # a kernel before 4.13, or a peer with more groups than that: its primary one counts
            raw = b""
    return peer, frozenset(struct.unpack(f"{len(raw) // 4}I", raw))


async def serve_control(
    provider: Administered, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer questions about a daemon until cancelled.

    Args:
        provider: the daemon.
        sock: a listening UNIX stream socket; it is closed when this ends, its path stays the caller's.
        task_status: told when connections are accepted.
    """
    await ControlServer(provider).serve(sock, task_status=task_status)
