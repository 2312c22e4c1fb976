"""The NVMe controller as a PCI function: BARs, config space, MSI-X, resets."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_oob.devices.model import DeviceModel, ModelHost, ModelRegion, ResetKind
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.irq import INTX, NO_IRQ, IrqDescription
from vfiouser_protocol.msix import MsixTable
from vfiouser_protocol.pci import BarSpec, ConfigEffects, ConfigSpace, PciIdentity
from vfiouser_protocol.pci_caps import Msix, PciExpress, PowerManagement
from vfiouser_protocol.regions import SparseArea
from vfiouser_soc.nvme import snapshot, snapshot_reader
from vfiouser_soc.nvme.cmb import ControllerMemoryBuffer
from vfiouser_soc.nvme.config import ControllerIdentity, ControllerLimits
from vfiouser_soc.nvme.controller import Controller
from vfiouser_soc.nvme.doorbells import PolledDoorbells, PollTimes
from vfiouser_soc.nvme.interrupts import Interrupts
from vfiouser_soc.nvme.namespace import Namespace
from vfiouser_soc.nvme.spec import (
    BAR0_SIZE,
    DOORBELLS_OFFSET,
    MSIX_PBA_OFFSET,
    MSIX_TABLE_OFFSET,
    PAGE,
    REGISTERS_OFFSET,
)
from vfiouser_soc.nvme.stores import MemoryStore
from vfiouser_soc.nvme.suspension import SuspensionEnded

#: Mass storage, non-volatile memory, NVM Express.
NVME_CLASS_CODE = 0x010802
#: Linux makes device memory usable for queues only in units of 2 MiB.
MIN_CMB_SIZE = 2 << 20
_CMB_BAR = int(RegionIndex.BAR2)
#: Seconds for commands under way, before they are begun anew by the process after this one.
_DRAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class NvmeSettings:
    """What kind of NVMe function to be.

    Args:
        identity: names.
        limits: sizes.
        polled_doorbells: offer the doorbell page as shared memory and poll it, instead of trapping writes.
        poll_times: how often it is polled.
        cmb_size: bytes of the controller memory buffer, at least 2 MiB in whole pages; 0 for none.
    """

    identity: ControllerIdentity
    limits: ControllerLimits = field(default_factory=ControllerLimits)
    polled_doorbells: bool = False
    poll_times: PollTimes = field(default_factory=PollTimes)
    cmb_size: int = 0

    def __post_init__(self) -> None:
        if self.cmb_size and (self.cmb_size < MIN_CMB_SIZE or self.cmb_size % PAGE):
            raise ValueError(
                f"a controller memory buffer of {self.cmb_size} bytes; allowed are whole pages, at least "
                f"{MIN_CMB_SIZE} bytes"
            )

    @property
    def cmb_bar_size(self) -> int:
        """Bytes of the BAR that holds the controller memory buffer: the next power of two."""
        return 1 << (self.cmb_size - 1).bit_length() if self.cmb_size else 0


class _Window(Protocol):
    """One page of BAR0."""

    def read(self, offset: int, count: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...


class _Page(NamedTuple):
    window: _Window
    size: int


class NvmeFunction(DeviceModel):
    """An NVMe function for the `model` backend.

    Args:
        settings: what kind of function.
        namespaces: its namespaces, at least one; owned from now on.
    """

    snapshot_version = snapshot.VERSION

    def __init__(self, settings: NvmeSettings, namespaces: list[Namespace]) -> None:
        self._namespaces = {namespace.nsid: namespace for namespace in namespaces}
        self.config = _config_space(settings)
        self.irqs = (
            INTX,
            NO_IRQ,
            IrqDescription(settings.limits.vectors),
            IrqDescription(1),
            IrqDescription(1),
        )
        name = f"nvme-{settings.identity.serial}"
        self._bar0_memory = SharedMemory(f"{name}-bar0", BAR0_SIZE) if settings.polled_doorbells else None
        self._cmb_memory = SharedMemory(f"{name}-cmb", settings.cmb_bar_size) if settings.cmb_size else None
        self.regions: Mapping[int, ModelRegion] = self._make_regions()
        self.table = MsixTable(settings.limits.vectors)
        self.controller = Controller(
            settings.identity,
            settings.limits,
            self._namespaces,
            lambda queues: Interrupts(self.config, self.table, queues),
            doorbell_memory=self._bar0_memory,
            poll_times=settings.poll_times,
            cmb=self._make_cmb(settings.cmb_size),
        )
        self.controller.replay = lambda offset, data: self.region_write(RegionIndex.BAR0, offset, data)
        #: Told of every reset to the power-on state.
        self.was_reset: Callable[[], None] = lambda: None
        self._pages = (
            _Page(self.controller.registers, PAGE),
            _Page(self.controller.doorbells, PAGE),
            _Page(_MsixTableWindow(self.table, self.controller.interrupts), PAGE),
            _Page(_PendingBitsWindow(self.table), PAGE),
        )
        assert tuple(PAGE * number for number in range(len(self._pages))) == (
            REGISTERS_OFFSET,
            DOORBELLS_OFFSET,
            MSIX_TABLE_OFFSET,
            MSIX_PBA_OFFSET,
        )
        self.memories = [each.store.memory for each in namespaces if isinstance(each.store, MemoryStore)]
        stores = ", ".join(namespace.store.summary for namespace in namespaces)
        doorbells = "polled" if settings.polled_doorbells else "trapped"
        self.summary = f"NVMe {settings.identity.serial}: {stores}; doorbells {doorbells}" + (
            f"; {settings.cmb_size >> 20} MiB controller memory buffer" if settings.cmb_size else ""
        )

    @property
    def polled_doorbells(self) -> PolledDoorbells | None:
        """The doorbells, if they are in shared memory."""
        doorbells = self.controller.doorbells
        return doorbells if isinstance(doorbells, PolledDoorbells) else None

    @property
    def cmb_memory(self) -> SharedMemory | None:
        """The controller memory buffer, if there is one."""
        return self._cmb_memory

    @property
    def namespaces(self) -> Mapping[int, Namespace]:
        """The namespaces by id."""
        return self._namespaces

    def _make_regions(self) -> dict[int, ModelRegion]:
        doorbell_page = (SparseArea(DOORBELLS_OFFSET, PAGE),) if self._bar0_memory is not None else ()
        regions = {
            int(RegionIndex.BAR0): ModelRegion(
                RegionIndex.BAR0, BAR0_SIZE, memory=self._bar0_memory, areas=doorbell_page
            )
        }
        if self._cmb_memory is not None:
            regions[_CMB_BAR] = ModelRegion(_CMB_BAR, self._cmb_memory.size, memory=self._cmb_memory)
        return regions

    def _make_cmb(self, size: int) -> ControllerMemoryBuffer | None:
        if self._cmb_memory is None:
            return None
        return ControllerMemoryBuffer(
            self._cmb_memory,
            size,
            _CMB_BAR,
            # Address 0 is what a BAR has before it is given one.
            lambda: self.config.bar_address(_CMB_BAR) or None if self.config.memory_enabled else None,
        )

    # What the framework calls

    def attach(self, host: ModelHost) -> None:
        """Take the host's services."""
        self.controller.attach(host)

    async def run(self) -> None:
        """Be the controller."""
        await self.controller.run()

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Answer a trapped read."""
        if index == RegionIndex.BAR0:
            page, start = offset >> 12, offset & (PAGE - 1)
            if start + count <= PAGE and page < len(self._pages):
                return self._pages[page].window.read(start, count)
            return b"".join(self._pages[page].window.read(start, size) for page, start, size in _split(offset, count))
        return bytes(self._cmb_view(index)[offset : offset + count])

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Take a trapped write."""
        if index == RegionIndex.BAR0:
            view = memoryview(data)
            for page, start, size in _split(offset, len(data)):
                self._write_page(page, start, bytes(view[:size]))
                view = view[size:]
        else:
            self._cmb_view(index)[offset : offset + len(data)] = data

    def _write_page(self, page: int, start: int, data: bytes) -> None:
        if not self.controller.suspender.suspended or page * PAGE not in (REGISTERS_OFFSET, DOORBELLS_OFFSET):
            self._pages[page].window.write(start, data)
        elif page * PAGE == DOORBELLS_OFFSET and self.polled_doorbells is not None:
            self.polled_doorbells.write_unnoticed(start, data)
        else:
            last_counts = page * PAGE == DOORBELLS_OFFSET
            self.controller.suspender.write_later(page * PAGE + start, data, last_counts=last_counts)

    def _cmb_view(self, index: int) -> memoryview:
        if index != _CMB_BAR or self._cmb_memory is None:
            raise CommandError(f"region {index} of an NVMe function; there is no such BAR", errno.EINVAL)
        return self._cmb_memory.view

    def config_changed(self, effects: ConfigEffects) -> None:
        """Config space was written: interrupts may be routed in another way, or unmasked."""
        self.controller.interrupts.unmasked()
        self.controller.interrupts.update_level()

    def reset(self, kind: ResetKind) -> None:
        """Do one of the resets."""
        if kind is ResetKind.CONNECTION_LOST:
            self.controller.freeze()
        else:
            self.controller.reset()
            if kind is ResetKind.NEW_CLIENT:
                self.controller.forget()
            self.table.reset()
            self.was_reset()

    def disconnected(self) -> None:
        """The client has gone: its queues' addresses mean nothing any more."""
        self.controller.freeze()

    # For the process after this one

    async def quiesce(self) -> None:
        """Finish the commands under way."""
        while not self.controller.suspender.suspended:
            with suppress(SuspensionEnded):  # a reset came in between
                await self.controller.suspender.suspend(_DRAIN_S)

    def snapshot(self) -> bytes:
        """Registers, queues, and what else the controller remembers."""
        if self.controller.suspender.clocks is None and self.controller.live_engine is not None:
            raise CommandError("the controller was reset and is in use again", errno.EBUSY)
        return snapshot.pack(snapshot.capture(self))

    async def restore(self, state: bytes) -> None:
        """Go on with the queues."""
        await self.controller.suspender.suspend(0)
        left = snapshot_reader.parse(state, self)
        snapshot.apply(replace(left, doorbells=None), self)
        if self.polled_doorbells is not None and left.doorbells is not None:
            self.polled_doorbells.adopt(left.doorbells[1])
        self.controller.suspender.unsuspend()

    def close(self) -> None:
        """Close stores and shared memory."""
        if self.polled_doorbells is not None:
            self.polled_doorbells.close()
        for namespace in self._namespaces.values():
            namespace.store.close()
        for memory in (self._bar0_memory, self._cmb_memory):
            if memory is not None:
                memory.close()


