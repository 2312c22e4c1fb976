"""One client on one function's socket, from its first byte to its last: negotiating, then attached, then leaving."""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack, suppress
from typing import Protocol

import trio

from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.server.attached import Attached
from vfiouser_oob.server.channel import Channel
from vfiouser_oob.server.context import FunctionContext
from vfiouser_oob.server.device_link import DeviceLink
from vfiouser_oob.server.estate import Arrival, Estate
from vfiouser_oob.server.negotiation import Negotiating, NegotiationHost
from vfiouser_oob.server.refusal import TurnedAway
from vfiouser_oob.server.resuming import resume
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket
from vfiouser_oob.transport.peer import Peer
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.limits import Limits
from vfiouser_protocol.session import CommandReceived, ConnectionEnd, ProtocolSession

_NOT_SERVED = "negotiation failed"
#: Seconds within which a client that has got an answer asks on; one that has not, waits for five.
_SIGN_S = 0.5


class Admission(NegotiationHost, Protocol):
    """A function, as its clients' connections use it."""

    @property
    def context(self) -> FunctionContext:
        """What its connections share."""

    @property
    def estate(self) -> Estate | None:
        """What it leaves to the daemon after this one."""

    async def claim(self, connection: ClientConnection, deadline: float) -> None:
        """Make a client the one that is served; raises TurnedAway."""

    def phase_changed(self) -> None:
        """The phase of the client that is served has changed."""

    def device_lost(self, link: DeviceLink, reason: str) -> None:
        """A client's device is lost."""


class Leaving:
    """A client that has gone, or is to go: what it had is being given back."""

    phase = "closing"
    spoken = True


