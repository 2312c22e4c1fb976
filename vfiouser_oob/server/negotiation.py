"""The first exchange on a connection: VERSION.

The device is opened before VERSION is answered, because what it can take limits what we offer.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import trio

from vfiouser_oob.devices.base import BackendSession, BackendUnavailable
from vfiouser_oob.server.refusal import TurnedAway
from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_oob.transport.message_socket import MessageSocket
from vfiouser_protocol.capabilities import Capabilities, MigrationCapability
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.limits import DEFAULT_MAX_DMA_MAPS, OUR_MAX_MSG_FDS
from vfiouser_protocol.session import CommandReceived, Refused

if TYPE_CHECKING:
    from vfiouser_oob.server.connection import Connection

#: What we offer when the device sets no tighter limit.
OFFER = Capabilities(max_msg_fds=OUR_MAX_MSG_FDS, max_dma_maps=DEFAULT_MAX_DMA_MAPS, write_multiple=True)
#: Seconds that a client may take for its first message; it keeps nobody from the function meanwhile.
FIRST_MESSAGE_S = 10.0


class TwinSocket:
    """The second socket of a connection, for our own commands.

    Args:
        stream: our end.
        theirs: the client's end, until it was sent.
    """

    def __init__(self, stream: MessageSocket, theirs: OwnedFd) -> None:
        self.stream = stream
        self.theirs = theirs

    def close(self) -> None:
        """Close what is still open."""
        self.theirs.close()
        self.stream.close()


async def negotiate_version(connection: Connection, nursery: trio.Nursery) -> bool:
    """Answer VERSION and set the connection up.

    Args:
        connection: a connection on which nothing was received yet.
        nursery: where the connection's tasks run.

    Returns:
        Whether the client may go on; otherwise it was told why not, as far as the protocol allows.

    Raises:
        EndOfStream: the client has gone.
        StreamError: the client does not speak vfio-user.
    """
    with trio.move_on_after(FIRST_MESSAGE_S) as patience:
        event = await _first_command(connection)
    if patience.cancelled_caught:
        connection.noise.warning("client sent no VERSION; disconnected", waited_s=FIRST_MESSAGE_S)
        return False
    connection.spoken = True
    # One deadline for all that VERSION waits for: the client before this one to leave, the device, the agent.
    deadline = trio.current_time() + connection.function.reply_budget_s
    try:
        await connection.function.claim(connection, deadline)
        return await _answer_version(connection, event, nursery, deadline)
    except TurnedAway as refusal:
        connection.function.note_error(refusal.reason)
        connection.noise.warning("client turned away", client=connection.peer, reason=refusal.reason)
        connection.send(connection.session.error_reply(event.header, refusal.errno))
        return False


async def _first_command(connection: Connection) -> CommandReceived:
    message = await connection.stream.receive()
    connection.trace_received(message)
    event = connection.session.receive(message)
    if isinstance(event, CommandReceived):
        connection.count(event.header.command)
        return event
    close_fds(event.fds)
    assert isinstance(event, Refused)  # nothing of ours is outstanding, so there is nothing to be a reply to
    raise StreamError(event.reason, event.errno, event.reply)


async def _open(connection: Connection, proposed: Capabilities, deadline: float) -> BackendSession:
    """Open the device for a client, and its migration; the device forgets the client before.

    Raises:
        TurnedAway: one of them cannot be had, or not in time.
    """
    function = connection.function
    late = "the device did not answer in time"
    try:
        with trio.fail_at(deadline):
            backend = await function.backend.open(connection)
            # From here on the connection closes the device, whatever happens.
            connection.adopt(backend)
            late = "the agent did not answer in time"
            await function.attach_migration(connection, backend, proposed)
            late = "the device was not reset in time"
            renewed = backend.renew()
            if renewed is not None:
                await renewed
    except (BackendUnavailable, trio.TooSlowError) as error:
        raise TurnedAway(str(error) or late, errno.ENODEV) from error
    return backend


async def _answer_version(
    connection: Connection, event: CommandReceived, nursery: trio.Nursery, deadline: float
) -> bool:
    session, header = connection.session, event.header
    assert session.proposal is not None
    proposed = session.proposal.capabilities
    connection.capabilities = proposed
    backend = await _open(connection, proposed, deadline)
    offer = _within(OFFER, backend.limits)
    if connection.port is not None and connection.port.migratable:
        offer = offer._replace(migration=MigrationCapability())
    twin = _make_twin(connection) if proposed.twin_socket is not None and proposed.twin_socket.supported else None
    reply = session.accept(header, offer, grant_twin=twin is not None)
    agreed = session.negotiated
    assert agreed is not None
    if twin is not None and not agreed.twin:
        twin.close()
        twin = None
    connection.start(agreed.client, offer, twin, agreed.migration_pgsize)
    if twin is None:
        connection.send(reply)
    else:
        connection.send(reply, (twin.theirs,))
        await connection.stream.flushed()
        twin.theirs.close()
        nursery.start_soon(connection.run_sender, twin.stream)
        nursery.start_soon(connection.read_twin, twin.stream)
    connection.function.visits.info(
        "client attached",
        client=connection.peer,
        version=f"0.{agreed.minor}",
        twin_socket=twin is not None,
        max_data_xfer_size=agreed.client.max_data_xfer_size,
    )
    return True


def _within(offer: Capabilities, device: Capabilities) -> Capabilities:
    """The smaller of both sides' limits: what the device cannot take must not be offered."""
    return offer._replace(
        max_data_xfer_size=min(offer.max_data_xfer_size, device.max_data_xfer_size),
        max_dma_maps=min(offer.max_dma_maps, device.max_dma_maps),
        pgsizes=max(offer.pgsizes, device.pgsizes),
    )


def _make_twin(connection: Connection) -> TwinSocket | None:
    """Make a second socket; without one the first carries our commands too."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            function = connection.function
            stream = MessageSocket(ours, connection.max_message_size, function.activity, function.account)
            return TwinSocket(stream, OwnedFd(theirs.detach()))
    except OSError as error:
        connection.log.warning("no twin socket can be made; the main socket does its work", error=error.strerror)
        return None
