"""One client on one function's socket: reader, dispatcher, writer.

The reader takes messages in order. A command that the device answers at once is answered right there, without a task
switch; that is how a trapped register access is served. A command whose answer has to be waited for goes to the
dispatcher, and from then on every later command queues behind it, because clients rely on replies in order. The reader
goes on reading meanwhile: replies to our own DMA commands must get through, and so must the end of the stream.

    reader ──► answered at once ──────────────► socket
       │
       └─► queue ──► dispatcher (waits) ──────► socket
"""

from __future__ import annotations

import errno
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import trio

from vfiouser_oob.devices.base import BackendSession, ClientLink
from vfiouser_oob.migration.port import MigrationPort
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.server.containment import Contained, errno_of
from vfiouser_oob.server.dma_link import DmaLink
from vfiouser_oob.server.handlers import Handler, Handlers, Reply, Result
from vfiouser_oob.server.holding import WriteHold
from vfiouser_oob.server.negotiation import TwinSocket, negotiate_version
from vfiouser_oob.transport.fds import HasFileno, close_fds
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket
from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.transport.pieces import Pieces
from vfiouser_oob.transport.quota import refusal_of
from vfiouser_oob.transport.turns import SLICE_S, Lane
from vfiouser_protocol.capabilities import Capabilities
from vfiouser_protocol.codec import describe
from vfiouser_protocol.constants import HEADER_SIZE, Command
from vfiouser_protocol.errors import CommandError, StreamError
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import NO_REPLY, unpack_header
from vfiouser_protocol.limits import Limits
from vfiouser_protocol.session import CommandReceived, Refused, ReplyReceived, Role, Session

if TYPE_CHECKING:
    from vfiouser_oob.server.function import Function

#: Messages answered in a row before other tasks get their turn, however they came: a client that asks again at once can
#: keep us from ever sleeping. One that does not wait for replies has its turn for the time of a slice only.
_TURN = 32
#: What a handler returns when there is nothing to wait for.
_READY = (bytes, Reply, Pieces)
#: Commands and bytes that may queue behind one that waits; beyond that we stop reading, and the client's socket fills.
_MAX_QUEUED = 16384
_MAX_QUEUED_BYTES = 64 << 20
#: What is left of a command's time when it is too late to begin it: so many seconds, or this part of all of it.
_GUARD_S = 0.05
_GUARD_PART = 0.05


class _Queued(NamedTuple):
    """A command that waits, for its result or for its turn; or a refusal whose reply has its place in the order."""

    event: CommandReceived | Refused
    deadline: float
    result: Result | None


