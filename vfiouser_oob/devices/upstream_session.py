"""One client's use of a function behind another vfio-user server."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import trio

from vfiouser_oob.client.client import ClientIoFds
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.devices.base import (
    Answer,
    BackendSession,
    BackendUnavailable,
    ClientLink,
    IoFds,
)
from vfiouser_oob.devices.server_watch import ServerWatch
from vfiouser_oob.devices.upstream_memory import map_anew, submit_map
from vfiouser_oob.devices.upstream_parts import shown
from vfiouser_oob.devices.upstream_recovery import ReachedServer, remember, require_same, tell_again
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.persist.successor.notes import Inheritance
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds
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
from vfiouser_protocol.rules import check_io_fds

#: QEMU reads config space in one access at attach, so no less than this may be offered; accesses are split anyway.
_LEAST_TRANSFER = 4096
_COMMAND_REGISTER = 4
_BUS_MASTER = 1 << 2
_SET_IRQS_FLAGS = 0x3F
#: How long an upstream server that has gone is left alone, first and at most, in seconds.
_RECOVER_FIRST_S, _RECOVER_MOST_S = 0.05, 1.0


class UpstreamSession(BackendSession):
    """One client's use of an upstream device.

    Args:
        reached: the upstream server; its connection and its regions' descriptors are owned from now on.
        link: the client that we serve.
        by_message: give the upstream server no memory files.
        retain_state: do not reset the device for this client.
        again: reaches the upstream server anew when it was lost; None: the device is lost with it.
    """

    def __init__(
        self,
        reached: ReachedServer,
        link: ClientLink,
        *,
        by_message: bool,
        retain_state: bool,
        again: Callable[[], Awaitable[ReachedServer]] | None = None,
    ) -> None:
        self._again = again
        #: What another server would have to be given; only if there may be one.
        self._eventfds: dict[tuple[int, int], OwnedFd] = {}
        self.description = reached.description
        self._client = client = reached.client
        self._regions = reached.regions
        self._link = link
        self._io_fds: dict[int, ClientIoFds] = {}
        self._by_message = by_message
        #: Whether the upstream server has memory files of ranges that have one.
        self._files_shared = not by_message
        #: Whether some have, and some have not, since somebody lost patience.
        self._mapping_anew = False
        self._retain_state = retain_state
        self._irqs = IrqSet(self.description.irqs)
        #: Ranges that are being unmapped.
        self._leaving: set[DmaRegion] = set()
        self._closing = False
        self._left = False
        self._notes = link.notes
        self._max_transfer = client.capabilities.max_data_xfer_size
        self._max_write = client.max_write_size
        self.memory = GuestMemory(
            link, self.limits.max_dma_maps, by_message=by_message, check_files=False, account=link.account
        )
        reached.relay.memory = self.memory

    def restore(self, inheritance: Inheritance) -> None:
        """Take over what the client has told another process.

        Args:
            inheritance: what that was.

        Raises:
            BackendUnavailable: its memory cannot be used.
        """
        try:
            for thing, file in inheritance.ranges:
                self.memory.restore(thing, file)
        except (CommandError, OSError) as error:
            raise BackendUnavailable(f"the client's memory cannot be used: {error}") from error
        for index, vectors in inheritance.assigned.items():
            self._irqs.restore(index, [True if vector else None for vector in vectors])

    def command_begins(self, tag: int, *, again: bool) -> None:
        """What is asked from now on is asked for another command of the client."""
        if self._client.ledger is not None:
            self._client.ledger.begin(tag, again=again)

    def leave(self) -> None:
        """Leave the upstream connection to the process after this one."""
        self._left = True
        self._client.leave()

    @property
    def limits(self) -> VersionCapabilities:
        """What the upstream server takes, as far as it can be believed."""
        theirs = self._client.capabilities
        return theirs._replace(
            max_data_xfer_size=max(theirs.max_data_xfer_size, _LEAST_TRANSFER),
            max_dma_maps=min(theirs.max_dma_maps, DEFAULT_MAX_DMA_MAPS),
        )

    async def watch(self, link: ClientLink, server: ServerWatch) -> None:
        """Tell the client's connection, and whoever watches the server, when it dies."""
        while True:
            reason = await self._client.wait_gone()
            if self._closing or self._left:
                return
            text = f"the upstream server {server.path} has gone: {reason}"
            server.lost(text)
            link.fail(text)
            if self._again is None or not await self._recover(link, self._again):
                return
            server.found()

    async def _recover(self, link: ClientLink, again: Callable[[], Awaitable[ReachedServer]]) -> bool:
        """Wait for another upstream server, and go on with that; returns whether it is possible."""
        pause_s = _RECOVER_FIRST_S
        while not self._closing:
            try:
                if link.notes is not None:
                    link.notes.server_lost()
                reached = await again()
            except BackendUnavailable:
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RECOVER_MOST_S)
                continue
            try:
                require_same(self.description, reached)
                if sum(map(self._irqs.assigned, range(len(self.description.irqs)))) != len(self._eventfds):
                    raise CommandError("its eventfds were given to a daemon before this one", errno.EIO)
                await tell_again(reached.client, self.memory, self._eventfds, share_files=self._files_shared)
            except VfioUserError as error:
                reached.close()
                link.fail_for_good(f"the upstream server {reached.client.failure or 'is back'}, but {error}")
                return False
            self._take_over(reached)
            link.recovered()
            return True
        return False

    def _take_over(self, reached: ReachedServer) -> None:
        if self._closing:
            reached.close()
            return
        for region in self._regions:
            region.close()
        for found in self._io_fds.values():
            found.close()
        self._io_fds.clear()
        self._client, self._regions = reached.client, reached.regions
        reached.relay.memory = self.memory

    def region_fd(self, index: int) -> HasFileno | None:
        """Return the upstream server's descriptor of a region."""
        return self._regions[index].fd

    def io_fds(self, index: int) -> Answer[IoFds]:
        """Pass on the upstream server's descriptors of a BAR's sub-regions; asked for once, and kept with the session.

        Config space stays with us: what is written there must be seen.
        """
        known = self._io_fds.get(index)
        if known is not None:
            return shown(known, self._link.capabilities.max_msg_fds)
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
        return shown(found, self._link.capabilities.max_msg_fds)

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
                f"retain_state = true allows that"
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
        if self._again is not None:
            remember(self._eventfds, self._irqs, request, fds)
        if self._notes is not None:
            count = self.description.irqs[request.index].count
            known = bytes(self._irqs.handle(request.index, vector) is not None for vector in range(count))
            self._notes.assigned(request.index, known)

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
            if self._notes is not None:
                self._notes.mapped(*self.memory.written_down(region))
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
            if self._notes is not None:
                self._notes.unmapped(request.address)
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
                f"the upstream device does not accept memory {'with' if share else 'without'} its file: {error}",
                errno.ENOTSUP,
            ) from error

    # The end

    async def close(self) -> None:
        """Leave the device in order, as far as the upstream server still answers, and disconnect."""
        self._closing = True
        try:
            if self._client.failure is None and not self._left:
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
            close_fds(self._eventfds.values())

    async def _quiet_device(self) -> None:
        """Interrupts off and bus mastering off."""
        for index in IrqIndex:
            if self._irqs.assigned(index):
                await self._client.disable_irqs(index)
        old = int.from_bytes(await self._client.region_read(RegionIndex.CONFIG, _COMMAND_REGISTER, 2), "little")
        if old & _BUS_MASTER:
            new = (old & ~_BUS_MASTER).to_bytes(2, "little")
            await self._client.region_write(RegionIndex.CONFIG, _COMMAND_REGISTER, new)
