"""The controller memory buffer: memory of the controller that the host maps, for queues, PRP lists and data.

Addresses inside it are resolved here and never go to the client's memory: the VMM maps the BAR back to us
as a range that can be reached only by messages, and for what is ours that detour would be slow and
pointless.

Spec: NVMe 1.4, 4.7 and 3.1.14 to 3.1.17.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_soc.nvme.spec import CmbMsc

_SIZE_UNIT = 1 << 12
_SUPPORTS_ALL = 0x1F  # submission and completion queues, lists, data for reads, data for writes
#: Mixed memory and independent locations allowed everywhere (CQMMS, CQPDS, CDPMLS, CDPCILS, CDMMMS, CQDA).
_LOCATION_FLAGS = 0x1F8
_BASE_MASK = ~0xFFF & (1 << 64) - 1


class Piece(NamedTuple):
    """Part of an access: an offset into the buffer if `local`, else an address of the client."""

    start: int
    length: int
    local: bool


class ControllerMemoryBuffer:
    """The buffer and the windows it is seen through.

    Args:
        memory: the memfd behind the BAR; all of it is resolved here.
        size: bytes that the host is told of; the BAR may be larger, since its size is a power of two.
        bar: index of the BAR.
        bar_address: returns the address the host gave the BAR, or None while it does not decode.
    """

    def __init__(self, memory: SharedMemory, size: int, bar: int, bar_address: Callable[[], int | None]) -> None:
        self.memory = memory
        self._size = size
        self.bar = bar
        self._bar_address = bar_address
        self._space_control = 0

    @property
    def location(self) -> int:
        """Value of CMBLOC once the host has enabled the registers."""
        return self.bar | _LOCATION_FLAGS

    @property
    def size_register(self) -> int:
        """Value of CMBSZ once the host has enabled the registers."""
        return self._size // _SIZE_UNIT << 12 | _SUPPORTS_ALL

    def control(self, value: int) -> bool:
        """Take a new value of CMBMSC.

        Args:
            value: 64-bit register value.

        Returns:
            False if the window it enables would wrap around the address space; it is then not enabled.
        """
        base = value & _BASE_MASK
        valid = not value & CmbMsc.CMSE or base + self.memory.size <= 1 << 64
        self._space_control = value if valid else value & ~CmbMsc.CMSE
        return valid

    def _bases(self) -> Iterator[int]:
        if self._space_control & CmbMsc.CMSE:
            yield self._space_control & _BASE_MASK
        address = self._bar_address()
        if address is not None:
            yield address

    def touches(self, address: int, count: int) -> bool:
        """Whether any byte of the range is in the buffer."""
        size = self.memory.size
        return any(base < address + count and address < base + size for base in self._bases())

    def split(self, address: int, count: int) -> Iterator[Piece]:
        """Split a range into parts inside and outside of the buffer, in order."""
        windows = sorted((base, base + self.memory.size) for base in self._bases())
        end = address + count
        for low, high in windows:
            if address >= end or address >= high or end <= low:
                continue
            if address < low:
                yield Piece(address, low - address, False)
                address = low
            stop = min(end, high)
            yield Piece(address - low, stop - address, True)
            address = stop
        if address < end:
            yield Piece(address, end - address, False)

    def read(self, offset: int, count: int) -> bytes:
        """Read bytes of the buffer."""
        return bytes(self.memory.view[offset : offset + count])

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of the buffer."""
        self.memory.view[offset : offset + len(data)] = data
