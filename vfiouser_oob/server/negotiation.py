"""The first exchange on a connection: VERSION.

The device is opened before VERSION is answered, because what it can take limits what we offer.
"""

from __future__ import annotations

import errno
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from vfiouser_oob.devices.base import BackendSession, BackendUnavailable, DeviceBackend
from vfiouser_oob.migration.inherited import KeptClient
from vfiouser_oob.migration.no_migration import NoMigration, Port
from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.server.attached import Attached
from vfiouser_oob.server.beginning import KnownBeginning
from vfiouser_oob.server.channel import Channel
from vfiouser_oob.server.context import FunctionContext
from vfiouser_oob.server.device_link import DeviceLink
from vfiouser_oob.server.dispatcher import Dispatcher
from vfiouser_oob.server.dma_link import DmaLink
from vfiouser_oob.server.estate import ClientNotes
from vfiouser_oob.server.executor import Executor, HoldingExecutor
from vfiouser_oob.server.handlers import Handlers
from vfiouser_oob.server.refusal import TurnedAway
from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_oob.transport.message_socket import MessageSocket
from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_protocol.capabilities import MigrationCapability, Negotiated, VersionCapabilities
from vfiouser_protocol.dma_layout import DmaLayout
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.limits import DEFAULT_MAX_DMA_MAPS, OUR_MAX_MSG_FDS, Limits
from vfiouser_protocol.session import CommandReceived, MessageRefused, ProtocolSession

if TYPE_CHECKING:
    from vfiouser_oob.migration.port import MigrationPort

#: What we offer when the device sets no tighter limit.
OFFER = VersionCapabilities(max_msg_fds=OUR_MAX_MSG_FDS, max_dma_maps=DEFAULT_MAX_DMA_MAPS, write_multiple=True)
#: Seconds that a client may take for its first message; it keeps nobody from the function meanwhile.
FIRST_MESSAGE_S = 10.0


class NegotiationHost(Protocol):
    """What a function does for a client that negotiates."""

    @property
    def backend(self) -> DeviceBackend:
        """Its device."""

    async def attach_migration(
        self, backend: BackendSession, client: VersionCapabilities, kept: KeptClient | None
    ) -> MigrationPort | None:
        """Connect the client to the function's migration; None if it has none."""


