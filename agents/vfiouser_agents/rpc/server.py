"""The agent's end of the reference protocol: implement `Agent` and `Session`, and serve them.

    async with MyAgent() as agent:
        await serve_agent(agent, await open_listeners(parse_address("unix:///run/agent.sock")))

This module does what all agents have in common: handshake, sessions of each connection, the order of the calls of one
function across all connections, events, limits. It never asks what a function's state is; that belongs to the agent.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import trio

from vfiouser_agents.api import Agent, AgentInfo, Session, Status
from vfiouser_agents.errors import (
    AgentError,
    InvalidArgument,
    InvalidState,
    NoResources,
    NotFound,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.operations import BY_WIRE, Op, invoke
from vfiouser_agents.ordering import CallQueue

from .core import Answer, RpcConnection, broken
from .messages import DEFAULT_MAX_MESSAGE, Codec
from .methods import CLOSE, EVENT, FUNCTIONS, HELLO, OPEN, PING, PROTOCOL, VERSIONS, WATCH
from .msgpack_codec import MsgpackCodec
from .wire import WireError, from_wire, to_wire

_log = logging.getLogger(__name__)
#: Connections at a time: two of each of 256 daemons. Whoever is refused comes again and again.
MAX_CONNECTIONS = 512
#: Sessions of one connection, unless the agent's own limit is lower.
MAX_SESSIONS = 1024
#: Seconds in which a new connection must have said who it is.
HELLO_TIMEOUT = 10.0
#: Smallest `max_message` that a client may ask for.
MIN_MESSAGE = 64 << 10


async def serve_agent(
    agent: Agent,
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
    *,
    max_message: int = DEFAULT_MAX_MESSAGE,
    codec: Callable[[int], Codec] = MsgpackCodec,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled. The calls under way are cancelled with it.

    Args:
        agent: the agent, entered.
        listeners: where clients come in.
        max_message: bytes of the longest message taken.
        codec: makes the codec of a connection out of `max_message`; msgpack-RPC unless said otherwise.
        task_status: told when clients may come.
    """
    async with trio.open_nursery() as nursery:
        server = ServedAgent(agent, await agent.connect(), nursery, max_message, codec)
        await nursery.start(partial(trio.serve_listeners, server.serve, list(listeners), handler_nursery=nursery))
        task_status.started()


class RpcPeer(Protocol):
    """What the handler of a client needs of its connection."""

    #: Bytes of the longest message that the client takes.
    max_outgoing: int
    #: Why it is of no use any more; None while it is.
    lost: AgentError | None

    def close(self, reason: AgentError) -> None:
        """End it from our side.

        Args:
            reason: why; calls under way fail with it.
        """

    async def notify(self, method: str, params: dict[str, Any]) -> None:
        """Send an event.

        Args:
            method: the notification's name.
            params: its parameters.

        Raises:
            TransportLost: the connection has ended.
        """


class ServedAgent:
    """An agent with what all its connections share, whatever carries them.

    Args:
        agent: the agent, entered.
        info: what it says about itself.
        nursery: where calls are executed.
        max_message: bytes of the longest message taken.
        codec: makes the codec of a connection.
    """

    def __init__(
        self,
        agent: Agent,
        info: AgentInfo,
        nursery: trio.Nursery,
        max_message: int,
        codec: Callable[[int], Codec] = MsgpackCodec,
    ) -> None:
        self.agent = agent
        self._codec = codec
        self.info = replace(
            info,
            protocol=PROTOCOL,
            protocol_version=VERSIONS[0],
            max_sessions=min(info.max_sessions, MAX_SESSIONS),
            max_message=max_message,
        )
        self.nursery = nursery
        self._queues: dict[str, CallQueue] = {}
        self._connections = 0

    def queue(self, function_id: str) -> CallQueue:
        """Return the queue of a function's calls, whichever connection they come from.

        Args:
            function_id: the function.
        """
        return self._queues.setdefault(function_id, CallQueue(self.nursery))

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection, from the first byte to the last.

        Args:
            stream: the connection, which is closed at the end. If `MAX_CONNECTIONS` are open, it is closed at once.
        """
        if self._connections >= MAX_CONNECTIONS:
            _log.warning("connection refused: %d are open already", self._connections)
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        try:
            if await _handshake(stream):
                await self._serve(stream)
        finally:
            self._connections -= 1

    async def _serve(self, stream: trio.abc.Stream) -> None:
        client = ClientHandler(self)
        connection = RpcConnection(stream, self._codec(self.info.max_message), client)
        try:
            async with trio.open_nursery() as nursery:
                client.start(connection, nursery)
                await connection.run()
                nursery.cancel_scope.cancel()
            _log.info("connection ended: %s", connection.lost)
        finally:
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + HELLO_TIMEOUT
                await client.close_sessions()


async def _handshake(stream: trio.abc.Stream) -> bool:
    if not isinstance(stream, trio.SSLStream):
        return True
    with trio.move_on_after(HELLO_TIMEOUT):
        try:
            await stream.do_handshake()
        except (trio.BrokenResourceError, OSError) as error:
            # trio does not send the alert that TLS has made, so this is the only place where the reason is known.
            _log.warning("a client was refused: %s", broken(error))
        else:
            return True
    await trio.aclose_forcefully(stream)
    return False


class _Handle:
    """A session as one connection sees it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.watching: trio.CancelScope | None = None