class ClientConnection:
    """A client of a function.

    Args:
        function: the function that is served.
        sock: the connected socket; owned from now on.
        peer: who connected it.
        arrival: how it came, where another process may have to know; None: nobody will.

    Raises:
        OSError: the socket cannot be watched; it is closed.
    """

    def __init__(
        self,
        function: Admission,
        sock: socket.socket,
        peer: Peer | None,
        arrival: Arrival | None = None,
    ) -> None:
        limits = Limits()
        context = function.context
        self.peer = peer
        #: The client as its device sees it.
        self.link = DeviceLink(context, function.device_lost)
        self._function = function
        self._context = context
        self._scope = trio.CancelScope()
        self._left = self._claimed = False
        #: Set when it is attached, or never will be.
        self._settled = trio.Event()
        self._heir = None if arrival is None else arrival.heir
        self._notes = None if arrival is None else arrival.notes
        stream = _stream(function, sock, peer, arrival)
        self._main = Channel(stream, context.log, self._scope)
        self._newcomer = Negotiating(
            ProtocolSession(ConnectionEnd.SERVER, limits), self._main, self.link, context, self._scope
        )
        self._newcomer.noted_by(self._notes)
        #: Where it stands.
        self.stage: Negotiating | Attached | Leaving = self._newcomer

    @property
    def phase(self) -> str:
        """What it does, in a word."""
        return self.stage.phase

    @property
    def spoken(self) -> bool:
        """Whether the client has sent its first message."""
        return self.stage.spoken

    @property
    def attached(self) -> Attached | None:
        """What the client consists of while it is served; None before and after."""
        return self.stage if isinstance(self.stage, Attached) else None

    @property
    def inherited(self) -> bool:
        """Whether a daemon before this one has served the client."""
        return self._heir is not None and self._heir.agreed is not None

    async def settled(self) -> None:
        """Wait until it is attached, or never will be."""
        await self._settled.wait()

    def level_changed(self) -> None:
        """Another log level counts from now on."""
        self._main.level_changed()
        if self.attached is not None and self.attached.twin is not None:
            self.attached.twin.level_changed()

    async def run(self) -> str:
        """Serve the client until it goes.

        Returns:
            Why it ended, for the log.
        """
        reason = "the daemon stops serving it"
        held = AsyncExitStack()
        held.callback(self._main.close)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    reason = await self._serve(nursery, held)
                    nursery.cancel_scope.cancel()
        finally:
            self.stage = Leaving()
            self._settled.set()
            if self._notes is not None and not self._left:
                self._notes.gone()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._context.reply_budget_s):
                await held.aclose()
        return reason

    async def _serve(self, nursery: trio.Nursery, held: AsyncExitStack) -> str:
        nursery.start_soon(self._main.run_sender)
        try:
            attached = await self._go_on(held)
            if attached is None:
                event = await self._newcomer.first_command()
                if event is None:
                    return _NOT_SERVED
                attached = await self._attach(event, held)
            if attached is None:
                return _NOT_SERVED
            self.stage = attached
            self._settled.set()
            self._function.phase_changed()
            await attached.serve(nursery)
        except EndOfStream as end:
            return str(end)
        except StreamError as error:
            await self._reply_last(error.reply)
            self._context.noise.warning("cannot follow the client's stream; disconnected", error=str(error))
            self._context.note_error(str(error))
            return str(error)
        return "the client left"

    async def _go_on(self, held: AsyncExitStack) -> Attached | None:
        """Go on with a client that another process has served; returns None if it had not been told yet what was
        agreed, and so is a newcomer.

        Raises:
            EndOfStream: that is not possible.
        """
        heir, stream = self._heir, self._main.stream
        if heir is None or heir.agreed is None:
            return None
        assert isinstance(stream, KeptSocket)
        await stream.answer_was_heard(_SIGN_S)
        if self._left:
            await trio.sleep_forever()
        if not stream.memory.answered:
            heir.notes.begin_anew()
            return None
        deadline = trio.current_time() + self._context.reply_budget_s
        try:
            await self._function.claim(self, deadline)
            self._claimed = True
            attached = await resume(self._newcomer, heir, self._function, deadline, held)
        except (TurnedAway, UnusableRecord) as refusal:
            self._context.note_error(str(refusal))
            raise EndOfStream(f"it cannot be gone on with: {refusal}", clean=False) from None
        self._context.visits.info("client goes on after a restart", client=self.peer)
        return attached

    async def leave(self) -> None:
        """Leave the client to another process, at the end of what is being answered."""
        stream = self._main.stream
        if not isinstance(stream, KeptSocket):
            return
        if self._claimed:
            # Its device is being opened, or taken over: that has to be done first.
            with trio.move_on_after(self._context.reply_budget_s):
                await self._settled.wait()
        attached = self.attached
        if attached is not None:
            # The device first: it may wait for memory of a client that waits for an answer.
            with trio.move_on_after(self._context.reply_budget_s / 4):
                await attached.backend.quiesce()
            with trio.move_on_after(self._context.reply_budget_s / 2):
                await attached.dispatcher.come_to_rest()
            attached.backend.leave()
            if attached.twin is not None and isinstance(attached.twin.stream, KeptSocket):
                attached.twin.stream.leave()
        elif self._claimed:
            return  # that takes too long: it is turned out as ever
        stream.leave()
        self._left = self._newcomer.left = True

    async def _attach(self, event: CommandReceived, held: AsyncExitStack) -> Attached | None:
        """Answer VERSION; returns None if the client was told why it cannot be served."""
        context = self._context
        # One deadline for all that VERSION waits for: the client before this one to leave, the device, the agent.
        deadline = trio.current_time() + context.reply_budget_s
        try:
            await self._function.claim(self, deadline)
            self._claimed = True
            attached = await self._newcomer.answer(event, self._function, deadline, held)
        except TurnedAway as refusal:
            context.note_error(refusal.reason)
            context.noise.warning("client turned away", client=self.peer, reason=refusal.reason)
            self._main.send(self._newcomer.session.error_reply(event.header, refusal.errno))
            return None
        context.trouble.over()
        context.visits.info(
            "client attached",
            client=self.peer,
            version=f"0.{attached.agreed.minor}",
            twin_socket=attached.twin is not None,
            max_data_xfer_size=attached.agreed.client.max_data_xfer_size,
        )
        return attached

    async def _reply_last(self, reply: bytes | None) -> None:
        """Send the reply to a message that ends the connection, behind those to what came before it."""
        # Those have deadlines of their own, and a moment is needed to answer the last of them.
        with suppress(EndOfStream), trio.move_on_after(2 * self._context.reply_budget_s):
            if self.attached is not None:
                await self.attached.all_answered()
            if reply is not None:
                self._main.stream.send(reply)
                await self._main.stream.flushed()


def _stream(function: Admission, sock: socket.socket, peer: Peer | None, arrival: Arrival | None) -> MessageSocket:
    """The client's stream: one that outlives us, where that is possible.

    Raises:
        OSError: the socket cannot be watched; it is closed.
    """
    context, size = function.context, Limits().max_message_size
    if arrival is None:
        return MessageSocket(sock, size, context.activity, context.account)
    try:
        memory = arrival.memory or arrival.notes.begin(peer)
        arrival.notes.resumed(memory)
    except OSError:
        arrival.notes.gone()
        sock.close()
        raise
    return KeptSocket(sock, size, memory, context.activity, context.account)
