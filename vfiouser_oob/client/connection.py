"""The client's end of a connection: commands out, replies matched by id, the server's own commands served.

Two ways lead to a reply. Usually the reader task finds it and wakes the task that waits. A caller in a hurry uses
`exchange_now`, which looks for the reply itself for a moment, saving two task switches and a trip through the kernel's
poll. Both run in one thread and neither waits between reading a message and acting on it, so each message is read by
exactly one of them and in order; the parked reader may wake up to find nothing, which is harmless.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Sequence

import trio
from vfiouser_protocol.capabilities import Capabilities
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import command_name
from vfiouser_protocol.limits import Limits
from vfiouser_protocol.session import CommandReceived, Refused, ReplyReceived, Role, Session

from vfiouser_oob.client.calls import PendingCall, Reply
from vfiouser_oob.client.dma import DmaServer, DmaService, NoMemory
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.transport.activity import BACK_TO_BACK_NS, Activity
from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket

#: A client that waits for one of these holds its big lock in QEMU, and serves no DMA meanwhile.
_ACCESSES = frozenset({Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI})
#: How often `exchange_now` looks again after something else arrived; a server cannot keep us spinning by small pieces.
_MAX_LOOKS = 4


class Connection:
    """One connection to a server. `run` has to run while it is used.

    Args:
        sock: a connected UNIX stream socket; owned from now on.
        limits: what we accept from the server.
        dma_server: serves the server's DMA_READ and DMA_WRITE; None refuses them.
        serve_dma_when_idle: like QEMU, serve them only while no region access of our own is outstanding.
        activity: the process's sockets, for `exchange_now`; None never spins.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        limits: Limits | None = None,
        dma_server: DmaServer | None = None,
        serve_dma_when_idle: bool = False,
        activity: Activity | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._activity = activity
        self._session = Session(Role.CLIENT, self._limits)
        self._main = MessageSocket(sock, self._limits.max_message_size, activity)
        self._twin: MessageSocket | None = None
        self._dma = DmaService(dma_server or NoMemory(), self._session, self._limits.max_data_xfer_size)
        self._serve_dma_when_idle = serve_dma_when_idle
        self._outstanding: dict[int, PendingCall] = {}
        self._round_trip_ns: float = math.inf
        self._failure: str | None = None
        self._gone = trio.Event()
        self._scope: trio.CancelScope | None = None
        #: Replies that came after their command had been given up.
        self.late_replies = 0

    # State

    @property
    def failure(self) -> str | None:
        """Why the connection ended; None while it is alive."""
        return self._failure

    @property
    def outstanding(self) -> int:
        """How many commands wait for their reply."""
        return len(self._outstanding)

    async def wait_gone(self) -> str:
        """Wait until the connection has ended, by either side; returns why."""
        await self._gone.wait()
        return self._failure or ""

    def close(self) -> None:
        """End the connection; `run` returns soon after, and outstanding commands fail."""
        self._end("the connection was closed on our side")

    # Sending

    def submit(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, max_reply_fds: int = 0
    ) -> PendingCall:
        """Send a command without waiting; many may be outstanding, and the server answers them in order.

        Args:
            command: command number.
            payload: its payload.
            fds: descriptors to attach; they stay the caller's and may be closed at once.
            max_reply_fds: how many descriptors the reply may bring.

        Returns:
            The call, to be waited for or abandoned.

        Raises:
            ServerGone: the connection has ended.
        """
        self._check_alive()
        holds_dma = self._serve_dma_when_idle and command in _ACCESSES
        call = PendingCall(self, command, max_reply_fds, holds_dma)
        call.msg_id, data = self._session.command(command, payload, call)
        self._outstanding[call.msg_id] = call
        if holds_dma:
            self._dma.hold()
        self._send(data, fds)
        return call

    def post(self, command: int, payload: bytes) -> None:
        """Send a command with NO_REPLY: nothing tells whether it succeeded.

        Raises:
            ServerGone: the connection has ended.
        """
        self._check_alive()
        _, data = self._session.command(command, payload, no_reply=True)
        self._send(data, ())

    async def request(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, max_reply_fds: int = 0
    ) -> Reply:
        """Send a command and wait for its reply; a deadline is the caller's cancel scope.

        Args:
            command: command number.
            payload: its payload.
            fds: descriptors to attach; they stay the caller's.
            max_reply_fds: how many descriptors the reply may bring.

        Raises:
            ReplyError: the server answered with an error.
            ServerGone: the connection has ended.
        """
        if self._main.congested:
            await self._main.flushed()
        return await self.submit(command, payload, fds, max_reply_fds=max_reply_fds).wait()

    def exchange_now(self, command: int, payload: bytes) -> PendingCall:
        """Send a command and look for its reply for a moment without letting other tasks run.

        It looks only while nothing else is outstanding and the last reply came quickly, and stops as soon as anybody
        else has work.

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

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            self._main.send(data, fds)
        except EndOfStream as error:
            # What the server sent before it went may still be there to be read, but nobody can use it.
            self._end(str(error))
            raise ServerGone(f"the server cannot be reached: {error}") from error

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise ServerGone(f"the server cannot be reached: {self._failure}")

    def forget(self, call: PendingCall) -> None:
        """Give up a call; its late reply will be dropped (called by `PendingCall`)."""
        if self._outstanding.pop(call.msg_id, None) is not None:
            self._session.forget(call.msg_id)
            if call.holds_dma:
                self._dma.release()

    # Receiving

    def _dispatch(self, channel: MessageSocket, message: Message) -> None:
        event = self._session.receive(message, twin=channel is self._twin)
        if isinstance(event, ReplyReceived):
            self._take_reply(event)
        elif isinstance(event, CommandReceived):
            close_fds(event.fds)
            self._dma.take(channel, event.header, event.payload)
        else:
            self._refuse(channel, event)

    def _take_reply(self, event: ReplyReceived) -> None:
        call: PendingCall = event.token
        del self._outstanding[call.msg_id]
        self._round_trip_ns = time.perf_counter_ns() - call.sent_ns
        if call.holds_dma:
            self._dma.release()
        fds: Sequence[OwnedFd] = ()
        if event.fds:
            close_fds(event.fds[call.max_fds :])
            fds = [OwnedFd(fd) for fd in event.fds[: call.max_fds]]
        call.complete(Reply(event.header, event.payload, fds))

    def _refuse(self, channel: MessageSocket, event: Refused) -> None:
        close_fds(event.fds)
        if event.reply is not None:
            channel.send(event.reply)
        elif not event.close:
            self.late_replies += 1
        if event.close:
            raise StreamError(event.reason)

    async def _read(self, channel: MessageSocket) -> None:
        try:
            while True:
                message = channel.try_receive()
                if message is None:
                    await channel.wait_for_data()
                else:
                    self._dispatch(channel, message)
                    # A server that never pauses must not keep the other tasks from running.
                    await trio.lowlevel.cancel_shielded_checkpoint()
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

    async def _run_tasks(self, nursery: trio.Nursery) -> None:
        self._scope = nursery.cancel_scope
        nursery.start_soon(self._read, self._main)
        nursery.start_soon(self._write, self._main)
        nursery.start_soon(self._serve_dma)

    def _start_twin(self, nursery: trio.Nursery, fd: OwnedFd) -> None:
        sock = socket.socket(fileno=fd.detach())
        self._twin = MessageSocket(sock, self._limits.max_message_size, self._activity)
        nursery.start_soon(self._read, self._twin)
        nursery.start_soon(self._write, self._twin)

    def _end(self, reason: str) -> None:
        if self._failure is not None:
            return
        self._failure = reason
        calls, self._outstanding = list(self._outstanding.values()), {}
        for call in calls:
            if call.holds_dma:
                self._dma.release()
            call.fail(ServerGone(f"the server has gone while {command_name(call.command)} was outstanding: {reason}"))
        self._gone.set()
        if self._scope is not None:
            self._scope.cancel()
        else:
            self._close_sockets()

    def _close_sockets(self) -> None:
        self._main.close()
        if self._twin is not None:
            self._twin.close()

    @property
    def capabilities(self) -> Capabilities:
        """What the server takes: limits for what we send."""
        raise NotImplementedError
