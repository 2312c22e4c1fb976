"""Implements what the framework gives a model: guest memory behind bus mastering, and interrupts."""

from __future__ import annotations

import errno
from collections import Counter

import trio

from vfiouser_oob.devices.model import DeviceModel
from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.errors import DmaFault

#: Where the memory starts, so that address 0 and small numbers are faults.
RAM_START = 0x10_0000


class Memory:
    """Guest memory; every access is recorded, and can be made to wait."""

    def __init__(self, model: DeviceModel, size: int) -> None:
        self._model = model
        self.ram = bytearray(size)
        self.end = RAM_START + size
        #: ("read" | "write", address, bytes), in the order in which they took place.
        self.accesses: list[tuple[str, int, int]] = []
        #: Accesses inside these ranges wait for their event first, as a client's answer does.
        self.gates: list[tuple[range, trio.Event]] = []
        #: Writes into these ranges take place, but are confirmed to the device only after their event.
        self.confirmations: list[tuple[range, trio.Event, bool]] = []
        #: Whether every access yields to other tasks first.
        self.yields = False

    def _offset(self, address: int, count: int) -> int:
        if not self._model.config.bus_master:
            raise DmaFault("bus mastering is off", errno.EPERM)
        if not RAM_START <= address <= address + count <= self.end:
            raise DmaFault(f"{address:#x}+{count:#x} is not mapped")
        return address - RAM_START

    async def _wait(self, address: int) -> None:
        if self.yields:
            await trio.lowlevel.checkpoint()
        for addresses, event in self.gates:
            if address in addresses:
                await event.wait()

    async def read(self, address: int, count: int) -> bytes:
        """Read as the device does."""
        await self._wait(address)
        offset = self._offset(address, count)
        self.accesses.append(("read", address, count))
        return bytes(self.ram[offset : offset + count])

    async def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write as the device does."""
        await self._wait(address)
        offset = self._offset(address, len(data))
        self.accesses.append(("write", address, len(data)))
        self.ram[offset : offset + len(data)] = data
        for addresses, event, answered in self.confirmations:
            if address in addresses:
                # A message that was sent has to be answered, whatever became of who sent it.
                with trio.CancelScope(shield=answered):
                    await event.wait()

    async def quiet(self) -> None:
        """Every access ends with its task."""
        await trio.lowlevel.checkpoint()

    def hold_confirmation(self, address: int, count: int, *, answered: bool = True) -> trio.Event:
        """Make writes into a range return only when the event that is returned is set.

        Unless `answered`, the device does not wait for the answer if its task is cancelled.
        """
        event = trio.Event()
        self.confirmations.append((range(address, address + count), event, answered))
        return event

    def hold(self, address: int, count: int) -> trio.Event:
        """Make accesses to a range wait until the event that is returned is set."""
        event = trio.Event()
        self.gates.append((range(address, address + count), event))
        return event

    def peek(self, address: int, count: int) -> bytes:
        """Read as the CPU does."""
        return bytes(self.ram[address - RAM_START : address - RAM_START + count])

    def poke(self, address: int, data: bytes) -> None:
        """Write as the CPU does."""
        self.ram[address - RAM_START : address - RAM_START + len(data)] = data


class Host:
    """The host of one model."""

    def __init__(self, model: DeviceModel, size: int = 8 << 20) -> None:
        self.memory = Memory(model, size)
        self.interrupts: Counter[int] = Counter()
        self.intx = False
        self._changed = trio.Event()
        model.attach(self)

    def trigger(self, index: IrqIndex, vector: int) -> None:
        """Count an edge."""
        assert index is IrqIndex.MSIX
        self.interrupts[vector] += 1
        self._notify()

    def set_intx(self, asserted: bool) -> None:
        """Take the level of the pin."""
        if asserted != self.intx:
            self.intx = asserted
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def interrupt(self) -> None:
        """Wait for the next edge, or for the pin to change."""
        await self._changed.wait()
