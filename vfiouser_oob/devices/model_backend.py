"""The `model` backend: joins a `DeviceModel` to clients.

The framework keeps config space, interrupts and guest memory, so that a model has only its own registers. The model
outlives its clients: between two of them its registers stay, for an agent that still wants them, and its DMA faults.
The next client finds it reset, with other memory behind its BARs.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence

import trio

from vfiouser_oob.devices.base import (
    Answer,
    BackendSession,
    BackendUnavailable,
    ClientLink,
    DeviceBackend,
    DeviceDescription,
)
from vfiouser_oob.devices.eventfds import Eventfds
from vfiouser_oob.devices.model import DeviceModel, ModelMemory, ModelRegion, ResetKind
from vfiouser_oob.devices.model_faults import REFUSALS, ModelFaults
from vfiouser_oob.devices.resets import RESETS, MemoryEffect
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.observability.log import Logger, get
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_protocol.constants import (
    PCI_NUM_REGIONS,
    DeviceInfoFlags,
    IrqIndex,
    RegionFlags,
    RegionIndex,
)
from vfiouser_protocol.errors import CommandError, DmaFault
from vfiouser_protocol.irq import IrqSet
from vfiouser_protocol.messages import DmaMap, DmaUnmap, SetIrqs
from vfiouser_protocol.pci import ConfigEffects
from vfiouser_protocol.regions import RegionSpec


class ModelBackend(DeviceBackend):
    """A function written in Python, as the server sees it; it is also the model's host.

    Args:
        model: the function; owned from now on.
        dma_by_message: reach guest memory by messages even where the client sent a file.
        retain_state: let a client find what the one before left.
        log: where the model's mistakes are reported.
    """

    def __init__(
        self,
        model: DeviceModel,
        *,
        dma_by_message: bool = False,
        retain_state: bool = False,
        log: Logger | None = None,
    ) -> None:
        self.model = model
        self.faults = ModelFaults(log or get("devices.model"))
        self.summary = model.summary
        self.dma_by_message = dma_by_message
        self.irqs = Eventfds(IrqSet(model.irqs))
        self.description = DeviceDescription(
            _region_specs(model), model.irqs, DeviceInfoFlags.PCI | DeviceInfoFlags.RESET
        )
        self.session: ModelSession | None = None
        self._retain_state = retain_state
        self._used = False
        self._intx = False
        self._memory = _BusMasterMemory(self)
        model.attach(self)

    # What the model asks of its host

    @property
    def memory(self) -> ModelMemory:
        """DMA to the memory of the attached client."""
        return self._memory

    def trigger(self, index: IrqIndex, vector: int) -> None:
        """Raise an edge."""
        self.irqs.trigger(index, vector)

    def set_intx(self, asserted: bool) -> None:
        """Drive the INTx line."""
        self._intx = asserted
        self.model.config.set_interrupt_status(asserted)
        self.drive_intx()

    def drive_intx(self) -> None:
        """Show the line's level to the client, unless the guest has disabled INTx."""
        self.irqs.set_level(self._intx and not self.model.config.intx_disabled)

    # What the server asks of a backend

    async def open(self, link: ClientLink) -> BackendSession:
        """Begin to serve a client, with a function that nobody has used."""
        if self._used and not self._retain_state:
            try:
                self.reset(ResetKind.NEW_CLIENT)
            except OSError as error:
                raise BackendUnavailable(f"no new memory for its BARs: {error.strerror}") from error
            except CommandError as error:
                raise BackendUnavailable(str(error)) from error
        self._used = True
        self.session = ModelSession(self, link)
        try:
            with self.faults.inside("connected"):
                self.model.connected()
        except CommandError as error:
            await self.session.close()
            raise BackendUnavailable(str(error)) from error
        return self.session

    async def run(self) -> None:
        """Run the model's tasks."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.irqs.watch)
            try:
                await self.model.run()
            except Exception as error:
                self.faults.report("run", error)
                raise
            await trio.sleep_forever()

    def close(self) -> None:
        """Close the model."""
        self.irqs.clear()
        self.model.close()

    def reset(self, kind: ResetKind) -> None:
        """Do what the table says for a reset.

        Raises:
            OSError: there is no new memory to be had; only some of the old was replaced, and nothing was reset.
            CommandError: the model failed.
        """
        effect = RESETS[kind]
        if effect.memory is MemoryEffect.RENEWED:
            for memory in {region.memory for region in self.model.regions.values() if region.memory is not None}:
                memory.renew()
        if effect.intx_deasserted:
            self.set_intx(False)
        if effect.eventfds_dropped:
            self.irqs.clear()
        if effect.config_space:
            # QEMU answers BAR reads itself, so after an FLR a guest sees its addresses unchanged and restores none.
            self.model.config.reset(keep_addresses=kind is ResetKind.FUNCTION_LEVEL)
            for index in (IrqIndex.MSI, IrqIndex.MSIX):
                self.irqs.forget_latched(index)
        elif effect.bus_master_off:
            self.model.config.clear_bus_master()
        if effect.maps_dropped and self.session is not None:
            self.session.memory.close()
        if effect.registers:
            with self.faults.inside("reset"):
                self.model.reset(kind)


class ModelSession(BackendSession):
    """One client's use of a model."""

    device_seen = True

    def __init__(self, backend: ModelBackend, link: ClientLink) -> None:
        self._backend = backend
        self._model = backend.model
        self._config = backend.model.config
        self.description = backend.description
        self.memory = GuestMemory(
            link,
            self.limits.max_dma_maps,
            by_message=backend.dma_by_message,
            check_files=True,
            account=link.account,
        )

    def region_fd(self, index: int) -> HasFileno | None:
        """Return the memfd of a mappable region."""
        region = self._model.regions.get(index)
        return None if region is None else region.memory

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read config space, shared memory or a trapped register."""
        if region == RegionIndex.CONFIG:
            return self._config.read(offset, count)
        try:
            return self._model.region_read(region, offset, count)
        except REFUSALS:
            raise
        except Exception as error:
            raise self._backend.faults.refused("region_read", error) from error

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool) -> None:
        """Write config space, shared memory or a trapped register."""
        if region == RegionIndex.CONFIG:
            self._apply(self._config.write(offset, data))
            return
        try:
            self._model.region_write(region, offset, data)
        except REFUSALS:
            raise
        except Exception as error:
            raise self._backend.faults.refused("region_write", error) from error

    def _apply(self, effects: ConfigEffects) -> None:
        if effects.flr:
            self._backend.reset(ResetKind.FUNCTION_LEVEL)
            return
        if effects.intx_disable_changed:
            self._backend.drive_intx()
        if effects.msi_changed and not self._config.msi_enabled:
            self._backend.irqs.forget_latched(IrqIndex.MSI)
        if effects.msix_changed and not self._config.msix_enabled:
            self._backend.irqs.forget_latched(IrqIndex.MSIX)
        if effects:
            with self._backend.faults.inside("config_changed"):
                self._model.config_changed(effects)

    def set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        """Configure interrupts."""
        self._backend.irqs.set_irqs(request, fds)

    def dma_map(self, request: DmaMap, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Map client memory; a file that is not memory is looked at in a thread."""
        if self.memory.must_wait_for(fds):
            return self._map_later(request, fds)
        self.memory.add(request, fds, self.memory.examine(fds))
        return None

    async def _map_later(self, request: DmaMap, fds: Sequence[OwnedFd]) -> None:
        self.memory.add(request, fds, await self.memory.examine_later(fds))

    def dma_unmap(self, request: DmaUnmap) -> Answer[None]:
        """Unmap one range; an access that a thread has under way is waited for."""
        self.memory.remove(request)
        return None if self.memory.is_quiet else self.memory.quiet()

    def dma_unmap_all(self) -> Answer[None]:
        """Unmap everything."""
        self.memory.remove_all()
        return None if self.memory.is_quiet else self.memory.quiet()

    def reset(self) -> None:
        """Go to the power-on state."""
        self._backend.reset(ResetKind.DEVICE)

    async def route_dma(self, *, by_message: bool) -> None:
        """Nothing is to be done: its memory asks for each write which way it goes."""
        await trio.lowlevel.checkpoint()

    def irq_summary(self) -> dict[str, int]:
        """Vectors with an eventfd."""
        return self._backend.irqs.summary()

    async def close(self) -> None:
        """Interrupts off, bus master off, memory gone; registers stay until the next client comes."""
        self._backend.reset(ResetKind.CONNECTION_LOST)
        self._backend.session = None
        with contextlib.suppress(CommandError), self._backend.faults.inside("disconnected"):
            self._model.disconnected()
        await trio.lowlevel.checkpoint()


