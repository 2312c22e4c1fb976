"""The client of the reference protocol over msgpack-RPC (docs/reference/agent-protocol.md).

One connection carries the sessions of all functions. It is made by the first call that needs it. When it is lost, its
sessions end: the calls under way and all later ones fail with `TransportLost`, and whoever watches is told. Whoever
wants to go on opens another session, which connects again, and takes the migration over by repeating `begin`. There is
a keepalive only while a migration is begun or an answer is due.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

import trio

from vfiouser_agents.api import Agent, AgentInfo, Event, FunctionInfo
from vfiouser_agents.errors import AgentError, AuthError, ConnectError, ProtocolError, TransportLost, Unsupported
from vfiouser_agents.options import number, seconds
from vfiouser_agents.rpc.core import AgentConnection, Handler, NoRequests, RpcConnection
from vfiouser_agents.rpc.endpoint import Address, TlsOptions
from vfiouser_agents.rpc.messages import DEFAULT_MAX_MESSAGE, Codec
from vfiouser_agents.rpc.methods import EVENT, FUNCTIONS, HELLO, OVERHEAD, PING, PROTOCOL, VERSIONS
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_agents.rpc.remote import Readers, Remote, read_remote_options, remote_readers
from vfiouser_agents.rpc.wire import WireError, from_wire

from .msgpack_rpc_session import RpcSession, parse
from .tasks import AgentWithTasks

_log = logging.getLogger(__name__)
DEFAULT_KEEPALIVE = 5.0
DEFAULT_CONNECT_TIMEOUT = 5.0
DEFAULT_CHUNK = 4 << 20


class Link(NoRequests):
    """One connection of an agent, with what the agent said in greeting; it takes the agent's events.

    Args:
        agent: whose connection it is.
        make: makes the connection, for which this is the handler.
    """

    def __init__(self, agent: MsgpackRpcAgent, make: Callable[[Handler], AgentConnection]) -> None:
        self._agent = agent
        self.connection = make(self)
        self.info = AgentInfo("", "")
        #: Set when there may be something to keep alive.
        self.wake = trio.Event()

    @property
    def usable(self) -> bool:
        """It is not lost."""
        return self.connection.lost is None

    @property
    def idle(self) -> bool:
        """Nobody waits for anything, so nothing needs to be kept alive."""
        return not self.connection.unanswered and not self._agent.migrating

    async def call(self, method: str, params: dict[str, Any], on_late: Callable[[Any], None] | None = None) -> Any:
        """Call the agent; see `RpcConnection.call`."""
        self.wake.set()
        return await self.connection.call(method, params, on_late)

    def notification(self, method: str, params: dict[str, Any]) -> None:
        """An event for one of the sessions; what is not understood is from a newer agent, and left alone."""
        if method != EVENT:
            return
        try:
            event = from_wire(Event, params, "event")
        except WireError as error:
            _log.warning("ignored an event from agent %s: %s", self._agent.address, error)
            return
        for session in self._agent.sessions:
            if session.is_number(self, params.get("session")):
                session.feed.put(event)


class _Attempt:
    """One attempt to connect, which several callers may wait for."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.link: Link | None = None
        self.error: AgentError | None = None


