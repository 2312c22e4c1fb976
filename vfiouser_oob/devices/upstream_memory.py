"""Client memory as an upstream server has it: mapped with its files, or without them and reached by messages."""

from __future__ import annotations

import errno
from collections.abc import Set as AbstractSet
from itertools import islice

from vfiouser_oob.client.calls import PendingCall
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.dma import DmaServer
from vfiouser_oob.devices.base import ClientLink
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_protocol.constants import DmaMapFlags
from vfiouser_protocol.dma import DmaRegion
from vfiouser_protocol.errors import ReplyError, VfioUserError

#: Flags that say how a file may be used.
_OF_FILES = int(DmaMapFlags.MMAP | DmaMapFlags.FILE_IO)
#: Ranges that are mapped anew before their answers are waited for.
_TOGETHER = 256


class DmaRelay(DmaServer):
    """The upstream server's DMA messages, relayed to the client; message ids and splitting are per hop.

    Args:
        link: the client.
    """

    def __init__(self, link: ClientLink) -> None:
        self._link = link
        #: The client's memory, once the device has been described.
        self.memory: GuestMemory | None = None

    async def read(self, address: int, count: int) -> bytes:
        """Relay DMA_READ."""
        if self.memory is None:
            return await self._link.dma_read(address, count)
        return await self.memory.relay_read(address, count)

    async def write(self, address: int, data: bytes) -> None:
        """Relay DMA_WRITE."""
        if self.memory is None:
            await self._link.dma_write(address, data)
        else:
            await self.memory.relay_write(address, data)


def submit_map(client: Client, region: DmaRegion, *, share_file: bool) -> PendingCall:
    """Send the DMA_MAP of a range.

    Args:
        client: the upstream server's.
        region: the range.
        share_file: whether its file goes along, if it has one.
    """
    if region.owner is None or not share_file:
        return client.submit_dma_map(region.address, region.size, flags=region.flags & ~_OF_FILES, fd=None, offset=0)
    fd, offset = region.owner.fd, region.offset
    return client.submit_dma_map(region.address, region.size, flags=region.flags, fd=fd, offset=offset)


async def map_anew(client: Client, memory: GuestMemory, leaving: AbstractSet[DmaRegion], *, share_files: bool) -> None:
    """Have the upstream server forget all ranges that have a file, and map them again with or without it.

    Both messages of a range go out together and in order, so whatever the client unmaps or maps meanwhile comes before
    or behind them, and never between.

    Args:
        client: the upstream server's.
        memory: what is mapped.
        leaving: ranges whose DMA_UNMAP has been sent.
        share_files: whether the files go along.

    Raises:
        VfioUserError: it refused, or has gone; some ranges may have been mapped anew, and one may not be mapped.
    """
    regions = iter([region for region in memory if region.owner is not None])
    while batch := list(islice(regions, _TOGETHER)):
        calls: list[tuple[DmaRegion, PendingCall, PendingCall]] = []
        for region in batch:
            # The client may have unmapped it since.
            if region.owner is not None and region not in leaving:
                unmapped = client.submit_dma_unmap(region.address, region.size)
                calls.append((region, unmapped, submit_map(client, region, share_file=share_files)))
        failed: VfioUserError | None = None
        for region, unmapped, mapped in calls:
            failed = await _refusal(unmapped, errno.ENOENT) or await _refusal(mapped) or failed
            if memory.map.find(region.address) is None:
                # It was refused when the client mapped it, and must not be there because it was sent once more.
                await _refusal(client.submit_dma_unmap(region.address, region.size), errno.ENOENT)
        if failed is not None:
            raise failed


async def _refusal(call: PendingCall, harmless: int = 0) -> ReplyError | None:
    """Wait for an answer; returns what the server refused it with."""
    try:
        await call.wait()
    except ReplyError as error:
        return None if error.errno == harmless else error
    return None
