"""The `vfio-user` backend: a function that another vfio-user server provides.

Descriptors are passed on in both directions (regions down, memory and eventfds up), so the data path bypasses this
process; only what has no descriptor is relayed as messages. There is one upstream connection per client connection, so
the upstream server sees clients come and go as we do. Migration commands are never forwarded: that is the agent's work.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from vfiouser_agents.causes import words_of
from vfiouser_oob.client.client import Client, ClientIoFds, ClientRegion
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.devices.base import (
    Answer,
    BackendSession,
    BackendUnavailable,
    ClientLink,
    DeviceBackend,
    DeviceDescription,
    IoFds,
)
from vfiouser_oob.devices.server_watch import ServerWatch
from vfiouser_oob.devices.upstream_description import describe_server
from vfiouser_oob.devices.upstream_memory import DmaRelay, map_anew, submit_map
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import (
    Command,
    DeviceInfoFlags,
    IrqIndex,
    RegionIndex,
)
from vfiouser_protocol.dma import DmaRegion
from vfiouser_protocol.errors import CommandError, RemoteProtocolError, ReplyError, VfioUserError
from vfiouser_protocol.irq import IrqSet
from vfiouser_protocol.limits import DEFAULT_MAX_DMA_MAPS
from vfiouser_protocol.messages import DmaMap, DmaUnmap, RegionWrite, SetIrqs
from vfiouser_protocol.rules import check_io_fds, io_fd_numbers

#: QEMU reads config space in one access at attach, so no less than this may be offered; accesses are split anyway.
_LEAST_TRANSFER = 4096
_COMMAND_REGISTER = 4
_BUS_MASTER = 1 << 2
_SET_IRQS_FLAGS = 0x3F
#: What is left of a client's message when nothing is sent for it any more: a round trip on this machine, with room.
_SEND_GUARD_S = 0.01


class UpstreamBackend(DeviceBackend):
    """A function behind another vfio-user server.

    Args:
        path: the upstream server's socket.
        activity: the daemon's sockets, for bounded spinning.
        dma_by_message: give the upstream server no memory files, so that all its DMA comes as messages.
        max_write: bytes of data in one message to the upstream server.
        retain_state: let a client find what the one before left, as far as the upstream server keeps it.
    """

    def __init__(
        self,
        path: Path,
        activity: Activity,
        *,
        dma_by_message: bool = False,
        max_write: int,
        retain_state: bool = False,
    ) -> None:
        self.path = path
        self.summary = f"vfio-user:{path}"
        self._activity = activity
        self._account = Account(f"the upstream server {path}")
        self._dma_by_message = dma_by_message
        self._max_write = max_write
        self._retain_state = retain_state
        self._server = ServerWatch(path)
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()

    @property
    def unavailable(self) -> str | None:
        """Why the upstream server cannot be used, as far as is known."""
        return self._server.reason

    @property
    def unavailable_since(self) -> float | None:
        """Since when that is so."""
        return self._server.since

    async def run(self) -> None:
        """Run the upstream connections' tasks; they outlive the client's, to leave the device in order."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running.set()
            await trio.sleep_forever()

    async def open(self, link: ClientLink) -> BackendSession:
        """Connect upstream and learn what the device has."""
        try:
            session = await self._open(link)
        except BackendUnavailable as error:
            self._server.lost(str(error))
            raise
        self._server.found()
        return session

    async def _open(self, link: ClientLink) -> UpstreamSession:
        await self._running.wait()
        assert self._nursery is not None
        relay = DmaRelay(link)
        try:
            sock = await self._connect()
            client = Client(
                sock,
                dma_server=relay,
                activity=self._activity,
                send_guard_s=_SEND_GUARD_S,
                max_write_size=self._max_write,
                account=self._account,
            )
            await self._nursery.start(client.run)
        except (OSError, VfioUserError) as error:
            raise BackendUnavailable(f"the upstream server {self.path} cannot be used: {words_of(error)}") from error
        regions: list[ClientRegion] = []
        try:
            description = await describe_server(client, regions)
        except BaseException as error:
            for region in regions:
                region.close()
            client.close()
            if isinstance(error, VfioUserError):
                raise BackendUnavailable(f"the upstream server {self.path} is unusable: {error}") from error
            raise
        session = UpstreamSession(
            client,
            description,
            regions,
            link,
            by_message=self._dma_by_message,
            retain_state=self._retain_state,
        )
        relay.memory = session.memory
        self._nursery.start_soon(self._watch, session, link)
        return session

    async def _watch(self, session: UpstreamSession, link: ClientLink) -> None:
        """Tell the client's connection when the upstream server dies."""
        reason = await session.lost()
        if reason is not None:
            text = f"the upstream server {self.path} has gone: {reason}"
            self._server.lost(text)
            link.fail(text)

    async def _connect(self) -> socket.socket:
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock:
            await sock.connect(os.fspath(self.path))
            return socket.socket(fileno=sock.detach())