class ClientHandler:
    """The handler of one connection's requests.

    Args:
        server: what all connections share.
    """

    def __init__(self, server: ServedAgent) -> None:
        self._server = server
        self._greeted = trio.Event()
        self._handles: dict[int, _Handle] = {}
        self._next = 1
        self._opening = 0
        self._closed = False

    def start(self, connection: RpcPeer, nursery: trio.Nursery) -> None:
        """Begin to expect a greeting; without one in `HELLO_TIMEOUT` seconds, the connection is closed.

        Args:
            connection: to the client.
            nursery: where the handler waits and reports events, as long as the connection lasts.
        """
        self._connection = connection
        self._nursery = nursery
        nursery.start_soon(self._expect_hello)

    async def _expect_hello(self) -> None:
        with trio.move_on_after(HELLO_TIMEOUT):
            await self._greeted.wait()
        if not self._greeted.is_set():
            self._connection.close(TransportLost(f"the client did not say {HELLO} within {HELLO_TIMEOUT:.0f} s"))

    async def close_sessions(self) -> None:
        """Let go of everything that the connection had open."""
        self._closed = True
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            try:
                await handle.session.aclose()
            except AgentError as error:
                _log.warning("closing a session of %s: %s", handle.session.function_id, error)

    def notification(self, method: str, params: dict[str, Any]) -> None:
        """Ignore what a client tells: there is no such message yet, but a newer client may send one.

        Args:
            method: the notification's name.
            params: its parameters.
        """

    def request(self, method: str, params: dict[str, Any]) -> Answer:
        """Begin a request; its place in the order of its function is taken at once.

        Args:
            method: its name.
            params: its parameters.

        Returns:
            What waits for the result.

        Raises:
            InvalidState: the client has not greeted yet.
            Unsupported: there is no such method.
            NotFound: the connection has no such session.
            InvalidArgument: a parameter is missing or has the wrong type.
        """
        if method != HELLO and not self._greeted.is_set():
            raise InvalidState(f"the first call must be {HELLO}, not {method}")
        if method in _AGENT_METHODS:
            return partial(_AGENT_METHODS[method], self, params)
        op = BY_WIRE.get(method)
        if op is None:
            raise Unsupported(f"there is no method {method[:100]!r} in version {VERSIONS[0]} of {PROTOCOL}")
        session = self._handle(params).session
        try:
            arguments = [from_wire(hint, params.get(name), name) for name, hint in op.arguments.items()]
            if not session.takes_views:
                arguments = [bytes(value) if type(value) is memoryview else value for value in arguments]
        except WireError as error:
            raise InvalidArgument(f"{method}: {error}") from None
        return self._session_call(session, op, arguments)

    def _session_call(self, session: Session, op: Op[..., Any], arguments: list[Any]) -> Answer:
        async def work() -> Any:
            return await invoke(session, op, *arguments)

        queue = self._server.queue(session.function_id)
        wait: Answer = work if op.at_once else queue.enter(op.name, work, overtakes=op.overtakes)

        async def answer() -> Any:
            result = await wait()
            if isinstance(result, Status) and not result.pending:
                result = replace(result, pending=queue.pending)
            if op.result is None:
                return None
            return {op.result_key: result} if op.result_key else to_wire(result)

        return answer

    def _handle(self, params: dict[str, Any]) -> _Handle:
        handle = self._handles.get(_param(params, "session", int))
        if handle is None:
            raise NotFound(f"there is no session {params['session']} on this connection")
        return handle

    async def _hello(self, params: dict[str, Any]) -> Any:
        versions = _param(params, "versions", tuple[int, ...])
        if params.get("protocol") != PROTOCOL or not set(versions) & set(VERSIONS):
            raise Unsupported(
                f"protocol {str(params.get('protocol'))[:100]!r} in versions {list(versions)[:16]} is not supported "
                f"here; allowed: {PROTOCOL!r} in {list(VERSIONS)}"
            )
        max_message = _param(params, "max_message", int)
        if max_message < MIN_MESSAGE:
            raise InvalidArgument(f"max_message is {max_message}; at least {MIN_MESSAGE} is needed")
        self._connection.max_outgoing = max_message
        self._greeted.set()
        _log.info("client %s", str(params.get("client", "without a name"))[:100])
        return to_wire(self._server.info)

    async def _ping(self, params: dict[str, Any]) -> Any:
        return None

    async def _functions(self, params: dict[str, Any]) -> Any:
        return {"functions": to_wire(list(await self._server.agent.functions()))}

    async def _open(self, params: dict[str, Any]) -> Any:
        function_id = _param(params, "function", str)
        limit = self._server.info.max_sessions
        if len(self._handles) + self._opening >= limit:
            raise NoResources(f"{limit} sessions are open on this connection", {"max_sessions": limit})
        self._opening += 1
        try:
            session = await self._server.agent.open(function_id)
        finally:
            self._opening -= 1
        if self._closed:
            # The connection ended meanwhile.
            await session.aclose()
            raise TransportLost("the connection was closed")
        number, self._next = self._next, self._next + 1
        self._handles[number] = _Handle(session)
        return {"session": number, "capabilities": to_wire(session.caps)}

    async def _close(self, params: dict[str, Any]) -> Any:
        number = _param(params, "session", int)
        handle = self._handles.pop(number, None)
        if handle is not None:
            if handle.watching is not None:
                handle.watching.cancel()
            await handle.session.aclose()

    async def _watch(self, params: dict[str, Any]) -> Any:
        handle = self._handle(params)
        if _param(params, "on", bool):
            if handle.watching is None:
                handle.watching = trio.CancelScope()
                await self._nursery.start(self._report_events, params["session"], handle, handle.watching)
        elif handle.watching is not None:
            handle.watching.cancel()
            handle.watching = None

    async def _report_events(
        self,
        number: int,
        handle: _Handle,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        started = False
        try:
            with scope:
                async with handle.session.watch() as events:
                    started = True
                    task_status.started()
                    async for event in events:
                        await self._connection.notify(EVENT, {"session": number, **to_wire(event)})
            if not started:
                raise InvalidState("the session closed before anyone could watch its events")
        except AgentError as error:
            handle.watching = None
            if not started:
                raise
            if self._connection.lost is None:
                _log.warning("the events of %s ended: %s", handle.session.function_id, error)


#: The methods that belong to no session. Not of the object: what is bound to it would keep it, and its connection.
_AGENT_METHODS: Mapping[str, Callable[[ClientHandler, dict[str, Any]], Awaitable[Any]]] = {
    HELLO: ClientHandler._hello,
    PING: ClientHandler._ping,
    FUNCTIONS: ClientHandler._functions,
    OPEN: ClientHandler._open,
    CLOSE: ClientHandler._close,
    WATCH: ClientHandler._watch,
}


def _param(params: dict[str, Any], name: str, hint: Any) -> Any:
    try:
        return from_wire(hint, params.get(name), name)
    except WireError as error:
        raise InvalidArgument(str(error)) from None
