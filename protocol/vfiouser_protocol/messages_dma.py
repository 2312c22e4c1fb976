"""Payloads about client memory: windows, access by message, and the v1 generation's dirty pages.

The field `count` hides a tuple method that nobody needs here; mypy wants to be told.
"""

from __future__ import annotations

from typing import NamedTuple

from construct import Bytes, Computed, GreedyBytes, If, IfThenElse, Int32ul, Int64ul, Struct, Terminated, this

from vfiouser_protocol.constants import DirtyPagesFlags, DmaUnmapFlags

DMA_MAP_LAYOUT = Struct("argsz" / Int32ul, "flags" / Int32ul, "offset" / Int64ul, "address" / Int64ul, "size" / Int64ul)


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

    argsz: int
    flags: int
    offset: int
    address: int
    size: int


_has_dirty_bitmap = this.flags & int(DmaUnmapFlags.GET_DIRTY_BITMAP)

DMA_UNMAP_LAYOUT = Struct(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "address" / Int64ul,
    "size" / Int64ul,
    "bitmap_pgsize" / If(_has_dirty_bitmap, Int64ul),
    "bitmap_size" / If(_has_dirty_bitmap, Int64ul),
    "bitmap" / IfThenElse(_has_dirty_bitmap, GreedyBytes, Computed(b"")),
)


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

    argsz: int
    flags: int
    address: int
    size: int
    bitmap_pgsize: int | None = None
    bitmap_size: int | None = None
    bitmap: bytes = b""


DMA_ACCESS_LAYOUT = Struct("address" / Int64ul, "count" / Int64ul)
DMA_DATA_LAYOUT = Struct("address" / Int64ul, "count" / Int64ul, "data" / Bytes(this.count), Terminated)


class DmaRead(NamedTuple):
    """DMA_READ request, from server to client.

    Args:
        address: DMA address.
        count: bytes wanted.

    Spec: vfio-user, VFIO_USER_DMA_READ.
    """

    address: int
    count: int  # type: ignore[assignment]


class DmaReadReply(NamedTuple):
    """DMA_READ reply: the request's fields and the bytes that were read."""

    address: int
    count: int  # type: ignore[assignment]
    data: bytes


class DmaWrite(NamedTuple):
    """DMA_WRITE request, from server to client.

    Args:
        address: DMA address.
        count: bytes to write.
        data: exactly `count` bytes.

    Spec: vfio-user, VFIO_USER_DMA_WRITE.
    """

    address: int
    count: int  # type: ignore[assignment]
    data: bytes


class DmaWriteReply(NamedTuple):
    """DMA_WRITE reply: `count` bytes were written.

    Spec: libvfio-user and QEMU send a 64-bit count; the specification's table gives it four bytes.
    """

    address: int
    count: int  # type: ignore[assignment]


_is_get_bitmap = this.flags & int(DirtyPagesFlags.GET_BITMAP)

DIRTY_PAGES_LAYOUT = Struct(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "iova" / If(_is_get_bitmap, Int64ul),
    "size" / If(_is_get_bitmap, Int64ul),
    "pgsize" / If(_is_get_bitmap, Int64ul),
    "bitmap_size" / If(_is_get_bitmap, Int64ul),
    "bitmap" / IfThenElse(_is_get_bitmap, GreedyBytes, Computed(b"")),
)


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

    argsz: int
    flags: int
    iova: int | None = None
    size: int | None = None
    pgsize: int | None = None
    bitmap_size: int | None = None
    bitmap: bytes = b""
