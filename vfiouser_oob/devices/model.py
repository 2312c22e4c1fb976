"""The interface of a function written in Python.

`DeviceModel` is what an author implements; `ModelHost` is what the daemon gives it. The backend that joins the two to a
client is `model_backend`. Whatever an author needs can be imported from here: see docs/howto/write-a-device.md.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from vfiouser_oob.config import values
from vfiouser_oob.config.tables import NoOptions, key, section
from vfiouser_oob.devices.base import ResetKind
from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_protocol.constants import IrqIndex, RegionFlags, RegionIndex
from vfiouser_protocol.errors import CommandError, DmaFault
from vfiouser_protocol.irq import INTX, IrqDescription
from vfiouser_protocol.pci import (
    BarSpec,
    ConfigEffects,
    ConfigSpace,
    Msi,
    Msix,
    PciExpress,
    PciIdentity,
)
from vfiouser_protocol.regions import SparseArea

__all__ = [
    "BarSpec",
    "CommandError",
    "ConfigEffects",
    "ConfigSpace",
    "DeviceModel",
    "DmaFault",
    "IrqDescription",
    "IrqIndex",
    "ModelHost",
    "ModelMemory",
    "ModelRegion",
    "Msi",
    "Msix",
    "NoOptions",
    "PciExpress",
    "PciIdentity",
    "RegionFlags",
    "ResetKind",
    "SharedMemory",
    "SparseArea",
    "interrupts",
    "key",
    "section",
    "values",
]


def interrupts(*, intx: bool = False, msi: int = 0, msix: int = 0) -> Sequence[IrqDescription]:
    """What a model puts into `irqs`: how many vectors it has of each sort.

    Args:
        intx: whether it has an INTx line.
        msi: MSI vectors, as its `Msi` capability says.
        msix: MSI-X vectors, as its `Msix` capability says.
    """
    one = IrqDescription(1)
    return (INTX if intx else IrqDescription(0), IrqDescription(msi), IrqDescription(msix), one, one)


@dataclass(frozen=True, slots=True)
class ModelRegion:
    """A BAR or ROM of a model.

    Args:
        index: region index.
        size: bytes; a power of two for BARs.
        flags: READ, WRITE.
        memory: shared memory behind the whole region, or None when every access is trapped.
        areas: what of `memory` a client may map; empty means all of it.
    """

    index: int
    size: int
    flags: int = RegionFlags.READ | RegionFlags.WRITE
    memory: SharedMemory | None = None
    areas: tuple[SparseArea, ...] = ()


class ModelMemory(Protocol):
    """DMA as a model sees it."""

    async def read(self, address: int, count: int) -> bytes:
        """Read guest memory.

        Args:
            address: guest address.
            count: bytes.

        Raises:
            DmaFault: bus mastering is off, no mapping allows it, or there is no client.
        """
        ...

    async def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest memory.

        Args:
            address: guest address.
            data: what to store there.

        Raises:
            DmaFault: as for `read`.
        """
        ...

    async def quiet(self) -> None:
        """Wait until no access is under way; a cancelled one may still be, in a thread."""
        ...


class ModelHost(Protocol):
    """What the daemon gives a model."""

    @property
    def memory(self) -> ModelMemory:
        """DMA to the memory of the client that is attached now."""
        ...

    def trigger(self, index: IrqIndex, vector: int) -> None:
        """Raise an edge (MSI, MSI-X, ERR, REQ); without an eventfd it is dropped.

        Args:
            index: IRQ index.
            vector: vector of that index.
        """
        ...

    def set_intx(self, asserted: bool) -> None:
        """Drive the INTx line.

        Args:
            asserted: the level.
        """
        ...


class DeviceModel(abc.ABC):
    """A PCI function in Python. No method may wait; put what takes time into a task under `run`."""

    #: Region 7, kept by the framework through this object.
    config: ConfigSpace
    #: What the daemon offers.
    host: ModelHost
    #: Version of what `snapshot` returns. None: the model has no snapshots, and so a restart of the daemon resets it.
    snapshot_version: int | None = None
    #: What it has in shared memory beside its regions; the daemon after this one gets it as well, in this order.
    memories: Sequence[SharedMemory] = ()

    @cached_property
    def regions(self) -> Mapping[int, ModelRegion]:
        """BARs and ROM by region index; unless a model sets it, those of `config`, with every access trapped."""
        bars = {index: ModelRegion(index, bar.size) for index, bar in self.config.bars.items()}
        rom = RegionIndex.ROM
        size = self.config.rom_size
        return {**bars, rom: ModelRegion(rom, size, RegionFlags.READ)} if size else bars

    @cached_property
    def irqs(self) -> Sequence[IrqDescription]:
        """One entry per IRQ index; unless a model sets it, what the pin, `Msi` and `Msix` in `config` say."""
        vectors = {type(entry): entry.vectors for entry in self.config.capabilities if isinstance(entry, Msi | Msix)}
        return interrupts(intx=bool(self.config.interrupt_pin), msi=vectors.get(Msi, 0), msix=vectors.get(Msix, 0))

    @cached_property
    def summary(self) -> str:
        """One line for logs and `status`; unless a model sets it, the name of its class."""
        return f"model:{type(self).__name__}"

    def attach(self, host: ModelHost) -> None:
        """Take the host's services; called once, before anything else."""
        self.host = host

    @abc.abstractmethod
    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Answer a trapped read inside the region.

        Args:
            index: region index.
            offset: where in the region, bytes.
            count: bytes.

        Raises:
            CommandError: the access is refused.
        """

    @abc.abstractmethod
    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Take a trapped write inside the region; never waits for DMA.

        Args:
            index: region index.
            offset: where in the region, bytes.
            data: what the client writes.

        Raises:
            CommandError: the access is refused.
        """

    def config_changed(self, effects: ConfigEffects) -> None:
        """Config space was written with an effect beyond its own bytes.

        Args:
            effects: what the write changed.
        """
        return

    @abc.abstractmethod
    def reset(self, kind: ResetKind) -> None:
        """Go to the power-on state, shared memory included; the framework has reset config space.

        With NEW_CLIENT, forget whatever else was learned from the last client as well. The framework has renewed the
        memory of `regions`: a part of `SharedMemory.view` that was kept reaches the old one; take it again.

        Args:
            kind: DEVICE, FUNCTION_LEVEL or NEW_CLIENT.
        """

    def connected(self) -> None:
        """A client has come."""
        return

    def disconnected(self) -> None:
        """The client has gone, and with it its memory and eventfds; bus mastering is off."""
        return

    async def run(self) -> None:
        """The device's own tasks; runs as long as the function does."""
        return

    async def quiesce(self) -> None:
        """Come to rest, since another process is going to go on: finish what is under way, and begin nothing any more.

        Register accesses are still answered. This may wait, also for DMA, for about a second.
        """
        return

    def snapshot(self) -> bytes:
        """Return the state of a model that has come to rest; the model is not used again.

        Config space, interrupts, and shared memory (`regions`, `memories`) are not the model's to save.
        """
        return b""

    async def restore(self, state: bytes) -> None:
        """Go on where another process has stopped; for a model that nobody has used, while `run` runs already.

        Shared memory is as the other process left it, and config space too. Take parts of
        `SharedMemory.view` again.

        Args:
            state: what `snapshot` has returned, of the same `snapshot_version`.

        Raises:
            ValueError: it makes no sense; the model will be reset.
        """
        return

    def close(self) -> None:
        """Give back shared memory and files; the function is going away."""
        return