class MsgpackRpcAgent(AgentWithTasks):
    """An agent that speaks the reference protocol.

    Args:
        address: where it is.
        tls: for `tls` addresses.
        allow_plaintext: `tcp` addresses may be other hosts.
        keepalive_s: silence in seconds after which the agent is asked whether it is there, and again that long until
            the connection is given up.
        connect_timeout_s: seconds for connection, TLS and greeting together.
        chunk_size: bytes of state in one message at most; None = as many as this transport is good for.

    Raises:
        OptionError: plain text is refused, or the TLS files cannot be used.
    """

    #: The options' readers, an address for those who leave it out, and the default of `chunk_size`: of each transport.
    readers: ClassVar[Readers] = {
        **remote_readers(),
        "keepalive_s": seconds(0.01, 3600),
        "chunk_size": number(4096, 8 << 20),
    }
    example: ClassVar[str] = "tls://soc:7711 or unix:///run/agent.sock"
    default_chunk: ClassVar[int] = DEFAULT_CHUNK

    def __init__(
        self,
        address: Address,
        *,
        tls: TlsOptions | None = None,
        allow_plaintext: bool = False,
        keepalive_s: float = DEFAULT_KEEPALIVE,
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.remote = Remote(address, tls, allow_plaintext=allow_plaintext)
        self.address = address
        self.chunk_size = self.default_chunk if chunk_size is None else chunk_size
        self.sessions: list[RpcSession] = []
        self._keepalive_s = keepalive_s
        self._connect_timeout_s = connect_timeout_s
        self._link: Link | None = None
        self._attempt: _Attempt | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Agent:
        """Make one out of options.

        Args:
            options: `address`, and optionally what the constructor has.

        Raises:
            OptionError: an option cannot be used.
        """
        return cls(**read_remote_options(options, cls.readers, cls.example))

    async def reach(self) -> Callable[[Handler], AgentConnection]:
        """Make what a connection needs.

        Returns:
            A function that makes the connection for a handler.
        """
        stream = await self.remote.connect()
        return lambda handler: RpcConnection(stream, self.make_codec(), handler)

    def make_codec(self) -> Codec:
        """How messages are written on a new connection; the protocol is the same with any codec."""
        return MsgpackCodec()

    def largest_chunk(self, max_message: int) -> int:
        """Bytes of state that one message can carry.

        Args:
            max_message: bytes of the longest message that the agent takes.
        """
        return min(self.chunk_size, max_message - OVERHEAD)

    @property
    def migrating(self) -> bool:
        """A session is in a migration."""
        return any(session.migrating for session in self.sessions)

    async def connect(self) -> AgentInfo:
        """Reach the agent and agree on a version."""
        return (await self.link()).info

    async def aclose(self) -> None:
        """Close the connection; functions stay as they are."""
        self.sessions.clear()
        if self._link is not None:
            self._link.connection.close(TransportLost("this side closed the agent"))
        await trio.lowlevel.checkpoint()

    async def functions(self) -> Sequence[FunctionInfo]:
        """Ask for all functions."""
        raw = await (await self.link()).call(FUNCTIONS, {})
        listed = raw.get("functions") if isinstance(raw, dict) else raw
        found: tuple[FunctionInfo, ...] = parse(tuple[FunctionInfo, ...], listed, FUNCTIONS)
        return found

    async def open(self, function_id: str) -> RpcSession:
        """A session for a function."""
        session = RpcSession(self, function_id)
        await session.open(await self.link())
        self.sessions.append(session)
        return session

    def background(self, work: Callable[[], Awaitable[Any]]) -> None:
        """Do something that nobody waits for; a lost connection is no reason for trouble."""

        async def run() -> None:
            try:
                await work()
            except AgentError as error:
                _log.debug("agent %s: %s", self.address, error)

        self.nursery.start_soon(run)

    async def link(self) -> Link:
        """The connection, made if there is none. A caller that is cancelled does not disturb others that wait.

        Raises:
            ConnectError: it cannot be made in time.
            AuthError: one side does not trust the other.
            ProtocolError: the agent speaks something else.
        """
        if self._link is not None and self._link.usable:
            return self._link
        nursery, attempt = self.nursery, self._attempt
        if attempt is None:
            attempt = self._attempt = _Attempt()
            nursery.start_soon(self._try, attempt)
        await attempt.done.wait()
        if attempt.link is None:
            error = attempt.error or ConnectError("the attempt was given up")
            raise type(error)(error.message)
        return attempt.link

    async def _try(self, attempt: _Attempt) -> None:
        try:
            with trio.fail_after(self._connect_timeout_s):
                self._link = attempt.link = await self._greeted()
        except trio.TooSlowError:
            attempt.error = ConnectError(f"agent {self.address} did not answer within {self._connect_timeout_s:g} s")
        except AgentError as error:
            # A new one, without the frames in which it was raised: they hold the connection.
            attempt.error = type(error)(error.message)
        finally:
            # Whoever waits for it has it; we would keep its connection.
            self._attempt = None
            attempt.done.set()

    async def _greeted(self) -> Link:
        link = Link(self, await self.reach())
        self.nursery.start_soon(self._run, link)
        try:
            link.info = await self._hello(link)
        except BaseException:
            link.connection.close(TransportLost("the greeting failed"))
            raise
        link.connection.max_outgoing = link.info.max_message
        return link

    async def _hello(self, link: Link) -> AgentInfo:
        params = {
            "protocol": PROTOCOL,
            "versions": list(VERSIONS),
            "client": "vfiouser-oob",
            "max_message": DEFAULT_MAX_MESSAGE,
        }
        try:
            info: AgentInfo = parse(AgentInfo, await link.connection.call(HELLO, params), HELLO)
        except TransportLost as error:
            hint = "; it may not accept our certificate" if self.remote.encrypted else ""
            raise ConnectError(f"agent {self.address} ended the connection at the greeting{hint}: {error}") from error
        except AuthError as error:
            raise AuthError(f"agent {self.address}: {error.message}") from error
        except Unsupported as error:
            raise ProtocolError(f"agent {self.address} does not speak a version that we know: {error}") from error
        if info.protocol != PROTOCOL or info.protocol_version not in VERSIONS:
            raise ProtocolError(
                f"agent {self.address} answered with {info.protocol!r} version {info.protocol_version}; "
                f"allowed: {PROTOCOL!r} in {list(VERSIONS)}"
            )
        return info

    async def _run(self, link: Link) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_alive, link)
            await link.connection.run()
            nursery.cancel_scope.cancel()
        _log.info("connection to agent %s ended: %s", self.address, link.connection.lost)
        if self._link is link:
            self._link = None
        for session in self.sessions:
            session.on_loss(link, str(link.connection.lost))

    async def _keep_alive(self, link: Link) -> None:
        while True:
            if link.idle:
                link.wake = trio.Event()
                await link.wake.wait()
            before = link.connection.received
            await trio.sleep(self._keepalive_s)
            if link.connection.received != before or link.idle:
                continue
            with trio.move_on_after(self._keepalive_s) as scope:
                await self._ping(link)
            if scope.cancelled_caught:
                link.connection.close(TransportLost(f"the agent sent nothing for {2 * self._keepalive_s:g} s"))

    async def _ping(self, link: Link) -> None:
        try:
            await link.connection.call(PING, {})
        except AgentError as error:
            _log.debug("ping of %s: %s", self.address, error)
