"""Going on with a client that another process has served, where that one has ended; the client notices only time."""

from __future__ import annotations

import errno
from contextlib import AsyncExitStack

import trio

from vfiouser_oob.devices.base import BackendSession, BackendUnavailable
from vfiouser_oob.migration.inherited import KeptClient
from vfiouser_oob.migration.no_migration import NoMigration, Port
from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.server.attached import Attached
from vfiouser_oob.server.channel import Channel
from vfiouser_oob.server.estate import Heir
from vfiouser_oob.server.negotiation import Negotiating, NegotiationHost
from vfiouser_oob.server.progress import Progress
from vfiouser_oob.server.refusal import TurnedAway
from vfiouser_protocol.limits import Limits
from vfiouser_protocol.session import ConnectionEnd, ProtocolSession


async def resume(
    newcomer: Negotiating, heir: Heir, host: NegotiationHost, deadline: float, held: AsyncExitStack
) -> Attached:
    """Make of a client what it was to another process.

    Args:
        newcomer: the client as far as it is known.
        heir: what was left of it.
        host: the function.
        deadline: by trio's clock, when that has to be done.
        held: closes what the client has, when it goes.

    Raises:
        TurnedAway: the device or the agent cannot be had, or not in time.
        UnusableRecord: the twin socket cannot be followed.
    """
    agreed = heir.agreed
    assert agreed is not None
    main = newcomer.main.stream
    assert isinstance(main, KeptSocket)
    session = newcomer.session = ProtocolSession.resumed(ConnectionEnd.SERVER, agreed)
    session.ids.use_half(main.memory.lives)
    newcomer.link.capabilities = agreed.client
    newcomer.link.goes_on()
    twin = _twin(newcomer, heir, held)
    backend, port = await _open(newcomer, heir, host, deadline, held, main.memory)
    attached = newcomer.attach(agreed, agreed.server, twin, backend, port, host.backend)
    held.callback(attached.dispatcher.close)
    held.callback(attached.dma.close)
    newcomer.spoken = True
    return attached


def _twin(newcomer: Negotiating, heir: Heir, held: AsyncExitStack) -> Channel | None:
    if heir.twin is None:
        return None
    sock, memory = heir.twin.take()
    context = newcomer.context
    stream = KeptSocket(sock, Limits().max_message_size, memory, context.activity, context.account)
    channel = Channel(stream, context.log, newcomer.broken)
    held.callback(channel.close)
    return channel


async def _open(
    newcomer: Negotiating,
    heir: Heir,
    host: NegotiationHost,
    deadline: float,
    held: AsyncExitStack,
    memory: StreamMemory,
) -> tuple[BackendSession, Port]:
    late = "the device did not answer in time"
    assert heir.agreed is not None
    try:
        with trio.fail_at(deadline):
            backend = await host.backend.resume(newcomer.link, heir.inheritance)
            held.push_async_callback(backend.close)
            late = "the agent did not answer in time"
            config = {thing.offset: thing.data for thing in heir.config}
            done = Progress(heir.progress, memory.number)
            kept = KeptClient(heir.notes, True, config, done.stream, done.registers, done.log)
            migrating = await host.attach_migration(backend, heir.agreed.client, kept)
            port: Port = migrating or NoMigration(backend, heir.agreed.server.max_data_xfer_size)
            held.push_async_callback(newcomer.detach, port)
    except (BackendUnavailable, trio.TooSlowError) as error:
        raise TurnedAway(str(error) or late, errno.ENODEV) from error
    _restore_region(port, heir)
    return backend, port


def _restore_region(port: Port, heir: Heir) -> None:
    """Give the migration region the memory that the client may have mapped.

    Raises:
        TurnedAway: that is not possible.
    """
    view = port.v1
    if view is None:
        return
    view.on_memory = heir.notes.region
    memory = heir.regions.get(view.index)
    if memory is not None:
        try:
            view.adopt(memory)
        except (OSError, ValueError) as error:
            raise TurnedAway(f"the migration region's memory cannot be used: {error}", errno.ENODEV) from None
