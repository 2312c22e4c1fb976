"""What the server asks of a device backend.

A backend belongs to one function and lives as long as it. A session belongs to one client connection: it is opened
before VERSION is answered and closed when the client has gone. Each request is answered at once, or by an awaitable
when the device really has to be waited for; the connection then answers later commands only after it, and cancels it at
the command's deadline. Nothing here may wait for DMA: a client may serve DMA only when its own access was answered.
"""

from __future__ import annotations

import abc
import errno
from collections.abc import Awaitable, Container, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias, TypeVar

import trio

from vfiouser_agents.api import Agent
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.memory.recorder import SentRead, SentWrite
from vfiouser_oob.persist.successor.notes import DeviceNotes, Inheritance
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_oob.transport.reaper import STRANGERS, Account
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.errors import CommandError, DmaFault
from vfiouser_protocol.irq import IrqDescription
from vfiouser_protocol.messages import DmaMap, DmaUnmap, IoFdEntry, SetIrqs
from vfiouser_protocol.regions import RegionSpec

T = TypeVar("T")
#: An answer that is there, or one to wait for.
Answer: TypeAlias = T | Awaitable[T]


class ResetKind(Enum):
    """The resets; `vfiouser_oob.devices.resets` says what each does to what."""

    #: The client's DEVICE_RESET.
    DEVICE = "device"
    #: Function-level reset, by the guest through the PCI Express capability.
    FUNCTION_LEVEL = "function-level"
    #: The client has gone.
    CONNECTION_LOST = "connection-lost"
    #: Another client has come: it finds nothing of the one before.
    NEW_CLIENT = "new-client"


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """What a client learns about a function before it uses it.

    Args:
        regions: one entry per region index.
        irqs: one entry per IRQ index.
        flags: DeviceInfoFlags.
    """

    regions: Sequence[RegionSpec]
    irqs: Sequence[IrqDescription]
    flags: int


class IoFds(NamedTuple):
    """What of a region can be reached by descriptors instead of messages (DEVICE_GET_REGION_IO_FDS).

    Args:
        entries: the sub-regions.
        fds: the descriptors that they name by position; they stay the device's.
    """

    entries: Sequence[IoFdEntry] = ()
    fds: Sequence[HasFileno] = ()


