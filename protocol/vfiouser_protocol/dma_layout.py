"""The two layouts in which clients speak DMA_READ and DMA_WRITE, and how to find a client's.

The specification, libvfio-user and QEMU 11.1 give `count` eight bytes and let the data begin at byte 16. QEMU
10.1 and 10.2, and the forks that they come from, give it four bytes and let the data begin at byte 12, though their
messages are as long as if it began at 16: four zeros follow. Nothing in VERSION tells them apart, and requests of
DMA_READ look the same, so a client is known by its replies. Four bytes decide: the upper half of the specified count is
always 0, and so is what follows the data of the narrow layout. Where both are 0, the data itself has zeros there, and
another place of the same memory has to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from vfiouser_protocol.messages import DmaReadReply, DmaWrite, NarrowDmaReadReply, NarrowDmaWrite

#: Where the data begins in the narrow layout, and by how much later in the specified one.
_DATA, _SHIFT = 12, 4

ReadReply: TypeAlias = DmaReadReply | NarrowDmaReadReply
WriteRequest: TypeAlias = DmaWrite | NarrowDmaWrite


class DmaLayout(Enum):
    """How a client lays out DMA_READ and DMA_WRITE."""

    SPECIFIED = "specified"
    #: QEMU 10.1 and 10.2.
    NARROW = "narrow"


#: The reply to DMA_READ, and the request of DMA_WRITE, in each layout.
READ_REPLIES: Mapping[DmaLayout, type[ReadReply]] = MappingProxyType(
    {DmaLayout.SPECIFIED: DmaReadReply, DmaLayout.NARROW: NarrowDmaReadReply}
)
WRITES: Mapping[DmaLayout, type[WriteRequest]] = MappingProxyType(
    {DmaLayout.SPECIFIED: DmaWrite, DmaLayout.NARROW: NarrowDmaWrite}
)


def fitting(payload: bytes, count: int) -> frozenset[DmaLayout]:
    """Return the layouts that a reply to DMA_READ can have.

    Args:
        payload: behind the reply's header.
        count: bytes that were asked for.

    Returns:
        One layout proves it; none is nonsense; both prove nothing.
    """
    if len(payload) != _DATA + count + _SHIFT or int.from_bytes(payload[8:_DATA], "little") != count:
        return frozenset()
    zeros = {
        DmaLayout.SPECIFIED: payload[_DATA : _DATA + _SHIFT],
        DmaLayout.NARROW: payload[_DATA + count :],
    }
    return frozenset(layout for layout, part in zeros.items() if not any(part))


class DmaProbe(NamedTuple):
    """Where to read a few bytes more, so that their reply has one layout only.

    Args:
        offset: from where the first read began, in bytes.
        size: bytes to read there.
    """

    offset: int
    size: int


def probes(payload: bytes, count: int) -> tuple[DmaProbe, ...]:
    """Return what else to read after a reply that fits both layouts, until one of the replies proves one.

    The first byte of the reply that is not 0 is the first of the memory in one layout, and lies 4 bytes later in the
    other. Either place holds it, and the reply that has it as its first byte cannot be misread.

    Args:
        payload: behind the reply's header; it fits both layouts.
        count: bytes that were asked for.

    Returns:
        Up to two places; none if all of it is 0, which is the same data in both layouts.
    """
    found = next((at for at, byte in enumerate(payload[_DATA:]) if byte), None)
    if found is None:
        return ()
    places = (found - _SHIFT, found)
    return tuple(DmaProbe(place, min(_SHIFT, count - place)) for place in places if 0 <= place < count)
