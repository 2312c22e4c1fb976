"""Payloads about client memory: windows, access by message, and the v1 generation's dirty pages.

The field `count` hides a tuple method that nobody needs here; mypy wants to be told.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from construct import Bytes, Computed, FocusedSeq, GreedyBytes, If, IfThenElse, Int64ul, Padding, Terminated, this

from vfiouser_protocol.constants import DirtyPagesFlags, DmaUnmapFlags
from vfiouser_protocol.fields import LENGTH, START, U32, U64, Show, letters, shown, shown_flags, shown_hex

#: The fourth letter is rare and would only be noise.
ACCESS = Show(lambda flags: letters(flags, "rwm" if flags < 8 else "rwmf"))


class DmaMap(NamedTuple):
    """DMA_MAP request; its reply has no payload.

    Args:
        argsz: bytes of this payload, 32.
        flags: `DmaMapFlags`.
        offset: offset inside the file descriptor that came with the message.
        address: DMA (I/O virtual) address.
        size: bytes.

    Spec: vfio-user, VFIO_USER_DMA_MAP.
    """

    argsz: U32
    flags: Annotated[U32, ACCESS]
    offset: Annotated[U64, shown_hex("offset=")]
    address: Annotated[U64, START]
    size: Annotated[U64, LENGTH]


_WITH_BITMAP = this.flags & int(DmaUnmapFlags.GET_DIRTY_BITMAP)


class DmaUnmap(NamedTuple):
    """DMA_UNMAP, request and reply.

    Args:
        argsz: bytes of reply payload the client takes; repeated in the reply.
        flags: `DmaUnmapFlags`.
        address: DMA address; 0 with ALL.
        size: bytes; 0 with ALL.
        bitmap_pgsize: bytes per bit, only with GET_DIRTY_BITMAP.
        bitmap_size: bytes of bitmap, only with GET_DIRTY_BITMAP.
        bitmap: the bitmap, in the reply only.

    Spec: vfio-user, VFIO_USER_DMA_UNMAP; the flags and the bitmap are those of the v1 generation.
    """

    argsz: U32
    flags: Annotated[U32, shown_flags(DmaUnmapFlags)]
    address: Annotated[U64, START]
    size: Annotated[U64, LENGTH]
    bitmap_pgsize: Annotated[int | None, If(_WITH_BITMAP, Int64ul)] = None
    bitmap_size: Annotated[int | None, If(_WITH_BITMAP, Int64ul), shown("bitmap=")] = None
    bitmap: Annotated[bytes, IfThenElse(_WITH_BITMAP, GreedyBytes, Computed(b""))] = b""


class DmaRead(NamedTuple):
    """DMA_READ request, from server to client.

    Args:
        address: DMA address.
        count: bytes wanted.

    Spec: vfio-user, VFIO_USER_DMA_READ.
    """

    address: Annotated[U64, START]
    count: Annotated[U64, shown("count=")]  # type: ignore[assignment]


class DmaReadReply(NamedTuple):
    """DMA_READ reply: the request's fields and the bytes that were read."""

    address: Annotated[U64, START]
    count: Annotated[U64, shown("count=")]  # type: ignore[assignment]
    data: Annotated[bytes, Bytes(this.count), Terminated]


class DmaWrite(NamedTuple):
    """DMA_WRITE request, from server to client.

    Args:
        address: DMA address.
        count: bytes to write.
        data: exactly `count` bytes.

    Spec: vfio-user, VFIO_USER_DMA_WRITE.
    """

    address: Annotated[U64, START]
    count: Annotated[U64, shown("count=")]  # type: ignore[assignment]
    data: Annotated[bytes, Bytes(this.count), Terminated]


class DmaWriteReply(NamedTuple):
    """DMA_WRITE reply: `count` bytes were written.

    Spec: libvfio-user and QEMU send a 64-bit count; the specification's table gives it four bytes.
    """

    address: Annotated[U64, START]
    count: Annotated[U64, shown("count=")]  # type: ignore[assignment]


#: Data of the narrow layout, with the zeros behind it that make its message as long as a specified one.
_NARROW_DATA = FocusedSeq("data", "data" / Bytes(this._.count), Padding(4))


class NarrowDmaReadReply(NamedTuple):
    """DMA_READ reply as QEMU 10.1 and 10.2 send it: a 32-bit count, the data behind it, and four zeros.

    Its request is the specified one: the upper half of a small count is 0.
    """

    address: Annotated[U64, START]
    count: Annotated[U32, shown("count=")]  # type: ignore[assignment]
    data: Annotated[bytes, _NARROW_DATA, Terminated]


class NarrowDmaWrite(NamedTuple):
    """DMA_WRITE request as QEMU 10.1 and 10.2 read it; their reply has no payload.

    Args:
        address: DMA address.
        count: bytes to write.
        data: exactly `count` bytes.
    """

    address: Annotated[U64, START]
    count: Annotated[U32, shown("count=")]  # type: ignore[assignment]
    data: Annotated[bytes, _NARROW_DATA, Terminated]


_IS_GET_BITMAP = this.flags & int(DirtyPagesFlags.GET_BITMAP)


class DirtyPages(NamedTuple):
    """DIRTY_PAGES of the v1 generation: request, and reply to GET_BITMAP.

    Args:
        argsz: bytes of reply payload the client takes (request), bytes a full reply needs (reply).
        flags: `DirtyPagesFlags`, exactly one.
        iova: start of the range; this and the rest only with GET_BITMAP.
        size: bytes of the range.
        pgsize: bytes per bit.
        bitmap_size: bytes of bitmap.
        bitmap: the bitmap, in the reply only.

    Spec: vfio-user 0.9.1, VFIO_USER_DIRTY_PAGES, with the bitmap at payload offset 40 as every implementation
    has it (the text's tables say 48).
    """

    argsz: U32
    flags: Annotated[U32, shown_flags(DirtyPagesFlags)]
    iova: Annotated[int | None, If(_IS_GET_BITMAP, Int64ul), START] = None
    size: Annotated[int | None, If(_IS_GET_BITMAP, Int64ul), LENGTH] = None
    pgsize: Annotated[int | None, If(_IS_GET_BITMAP, Int64ul)] = None
    bitmap_size: Annotated[int | None, If(_IS_GET_BITMAP, Int64ul)] = None
    bitmap: Annotated[bytes, IfThenElse(_IS_GET_BITMAP, GreedyBytes, Computed(b""))] = b""
