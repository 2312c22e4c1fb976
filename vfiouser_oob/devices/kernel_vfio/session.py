"""One client's use of a real function."""

from __future__ import annotations

import errno
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from vfiouser_oob.config.schema import RegionPolicy
from vfiouser_oob.devices.base import Answer, BackendSession, BackendUnavailable, ClientLink, DeviceDescription
from vfiouser_oob.devices.kernel_vfio.irqs import KernelIrqs
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_oob.devices.kernel_vfio.maps import IommuMaps
from vfiouser_oob.devices.kernel_vfio.openers import OpenDevice
from vfiouser_oob.devices.kernel_vfio.regions import RegionTable
from vfiouser_oob.devices.kernel_vfio.worker import BUDGET_ADVICE, SLOW_S, Job, OrderedWorker, explain
from vfiouser_oob.memory.files import FileFacts
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.successor.notes import Inheritance
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds, take_fds
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.constants import DeviceInfoFlags, IrqIndex, RegionIndex
from vfiouser_protocol.dma import DmaRegion
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.irq import IrqDescription
from vfiouser_protocol.limits import DEFAULT_MAX_DMA_MAPS
from vfiouser_protocol.messages import DmaMap, DmaUnmap, SetIrqs

T = TypeVar("T")
#: Accesses up to this many bytes are done in the event loop: a register read takes a microsecond.
_INLINE_BYTES = 256
#: Of the registers that every function has, one that the kernel does not keep a copy of.
_STATUS_REGISTER = 6
_DEVICE_FLAGS = int(DeviceInfoFlags.PCI | DeviceInfoFlags.RESET)


