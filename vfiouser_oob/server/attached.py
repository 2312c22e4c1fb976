"""A client that was told what was agreed: its reader, and everything that belongs to it until it goes.

All that another process would need to go on with the client is in the parts that `Attached` names: the session (what
was agreed, which commands of either side wait), the sockets, the device's session (DMA mappings with their files,
interrupts with their eventfds), and the dispatcher's queue. The reader itself keeps nothing but how long it has had
its turn; a message that is not complete yet is in its socket's framer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import trio

from vfiouser_oob.devices.base import BackendSession
from vfiouser_oob.migration.no_migration import Port
from vfiouser_oob.server.channel import Channel
from vfiouser_oob.server.context import FunctionContext
from vfiouser_oob.server.dispatcher import Dispatcher, note_refusal
from vfiouser_oob.server.dma_link import DmaLink
from vfiouser_oob.server.executor import Executor
from vfiouser_oob.transport.fds import close_fds
from vfiouser_oob.transport.message_socket import EndOfStream
from vfiouser_oob.transport.turns import SLICE_S, FunctionQueue
from vfiouser_protocol.capabilities import Negotiated
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.framing import Message
from vfiouser_protocol.session import CommandReceived, ProtocolSession, ReplyReceived

#: Messages answered in a row before other tasks get their turn, however they came: a client that asks again at once can
#: keep us from ever sleeping. One that does not wait for replies has its turn for the time of a slice only.
_TURN = 32


@dataclass(frozen=True, eq=False)
class Attached:
    """A client that is served.

    Args:
        session: the protocol state of the connection.
        agreed: what was negotiated.
        main: the socket that the client connected.
        twin: the second socket, for our own commands; None if it was not granted.
        backend: the device, as opened for this client.
        dma: our own commands that wait for their replies.
        executor: begins commands.
        dispatcher: the client's commands that wait.
        context: the function's.
        lane: its place in the queue for the event loop.
        port: its way into the function's migration, which knows configuration space as it wrote it.
    """

    session: ProtocolSession
    agreed: Negotiated
    main: Channel
    twin: Channel | None
    backend: BackendSession
    dma: DmaLink
    executor: Executor
    dispatcher: Dispatcher
    context: FunctionContext
    lane: FunctionQueue
    port: Port

    phase = "attached"
    #: It has sent its first message.
    spoken = True

    @property
    def sockets(self) -> int:
        """How many sockets the client has here."""
        return 1 if self.twin is None else 2

    async def serve(self, nursery: trio.Nursery) -> None:
        """Read and answer until the stream ends.

        Args:
            nursery: where its tasks run; the caller's, which cancels it.

        Raises:
            EndOfStream: the client has gone.
            StreamError: the stream cannot be followed.
        """
        nursery.start_soon(self.dispatcher.run)
        nursery.start_soon(self.executor.run)
        if self.twin is not None:
            nursery.start_soon(self.twin.run_sender)
            nursery.start_soon(self._read_twin, self.twin)
        try:
            await self._read()
        finally:
            self.main.stream.uncork()

    async def all_answered(self) -> None:
        """Wait until every command so far is answered."""
        await self.dispatcher.all_answered()

    async def _read(self) -> None:
        stream, take, dispatcher = self.main.stream, self._take, self.dispatcher
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
            take(message, self.main, twin=False)
            burst += 1
            turn += 1
            if turn >= _TURN or (burst > 1 and time.monotonic() - began > SLICE_S):
                stream.uncork()
                burst = turn = 0
                await self.lane.rest()
                if stream.congested or dispatcher.full:
                    # The client's socket fills until our replies are out and the queue is shorter.
                    await stream.flushed()
                    await dispatcher.not_full()

    async def _read_twin(self, channel: Channel) -> None:
        """Read the twin socket, which carries replies to our commands only."""
        try:
            while True:
                self._take(await channel.stream.receive(), channel, twin=True)
        except EndOfStream:
            channel.end()
        except StreamError as error:
            self.context.noise.warning("cannot follow the client's twin stream; disconnected", error=str(error))
            channel.end()

    def _take(self, message: Message, channel: Channel, *, twin: bool) -> None:
        if channel.tracing:
            channel.trace_received(message)
        event = self.session.receive(message, twin=twin)
        if isinstance(event, CommandReceived):
            self.dispatcher.take(event)
        elif isinstance(event, ReplyReceived):
            channel.stream.settle()
            close_fds((*event.fds, *event.surplus_fds))
            event.token.resolve(event.header, event.payload)
        elif event.close:
            note_refusal(event, self.context)
            raise StreamError(event.reason, event.errno, event.reply)
        elif twin and channel.stream.kept:
            channel.stream.settle()
            note_refusal(event, self.context)
        else:
            self.dispatcher.refuse(event)
