"""A device whose server was started anew: what its client had told the old server is told to the new one."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vfiouser_oob.client.client import Client, ClientRegion
from vfiouser_oob.devices.base import DeviceDescription
from vfiouser_oob.devices.upstream_memory import DmaRelay, submit_map
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import DeviceInfoFlags
from vfiouser_protocol.dma import DmaRegion
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.irq import IrqSet
from vfiouser_protocol.messages import SetIrqs


class ReachedServer(NamedTuple):
    """A connection to a server, and what its device is.

    Args:
        client: the connection.
        description: the device, as we render it.
        regions: its regions and their descriptors.
        relay: takes its DMA messages; told of the client's memory once there is any.
    """

    client: Client
    description: DeviceDescription
    regions: Sequence[ClientRegion]
    relay: DmaRelay

    def close(self) -> None:
        """End the connection."""
        self.client.close()
        for region in self.regions:
            region.close()


def require_same(old: DeviceDescription, new: ReachedServer) -> None:
    """Make sure that a guest can go on with a device after no more than a reset.

    Args:
        old: what it knows of the device.
        new: what that is now.

    Raises:
        CommandError: it cannot; the text says why not.
    """
    if old != new.description:
        raise CommandError("the device is a different one now", errno.EIO)
    if any(region.fd is not None for region in new.regions):
        raise CommandError("its client still has memory of the old server mapped", errno.EIO)
    if not old.flags & DeviceInfoFlags.RESET:
        raise CommandError("the device has no reset", errno.EIO)


def remember(eventfds: dict[tuple[int, int], OwnedFd], irqs: IrqSet, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
    """Keep what another server would have to be given.

    Args:
        eventfds: what is kept, by IRQ index and vector.
        irqs: which vectors have one now.
        request: what the client has just asked for, and got.
        fds: what came with it; they stay the caller's.
    """
    for vector, fd in enumerate(fds, request.start):
        old = eventfds.pop((request.index, vector), None)
        if old is not None:
            old.close()
        eventfds[request.index, vector] = fd.duplicate()
    for key in [key for key in eventfds if irqs.handle(*key) is None]:
        eventfds.pop(key).close()


async def tell_again(
    client: Client,
    ranges: Iterable[DmaRegion],
    eventfds: Mapping[tuple[int, int], OwnedFd],
    *,
    share_files: bool,
) -> None:
    """Reset the device, and give it what its client has given to the old one.

    Args:
        client: the new connection.
        ranges: the client's memory.
        eventfds: its eventfds, by IRQ index and vector.
        share_files: whether the server is given the memory's files.

    Raises:
        VfioUserError: the server refuses, or has gone as well.
    """
    await client.reset()
    for region in ranges:
        await submit_map(client, region, share_file=share_files).wait()
    for (index, vector), eventfd in sorted(eventfds.items(), key=lambda item: item[0]):
        await client.set_eventfds(index, [eventfd], start=vector)
