"""The client as its device sees it: what it can take, its memory by messages, and the news that the device is lost."""

from __future__ import annotations

import errno
from collections.abc import Callable, Container
from typing import Protocol

import trio

from vfiouser_oob.devices.base import ClientLink
from vfiouser_oob.memory.recorder import SentRead, SentWrite
from vfiouser_oob.server.context import FunctionContext
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import DmaFault

#: What a device that has lost its state does all the same: the client's memory and interrupts stay known.
_BEFORE_RESET = frozenset(
    {
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_GET_IRQ_INFO,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_RESET,
        Command.DIRTY_PAGES,
    }
)


class Dma(Protocol):
    """A way to the client's memory."""

    async def read(self, address: int, count: int) -> bytes:
        """Read client memory."""

    async def write(self, address: int, data: bytes) -> None:
        """Write client memory."""

    def send_read(self, address: int, count: int) -> SentRead:
        """Send a read of whatever is at an address of its bus."""

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Send a write to whatever is there."""


class NoDma:
    """The way to the memory of a client that was not told yet what was agreed: there is none."""

    async def read(self, address: int, count: int) -> bytes:
        """Refuse."""
        raise _too_early()

    async def write(self, address: int, data: bytes) -> None:
        """Refuse."""
        raise _too_early()

    def send_read(self, address: int, count: int) -> SentRead:
        """Refuse."""
        raise _too_early()

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Refuse."""
        raise _too_early()


class DmaToCome:
    """The way to the memory of a client that another process has served: there will be one in a moment."""

    def __init__(self) -> None:
        self._known = trio.Event()
        self._dma: Dma = NoDma()

    def known(self, dma: Dma) -> None:
        """There it is."""
        self._dma = dma
        self._known.set()

    async def read(self, address: int, count: int) -> bytes:
        """Read client memory."""
        await self._known.wait()
        return await self._dma.read(address, count)

    async def write(self, address: int, data: bytes) -> None:
        """Write client memory."""
        await self._known.wait()
        await self._dma.write(address, data)

    def send_read(self, address: int, count: int) -> SentRead:
        """Send a read, once it is known how."""
        return self._dma.send_read(address, count)

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Send a write, once it is known how."""
        return self._dma.bus_write(address, data)


class DeviceLink(ClientLink):
    """What a device can ask of the client that it serves.

    Args:
        context: the function's.
        on_loss: told that the device is lost, and why.
    """

    def __init__(self, context: FunctionContext, on_loss: Callable[[DeviceLink, str], None]) -> None:
        self.capabilities = VersionCapabilities()
        self.account = context.account
        #: Why the device is lost; None as long as it is there.
        self.lost: str | None = None
        #: What it does all the same.
        self.served: Container[int] = ()
        self._context = context
        self._on_loss = on_loss
        self._dma: Dma = NoDma()

    def agreed(self, capabilities: VersionCapabilities, dma: Dma) -> None:
        """Take what was negotiated.

        Args:
            capabilities: what the client takes.
            dma: the way to its memory.
        """
        self.capabilities = capabilities
        if isinstance(self._dma, DmaToCome):
            self._dma.known(dma)
        self._dma = dma

    def goes_on(self) -> None:
        """Another process has served the client: its memory is reached as soon as we know how."""
        self._dma = DmaToCome()

    async def dma_read(self, address: int, count: int) -> bytes:
        """Read client memory by messages."""
        return await self._dma.read(address, count)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write client memory by messages."""
        await self._dma.write(address, data)

    def send_read(self, address: int, count: int) -> SentRead:
        """Send a read of whatever is at an address of the client's bus."""
        return self._dma.send_read(address, count)

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Send a write to whatever is at an address of the client's bus."""
        return self._dma.bus_write(address, data)

    def fail(self, reason: str) -> None:
        """The device is lost: from now on every command is answered with EIO."""
        if self.lost is None:
            self.lost = reason
            self._context.log.error("device lost; its client gets EIO until it reconnects", reason=reason)
            self._context.note_error(reason)
            self._on_loss(self, reason)

    def fail_until_reset(self, reason: str) -> None:
        """The device has lost its state: what needs that is answered with EIO until it is reset."""
        if self.lost is None:
            self.lost, self.served = reason, _BEFORE_RESET
            self._context.log.error("device lost its state; its client gets EIO until it resets it", reason=reason)
            self._context.note_error(reason)
            self._on_loss(self, reason)

    def recovered(self) -> None:
        """The device is back, and was reset."""
        self.lost, self.served = None, ()
        self._context.log.warning("device is back and was reset; its guest has to set it up again")

    def fail_for_good(self, reason: str) -> None:
        """The device does not come back."""
        self._context.log.error("device remains lost; its client gets EIO until it reconnects", reason=reason)
        self._context.note_error(reason)


def _too_early() -> DmaFault:
    return DmaFault("DMA before the client has the answer to VERSION", errno.ENODEV)