class ClientLink(abc.ABC):
    """What a session can ask of the client that it serves."""

    #: What the client announced in VERSION.
    capabilities: VersionCapabilities
    #: Where what it has open here is counted.
    account: Account = STRANGERS
    #: Takes down what a process after this one needs; None if there will be none.
    notes: DeviceNotes | None = None

    @abc.abstractmethod
    async def dma_read(self, address: int, count: int) -> bytes:
        """Read client memory by DMA_READ messages.

        Raises:
            DmaFault: the client refused it, answered nonsense, has gone, or did not answer in time.
        """

    @abc.abstractmethod
    async def dma_write(self, address: int, data: bytes) -> None:
        """Write client memory by DMA_WRITE messages.

        Raises:
            DmaFault: as for `dma_read`.
        """

    def send_read(self, address: int, count: int) -> SentRead:
        """Send a read of whatever is at an address of the client's bus, as another PCI function's registers are read.

        Raises:
            DmaFault: it cannot be sent.
        """
        raise DmaFault("the device has no way to its client's bus", errno.ENODEV)

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Send a write to whatever is at an address of the client's bus; the client carries them out in order.

        Raises:
            DmaFault: it cannot be sent.
        """
        raise DmaFault("the device has no way to its client's bus", errno.ENODEV)

    @abc.abstractmethod
    def fail(self, reason: str) -> None:
        """Note that the device behind this session is lost; every further command is answered with EIO."""

    def fail_until_reset(self, reason: str) -> None:
        """Note that the device has lost its state: its registers answer with EIO until DEVICE_RESET."""
        self.fail(reason)

    def recovered(self) -> None:
        """Note that a device that was lost is back, and was reset."""
        return

    def fail_for_good(self, reason: str) -> None:
        """Note that a device that was lost does not come back, and why."""
        return


class BackendSession(abc.ABC):
    """One client's use of a device. All methods raise `CommandError` for a refusal with an errno.

    Args:
        description: regions and interrupts.
        memory: the client's DMA mappings, kept by the connection.
    """

    description: DeviceDescription
    memory: GuestMemory

    @property
    def limits(self) -> VersionCapabilities:
        """What this session can take; the connection offers no more to the client."""
        return VersionCapabilities()

    def region_fd(self, index: int) -> HasFileno | None:
        """Return the descriptor that maps a region; it stays the backend's."""
        return None

    def io_fds(self, index: int) -> Answer[IoFds]:
        """Return the sub-regions of a region that have descriptors of their own."""
        return IoFds()

    @abc.abstractmethod
    def region_read(self, region: int, offset: int, count: int) -> Answer[bytes]:
        """Read `count` bytes; the connection has checked the range."""

    @abc.abstractmethod
    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool) -> Answer[None]:
        """Write bytes; the connection has checked the range. `posted`: nobody waits for the result."""

    @abc.abstractmethod
    def set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Configure interrupts; `fds` are lent, and what is kept is taken out of them."""

    @abc.abstractmethod
    def dma_map(self, request: DmaMap, fds: Sequence[OwnedFd]) -> Answer[None]:
        """Map client memory; `fds` are lent, and what is kept is taken out of them."""

    @abc.abstractmethod
    def dma_unmap(self, request: DmaUnmap) -> Answer[None]:
        """Unmap one range (flags 0); the memory is not used any more once this is answered."""

    @abc.abstractmethod
    def dma_unmap_all(self) -> Answer[None]:
        """Unmap everything."""

    def renew(self) -> Answer[None]:
        """Make the function as if nobody had ever used it, before this client's first reply.

        Nothing is to be done by a backend whose `open` has done it.

        Raises:
            BackendUnavailable: that is not possible; the client is turned away.
        """
        return None

    @abc.abstractmethod
    def reset(self) -> Answer[None]:
        """DEVICE_RESET."""

    #: Whether every write of the device to client memory goes through this process, which so knows what is dirty.
    device_seen: bool = False

    async def route_dma(self, *, by_message: bool) -> None:
        """Have the device reach client memory by messages, or by the client's files again where there are some.

        When it has returned, the device uses the other way no more.

        Args:
            by_message: whether even memory with a file is written by messages.

        Raises:
            CommandError: the device cannot do that; it goes on as before.
        """
        if by_message:
            raise CommandError("this device cannot write client memory by messages", errno.ENOTSUP)
        await trio.lowlevel.checkpoint()

    #: Whether the device must hold still while `route_dma` works, since memory is not mapped for a moment.
    routing_disturbs: bool = False

    def flush(self) -> Answer[None]:
        """Wait until every access so far is at the device; nothing to do where accesses are answered at once."""
        return None

    def irq_summary(self) -> dict[str, int]:
        """How many vectors have an eventfd, by IRQ index name, for `status`."""
        return {}

    def command_begins(self, tag: int, *, again: bool) -> None:
        """A command of the client begins.

        Args:
            tag: which, modulo 2^16.
            again: a process before this one has begun it already.
        """
        return

    async def quiesce(self) -> None:
        """Finish what the device is doing by itself, before `leave`; commands are answered meanwhile."""
        await trio.lowlevel.checkpoint()

    def leave(self) -> None:
        """Leave everything to the process after this one as it is; `close` then only closes."""
        return

    @abc.abstractmethod
    async def close(self) -> None:
        """The client has gone: interrupts off, bus master off, all maps and descriptors gone."""


class DeviceBackend(abc.ABC):
    """A function's device."""

    #: One line for logs and `status`.
    summary: str

    @property
    def unavailable(self) -> str | None:
        """Why no client can be served now, as far as is known; None when one can."""
        return None

    @property
    def unavailable_since(self) -> float | None:
        """Since when that is so, in seconds since 1970; None when one can be served."""
        return None

    def agent(self) -> Agent | None:
        """The migration that the device has of its own, without an agent on an SoC; it works while `run` does."""
        return None

    #: Whether a process after this one can go on with its clients, and which commands can be begun once more then.
    survives: bool = False
    repeatable: Container[int] = ()

    async def resume(self, link: ClientLink, inheritance: Inheritance) -> BackendSession:
        """Go on with a client that another process has served, and which has noticed nothing.

        Args:
            link: the client.
            inheritance: what was left of it; taken.

        Raises:
            BackendUnavailable: that is not possible.
        """
        raise BackendUnavailable("this kind of device does not outlive its process")

    @abc.abstractmethod
    async def open(self, link: ClientLink) -> BackendSession:
        """Begin to serve a client, before VERSION is answered.

        Raises:
            BackendUnavailable: the device cannot be used now; the client is turned away.
        """

    async def run(self) -> None:
        """The device's own life; runs as long as the function does."""
        return

    def close(self) -> None:
        """Give back everything that the device holds; the function is going away."""
        return


class BackendUnavailable(Exception):
    """The device cannot be used now; the text says why and what would help."""