class Connection(ClientLink):
    """A client of a function, from its first byte to its last.

    Args:
        function: the function that is served.
        sock: the connected socket; owned from now on.
        peer: who connected it.
        log: logger with the function's fields.
    """

    def __init__(self, function: Function, sock: socket.socket, peer: Peer | None, log: Logger) -> None:
        limits = Limits()
        self.function = function
        self.max_message_size = limits.max_message_size
        self.peer = peer
        self.capabilities = Capabilities()
        self.account = function.account
        self.phase = "negotiating"
        #: Whether it has sent its first message.
        self.spoken = False
        self.log = log
        self._tracing = log.debug_enabled
        self.noise = function.noise
        self._budget_s = function.reply_budget_s
        self.session = Session(Role.SERVER, limits)
        self.stream = MessageSocket(sock, limits.max_message_size, function.activity, function.account)
        self._twin: TwinSocket | None = None
        self.backend: BackendSession | None = None
        self.port: MigrationPort | None = None
        self._handlers: dict[int, Handler] = {}
        self._hold: WriteHold | None = None
        #: How a command is begun; a function that cannot migrate holds nothing back.
        self._start: Callable[[CommandReceived], Result] = self._start_now
        self._counts = function.counts
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._lane = Lane()
        self._queue_filled = trio.Event()
        self._queue_drained = trio.Event()
        self._lost: str | None = None
        self._dma: DmaLink | None = None
        self._scope = trio.CancelScope()

    # The life of a connection

    async def run(self) -> str:
        """Serve the client until it goes.

        Returns:
            Why it ended, for the log.
        """
        reason = "the daemon stops serving it"
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    reason = await self._serve(nursery)
                    nursery.cancel_scope.cancel()
        finally:
            self.phase = "closing"
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._budget_s):
                await self._tear_down()
        return reason

    async def _serve(self, nursery: trio.Nursery) -> str:
        nursery.start_soon(self.run_sender, self.stream)
        try:
            if not await negotiate_version(self, nursery):
                return "negotiation failed"
            self.phase = "attached"
            self.function.phase_changed()
            nursery.start_soon(self._dispatch_queued)
            if self._hold is not None:
                nursery.start_soon(self._hold.run)
            try:
                await self._read()
            finally:
                self.stream.uncork()
        except EndOfStream as end:
            return str(end)
        except StreamError as error:
            await self._reply_last(error.reply)
            self.noise.warning("client's stream cannot be followed; disconnected", error=str(error))
            self.function.note_error(str(error))
            return str(error)
        return "the client left"

    async def _reply_last(self, reply: bytes | None) -> None:
        """Send the reply to a message that ends the connection, behind those to what came before it."""
        # Those have deadlines of their own, and a moment is needed to answer the last of them.
        with suppress(EndOfStream), trio.move_on_after(2 * self._budget_s):
            while self._queue:
                self._queue_drained = trio.Event()
                await self._queue_drained.wait()
            if reply is not None:
                self.stream.send(reply)
                await self.stream.flushed()

    async def _tear_down(self) -> None:
        if self._dma is not None:
            self._dma.close()
        for queued in self._queue:
            self._abandon(queued)
        self._queue.clear()
        try:
            if self.port is not None:
                await self.port.detach()
        finally:
            await self._close_device()

    async def _close_device(self) -> None:
        try:
            if self.backend is not None:
                await self.backend.close()
        finally:
            if self._twin is not None:
                self._twin.close()
            self.stream.close()

    def _abandon(self, queued: _Queued) -> None:
        if isinstance(queued.result, Coroutine):
            queued.result.close()
        # Whatever a handler took is no longer among them.
        close_fds(queued.event.fds)

    async def run_sender(self, stream: MessageSocket) -> None:
        """Send what one of the sockets did not take at once."""
        try:
            await stream.run_sender()
        except EndOfStream:
            self._scope.cancel()

    # What the negotiation sets up

    def adopt(self, backend: BackendSession) -> None:
        """Take the device that was opened for this client; it is closed with the connection."""
        self.backend = backend

    def migrate_by(self, port: MigrationPort) -> None:
        """Take the client's way into the migration of its function; it is detached with the connection."""
        self.port = port

    def start(
        self, client: Capabilities, offer: Capabilities, twin: TwinSocket | None, migration_pgsize: int | None
    ) -> None:
        """Take what was negotiated.

        Args:
            client: what the client can take.
            offer: what we said that we can take.
            twin: the second socket, if it was granted; closed with the connection.
            migration_pgsize: bytes per bit of v1's dirty bitmaps, if both sides named it.
        """
        assert self.backend is not None
        self.capabilities = client
        self._twin = twin
        channel = self.send if twin is None else self._send_on_twin
        permit = self.backend.memory.map.segments
        self._dma = DmaLink(self.session, channel, permit, client.max_data_xfer_size, self._budget_s)
        if self.port is not None:
            self.port.negotiated(client, offer, migration_pgsize)
            self.stream.make_room()
            v1 = self.port.v1
            self._hold = WriteHold(self.port.runner, -1 if v1 is None else v1.index, self._carry_out, self.log)
            self.port.held_by(self._hold.drained)
            self._start = self._start_unless_held
        self._handlers = Handlers(self.backend, offer.max_data_xfer_size, self.port).table

    def count(self, command: int) -> None:
        """Count a command for `status`."""
        self._counts[command] += 1

    # Reading

    async def _read(self) -> None:
        """Read and answer until the stream ends."""
        stream = self.stream
        burst = turn = 0
        began = 0.0
        while True:
            message = stream.try_receive()
            if message is None:
                stream.uncork()
                burst = 0
                if not stream.spin():
                    turn = 0
                    await stream.wait_for_data()
                continue
            if not burst:
                began = time.monotonic()
            else:
                # The client sends without waiting for each reply, so replies may go together. The first one of a burst
                # does not wait: it may be the only one, and its sender a virtual CPU.
                stream.cork()
            self._take(message, twin=False)
            burst += 1
            turn += 1
            if turn >= _TURN or (burst > 1 and time.monotonic() - began > SLICE_S):
                stream.uncork()
                burst = turn = 0
                await self._lane.rest()
                if stream.congested or self._queue_is_full:
                    await self._make_room()

    async def read_twin(self, stream: MessageSocket) -> None:
        """Read the twin socket, which carries replies to our commands only."""
        try:
            while True:
                self._take(await stream.receive(), twin=True)
        except EndOfStream:
            self._scope.cancel()
        except StreamError as error:
            self.noise.warning("client's twin stream cannot be followed; disconnected", error=str(error))
            self._scope.cancel()

    @property
    def _queue_is_full(self) -> bool:
        return len(self._queue) > _MAX_QUEUED or self._queued_bytes > _MAX_QUEUED_BYTES

    async def _make_room(self) -> None:
        """Let the client's socket fill until our replies are out and the queue is shorter."""
        await self.stream.flushed()
        while self._queue_is_full:
            self._queue_drained = trio.Event()
            await self._queue_drained.wait()

    def _take(self, message: Message, *, twin: bool) -> None:
        if self._tracing:
            self.trace_received(message)
        event = self.session.receive(message, twin=twin)
        if isinstance(event, CommandReceived):
            self._counts[event.header.command] += 1
            if event.surplus_fds:
                close_fds(event.surplus_fds)
            refusal = refusal_of(self.account, event.fds) if event.fds else None
            if self._queue:
                self._enqueue(event, refusal)
            else:
                self._execute(event, refusal)
        elif isinstance(event, ReplyReceived):
            close_fds((*event.fds, *event.surplus_fds))
            event.token.resolve(event.header, event.payload)
        elif event.close:
            self._note_refusal(event)
            raise StreamError(event.reason, event.errno, event.reply)
        elif self._queue:
            self._enqueue(event, None)
        else:
            self._refuse(event)

    def trace_received(self, message: Message) -> None:
        """Log a message at debug level, as one readable line."""
        if self._tracing:
            self.log.debug(describe(message.header, bytes(message.payload), len(message.fds), "<"))

    def _refuse(self, event: Refused) -> None:
        self._note_refusal(event)
        if event.reply is not None:
            self.send(event.reply)

    def _note_refusal(self, event: Refused) -> None:
        close_fds(event.fds)
        self.noise.warning("message refused", reason=event.reason)
        self.function.note_error(event.reason)

    # Answering

    def _execute(self, event: CommandReceived, refusal: Result | None) -> None:
        """Run a command; answer it, or hand it to the dispatcher."""
        with Contained() as outcome:
            result = self._start(event) if refusal is None else refusal
            if isinstance(result, _READY):
                self._answer(event, result)
            else:
                self._enqueue(event, result)
                return
        if event.fds:
            close_fds(event.fds)
        if outcome.error is not None:
            self._answer_error(event, outcome.taken())

    def _start_unless_held(self, event: CommandReceived) -> Result:
        hold = self._hold
        if hold is not None and (hold.runner.record.awaiting or hold.held):
            held = hold.take(event, lambda: self._carry_out_held(event))
            if held is not None:
                return held
        return self._start_now(event)

    def _start_now(self, event: CommandReceived) -> Result:
        _, header, payload, fds, _ = event
        if self._lost is not None:
            raise CommandError(f"the device is lost ({self._lost})", errno.EIO)
        return self._handlers[header.command](payload, fds, header.flags & NO_REPLY != 0)

    async def _carry_out_held(self, event: CommandReceived) -> bytes:
        """Do an access that was held back; its reply is the payload."""
        self._require_time(event, trio.current_effective_deadline())
        result = self._start_now(event)
        if not isinstance(result, _READY):
            result = await result
        assert isinstance(result, bytes)
        return result

    async def _carry_out(self, event: CommandReceived) -> None:
        """Do a write that was held back, and that nobody waits for."""
        with Contained() as outcome, trio.move_on_after(self._budget_s):
            await self._carry_out_held(event)
        if outcome.error is not None:
            self._note_error(event, outcome.taken())

    def _require_time(self, event: CommandReceived, deadline: float) -> None:
        """Refuse to begin what could not be answered any more: the client would read a failure of what was done."""
        if event.header.no_reply or deadline - trio.current_time() >= min(_GUARD_S, self._budget_s * _GUARD_PART):
            return
        name = Command(event.header.command).name
        raise CommandError(f"{name} waited {self._budget_s:g} s for its turn and was not begun", errno.ETIMEDOUT)

    def _enqueue(self, event: CommandReceived | Refused, result: Result | None) -> None:
        if self._hold is not None:
            self._hold.queued(event)
        self._queue.append(_Queued(event, trio.current_time() + self._budget_s, result))
        if isinstance(event, CommandReceived):
            self._queued_bytes += len(event.payload)
        self._queue_filled.set()

    async def _dispatch_queued(self) -> None:
        """Answer in order what has to be waited for, and what queued up behind it."""
        while True:
            await self._queue_filled.wait()
            began = time.monotonic()
            while self._queue:
                queued = self._queue[0]
                if isinstance(queued.event, Refused):
                    self._refuse(queued.event)
                else:
                    await self._finish(queued.event, queued)
                    self._queued_bytes -= len(queued.event.payload)
                self._queue.popleft()
                if self._hold is not None:
                    self._hold.unqueued(queued.event)
                self._queue_drained.set()
                if time.monotonic() - began > SLICE_S:  # what is carried out at once never waits by itself
                    await self._lane.rest()
                    began = time.monotonic()
            self._queue_filled = trio.Event()

    async def _finish(self, event: CommandReceived, queued: _Queued) -> None:
        with Contained() as outcome:
            result = queued.result
            if result is None:
                self._require_time(event, queued.deadline)
                result = self._start(event)
            if not isinstance(result, _READY):
                with trio.move_on_at(queued.deadline) as scope:
                    result = await result
                if scope.cancelled_caught:
                    raise CommandError(
                        f"{Command(event.header.command).name} took longer than {self._budget_s:g} s", errno.ETIMEDOUT
                    )
            assert isinstance(result, _READY)
            self._answer(event, result)
        if event.fds:
            close_fds(event.fds)
        if outcome.error is not None:
            self._answer_error(event, outcome.taken())

    def _answer(self, event: CommandReceived, result: bytes | Reply | Pieces) -> None:
        if isinstance(result, bytes):
            self.send(self.session.reply(event.header, result))
        elif isinstance(result, Pieces):
            self._answer_in_pieces(event, result)
        else:
            self.send(self.session.reply(event.header, result.payload), result.fds)

    def _answer_in_pieces(self, event: CommandReceived, result: Pieces) -> None:
        head = self.session.reply_head(event.header, result.size)
        if not head:
            return
        if self._tracing:
            self.log.debug(describe(unpack_header(head), b"".join(result.pieces), 0, ">"))
        try:
            self.stream.send_pieces([head, *result.pieces])
        except EndOfStream:
            self._scope.cancel()

    def _answer_error(self, event: CommandReceived, error: Exception) -> None:
        self.send(self.session.error_reply(event.header, self._note_error(event, error)))

    def _note_error(self, event: CommandReceived, error: Exception) -> int:
        """Note why a command failed; returns the error number for its reply."""
        name = Command(event.header.command).name
        number = errno_of(error, self.log, name)
        text = f"{name}: {error}"
        self.function.note_error(text)
        self.noise.warning("command refused", reason=text, errno=errno.errorcode.get(number, str(number)))
        return number

    def send(self, data: bytes, fds: Sequence[HasFileno] = ()) -> None:
        """Send one message on the main socket; nothing, for a command that wants no reply.

        A broken connection is noticed by the reader.
        """
        if not data:
            return
        if self._tracing:
            header = unpack_header(data[:HEADER_SIZE])
            self.log.debug(describe(header, data[HEADER_SIZE:], len(fds), ">"))
        try:
            self.stream.send(data, fds)
        except EndOfStream:
            self._scope.cancel()

    def _send_on_twin(self, data: bytes) -> None:
        assert self._twin is not None
        try:
            self._twin.stream.send(data)
        except EndOfStream:
            self._scope.cancel()

    # What the device may ask of the client

    async def dma_read(self, address: int, count: int) -> bytes:
        """Read client memory by messages."""
        assert self._dma is not None
        return await self._dma.read(address, count)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write client memory by messages."""
        assert self._dma is not None
        await self._dma.write(address, data)

    def fail(self, reason: str) -> None:
        """The device is lost: from now on every command is answered with EIO."""
        if self._lost is None:
            self._lost = reason
            self.log.error("device lost; its client gets EIO until it reconnects", reason=reason)
            self.function.note_error(reason)

    # For `status`

    @property
    def sockets(self) -> int:
        """How many sockets the connection has."""
        return 1 if self._twin is None else 2

    def dma_summary(self) -> dict[str, int]:
        """What was transferred by DMA messages."""
        return {} if self._dma is None else self._dma.summary()
