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
from vfiouser_oob.devices.model_survival import REPEATABLE, ModelEstate
from vfiouser_oob.devices.resets import RESETS, MemoryEffect
from vfiouser_oob.memory.files import FileFacts
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.observability.log import Logger, get
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.notes import Inheritance
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_protocol.constants import (
    PCI_NUM_REGIONS,
    DeviceInfoFlags,
    IrqIndex,
    IrqSetFlags,
    RegionFlags,
    RegionIndex,
)
from vfiouser_protocol.errors import CommandError, DmaFault
from vfiouser_protocol.irq import IrqSet
from vfiouser_protocol.messages import DmaMap, DmaUnmap, SetIrqs
from vfiouser_protocol.pci import ConfigEffects
from vfiouser_protocol.regions import RegionSpec

#: A DEVICE_SET_IRQS that has a lasting effect, so that it is no harm to do it twice: all that does not raise at once.
_LASTING = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK)


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
        self.log = log or get("devices.model")
        self.faults = ModelFaults(self.log)
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

    @property
    def intx(self) -> bool:
        """Whether the model asserts its INTx line."""
        return self._intx

    def drive_intx(self) -> None:
        """Show the line's level to the client, unless the guest has disabled INTx."""
        self.irqs.set_level(self._intx and not self.model.config.intx_disabled)

    # What the server asks of a backend

    survives = True
    repeatable = REPEATABLE

    async def resume(self, link: ClientLink, inheritance: Inheritance) -> BackendSession:
        """Go on with a client of another process: with the model as it was left, or as one that has to be reset."""
        assert link.notes is not None
        self._used = True
        estate = ModelEstate.go_on(self.model, self.irqs, link.notes, inheritance)
        self.session = session = ModelSession(self, link, estate)
        session.restore(inheritance)
        try:
            with self.faults.inside("connected"):
                self.model.connected()
            left = estate.take_snapshot(inheritance.snapshot)
            self.model.config.restore(left.config)
            with self.faults.inside("restore"):
                await self.model.restore(left.state)
        except (OSError, UnusableRecord, CommandError, ValueError) as error:
            session.lost_state(f"the state of the model is lost: {error}")
        else:
            self._intx = left.intx
            self.irqs.state.restore_level(left.intx and not self.model.config.intx_disabled)
        return session

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
        self.session = ModelSession(self, link, self._estate(link))
        try:
            with self.faults.inside("connected"):
                self.model.connected()
        except CommandError as error:
            await self.session.close()
            raise BackendUnavailable(str(error)) from error
        return self.session

    def _estate(self, link: ClientLink) -> ModelEstate | None:
        if link.notes is None:
            return None
        try:
            return ModelEstate.begin(self.model, self.irqs, link.notes)
        except OSError as error:
            raise BackendUnavailable(f"there is no memory: {error.strerror}") from error

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

    def __init__(self, backend: ModelBackend, link: ClientLink, estate: ModelEstate | None = None) -> None:
        self._backend = backend
        self._link = link
        self._notes = link.notes
        self._estate = estate
        #: The command that is carried out was begun by another process already.
        self._again = False
        self._quiet = self._left = False
        #: The model has lost its state, and waits for a reset.
        self._stateless = False
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
        if self._again and request.count and not request.flags & _LASTING:
            raise CommandError("a daemon that has ended raised interrupts; that is not done twice", errno.EIO)
        self._backend.irqs.set_irqs(request, fds)
        if self._estate is not None:
            self._estate.irqs_set(request)

    def dma_map(self, request: DmaMap, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Map client memory; a file that is not memory is looked at in a thread."""
        if self.memory.must_wait_for(fds):
            return self._map_later(request, fds)
        self._add(request, fds, self.memory.examine(fds))
        return None

    async def _map_later(self, request: DmaMap, fds: Sequence[OwnedFd]) -> None:
        self._add(request, fds, await self.memory.examine_later(fds))

    def _add(self, request: DmaMap, fds: Sequence[OwnedFd], facts: FileFacts | None) -> None:
        region = self.memory.add(request, fds, facts)
        if region is not None and self._notes is not None:
            self._notes.mapped(*self.memory.written_down(region))

    def dma_unmap(self, request: DmaUnmap) -> Answer[None]:
        """Unmap one range; an access that a thread has under way is waited for."""
        if not self._again or self.memory.map.find(request.address) is not None:
            self.memory.remove(request)
            if self._notes is not None:
                self._notes.unmapped(request.address)
        return None if self.memory.is_quiet else self.memory.quiet()

    def dma_unmap_all(self) -> Answer[None]:
        """Unmap everything."""
        for region in self.memory.remove_all():
            if self._notes is not None:
                self._notes.unmapped(region.address)
        return None if self.memory.is_quiet else self.memory.quiet()

    def reset(self) -> None:
        """Go to the power-on state."""
        self._backend.reset(ResetKind.DEVICE)
        if self._stateless:
            self._stateless = False
            self._link.recovered()

    async def route_dma(self, *, by_message: bool) -> None:
        """Nothing is to be done: its memory asks for each write which way it goes."""
        await trio.lowlevel.checkpoint()

    def irq_summary(self) -> dict[str, int]:
        """Vectors with an eventfd."""
        return self._backend.irqs.summary()

    def restore(self, inheritance: Inheritance) -> None:
        """Take over the client's memory.

        Raises:
            BackendUnavailable: it cannot be used.
        """
        try:
            for thing, file in inheritance.ranges:
                self.memory.restore(thing, file)
        except (CommandError, OSError) as error:
            raise BackendUnavailable(f"the client's memory cannot be used: {error}") from error

    def lost_state(self, reason: str) -> None:
        """The model is as nobody had ever used it, and its client does not know that yet."""
        self._stateless = True
        self._config.reset()
        self._link.fail_until_reset(reason)

    def command_begins(self, tag: int, *, again: bool) -> None:
        """A command of the client begins."""
        self._again = again

    async def quiesce(self) -> None:
        """Have the model come to rest."""
        if self._estate is None or self._stateless:
            return
        with contextlib.suppress(CommandError):
            with self._backend.faults.inside("quiesce"):
                await self._model.quiesce()
            await self.memory.quiet()
            self._quiet = True

    def leave(self) -> None:
        """Leave the model's state to the process after this one, if it has come to rest."""
        self._left = True
        if self._estate is None or not self._quiet:
            return
        try:
            with self._backend.faults.inside("snapshot"):
                self._estate.leave(intx=self._backend.intx)
        except (OSError, ValueError, CommandError) as error:
            self._backend.log.error("a model will have to be reset by its client: no snapshot", reason=str(error))

    async def close(self) -> None:
        """Interrupts off, bus master off, memory gone; registers stay until the next client comes."""
        if self._estate is not None:
            self._estate.close()
        if self._left:
            self._backend.irqs.clear()
            self.memory.close()
            self._backend.session = None
            return
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