class Negotiating:
    """A client that was not told yet what was agreed.

    Args:
        session: the protocol state of the connection.
        main: the socket that the client connected.
        link: the client as its device sees it.
        context: the function's.
        broken: cancelled when a socket of the connection cannot be used any more.
    """

    phase = "negotiating"

    def __init__(
        self,
        session: ProtocolSession,
        main: Channel,
        link: DeviceLink,
        context: FunctionContext,
        broken: trio.CancelScope,
    ) -> None:
        self.session = session
        self.main = main
        self.link = link
        #: Whether the client has sent its first message.
        self.spoken = False
        #: Whether another process goes on with the client.
        self.left = False
        self.context = context
        #: Cancelled when a socket of the connection cannot be used any more.
        self.broken = broken
        self._notes: ClientNotes | None = None

    def noted_by(self, notes: ClientNotes | None) -> None:
        """Have taken down what becomes of it, for another process."""
        self._notes = self.link.notes = notes

    async def first_command(self) -> CommandReceived | None:
        """Wait for VERSION.

        Returns:
            The command; None if it did not come in time.

        Raises:
            EndOfStream: the client has gone.
            StreamError: the client does not speak vfio-user.
        """
        with trio.move_on_after(FIRST_MESSAGE_S):
            event = await self._receive()
            self.spoken = True
            return event
        self.context.noise.warning("client sent no VERSION; disconnected", waited_s=FIRST_MESSAGE_S)
        return None

    async def _receive(self) -> CommandReceived:
        message = await self.main.stream.receive()
        self.main.trace_received(message)
        event = self.session.receive(message)
        if isinstance(event, CommandReceived):
            self.context.counts[event.header.command] += 1
            return event
        close_fds(event.fds)
        assert isinstance(event, MessageRefused)  # nothing of ours is outstanding, so there is nothing to be a reply to
        raise StreamError(event.reason, event.errno, event.reply)

    async def answer(
        self, event: CommandReceived, host: NegotiationHost, deadline: float, held: AsyncExitStack
    ) -> Attached:
        """Open the function for the client and tell it what is agreed.

        Args:
            event: the VERSION command.
            host: the function.
            deadline: by trio's clock, when VERSION has to be answered.
            held: closes what the client has, when it goes.

        Raises:
            TurnedAway: the device or the agent cannot be had, or not in time.
        """
        proposal = self.session.proposal
        assert proposal is not None
        proposed = self.link.capabilities = proposal.capabilities
        wants_twin = proposed.twin_socket is not None and proposed.twin_socket.supported
        twin = self._make_twin(held) if wants_twin else None
        backend, port = await self._open(host, proposed, deadline, held)
        offer = within(OFFER, backend.limits)
        if port.migratable:
            offer = offer._replace(migration=MigrationCapability())
        reply = self.session.accept(event.header, offer, grant_twin=twin is not None)
        agreed = self.session.negotiated
        assert agreed is not None
        if twin is not None and not agreed.twin:
            twin.close()
            twin = None
        ours = None if twin is None else self._noted(agreed, twin, held)
        if twin is None and self._notes is not None:
            self._notes.agreed(agreed, None)
        attached = self.attach(agreed, offer, ours, backend, port, host.backend)
        held.callback(attached.dispatcher.close)
        held.callback(attached.dma.close)
        if twin is None:
            self.main.answer(reply)
        else:
            self.main.answer(reply, (twin.theirs,))
            await self.main.stream.flushed()
            twin.theirs.close()
        return attached

    def _noted(self, agreed: Negotiated, twin: _Pair, held: AsyncExitStack) -> Channel:
        """Our end of the twin socket, as a stream that is taken down for another process where that is done."""
        context = self.context
        memory = None if self._notes is None else self._notes.agreed(agreed, twin.ours)
        size = Limits().max_message_size
        sock = socket.socket(fileno=twin.ours.detach())
        if memory is None:
            stream = MessageSocket(sock, size, context.activity, context.account)
        else:
            stream = KeptSocket(sock, size, memory, context.activity, context.account)
        channel = Channel(stream, context.log, self.broken)
        held.callback(channel.close)
        return channel

    async def _open(
        self, host: NegotiationHost, proposed: VersionCapabilities, deadline: float, held: AsyncExitStack
    ) -> tuple[BackendSession, Port]:
        """Open the device for the client, and its migration; the device forgets the client before.

        Raises:
            TurnedAway: one of them cannot be had, or not in time.
        """
        late = "the device did not answer in time"
        kept = None if self._notes is None else KeptClient(self._notes)
        try:
            with trio.fail_at(deadline):
                backend = await host.backend.open(self.link)
                # From here on the connection closes the device, whatever happens.
                held.push_async_callback(backend.close)
                late = "the agent did not answer in time"
                migrating = await host.attach_migration(backend, proposed, kept)
                port: Port = migrating or await _without_migration(backend)
                held.push_async_callback(self.detach, port)
                if port.v1 is not None and self._notes is not None:
                    port.v1.on_memory = self._notes.region
                late = "the device was not reset in time"
                renewed = backend.renew()
                if renewed is not None:
                    await renewed
        except (BackendUnavailable, trio.TooSlowError) as error:
            raise TurnedAway(str(error) or late, errno.ENODEV) from error
        return backend, port

    async def detach(self, port: Port) -> None:
        """The client has gone; its migration is told, unless another process goes on with the client."""
        if not self.left:
            await port.detach()

    def attach(
        self,
        agreed: Negotiated,
        offer: VersionCapabilities,
        twin: Channel | None,
        backend: BackendSession,
        port: Port,
        device: DeviceBackend,
    ) -> Attached:
        """Make what an attached client consists of.

        Args:
            agreed: what was negotiated.
            offer: what we take.
            twin: the second socket.
            backend: the device, as opened for the client.
            port: its way into the migration.
            device: the device.
        """
        context, link, lane = self.context, self.link, FunctionQueue()
        commands = self.main if twin is None else twin
        permit = backend.memory.map.segments
        most, budget_s = agreed.client.max_data_xfer_size, context.reply_budget_s
        dma = DmaLink(self.session, commands.send, permit, most, budget_s, self._layout_learned)
        link.agreed(agreed.client, dma)
        executor = self._executor(agreed, offer, backend, port)
        begin = None
        if isinstance(self.main.stream, KeptSocket):
            begin = KnownBeginning(self.main.stream, executor, backend, device, port).begin
        dispatcher = Dispatcher(self.session, self.main, executor, context, lane, begin)
        return Attached(self.session, agreed, self.main, twin, backend, dma, executor, dispatcher, context, lane, port)

    def _layout_learned(self, layout: DmaLayout) -> None:
        if layout is DmaLayout.NARROW:
            self.context.log.info("the client speaks the DMA messages of QEMU 10.1 and 10.2")

    def _executor(
        self, agreed: Negotiated, offer: VersionCapabilities, backend: BackendSession, port: Port
    ) -> Executor:
        port.negotiated(agreed.client, offer, agreed.migration_pgsize)
        handlers = Handlers(backend, offer.max_data_xfer_size, port).table
        if isinstance(port, NoMigration):
            return Executor(handlers, self.link, self.context)
        from vfiouser_oob.migration.port import MigrationPort

        assert isinstance(port, MigrationPort)
        self.main.stream.make_room()
        return HoldingExecutor(handlers, self.link, self.context, port)

    def _make_twin(self, held: AsyncExitStack) -> _Pair | None:
        """Make a second socket; without one the first carries our commands too."""
        context = self.context
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            pair = _Pair(OwnedFd(ours.detach()), OwnedFd(theirs.detach()))
        except OSError as error:
            context.log.warning("cannot make a twin socket; the main socket does its work", error=error.strerror)
            return None
        held.callback(pair.close)
        return pair


async def _without_migration(backend: BackendSession) -> NoMigration:
    port = NoMigration(backend, OFFER.max_data_xfer_size)
    if backend.memory.recorder is not None:  # nobody else wants to know of resets; asking takes a round trip
        await port.learn()
    return port


class _Pair(NamedTuple):
    """Both ends of a twin socket, until the client's was sent."""

    ours: OwnedFd
    theirs: OwnedFd

    def close(self) -> None:
        """Close what is still open."""
        self.theirs.close()
        self.ours.close()


def within(offer: VersionCapabilities, device: VersionCapabilities) -> VersionCapabilities:
    """The smaller of both sides' limits: what the device cannot take must not be offered."""
    return offer._replace(
        max_data_xfer_size=min(offer.max_data_xfer_size, device.max_data_xfer_size),
        max_dma_maps=min(offer.max_dma_maps, device.max_dma_maps),
        pgsizes=max(offer.pgsizes, device.pgsizes),
    )