class KernelVfioSession(BackendSession):
    """A client and the device that was opened for it.

    Args:
        kernel: the operating system.
        opened: the device; shut down by `close`.
        policy: how regions may be mapped.
        worker: the function's worker.
        link: the client.
        log: logger with the device's address.
        leaving: called in the worker before the device is left.
    """

    def __init__(
        self,
        kernel: Kernel,
        opened: OpenDevice,
        policy: RegionPolicy,
        worker: OrderedWorker,
        link: ClientLink,
        log: Logger,
        leaving: Callable[[], object] = lambda: None,
    ) -> None:
        self._opened = opened
        self._device = opened.device
        self._worker = worker
        self._log = log
        self._leaving = leaving
        self._notes = link.notes
        #: Another process may have done what is asked for already.
        self._again = False
        self._left = False
        self._regions = RegionTable(kernel, opened.device, policy, log)
        irqs = list(opened.device.irqs)
        irqs += [IrqDescription(0)] * (len(IrqIndex) - len(irqs))
        self.description = DeviceDescription(self._regions.specs, irqs, opened.device.flags & _DEVICE_FLAGS)
        self._irqs = KernelIrqs(opened.device, irqs)
        self._maps = IommuMaps(opened.space, worker, log)
        self._max_maps = min(DEFAULT_MAX_DMA_MAPS, opened.space.max_maps or DEFAULT_MAX_DMA_MAPS)
        self.memory = GuestMemory(link, self._max_maps, by_message=False, check_files=False, account=link.account)
        if not self._device.flags & DeviceInfoFlags.RESET:
            log.warning("the kernel cannot reset this function: what one client leaves in it, the next one finds")

    @property
    def limits(self) -> VersionCapabilities:
        """How many ranges the IOMMU takes, and of which pages."""
        return VersionCapabilities(max_dma_maps=self._max_maps, pgsizes=self._opened.space.page_size)

    def region_fd(self, index: int) -> HasFileno | None:
        """Return the descriptor of a region: a dma-buf, or the device itself."""
        return self._regions.fd(index)

    # Registers

    def region_read(self, region: int, offset: int, count: int) -> Answer[bytes]:
        """Read by a system call: it fails where a load from a mapping would kill the process."""
        what = f"reading {count} bytes at {offset:#x} of region {region}"
        if count > _INLINE_BYTES or self._worker.busy:
            return self._in_worker(what, lambda: self._device.read(region, offset, count))
        return explain(what, lambda: self._device.read(region, offset, count))

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool) -> Answer[None]:
        """Write by a system call."""
        what = f"writing {len(data)} bytes at {offset:#x} of region {region}"
        if self._again and region != RegionIndex.CONFIG:
            raise CommandError(f"a daemon that has ended started {what}; that is not done twice", errno.EIO)
        slow = len(data) > _INLINE_BYTES or self._device.write_may_sleep(region, offset, len(data))
        if slow or self._worker.busy:
            return self._in_worker(what, lambda: self._device.write(region, offset, data))
        return explain(what, lambda: self._device.write(region, offset, data))

    def reset(self) -> Answer[None]:
        """Reset the function."""
        if not self._device.flags & DeviceInfoFlags.RESET:
            raise CommandError("the kernel knows no way to reset this function", errno.EINVAL)
        return self._in_worker("resetting the function", self._reset)

    def _reset(self) -> None:
        # The kernel restores config space after it, and a function that was reset must not be a bus master.
        self._device.clear_bus_master()
        self._device.reset()

    def _in_worker(self, what: str, work: Callable[[], T]) -> Awaitable[T]:
        def run(job: Job[T]) -> T:
            started = time.monotonic()
            try:
                return explain(what, work)
            finally:
                seconds = time.monotonic() - started
                if seconds >= SLOW_S:
                    self._log.warning(
                        "the kernel was slow; a client may not wait that long",
                        what=what,
                        seconds=seconds,
                        advice=BUDGET_ADVICE,
                    )

        return self._worker.submit(Job(run))

    def flush(self) -> Answer[None]:
        """Read from the hardware: a read overtakes no write, so all that the client wrote is at the device then."""
        answer = self.region_read(RegionIndex.CONFIG, _STATUS_REGISTER, 2)
        return None if isinstance(answer, bytes) else _ignore(answer)

    # Interrupts

    def set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Hand the eventfds to the kernel; our own are closed at once."""
        if self._worker.busy:
            # The job goes on when nothing waits for it any more, so they are its own.
            owned = take_fds(fds)
            return self._worker.submit(
                Job(
                    partial(self._set_irqs, request, owned),
                    succeeded=partial(self._note_irqs, request),
                    finish=partial(close_fds, owned),
                )
            )
        self._irqs.set_irqs(request, fds)
        self._note_irqs(request)
        return None

    def _note_irqs(self, request: SetIrqs) -> None:
        index, start = request.index, request.start
        if self._notes is not None:
            everything = range(self.description.irqs[index].count)
            self._irqs.note(self._notes, index, range(start, start + request.count) if request.count else everything)

    def _set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd], job: Job[None]) -> None:
        self._irqs.set_irqs(request, fds)

    def irq_summary(self) -> dict[str, int]:
        """Vectors with an eventfd."""
        return self._irqs.summary()

    # Memory

    def dma_map(self, request: DmaMap, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Map client memory for the device, at the client's addresses."""
        if self.memory.must_wait_for(fds):
            return self._map_later(request, fds)
        return self._map(request, fds, self.memory.examine(fds))

    async def _map_later(self, request: DmaMap, fds: Sequence[OwnedFd]) -> None:
        mapping = self._map(request, fds, await self.memory.examine_later(fds))
        if mapping is not None:
            await mapping

    def _map(self, request: DmaMap, fds: Sequence[OwnedFd], facts: FileFacts | None) -> Answer[None]:
        # A copy of its own: of descriptors that share an inode, as those of devices do, the file table keeps one.
        fd = fds[0].duplicate() if fds else None
        region: DmaRegion | None = None
        again = self._again
        if again and (known := self.memory.map.find(request.address)) is not None:
            self._forget(known)
        try:
            region = self.memory.add(request, fds, facts)
            if region is None or fd is None:
                self._note_unmapped(request, fd)
                if region is not None:
                    self._note_range(region)
                return None
            self._maps.check(region)
            owned, fd = fd, None
        except CommandError:
            if region is not None:
                self.memory.discard(region)
            raise
        finally:
            if fd is not None:
                fd.close()
        forget, note = partial(self._forget, region), partial(self._note_range, region)
        return self._maps.map(region, owned, forget, note, again=again)

    def _note_range(self, region: DmaRegion) -> None:
        # Its client may have lost patience meanwhile.
        if self._notes is not None and self.memory.map.find(region.address) is region:
            self._notes.mapped(*self.memory.written_down(region))

    def _forget(self, region: DmaRegion) -> None:
        # Closing the session drops all of them, also those that are still under way.
        if self.memory.map.find(region.address) is region:
            self.memory.discard(region)
            if self._notes is not None:
                self._notes.unmapped(region.address)

    def _note_unmapped(self, request: DmaMap, fd: OwnedFd | None) -> None:
        # QEMU maps ROMs and the function's own BARs like this. No function does DMA to them.
        if fd is None:
            self._log.debug(
                "memory without a descriptor is not mapped", address=f"{request.address:#x}", size=request.size
            )

    def dma_unmap(self, request: DmaUnmap) -> Answer[None]:
        """Unmap one range; while the device may use it, it counts as mapped."""
        region = self.memory.map.find(request.address)
        if self._again and region is None:
            return None
        self.memory.require(request)
        if region is None or region.owner is None:
            self.memory.remove(request)
            if self._notes is not None:
                self._notes.unmapped(request.address)
            return None
        return self._maps.unmap(region, partial(self._forget, region))

    def dma_unmap_all(self) -> Answer[None]:
        """Unmap everything."""
        return self._maps.unmap_all(self._forget_all)

    def _forget_all(self) -> None:
        for region in self.memory.remove_all():
            if self._notes is not None:
                self._notes.unmapped(region.address)

    # For the process after this one

    def begin_notes(self) -> None:
        """Have kept what the kernel has opened."""
        if self._notes is not None:
            for handle, fd in self._opened.handles.items():
                self._notes.kernel_handle(handle, fd, self._opened.space.ioas)

    def restore(self, left: Inheritance) -> None:
        """Take over what a client has done with another process; the IOMMU and the device have it still.

        Raises:
            BackendUnavailable: the client's memory cannot be used.
        """
        try:
            for thing, file in left.ranges:
                self.memory.restore(thing, file)
                if file is not None:
                    self._maps.restore(thing.size)
        except (CommandError, OSError) as error:
            raise BackendUnavailable(f"the client's memory cannot be used: {error}") from error
        eventfds = [((thing.index, thing.vector), fd) for thing, fd in left.eventfds]
        self._irqs.restore(left.assigned, left.lines, eventfds)

    def command_begins(self, tag: int, *, again: bool) -> None:
        """A command of the client begins."""
        self._again = self._irqs.again = again

    def leave(self) -> None:
        """Leave the device as it is to the process after this one."""
        self._left = True

    # The end

    async def close(self) -> None:
        """Leave the device quiet and reset, and give it back to the system, so that the next client can have it."""
        active = self._irqs.active
        self._irqs.close()
        self.memory.close()
        if self._left:
            await self._worker.submit(Job(self._let_go, always=True))
            return
        await self._worker.submit(Job(partial(self._shut_down, active), always=True))

    def _let_go(self, job: Job[None]) -> None:
        """Close what is ours; the device goes on."""
        self._leaving()
        self._regions.close()
        self._opened.close()

    def _shut_down(self, active: list[int], job: Job[None]) -> None:
        """Each step on its own: a device that has gone fails all of them, and is closed all the same."""
        self._leaving()
        device = self._device
        steps: list[tuple[str, Callable[[], object]]] = [
            *((f"switching interrupts {index} off", partial(device.disable_irqs, index)) for index in active),
            ("switching bus mastering off", device.clear_bus_master),
            ("unmapping all memory", self._opened.space.unmap_all),
        ]
        if device.flags & DeviceInfoFlags.RESET:
            steps.insert(-1, ("resetting the function", device.reset))
        for what, step in steps:
            try:
                step()
            except OSError as error:
                self._log.warning("leaving the device: a step failed", step=what, error=error.strerror)
        self._regions.close()
        self._opened.close()


async def _ignore(answer: Awaitable[bytes]) -> None:
    await answer
