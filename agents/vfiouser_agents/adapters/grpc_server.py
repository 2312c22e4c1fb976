"""Serves an agent with oob_migration.v1: gRPC's threads at the front, the agent's own code in trio."""

from __future__ import annotations

import errno
import logging
import os
import queue
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import trio
from grpc_reflection.v1alpha import reflection

from vfiouser_agents.api import Agent
from vfiouser_agents.errors import AgentError, NoResources, TransportLost
from vfiouser_agents.rpc.core import CallGuard
from vfiouser_agents.rpc.endpoint import Address, TlsOptions, check_plaintext, remove_stale_socket, server_context
from vfiouser_agents.rpc.messages import DEFAULT_MAX_MESSAGE
from vfiouser_agents.rpc.methods import CLOSE, HELLO, OPEN, OVERHEAD
from vfiouser_agents.rpc.server import HELLO_TIMEOUT, ClientHandler, ServedAgent

from .grpc_agent import key_and_chain, target_of
from .grpc_messages import ERROR_KEY, MESSAGES, METHODS, POOL, SERVICE, pack, unpack
from .grpc_status import to_status

_log = logging.getLogger(__name__)
#: Connections at a time; fewer than of the other protocols, since each keeps a thread.
_MAX_CONNECTIONS = 64
#: Threads: one for each connection, and those that wait for calls.
_THREADS = _MAX_CONNECTIONS + 64
#: Seconds of silence after which a client is asked whether it is there, and seconds that it has for the answer.
_KEEPALIVE_S, _KEEPALIVE_TIMEOUT_S = 10.0, 10.0
#: Events that a connection may be behind.
_BACKLOG = 1024


