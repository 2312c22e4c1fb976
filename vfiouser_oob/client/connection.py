"""The client's end of a connection: commands out, replies matched by id, the server's own commands served.

Two ways lead to a reply. Usually the reader task finds it and wakes the task that waits. A caller in a hurry
uses `exchange_now`, which looks for the reply itself for a moment, saving two task switches and a trip
through the kernel's poll. Both run in one thread and neither waits between reading a message and acting on
it, so each message is read by exactly one of them and in order; the parked reader may wake up to find
nothing, which is harmless.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Self

import trio

from vfiouser_oob.client.call_ledger import CallLedger
from vfiouser_oob.client.calls import PendingCall, Reply
from vfiouser_oob.client.dma import DmaServer, DmaService, NoMemory
from vfiouser_oob.client.errors import ServerGone, TooLate
from vfiouser_oob.client.keeping import ConnectionKeeping
from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.transport.activity import BACK_TO_BACK_NS, Activity
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket
from vfiouser_oob.transport.reaper import STRANGERS, Account
from vfiouser_protocol.capabilities import MigrationCapability, TwinSocket, VersionCapabilities
from vfiouser_protocol.codec import describe
from vfiouser_protocol.constants import HEADER_SIZE, PROTOCOL_MINOR, Command
from vfiouser_protocol.errors import LocalProtocolError, StreamError, VfioUserError
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import command_name, unpack_header
from vfiouser_protocol.limits import Limits
from vfiouser_protocol.session import CommandReceived, ConnectionEnd, MessageRefused, ProtocolSession, ReplyReceived

#: A client that waits for one of these holds its big lock in QEMU, and serves no DMA meanwhile.
_ACCESSES = frozenset({Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI})
#: How often `exchange_now` looks again after something else arrived; a server cannot keep us spinning by
#: small pieces.
_MAX_LOOKS = 4
#: Messages handled in a row before other tasks get their turn.
_BURST = 32


class Connection:
    """One connection to a server. `run` has to run while it is used.

    Args:
        sock: a connected UNIX stream socket; owned from now on.
        limits: what we accept from the server.
        twin_socket: ask for a second socket for the server's commands.
        minor: highest protocol minor to propose.
        dma_server: serves the server's DMA_READ and DMA_WRITE; None refuses them.
        serve_dma_when_idle: like QEMU, serve them only while no region access of our own is outstanding.
        activity: the process's sockets, for `exchange_now`; None never spins.
        send_guard_s: `request` sends nothing when less than so many seconds of the caller's time are left, so that
            what is given up was not done; a server may still be slower than that.
        max_write_size: bytes of data in one message at most, whatever the server says that it takes: some read a
            message's body by a single call, and lose their place when the socket held less of it.
        trace: takes one readable line per message, for debug logs; None: they are not made.
        account: where the server's descriptors are counted.
        keeping: how it outlives this process; None: it does not.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        limits: Limits | None = None,
        twin_socket: bool = True,
        minor: int = PROTOCOL_MINOR,
        dma_server: DmaServer | None = None,
        serve_dma_when_idle: bool = False,
        activity: Activity | None = None,
        send_guard_s: float = 0.0,
        max_write_size: int | None = None,
        trace: Callable[[str], None] | None = None,
        account: Account = STRANGERS,
        keeping: ConnectionKeeping | None = None,
    ) -> None:
        self._keeping = keeping
        #: What was asked on behalf of whom; None where nobody will want to know.
        self.ledger: CallLedger | None = None if keeping is None else keeping.ledger()
        self._account = account
        self._limits = limits or Limits()
        self._activity = activity
        self._send_guard_s = send_guard_s
        self._max_write_size = max_write_size
        size = self._limits.max_message_size
        self._session = ProtocolSession(ConnectionEnd.CLIENT, self._limits) if keeping is None else keeping.session()
        self._main: MessageSocket
        if keeping is None:
            self._main = MessageSocket(sock, size, activity, account)
        else:
            self._main = keeping.stream(sock, size, activity, account)
        self._twin: MessageSocket | None = None
        self._twin_socket = twin_socket
        self._minor = minor
        self._trace = trace
        self._dma = DmaService(
            dma_server or NoMemory(), self._session, self._limits.max_data_xfer_size, self._trace_sent
        )
        self._serve_dma_when_idle = serve_dma_when_idle
        self._outstanding: set[PendingCall] = set()
        self._round_trip_ns: float = math.inf
        self._failure: str | None = None
        self._gone = trio.Event()
        self._scope: trio.CancelScope | None = None

    # State

    @property
    def failure(self) -> str | None:
        """Why the connection ended; None while it is alive."""
        return self._failure

    @property
    def capabilities(self) -> VersionCapabilities:
        """What the server takes, which limits what we send; known once `run` has started.

        Raises:
            LocalProtocolError: it has not.
        """
        negotiated = self._session.negotiated
        if negotiated is None:
            raise LocalProtocolError("the connection is not negotiated yet")
        return negotiated.server

    @property
    def max_data_xfer_size(self) -> int:
        """Bytes of the largest transfer."""
        # A server that says 0 takes no data at all; it will refuse the single byte by itself.
        return max(1, self.capabilities.max_data_xfer_size)

    @property
    def max_write_size(self) -> int:
        """Bytes of data in the largest message that we send."""
        limit = self.max_data_xfer_size
        return limit if self._max_write_size is None else min(limit, self._max_write_size)

    @property
    def has_twin_socket(self) -> bool:
        """Whether the server's commands come over a second socket."""
        return self._twin is not None

    @property
    def outstanding(self) -> int:
        """How many commands wait for their reply."""
        return len(self._outstanding)

    @property
    def late_replies(self) -> int:
        """How many replies came after their command had been given up."""
        return self._session.late_replies

    @property
    def congested(self) -> bool:
        """Whether so much is unsent that a caller who can wait should wait."""
        return self._main.congested

    async def wait_gone(self) -> str:
        """Wait until the connection has ended, by either side; returns why."""
        await self._gone.wait()
        return self._failure or ""

    def close(self) -> None:
        """End the connection; `run` returns soon after, and outstanding commands fail."""
        self._end("the connection was closed on our side")

    # Sending

    def submit(self, command: int, payload: bytes = b"", fds: Sequence[HasFileno] = ()) -> PendingCall:
        """Send a command without waiting; many may be outstanding, and the server answers them in order.

        Args:
            command: command number.
            payload: its payload.
            fds: descriptors to attach; they stay the caller's and may be closed at once.

        Returns:
            The call, to be waited for or abandoned.

        Raises:
            ServerGone: the connection has ended.
        """
        if self._failure is not None:
            raise self._gone_already()
        holds_dma = self._serve_dma_when_idle and command in _ACCESSES
        call = PendingCall(self, command, holds_dma)
        ledger = self.ledger
        if ledger is not None and (known := ledger.known(command)) is not None:
            call.complete(known)
            return call
        call.msg_id, data = self._session.command(command, payload, call)
        if ledger is not None:
            ledger.asking(command, call.msg_id)
        self._outstanding.add(call)
        if holds_dma:
            self._dma.hold()
        self._send(data, fds)
        return call

    def post(self, command: int, payload: bytes) -> None:
        """Send `command` and its `payload` with NO_REPLY: no reply comes, not even for an error.

        Raises:
            ServerGone: the connection has ended.
        """
        if self._failure is not None:
            raise self._gone_already()
        if self.ledger is not None:
            # Its answer is the only sign that the server has got it.
            self.submit(command, payload).abandon()
            return
        _, data = self._session.command(command, payload, no_reply=True)
        self._send(data, ())

    async def post_when_possible(self, command: int, payload: bytes) -> None:
        """Send `command` and its `payload` with NO_REPLY, waiting while too much is unsent.

        Raises:
            ServerGone: the connection has ended.
        """
        if self._main.congested:
            await self._main.flushed()
        self.post(command, payload)

    async def request(self, command: int, payload: bytes = b"", fds: Sequence[HasFileno] = ()) -> Reply:
        """Send a command and wait for its reply; a deadline is the caller's cancel scope.

        Args:
            command: command number.
            payload: its payload.
            fds: descriptors to attach; they stay the caller's.

        Returns:
            The reply; its descriptors are the caller's.

        Raises:
            ReplyError: the server answered with an error.
            TooLate: the caller's time is almost up, and nothing was sent.
            ServerGone: the connection has ended.
        """
        if self._main.congested:
            await self._main.flushed()
        left = trio.current_effective_deadline() - trio.current_time()
        if left < self._send_guard_s:
            # A caller that was cancelled has no time left either, but wants to hear of that only.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise TooLate(f"{command_name(command)} was not sent: only {max(0.0, left):.3f} s are left for its reply")
        return await self.submit(command, payload, fds).wait()

    def exchange_now(self, command: int, payload: bytes) -> PendingCall:
        """Send a command and look for its reply for a moment without letting other tasks run.

        It looks only while nothing else is outstanding and the last reply came quickly, and stops as soon as
        anybody else has work.

        Args:
            command: command number.
            payload: its payload.

        Returns:
            The call; when it is not `done` the reply has to be waited for as usual.

        Raises:
            ServerGone: the connection has ended.
        """
        worth_while = not self._outstanding and self._round_trip_ns < BACK_TO_BACK_NS
        call = self.submit(command, payload)
        if worth_while and self._activity is not None:
            self._look_for(call, self._activity)
        return call

    def _look_for(self, call: PendingCall, activity: Activity) -> None:
        main = self._main
        fd = main.fileno()
        try:
            for _ in range(_MAX_LOOKS):
                if not activity.spin(fd):
                    return
                message = main.try_receive()
                if message is not None:
                    self._dispatch(main, message)
                if call.done:
                    return
        except (EndOfStream, StreamError) as error:
            self._end(str(error))

    def _trace_sent(self, data: bytes, fd_count: int = 0) -> None:
        if self._trace is not None:
            self._trace(describe(unpack_header(data[:HEADER_SIZE]), data[HEADER_SIZE:], fd_count, ">"))

    def _send(self, data: bytes, fds: Sequence[HasFileno]) -> None:
        if self._trace is not None:
            self._trace_sent(data, len(fds))
        try:
            self._main.send(data, fds)
        except EndOfStream as error:
            # What the server sent before it went may still be there to be read, but nobody can use it.
            self._end(str(error))
            raise ServerGone(f"cannot reach the server: {error}") from error

    def _gone_already(self) -> ServerGone:
        return ServerGone(f"cannot reach the server: {self._failure}")

    def forget(self, call: PendingCall) -> None:
        """Give up a call; its late reply will be dropped (called by `PendingCall`)."""
        if call in self._outstanding:
            self._settle(call)
            self._session.forget(call.msg_id)

    def _settle(self, call: PendingCall) -> None:
        self._outstanding.discard(call)
        if call.holds_dma:
            self._dma.release()

    # Receiving

    def _dispatch(self, channel: MessageSocket, message: Message) -> None:
        if self._trace is not None:
            self._trace(describe(message.header, message.payload, len(message.fds), "<"))
        if self.ledger is not None and message.header.is_reply:
            self.ledger.heard(message.header, message.payload)
        event = self._session.receive(message, twin=channel is self._twin)
        if isinstance(event, ReplyReceived):
            self._take_reply(event)
            channel.settle()
        elif isinstance(event, CommandReceived):
            close_fds(event.fds)
            close_fds(event.surplus_fds)
            self._dma.take(channel, event.header, event.payload)
        else:
            self._refuse(channel, event)

    def _take_reply(self, event: ReplyReceived) -> None:
        call: PendingCall
        call, header, payload, fds, surplus_fds = event
        self._settle(call)
        self._round_trip_ns = time.perf_counter_ns() - call.sent_ns
        if surplus_fds:
            close_fds(surplus_fds)
        call.complete(Reply(header, payload, fds))

    def _refuse(self, channel: MessageSocket, event: MessageRefused) -> None:
        close_fds(event.fds)
        if event.close:
            raise StreamError(event.reason)
        if event.reply is not None:
            self._dma.refuse(channel, event.reply)
        else:
            channel.settle()

    async def _read(self, channel: MessageSocket) -> None:
        burst = 0
        try:
            while True:
                message = channel.try_receive()
                if message is None:
                    burst = 0
                    await channel.wait_for_data()
                    continue
                self._dispatch(channel, message)
                if self._dma.full:
                    await self._dma.room()
                burst += 1
                if burst == _BURST:
                    # A server that never pauses must not keep the other tasks from running.
                    burst = 0
                    await trio.lowlevel.checkpoint()
        except (EndOfStream, StreamError) as error:
            self._end(str(error))

    async def _write(self, channel: MessageSocket) -> None:
        try:
            await channel.run_sender()
        except EndOfStream as error:
            self._end(str(error))

    async def _serve_dma(self) -> None:
        try:
            await self._dma.run()
        except EndOfStream as error:
            self._end(str(error))

    # Life

    async def run(self, *, task_status: trio.TaskStatus[Self] = trio.TASK_STATUS_IGNORED) -> None:
        """Negotiate, tell `task_status`, then keep the connection going until it ends; for `nursery.start`.

        It returns when either side has ended the connection; a server that goes away is not an error here, but
        one for every command.

        Raises:
            ServerGone: the server went away, or ended the stream, during negotiation.
            ReplyError: the server refused VERSION.
        """
        refusal: VfioUserError | None = None
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                self._start_channel(nursery, self._main)
                nursery.start_soon(self._serve_dma)
                try:
                    await self._negotiate(nursery)
                except VfioUserError as error:
                    refusal = error
                    nursery.cancel_scope.cancel()
                else:
                    task_status.started(self)
        finally:
            self._end("the client was stopped")
            self._session.close()
            self._close_sockets()
        if refusal is not None:
            raise refusal

    def _go_on(self, nursery: trio.Nursery, keeping: ConnectionKeeping) -> None:
        """Go on where another process has ended."""
        self._twin = keeping.twin_stream(self._limits.max_message_size, self._activity, self._account)
        if self._twin is not None:
            self._start_channel(nursery, self._twin)

    def leave(self) -> None:
        """Leave the connection to another process, and do nothing with it any more."""
        for stream in (self._main, self._twin):
            if isinstance(stream, KeptSocket):
                stream.leave()

    async def _negotiate(self, nursery: trio.Nursery) -> None:
        if self._failure is not None:
            raise self._gone_already()
        if self._keeping is not None and self._keeping.agreed is not None:
            self._go_on(nursery, self._keeping)
            return
        limits = self._limits
        proposal = VersionCapabilities(
            max_msg_fds=limits.max_msg_fds,
            max_data_xfer_size=limits.max_data_xfer_size,
            max_dma_maps=limits.max_dma_maps,
            write_multiple=True,
            twin_socket=TwinSocket(True) if self._twin_socket else None,
            migration=MigrationCapability(),
        )
        call = PendingCall(self, Command.VERSION, False)
        call.msg_id, data = self._session.propose(proposal, minor=self._minor, token=call)
        self._outstanding.add(call)
        self._send(data, ())
        reply = await call.wait()
        # A descriptor comes only when it is the twin socket's; the session has checked that.
        memory: StreamMemory | None = None
        if self._keeping is not None and self._session.negotiated is not None:
            memory = self._keeping.settled(self._session.negotiated, next(iter(reply.fds), None))
        for fd in reply.fds:
            self._start_twin(nursery, fd, memory)

    def _start_twin(self, nursery: trio.Nursery, fd: OwnedFd, memory: StreamMemory | None) -> None:
        try:
            sock = socket.socket(fileno=fd.fileno())
        except OSError as error:
            fd.close()
            raise StreamError(f"the server's twin socket is unusable: {error.strerror}") from error
        fd.detach()
        size = self._limits.max_message_size
        if memory is None:
            self._twin = MessageSocket(sock, size, self._activity, self._account)
        else:
            self._twin = KeptSocket(sock, size, memory, self._activity, self._account)
        self._start_channel(nursery, self._twin)

    def _start_channel(self, nursery: trio.Nursery, channel: MessageSocket) -> None:
        nursery.start_soon(self._read, channel)
        nursery.start_soon(self._write, channel)

    def _end(self, reason: str) -> None:
        if self._failure is not None:
            return
        self._failure = reason
        self._dma.close()
        for call in list(self._outstanding):
            self._settle(call)
            name = command_name(call.command)
            call.fail(ServerGone(f"the server left while {name} was outstanding: {reason}"))
        self._gone.set()
        if self._scope is not None:
            self._scope.cancel()
        else:
            self._close_sockets()

    def _close_sockets(self) -> None:
        self._main.close()
        if self._twin is not None:
            self._twin.close()
