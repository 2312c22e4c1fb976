"""`GET /metrics` on a socket: OpenMetrics for whoever scrapes, and nothing else.

Whoever connects may be hostile: requests are read by h11, which bounds them; a connection has one deadline for all that
it does, answers one request, and there are few of them. What is rendered is rendered in a thread, and serves everybody
who asks within a second.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import trio

from vfiouser_oob.observability import log
from vfiouser_oob.observability.openmetrics import CONTENT_TYPE, render
from vfiouser_oob.observability.status import StatusProvider
from vfiouser_oob.transport.listener import Listener

CONNECTIONS_MAX = 8
#: Seconds for a whole connection: request, rendering, answer.
CONNECTION_S = 10.0
#: Bytes of the longest request head.
HEAD_MAX = 8192
#: Seconds for which what was rendered is good enough.
FRESH_S = 1.0
PATH = b"/metrics"
_RECEIVE_SIZE = 4096


class MetricsServer:
    """Answers scrapes until it is cancelled.

    Args:
        provider: knows what was measured.
    """

    def __init__(self, provider: StatusProvider) -> None:
        self._provider = provider
        self._noise = log.RateLimited(log.get("metrics"))
        self._slots = trio.Semaphore(CONNECTIONS_MAX)
        self._rendering = trio.Lock()
        self._text = b""
        self._rendered = float("-inf")

    async def serve(
        self, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve on a listening socket.

        Args:
            sock: a listening stream socket; it is closed when this ends, its path stays the caller's.
            task_status: told when connections are accepted.
        """
        listener = Listener(sock, None, lasting=True)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    # Further ones wait in the socket's queue, whose length is the kernel's affair.
                    await self._slots.acquire()
                    connected = await listener.next_client(self._not_accepted)
                    nursery.start_soon(self._connection, trio.SocketStream(trio.socket.from_stdlib_socket(connected)))
        finally:
            listener.close()

    def _not_accepted(self, reason: str) -> None:
        self._noise.warning("cannot accept a scrape now", error=reason)

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            with trio.move_on_after(CONNECTION_S):
                async with stream:
                    await self._answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):  # it has gone, and nobody misses it
            pass
        finally:
            self._slots.release()

    async def _answer(self, stream: trio.SocketStream) -> None:
        import h11

        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        try:
            request = await _request(connection, stream)
        except h11.RemoteProtocolError as error:
            self._noise.warning("a scrape makes no sense", reason=str(error)[:200])
            await _reply(connection, stream, error.error_status_hint, b"that is no HTTP request\n", b"text/plain")
            return
        if request is None:
            return
        status, text, kind = await self._found(request.method, request.target)
        await _reply(connection, stream, status, text, kind, head_only=request.method == b"HEAD")

    async def _found(self, method: bytes, target: bytes) -> tuple[int, bytes, bytes]:
        if method not in (b"GET", b"HEAD"):
            return 405, b"only GET is served\n", b"text/plain"
        if target.partition(b"?")[0] != PATH:
            return 404, b"only /metrics is served\n", b"text/plain"
        return 200, await self._rendered_lately(), CONTENT_TYPE.encode()

    async def _rendered_lately(self) -> bytes:
        async with self._rendering:
            if time.monotonic() - self._rendered > FRESH_S:
                measured = self._provider.metrics()
                self._text = await trio.to_thread.run_sync(render, measured)
                self._rendered = time.monotonic()
            return self._text


async def _request(connection: Any, stream: trio.SocketStream) -> Any:
    """The request; None if the client has gone before it was whole."""
    import h11

    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_RECEIVE_SIZE))
        elif isinstance(event, h11.Request):
            return event
        else:
            return None


async def _reply(
    connection: Any, stream: trio.SocketStream, status: int, text: bytes, kind: bytes, *, head_only: bool = False
) -> None:
    import h11

    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
    ]
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    data = connection.send(h11.Response(status_code=status, headers=headers))
    if not head_only:
        data += connection.send(h11.Data(data=text))
    await stream.send_all(data)
    await stream.send_eof()
    # What the client still says is taken, or closing would take away what it has not read yet.
    for _ in range(HEAD_MAX // _RECEIVE_SIZE):
        if not await stream.receive_some(_RECEIVE_SIZE):
            break


async def serve_metrics(
    provider: StatusProvider, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer scrapes until cancelled.

    Args:
        provider: the daemon.
        sock: a listening stream socket; it is closed when this ends, its path stays the caller's.
        task_status: told when connections are accepted.
    """
    await MetricsServer(provider).serve(sock, task_status=task_status)