async def serve_grpc(
    agent: Agent,
    address: Address,
    tls: TlsOptions | None,
    *,
    allow_plaintext: bool = False,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled.

    Args:
        agent: the agent, entered.
        address: where; port 0 is any.
        tls: certificate and, for client certificates, CA; needed for `tls`.
        allow_plaintext: TCP without TLS may be for other hosts.
        task_status: told the address when clients may come.

    Raises:
        OptionError: plain text is refused, or the TLS files cannot be used.
        OSError: the address cannot be used.
    """
    check_plaintext(address, allowed=allow_plaintext)
    credentials = server_credentials(tls or TlsOptions()) if address.scheme == "tls" else None
    info = await agent.connect()
    async with trio.open_nursery() as nursery:
        served = ServedAgent(agent, info, nursery, DEFAULT_MAX_MESSAGE)
        front = _Front(served, nursery)
        server = grpc.server(futures.ThreadPoolExecutor(_THREADS, "grpc"), [front.handlers()], options=_OPTIONS)
        reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server, pool=POOL)
        try:
            port = _bind(server, address, credentials)
            server.start()
            shown = address if address.scheme == "unix" else Address(address.scheme, address.host, port)
            task_status.started(shown)
            await trio.sleep_forever()
        finally:
            front.end()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(server.stop(None).wait)


_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", DEFAULT_MAX_MESSAGE + OVERHEAD),
    # Two agents at one port would each get some of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", int(_KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(_KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
]


def server_credentials(tls: TlsOptions) -> grpc.ServerCredentials:
    """TLS for a server: with `ca`, clients need a certificate from there.

    Raises:
        OptionError: a file cannot be used, or there is no certificate.
    """
    server_context(tls)  # which says better than gRPC what is wrong
    roots = Path(tls.ca).read_bytes() if tls.ca is not None else None
    return grpc.ssl_server_credentials([key_and_chain(tls)], roots, require_client_auth=roots is not None)


def _bind(server: grpc.Server, address: Address, credentials: grpc.ServerCredentials | None) -> int:
    if address.scheme == "unix":
        remove_stale_socket(address.path)
    # As for our other protocols: nobody else may connect, unless the one who made the directory says so.
    before = os.umask(0o177) if address.scheme == "unix" else None
    try:
        if credentials is not None:
            return int(server.add_secure_port(target_of(address), credentials))
        return int(server.add_insecure_port(target_of(address)))
    except RuntimeError as error:
        raise OSError(errno.EADDRNOTAVAIL, f"cannot listen at {address}: {error}") from error
    finally:
        if before is not None:
            os.umask(before)


class _Peer:
    """One connection: its events wait in a queue for the thread that sends them. Implements `rpc.server.Peer`."""

    def __init__(self, served: ServedAgent) -> None:
        self.id = secrets.token_bytes(16)
        self.client = ClientHandler(served)
        self.events: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_BACKLOG)
        self.ended = trio.Event()
        self.max_outgoing = DEFAULT_MAX_MESSAGE
        self.lost: AgentError | None = None

    def close(self, reason: AgentError) -> None:
        """End it from our side."""
        if self.lost is None:
            self.lost = reason
            self.ended.set()
            # Makes room, so that the thread is told in any case.
            while self.events.full():
                self.events.get_nowait()
            self.events.put_nowait(None)

    async def notify(self, method: str, params: dict[str, Any]) -> None:
        """Send an event."""
        await trio.lowlevel.checkpoint()
        try:
            self.events.put_nowait(params)
        except queue.Full:
            self.close(TransportLost(f"the client is {_BACKLOG} events behind"))


class _Front:
    """What gRPC's threads call."""

    def __init__(self, served: ServedAgent, nursery: trio.Nursery) -> None:
        self._served = served
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._peers: dict[bytes, _Peer] = {}
        self._waiting: set[futures.Future[Any]] = set()
        self._over = False

    def end(self) -> None:
        """Let every thread go that waits for something."""
        self._over = True
        for waiting in list(self._waiting):
            _resolve(waiting, error=TransportLost("the agent ends"))
        for peer in list(self._peers.values()):
            peer.close(TransportLost("the agent ends"))

    def handlers(self) -> grpc.GenericRpcHandler:
        """All calls of the service."""
        table = {}
        for ours, row in METHODS.items():
            wire = {
                "request_deserializer": MESSAGES[row.request].FromString,
                "response_serializer": MESSAGES[row.response].SerializeToString,
            }
            name = row.path.rpartition("/")[2]
            if ours == HELLO:
                table[name] = grpc.unary_stream_rpc_method_handler(self._connect, **wire)
            else:
                table[name] = grpc.unary_unary_rpc_method_handler(partial(self._unary, ours), **wire)
        return grpc.method_handlers_generic_handler(SERVICE, table)

    def _unary(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        row = METHODS[method]
        data = unpack(row.request, request)

        async def work() -> Any:
            peer = self._peers.get(data.pop("connection"))
            if peer is None:
                raise TransportLost("this connection is unknown here; call Connect again")
            result = await peer.client.request(method, data)()
            if method == OPEN and not context.is_active():
                # The client has given up and will never know the number.
                await peer.client.request(CLOSE, {"session": result["session"]})()
            return result

        try:
            return pack(row.response, self._in_trio(method, work, context))
        except AgentError as error:
            return _abort(context, error)

    def _connect(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        data = unpack(METHODS[HELLO].request, request)
        try:
            peer, info = self._in_trio(HELLO, partial(self._open_peer, data), context)
        except AgentError as error:
            _abort(context, error)
            return
        gone = TransportLost("the client ended the connection")
        context.add_callback(partial(self._soon, peer.close, gone))
        try:
            yield pack("ConnectResponse", {"greeting": {"connection": peer.id, "info": info}})
            while (event := peer.events.get()) is not None:
                yield pack("ConnectResponse", {"event": event})
        finally:
            self._soon(peer.close, gone)

    def _soon(self, work: Callable[..., None], *args: Any) -> None:
        try:
            self._token.run_sync_soon(work, *args)
        except trio.RunFinishedError:
            pass  # everything has been let go of already

    async def _open_peer(self, data: dict[str, Any]) -> tuple[_Peer, Any]:
        if len(self._peers) >= _MAX_CONNECTIONS:
            raise NoResources(f"{_MAX_CONNECTIONS} connections are open", {"max_connections": _MAX_CONNECTIONS})
        peer = _Peer(self._served)
        self._peers[peer.id] = peer
        await self._nursery.start(self._keep, peer)
        try:
            return peer, await peer.client.request(HELLO, data)()
        except BaseException:
            peer.close(TransportLost("the greeting failed"))
            raise

    async def _keep(self, peer: _Peer, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                peer.client.start(peer, nursery)
                task_status.started()
                await peer.ended.wait()
                nursery.cancel_scope.cancel()
            _log.info("connection ended: %s", peer.lost)
        finally:
            self._peers.pop(peer.id, None)
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + HELLO_TIMEOUT
                await peer.client.close_sessions()

    def _in_trio(self, name: str, work: Callable[[], Awaitable[Any]], context: grpc.ServicerContext) -> Any:
        """Wait in a thread of gRPC's for something that is done in trio; ends it when the client gives up."""
        waiting: futures.Future[Any] = futures.Future()
        scope = trio.CancelScope()

        async def run() -> None:
            taken = CallGuard(name)
            result = None
            with scope, taken:
                result = await work()
            if scope.cancelled_caught:
                taken.error = TransportLost("its caller cancelled the call")
            _resolve(waiting, result, taken.error)

        def begin() -> None:
            if self._over:
                _resolve(waiting, error=TransportLost("the agent ends"))
                return
            self._waiting.add(waiting)
            waiting.add_done_callback(self._waiting.discard)
            self._nursery.start_soon(run)

        if not context.add_callback(partial(self._soon, scope.cancel)):
            raise TransportLost("its caller cancelled the call")
        try:
            self._token.run_sync_soon(begin)
        except trio.RunFinishedError:
            raise TransportLost("the agent ends") from None
        return waiting.result()


def _resolve(waiting: futures.Future[Any], result: Any = None, error: AgentError | None = None) -> None:
    if waiting.done():
        return
    if error is None:
        waiting.set_result(result)
    else:
        waiting.set_exception(error)


def _abort(context: grpc.ServicerContext, error: AgentError) -> Any:
    code, text, raw = to_status(error)
    context.set_trailing_metadata(((ERROR_KEY, raw),))
    return context.abort(code, text)