class UpstreamSession(BackendSession):
    """One client's use of an upstream device.

    Args:
        client: the upstream connection.
        description: what the device has, as we render it.
        regions: the upstream regions and their descriptors; owned from now on.
        link: the client that we serve.
        by_message: give the upstream server no memory files.
        retain_state: do not reset the device for this client.
    """

    def __init__(
        self,
        client: Client,
        description: DeviceDescription,
        regions: Sequence[ClientRegion],
        link: ClientLink,
        *,
        by_message: bool,
        retain_state: bool,
    ) -> None:
        self.description = description
        self._client = client
        self._regions = regions
        self._link = link
        self._io_fds: dict[int, ClientIoFds] = {}
        self._by_message = by_message
        #: Whether the upstream server has memory files of ranges that have one.
        self._files_shared = not by_message
        #: Whether some have, and some have not, since somebody lost patience.
        self._mapping_anew = False
        self._retain_state = retain_state
        self._irqs = IrqSet(description.irqs)
        #: Ranges that are being unmapped.
        self._leaving: set[DmaRegion] = set()
        self._closing = False
        self._max_transfer = client.capabilities.max_data_xfer_size
        self._max_write = client.max_write_size
        self.memory = GuestMemory(
            link, self.limits.max_dma_maps, by_message=by_message, check_files=False, account=link.account
        )

    @property
    def limits(self) -> VersionCapabilities:
        """What the upstream server takes, as far as it can be believed."""
        theirs = self._client.capabilities
        return theirs._replace(
            max_data_xfer_size=max(theirs.max_data_xfer_size, _LEAST_TRANSFER),
            max_dma_maps=min(theirs.max_dma_maps, DEFAULT_MAX_DMA_MAPS),
        )

    async def lost(self) -> str | None:
        """Wait for the end of the upstream connection.

        Returns:
            Why the upstream server has ended it; None if we did.
        """
        reason = await self._client.wait_gone()
        return None if self._closing else reason

    def region_fd(self, index: int) -> HasFileno | None:
        """Return the upstream server's descriptor of a region."""
        return self._regions[index].fd

    def io_fds(self, index: int) -> Answer[IoFds]:
        """Pass on the upstream server's descriptors of a BAR's sub-regions; asked for once, and kept with the session.

        Config space stays with us: what is written there must be seen.
        """
        known = self._io_fds.get(index)
        if known is not None:
            return _shown(known, self._link.capabilities.max_msg_fds)
        if index > RegionIndex.ROM or not self.description.regions[index].size:
            return IoFds()
        return self._ask_io_fds(index)

    async def _ask_io_fds(self, index: int) -> IoFds:
        try:
            found = await self._client.get_region_io_fds(index)
        except ReplyError:  # it does not know the command, or has none there
            return IoFds()
        try:
            check_io_fds(found.reply.entries, len(found.fds), self.description.regions[index].size)
        except RemoteProtocolError as error:
            found.close()
            raise BadReply(str(error)) from error
        self._io_fds[index] = found
        return _shown(found, self._link.capabilities.max_msg_fds)

    # Registers

    def region_read(self, region: int, offset: int, count: int) -> Answer[bytes]:
        """Forward a read; the answer is often there before it would be worth to wait."""
        if count > self._max_transfer:
            return self._client.region_read(region, offset, count)
        return self._client.region_read_now(region, offset, count)

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool) -> Answer[None]:
        """Forward a write, posted as it came."""
        if len(data) > self._max_write or self._client.congested:
            return self._client.region_write(region, offset, data, posted=posted)
        if posted:
            self._client.post(Command.REGION_WRITE, encode(RegionWrite(offset, region, len(data), data)))
            return None
        return self._client.region_write_now(region, offset, data)

    async def flush(self) -> None:
        """Read a register: its answer comes after everything that was sent before."""
        await self._client.region_read(RegionIndex.CONFIG, 0, 2)

    def renew(self) -> Answer[None]:
        """Have the upstream server reset the device; what memory it gives to new clients is its own affair."""
        return None if self._retain_state else self._reset_for_client()

    async def _reset_for_client(self) -> None:
        try:
            await self.reset()
        except VfioUserError as error:
            raise BackendUnavailable(
                f"the upstream device cannot be reset, so this client would find what the last one left: {error}; "
                "retain_state = true lets it"
            ) from error

    def reset(self) -> Awaitable[None]:
        """Forward DEVICE_RESET."""
        if not self.description.flags & DeviceInfoFlags.RESET:
            raise CommandError("the upstream device has no reset", errno.EINVAL)
        return self._client.reset()

    # Interrupts

    def set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Check by our rules, then pass the eventfds on."""
        self._irqs.check(request, len(fds))
        return self._forward_irqs(request, fds)

    async def _forward_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        await self._client.set_irqs(
            request.index,
            request.flags & _SET_IRQS_FLAGS,
            request.start,
            request.count,
            fds=fds,
            data=request.data,
        )
        self._irqs.apply(request, [True] * len(fds))

    def irq_summary(self) -> dict[str, int]:
        """Vectors with an eventfd, as passed on."""
        return {index.name: assigned for index in IrqIndex if (assigned := self._irqs.assigned(index))}

    # Memory

    def dma_map(self, request: DmaMap, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Check by our rules, then pass the file on."""
        if self.memory.must_wait_for(fds):
            return self._map_later(request, fds)
        region = self.memory.add(request, fds, self.memory.examine(fds))
        return None if region is None else self._forward_map(region)

    async def _map_later(self, request: DmaMap, fds: Sequence[OwnedFd]) -> None:
        region = self.memory.add(request, fds, await self.memory.examine_later(fds))
        if region is not None:
            await self._forward_map(region)

    async def _forward_map(self, region: DmaRegion) -> None:
        call = submit_map(self._client, region, share_file=self._files_shared)
        try:
            await call.wait()
        except VfioUserError:
            self.memory.discard(region)
            raise
        except trio.Cancelled:
            # Too late, or the client has gone: whatever the upstream server makes of it, the range is not mapped.
            self.memory.discard(region)
            if self._client.failure is None:
                self._client.submit_dma_unmap(region.address, region.size).abandon()
            raise

    def dma_unmap(self, request: DmaUnmap) -> Answer[None]:
        """Unmap upstream first: while it may use the memory, the range counts as mapped."""
        self.memory.require(request)
        return self._forward_unmap(request)

    async def _forward_unmap(self, request: DmaUnmap) -> None:
        region = self.memory.map.find(request.address)
        if region is not None:
            self._leaving.add(region)
        try:
            await self._client.dma_unmap(request.address, request.size)
            self.memory.remove(request)
        finally:
            if region is not None:
                self._leaving.discard(region)

    def dma_unmap_all(self) -> Answer[None]:
        """Unmap range by range: not every server knows the flag for all of them."""
        return self._unmap_each()

    async def _unmap_each(self) -> None:
        for region in list(self.memory):
            await self._forward_unmap(DmaUnmap(0, 0, region.address, region.size))

    #: A range is not mapped for a moment, in which the device's accesses to it would fail.
    routing_disturbs = True

    async def route_dma(self, *, by_message: bool) -> None:
        """Map all memory anew, without its files or with them; the upstream server then writes by messages, or not."""
        share = not (by_message or self._by_message)
        if share == self._files_shared and not self._mapping_anew:
            return
        self._files_shared = share  # what is mapped from now on already follows it
        self._mapping_anew = True
        try:
            await map_anew(self._client, self.memory, self._leaving, share_files=share)
            self._mapping_anew = False
        except VfioUserError as error:
            self._files_shared = not share
            with suppress(VfioUserError):
                await map_anew(self._client, self.memory, self._leaving, share_files=not share)
            raise CommandError(
                f"the upstream device does not take memory {'with' if share else 'without'} its file: {error}",
                errno.ENOTSUP,
            ) from error

    # The end

    async def close(self) -> None:
        """Leave the device in order, as far as the upstream server still answers, and disconnect."""
        self._closing = True
        try:
            if self._client.failure is None:
                await self._quiet_device()
        except VfioUserError:  # it went meanwhile, and its own disconnect rules do the rest
            pass
        finally:
            self._client.close()
            self.memory.close()
            for region in self._regions:
                region.close()
            for found in self._io_fds.values():
                found.close()

    async def _quiet_device(self) -> None:
        """Interrupts off and bus mastering off."""
        for index in IrqIndex:
            if self._irqs.assigned(index):
                await self._client.disable_irqs(index)
        old = int.from_bytes(await self._client.region_read(RegionIndex.CONFIG, _COMMAND_REGISTER, 2), "little")
        if old & _BUS_MASTER:
            new = (old & ~_BUS_MASTER).to_bytes(2, "little")
            await self._client.region_write(RegionIndex.CONFIG, _COMMAND_REGISTER, new)


def _shown(found: ClientIoFds, most: int) -> IoFds:
    """What a client is shown, which may not take as many descriptors: without one, an access is a message."""
    entries = [entry for entry in found.reply.entries if all(number < most for number in io_fd_numbers(entry))]
    used = max((number + 1 for entry in entries for number in io_fd_numbers(entry)), default=0)
    return IoFds(entries, found.fds[:used])