class _BusMasterMemory:
    """Guest memory behind the bus-master enable bit: a cleared bit, or no client, is a DMA fault."""

    def __init__(self, backend: ModelBackend) -> None:
        self._backend = backend

    def _memory(self) -> GuestMemory:
        session = self._backend.session
        if session is None:
            raise DmaFault("DMA without a client", errno.ENODEV)
        if not self._backend.model.config.bus_master:
            raise DmaFault("DMA while bus mastering is disabled", errno.EPERM)
        return session.memory

    async def read(self, address: int, count: int) -> bytes:
        """Read guest memory."""
        return await self._memory().read(address, count)

    async def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest memory."""
        await self._memory().write(address, data)

    async def quiet(self) -> None:
        """Wait until no access is under way."""
        session = self._backend.session
        if session is not None:
            await session.memory.quiet()


def _region_specs(model: DeviceModel) -> Sequence[RegionSpec]:
    specs = []
    for index in range(PCI_NUM_REGIONS):
        region = model.regions.get(index)
        if index == RegionIndex.CONFIG:
            specs.append(RegionSpec(index, model.config.size, RegionFlags.READ | RegionFlags.WRITE))
        elif region is None:
            specs.append(RegionSpec.absent(index))
        else:
            specs.append(_spec_of(region))
    return specs


def _spec_of(region: ModelRegion) -> RegionSpec:
    mappable = region.memory is not None
    return RegionSpec(region.index, region.size, region.flags, region.areas, mappable=mappable)