class _MsixTableWindow:
    """The page of the MSI-X table; beyond the table it reads as zeros."""

    def __init__(self, table: MsixTable, interrupts: Interrupts) -> None:
        self._table = table
        self._interrupts = interrupts

    def read(self, offset: int, count: int) -> bytes:
        inside = min(count, max(0, self._table.table_size - offset))
        return (self._table.read(offset, inside) if inside else b"").ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        inside = data[: max(0, self._table.table_size - offset)]
        if inside:
            self._table.write(offset, inside)
            self._interrupts.unmasked()


class _PendingBitsWindow:
    """The page of the pending bits, which a host can only read."""

    def __init__(self, table: MsixTable) -> None:
        self._table = table

    def read(self, offset: int, count: int) -> bytes:
        inside = min(count, max(0, self._table.pba_size - offset))
        return (self._table.read_pba(offset, inside) if inside else b"").ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        return


def _split(offset: int, count: int) -> list[tuple[int, int, int]]:
    """Split an access to BAR0 into (page, offset in it, bytes)."""
    pieces = []
    while count:
        page, start = divmod(offset, PAGE)
        size = min(count, PAGE - start)
        pieces.append((page, start, size))
        offset, count = offset + size, count - size
    return pieces


def _config_space(settings: NvmeSettings) -> ConfigSpace:
    identity = settings.identity
    bars = [BarSpec(RegionIndex.BAR0, BAR0_SIZE, is_64=True, prefetchable=False)]
    if settings.cmb_size:
        bars.append(BarSpec(_CMB_BAR, settings.cmb_bar_size, is_64=True, prefetchable=True))
    return ConfigSpace(
        PciIdentity(
            vendor=identity.vendor_id,
            device=identity.device_id,
            subsystem_vendor=identity.vendor_id,
            subsystem=identity.device_id,
            class_code=NVME_CLASS_CODE,
            revision=1,
        ),
        bars,
        interrupt_pin=1,
        capabilities=(
            PowerManagement(),
            Msix(
                settings.limits.vectors,
                RegionIndex.BAR0,
                MSIX_TABLE_OFFSET,
                RegionIndex.BAR0,
                MSIX_PBA_OFFSET,
            ),
            PciExpress(flr=True),
        ),
        size=4096,
    )
