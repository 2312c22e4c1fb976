"""One RPC connection on a byte stream, either end of it.

A reader task takes messages in and hands them on; a writer task sends them out, whole, so that a caller who is
cancelled never leaves half a message behind. Answers are matched by id; those to calls that were given up are dropped.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import trio

from vfiouser_agents.causes import words_of
from vfiouser_agents.errors import AgentError, AuthError, ProtocolError, TransportLost, Unsupported

from .carrier import carrier
from .messages import DEFAULT_MAX_MESSAGE, ID_LIMIT, Buffer, Codec, Message, Notification, Request, Response

_log = logging.getLogger(__name__)
#: Requests of a peer that may be under way; more are not read before one is answered.
MAX_REQUESTS = 512
#: Answers that were given up and never came; with more, the peer is taken for dead.
MAX_ABANDONED = 4096
#: Seconds for which what a peer has sent is dealt with before everybody else has a turn.
TURN_S = 0.002
#: Seconds that a peer which takes nothing more has to say why.
LAST_WORDS = 0.5

#: Waits for the result of a request.
Answer = Callable[[], Awaitable[Any]]


class Handler(Protocol):
    """What is done with what the peer asks."""

    def request(self, method: str, params: dict[str, Any]) -> Answer:
        """Begin a request, at once and in order; what is returned waits for the result.

        Raises:
            AgentError: it is not accepted.
        """

    def notification(self, method: str, params: dict[str, Any]) -> None:
        """Take a notification; never waits."""


class NoRequests:
    """The handler of a peer that is only called upon: it knows no method."""

    def request(self, method: str, params: dict[str, Any]) -> Answer:
        """Refuse."""
        raise Unsupported(f"there is no method {method!r} here")

    def notification(self, method: str, params: dict[str, Any]) -> None:
        """Ignore."""


class AgentConnection(Protocol):
    """A connection to an agent, whatever carries the calls; see `RpcConnection`."""

    #: Bytes of the longest message that the peer takes.
    max_outgoing: int
    #: Why it is of no use any more; None while it is.
    lost: AgentError | None
    #: Counts what arrived.
    received: int

    @property
    def unanswered(self) -> int:
        """Calls that are not answered yet."""

    def close(self, reason: AgentError) -> None:
        """End it from our side."""

    async def run(self) -> None:
        """Work until the connection ends."""

    async def call(self, method: str, params: dict[str, Any], on_late: Callable[[Any], None] | None = None) -> Any:
        """Call the peer."""


class _Pending:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.response: Response | None = None


class RpcConnection:
    """A connection; of use while `run` runs.

    Args:
        stream: the bytes.
        codec: how messages are written.
        handler: what the peer may ask.
    """

    def __init__(self, stream: trio.abc.Stream, codec: Codec, handler: Handler) -> None:
        self._stream = stream
        self._carrier = carrier(stream)
        self._codec = codec
        self._handler = handler
        self._next_id = 0
        self._pending: dict[int, _Pending] = {}
        self._abandoned: dict[int, Callable[[Any], None] | None] = {}
        self._outbox, self._to_send = trio.open_memory_channel[Sequence[Buffer]](0)
        #: The writer has nothing to send, so that anybody may.
        self._writer_idle = False
        self._requests = trio.Semaphore(MAX_REQUESTS)
        self._scope = trio.CancelScope()
        #: Bytes of the longest message that the peer takes.
        self.max_outgoing = DEFAULT_MAX_MESSAGE
        #: Why it is of no use any more; None while it is.
        self.lost: AgentError | None = None
        #: Counts what arrived, so that a keepalive can see whether anything did.
        self.received = 0

    @property
    def unanswered(self) -> int:
        """Calls that are not answered yet, also those that were given up."""
        return len(self._pending) + len(self._abandoned)

    def close(self, reason: AgentError) -> None:
        """End it from our side; calls under way fail with the reason."""
        if self.lost is None:
            self.lost = reason
        self._scope.cancel()

    async def run(self) -> None:
        """Read and write until the connection ends. Returns then, and raises nothing but cancellation."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(nursery)
                    nursery.cancel_scope.cancel()
        finally:
            self._fail(TransportLost("the connection was closed"))
            self._outbox.close()
            self._to_send.close()
            # Whoever handles it knows this connection: its buffers would wait for the garbage collector.
            self._handler = NoRequests()
            # Not graceful: whoever wants to say good-bye has done so, and a dead peer must not hold us up.
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    def _fail(self, reason: AgentError) -> None:
        if self.lost is None:
            # A new one, without the frames in which it was raised: they hold what was being read.
            self.lost = type(reason)(reason.message)
        for pending in self._pending.values():
            pending.done.set()

    async def call(self, method: str, params: dict[str, Any], on_late: Callable[[Any], None] | None = None) -> Any:
        """Call the peer.

        Args:
            method: its name.
            params: its parameters.
            on_late: gets a result that comes after the caller was cancelled.

        Returns:
            The result.

        Raises:
            TransportLost: the connection ended before the answer.
            ProtocolError: the peer takes no message of that length.
            AgentError: the peer answered with it.
        """
        self._check()
        id_ = self._new_id()
        data = self._sized(Request(id_, method, params))
        pending = self._pending[id_] = _Pending()
        sent = False
        try:
            await self._send(data)
            sent = True
            await pending.done.wait()
        finally:
            del self._pending[id_]
            if sent and pending.response is None and self.lost is None:
                self._abandon(id_, on_late)
        if pending.response is None:
            raise self._loss()
        if pending.response.error is not None:
            raise pending.response.error
        return pending.response.result

    async def notify(self, method: str, params: dict[str, Any]) -> None:
        """Send a notification.

        Raises:
            TransportLost: the connection has ended.
        """
        self._check()
        await self._send((self._codec.encode(Notification(method, params)),))
        await trio.lowlevel.checkpoint()

    def _check(self) -> None:
        if self.lost is not None:
            raise self._loss()

    def _loss(self) -> AgentError:
        # A new object for each caller: one exception raised in several tasks would mix up their tracebacks.
        reason = self.lost or TransportLost("the connection was closed")
        return type(reason)(reason.message)

    async def _send(self, pieces: Sequence[Buffer]) -> None:
        """Send a message, or leave it to the writer, who never leaves half of it behind."""
        try:
            if self._writer_idle and self.lost is None:
                await trio.lowlevel.checkpoint_if_cancelled()
                rest = self._sent_at_once(pieces)
                if rest:
                    self._writer_idle = False
                    self._outbox.send_nowait(rest)
            else:
                await self._outbox.send(pieces)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.WouldBlock):
            raise self._loss() from None

    def _sent_at_once(self, pieces: Sequence[Buffer]) -> Sequence[Buffer]:
        """Send what can be sent without waiting, and so without waking the writer; returns the rest."""
        try:
            return self._carrier.send_now(pieces)
        except OSError:
            # The writer finds the same, and deals with it.
            return pieces

    def _new_id(self) -> int:
        while self._next_id in self._pending or self._next_id in self._abandoned:
            self._next_id = (self._next_id + 1) % ID_LIMIT
        id_ = self._next_id
        self._next_id = (id_ + 1) % ID_LIMIT
        return id_

    def _abandon(self, id_: int, on_late: Callable[[Any], None] | None) -> None:
        self._abandoned[id_] = on_late
        if len(self._abandoned) > MAX_ABANDONED:
            self.close(TransportLost(f"{len(self._abandoned)} calls have no answer; this side gives the peer up"))

    async def _write(self) -> None:
        try:
            while True:
                try:
                    pieces = self._to_send.receive_nowait()
                except trio.WouldBlock:
                    # Only now, and until something is handed over: whoever sends past the writer must not come between
                    # what it has in its hands.
                    self._writer_idle = True
                    pieces = await self._to_send.receive()
                    self._writer_idle = False
                await self._carrier.send(pieces)
        except trio.EndOfChannel:
            pass
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            # The reader may still find out why, such as that our certificate was refused.
            await trio.sleep(LAST_WORDS)
            self.close(broken(error))

    async def _read(self, nursery: trio.Nursery) -> None:
        turn = time.monotonic() + TURN_S
        try:
            while True:
                count, messages = await self._carrier.receive(self._codec)
                if not count:
                    break
                self.received += count
                for message in messages:
                    await self._dispatch(message, nursery)
                    # Also over several reads: none of them waits for a peer that always has sent more.
                    if time.monotonic() > turn:
                        await trio.lowlevel.checkpoint()
                        turn = time.monotonic() + TURN_S
            self._fail(TransportLost("the peer closed the connection"))
        except ProtocolError as error:
            self._fail(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            self._fail(broken(error))

    async def _dispatch(self, message: Message, nursery: trio.Nursery) -> None:
        match message:
            case Response():
                self._take(message)
            case Request():
                # Waiting here is what holds up a peer that asks for more than it reads.
                await self._requests.acquire()
                nursery.start_soon(self._answer, message, self._begin(message))
            case Notification():
                self._handler.notification(message.method, message.params)

    def _take(self, response: Response) -> None:
        if response.id in self._abandoned:
            on_late = self._abandoned.pop(response.id)
            if on_late is not None and response.error is None:
                on_late(response.result)
            return
        pending = self._pending.get(response.id)
        if pending is None or pending.response is not None:
            raise ProtocolError(f"peer answered call {response.id}, which is not open; the connection is closed")
        pending.response = response
        pending.done.set()

    def _begin(self, request: Request) -> Answer | AgentError:
        try:
            return self._handler.request(request.method, request.params)
        except AgentError as error:
            return error

    async def _answer(self, request: Request, answer: Answer | AgentError) -> None:
        try:
            result, taken = None, CallGuard(request.method)
            if isinstance(answer, AgentError):
                taken.error = answer
            else:
                with taken:
                    result = await answer()
            response = Response(request.id, result) if taken.error is None else Response(request.id, error=taken.error)
            await self._send(self._encoded(response))
        except TransportLost:
            pass  # nobody is there to be told
        finally:
            self._requests.release()

    def _encoded(self, response: Response) -> Sequence[Buffer]:
        try:
            return self._sized(response)
        except ProtocolError as error:
            _log.error("the result of a call cannot be sent: %s", error)
            return (self._codec.encode(Response(response.id, error=error)),)

    def _sized(self, message: Message) -> Sequence[Buffer]:
        pieces = self._codec.encode_apart(message)
        size = sum(map(len, pieces))
        if size > self.max_outgoing:
            raise ProtocolError(f"message of {size} bytes; the peer takes {self.max_outgoing}; it was not sent")
        return pieces


class CallGuard:
    """Takes what an agent raises, so that a mistake in one call ends that call and nothing else."""

    def __init__(self, method: str) -> None:
        self._method = method
        self.error: AgentError | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, AgentError):
            self.error = error
        elif isinstance(error, Exception):
            _log.error("%s failed with an error that is not an AgentError", self._method, exc_info=error)
            self.error = AgentError(f"{self._method} failed inside the agent: {type(error).__name__}")
        return isinstance(error, Exception)


#: X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL.
_HAS_EXPIRED = 10


def broken(error: BaseException) -> AgentError:
    """What a broken stream means: TLS that fails is something else than a peer that is gone.

    Args:
        error: as trio raised it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return AuthError(f"TLS failed: {tls_reason(cause)}")
        cause = cause.__cause__
    return TransportLost(f"the connection broke: {words_of(error)}")


def tls_reason(error: ssl.SSLError) -> str:
    """The part of a TLS error that means something to people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == _HAS_EXPIRED:
            return "the peer's certificate has expired"
        return f"the peer's certificate is not accepted: {error.verify_message}"
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return "the peer says that our certificate has expired" if "certificate expired" in reason else reason
