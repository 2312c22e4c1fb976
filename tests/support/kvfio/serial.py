"""The serial ports of an mtty device behind our client: state that can be written, compared, and carried along.

Spec: National Semiconductor PC16550D, as far as linux/samples/vfio-mdev/mtty.c plays it: what is sent comes back.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from kvfio.scenarios import eventfd, fired
from vfiouser_oob.client.client import Client
from vfiouser_oob.lab.vmm.attachment import Attachment, ConfigState, save_config
from vfiouser_oob.lab.vmm.live import VirtualMachine
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.constants import IrqIndex

DATA, IER, FCR, LCR, MCR, LSR, SCR = 0, 1, 2, 3, 4, 5, 7
FIFO_ON, FIFO_CLEAR = 1, 6
DIVISOR_LATCH = 0x80
RECEIVED = 1
#: mtty keeps what was sent, and gives it back to whoever reads.
FIFO_SIZE = 16


class SerialPort:
    """One port: a BAR of eight registers.

    Args:
        client: connected to the function.
        index: of the BAR.
    """

    def __init__(self, client: Client, index: int) -> None:
        self._client = client
        self._index = index

    async def read(self, register: int) -> int:
        """Read a register."""
        return (await self._client.region_read(self._index, register, 1))[0]

    async def write(self, register: int, value: int) -> None:
        """Write a register."""
        await self._client.region_write(self._index, register, bytes([value]))

    async def fill(self, scratch: int, text: bytes) -> None:
        """Put a number into the scratch register and text into the FIFO."""
        await self.write(LCR, 3)
        await self.write(MCR, 0x0B)
        await self.write(SCR, scratch)
        await self.write(FCR, FIFO_ON | FIFO_CLEAR)
        for byte in text:
            await self.write(DATA, byte)

    async def scratch(self) -> int:
        """The scratch register."""
        return await self.read(SCR)

    async def drain(self) -> bytes:
        """Take what is in the FIFO."""
        text = bytearray()
        while await self.read(LSR) & RECEIVED:
            text.append(await self.read(DATA))
            assert len(text) <= FIFO_SIZE
        return bytes(text)

    async def set_divisor(self, divisor: int) -> None:
        """Set the divisor, and leave its latch open, so that it can be read."""
        await self.write(LCR, DIVISOR_LATCH | 3)
        await self.write(DATA, divisor & 0xFF)
        await self.write(IER, divisor >> 8)

    async def divisor(self) -> int:
        """Read the divisor; its latch is open."""
        assert await self.read(LCR) & DIVISOR_LATCH
        return await self.read(DATA) | await self.read(IER) << 8


class SerialMachine(VirtualMachine):
    """A guest that has filled both ports, and finds them again wherever it goes on.

    Args:
        client: of the function that it has now.
        scratch: a number that tells this guest from others.
    """

    TEXT = b"out of band"
    DIVISOR = 0x1234

    def __init__(self, client: Client, scratch: int = 0x5A) -> None:
        self.client = client
        self.number = scratch
        #: What the guest does at the last moment before it is stopped.
        self.last: Callable[[], Awaitable[None]] | None = None
        self.arrived = 0
        self.went_on = 0

    async def fill(self) -> None:
        """Write all that `verify` looks for."""
        await SerialPort(self.client, 0).fill(self.number, self.TEXT)
        second = SerialPort(self.client, 1)
        await second.fill(self.number ^ 0xFF, b"two")
        await second.set_divisor(self.DIVISOR)

    async def glance(self) -> tuple[int, int, int]:
        """What can be read without changing anything: both scratch registers and the divisor."""
        first, second = SerialPort(self.client, 0), SerialPort(self.client, 1)
        return await first.scratch(), await second.scratch(), await second.divisor()

    async def verify(self) -> None:
        """Both ports are as they were filled, the FIFOs too, which are filled anew; and interrupts arrive."""
        assert (self.number, self.number ^ 0xFF, self.DIVISOR) == await self.glance()
        first, second = SerialPort(self.client, 0), SerialPort(self.client, 1)
        assert 0x0B == await first.read(MCR)
        assert self.TEXT == await first.drain()
        await second.write(LCR, 3)
        assert b"two" == await second.drain()
        await self._expect_interrupt(first)
        await self.fill()

    async def _expect_interrupt(self, port: SerialPort) -> None:
        line = eventfd()
        try:
            await self.client.set_eventfds(IrqIndex.INTX, [LentFd(line)])
            await port.write(IER, RECEIVED)
            await port.write(DATA, 0x42)
            assert 1 == await fired(line), "no interrupt for what was received"
            await port.write(IER, 0)
            await self.client.disable_irqs(IrqIndex.INTX)
        finally:
            os.close(line)

    # What a VMM does with it

    async def stop(self) -> None:
        """Nothing runs by itself; what the guest still has to do is done now."""
        if self.last is not None:
            await self.last()

    def go(self) -> None:
        """Go on at the source."""
        self.went_on += 1

    async def save(self) -> ConfigState:
        """Configuration space is the VMM's."""
        return await save_config(self.client, vectors=0)

    async def arrive(self, place: Attachment) -> None:
        """Go on at the destination."""
        self.client = place.client
        self.arrived += 1
