"""What firmware and an operating system's PCI core do with a function: look at it, give its BARs addresses,
switch it on.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiouser_oob.client.client import Client
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import RemoteProtocolError

_COMMAND = 0x04
_STATUS = 0x06
_CLASS = 0x08
_HEADER_TYPE = 0x0E
_BAR0 = 0x10
_CAPABILITIES = 0x34
_STATUS_CAPABILITY_LIST = 0x10
_COMMAND_MEMORY = 0x02
_COMMAND_BUS_MASTER = 0x04
_COMMAND_INTX_DISABLE = 0x400
_BAR_IO = 0x1
_BAR_64BIT = 0x4
_BAR_PREFETCHABLE = 0x8
_BAR_COUNT = 6
_CAP_MSIX = 0x11
_MSIX_ENABLE = 0x8000
_MSIX_TABLE_SIZE = 0x7FF
#: Where the first memory BAR goes; any place that no other device of this "machine" uses is as good.
_BAR_WINDOW = 0xE000_0000


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory BAR as config space tells it.

    Args:
        index: region index.
        size: bytes.
        is_64: whether it takes the next BAR's register as its upper half.
        prefetchable: whether it has no read side effects.
        address: where it was put.
    """

    index: int
    size: int
    is_64: bool
    prefetchable: bool
    address: int


class PciFunction:
    """A PCI function behind a connected client; `probe` makes one.

    Args:
        client: the client.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.vendor_id = 0
        self.device_id = 0
        self.class_code = 0
        self.revision = 0
        self.bars: list[Bar] = []
        #: Offset in config space by capability id; the first one of each id counts.
        self.capabilities: dict[int, int] = {}

    @classmethod
    async def probe(cls, client: Client) -> PciFunction:
        """Read the identity and capabilities, size the BARs and give them addresses."""
        function = cls(client)
        await function._identify()
        await function._find_capabilities()
        await function._size_bars()
        return function

    def move(self, client: Client) -> None:
        """Go on with the same function behind another client, as after a migration."""
        self._client = client

    async def read(self, offset: int, width: int) -> int:
        """Read config space, `width` bytes at `offset`."""
        return int.from_bytes(await self._client.region_read(RegionIndex.CONFIG, offset, width), "little")

    async def write(self, offset: int, width: int, value: int) -> None:
        """Write config space, `width` bytes at `offset`."""
        await self._client.region_write(RegionIndex.CONFIG, offset, value.to_bytes(width, "little"))

    async def _identify(self) -> None:
        self.vendor_id = await self.read(0, 2)
        self.device_id = await self.read(2, 2)
        class_and_revision = await self.read(_CLASS, 4)
        self.class_code, self.revision = class_and_revision >> 8, class_and_revision & 0xFF

    async def _find_capabilities(self) -> None:
        if not await self.read(_STATUS, 2) & _STATUS_CAPABILITY_LIST:
            return
        offset = await self.read(_CAPABILITIES, 1) & 0xFC
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise RemoteProtocolError(f"the function's capability list runs in circles at {offset:#x}")
            seen.add(offset)
            header = await self.read(offset, 2)
            self.capabilities.setdefault(header & 0xFF, offset)
            offset = header >> 8 & 0xFC

    async def _size_bars(self) -> None:
        address = _BAR_WINDOW
        index = 0
        while index < _BAR_COUNT:
            register = _BAR0 + 4 * index
            kind = await self.read(register, 4)
            is_64 = not kind & _BAR_IO and bool(kind & _BAR_64BIT)
            size = await self._sizing(register, is_64) if not kind & _BAR_IO else 0
            if size:
                # Natural alignment: a BAR decodes the address bits above its size only.
                address = -(-address // size) * size
                await self.write(register, 4, address & 0xFFFF_FFFF)
                if is_64:
                    await self.write(register + 4, 4, address >> 32)
                self.bars.append(Bar(index, size, is_64, bool(kind & _BAR_PREFETCHABLE), address))
                address += size
            index += 2 if is_64 else 1

    async def _sizing(self, register: int, is_64: bool) -> int:
        await self.write(register, 4, 0xFFFF_FFFF)
        mask = await self.read(register, 4) & ~0xF
        if not is_64:
            return -mask & 0xFFFF_FFFF if mask else 0
        await self.write(register + 4, 4, 0xFFFF_FFFF)
        mask |= await self.read(register + 4, 4) << 32
        return -mask & 0xFFFF_FFFF_FFFF_FFFF

    async def enable(self) -> None:
        """Switch on memory decoding and bus mastering, and INTx off."""
        command = await self.read(_COMMAND, 2)
        await self.write(_COMMAND, 2, command | _COMMAND_MEMORY | _COMMAND_BUS_MASTER | _COMMAND_INTX_DISABLE)

    async def disable(self) -> None:
        """Switch off memory decoding and bus mastering."""
        command = await self.read(_COMMAND, 2)
        await self.write(_COMMAND, 2, command & ~(_COMMAND_MEMORY | _COMMAND_BUS_MASTER))

    async def msix_vectors(self) -> int:
        """How many MSI-X vectors the function has; 0 without MSI-X."""
        offset = self.capabilities.get(_CAP_MSIX)
        return 0 if offset is None else (await self.read(offset + 2, 2) & _MSIX_TABLE_SIZE) + 1

    async def enable_msix(self, on: bool = True) -> None:
        """Set or clear MSI-X enable in config space; eventfds are assigned by SET_IRQS."""
        offset = self.capabilities[_CAP_MSIX] + 2
        control = await self.read(offset, 2)
        await self.write(offset, 2, control | _MSIX_ENABLE if on else control & ~_MSIX_ENABLE)
