"""Payloads about the device: version, information, interrupts, region access and reset.

Each payload is a NamedTuple, below the construct declaration of its layout. Variable parts come last and are
plain bytes; what the parts mean is told by `regions` and `irq`. The fields `index` and `count`, named so by
the specification, hide tuple methods that nobody needs here; mypy wants to be told.
"""

from __future__ import annotations

from typing import NamedTuple

from construct import (
    Array,
    Bytes,
    FixedSized,
    GreedyBytes,
    GreedyRange,
    Int16ul,
    Int32ul,
    Int64ul,
    Rebuild,
    Struct,
    Switch,
    Terminated,
    len_,
    this,
)

VERSION_LAYOUT = Struct("major" / Int16ul, "minor" / Int16ul, "data" / GreedyBytes)


class Version(NamedTuple):
    """VERSION, request and reply.

    Args:
        major: protocol major; only 0 exists.
        minor: highest minor that is understood (request), minor that is used (reply).
        data: JSON text and its NUL, or nothing; see `capabilities`.

    Spec: vfio-user, VFIO_USER_VERSION.
    """

    major: int
    minor: int
    data: bytes = b""


EMPTY_LAYOUT = Struct()


class Empty(NamedTuple):
    """No payload: DEVICE_RESET, and the replies to DMA_MAP, SET_IRQS, DEVICE_RESET and MIG_DATA_WRITE."""


DEVICE_INFO_LAYOUT = Struct("argsz" / Int32ul, "flags" / Int32ul, "num_regions" / Int32ul, "num_irqs" / Int32ul)


class DeviceInfo(NamedTuple):
    """DEVICE_GET_INFO, request and reply.

    Args:
        argsz: bytes of reply payload the client takes; 16 in the reply.
        flags: `DeviceInfoFlags`; 0 in the request.
        num_regions: highest region index + 1.
        num_irqs: number of IRQ indices.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_INFO.
    """

    argsz: int
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0


REGION_INFO_LAYOUT = Struct(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "index" / Int32ul,
    "cap_offset" / Int32ul,
    "size" / Int64ul,
    "offset" / Int64ul,
    "capabilities" / GreedyBytes,
)


class RegionInfo(NamedTuple):
    """DEVICE_GET_REGION_INFO, request and reply.

    Args:
        argsz: bytes of reply payload the client takes (request), bytes a full reply needs (reply).
        flags: `RegionFlags`.
        index: region index.
        cap_offset: payload offset of the first capability, 0 for none.
        size: bytes of the region; 0 means not implemented.
        offset: offset for mmap() of the region's file descriptor.
        capabilities: the bytes after the fixed part.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_REGION_INFO.
    """

    argsz: int
    flags: int
    index: int  # type: ignore[assignment]
    cap_offset: int = 0
    size: int = 0
    offset: int = 0
    capabilities: bytes = b""


IO_FD_ENTRY_LAYOUT = Struct(
    "offset" / Int64ul,
    "size" / Int64ul,
    "fd_index" / Int32ul,
    "type" / Int32ul,
    "flags" / Int32ul,
    "padding" / Rebuild(Int32ul, 0),
    "datamatch" / Int64ul,
)
IO_FD_SHADOW_ENTRY_LAYOUT = Struct(
    "offset" / Int64ul,
    "size" / Int64ul,
    "fd_index" / Int32ul,
    "type" / Int32ul,
    "flags" / Int32ul,
    "shadow_mem_fd_index" / Int32ul,
    "shadow_offset" / Int64ul,
    "datamatch" / Int64ul,
)


class IoFdEntry(NamedTuple):
    """One sub-region of GET_REGION_IO_FDS.

    Args:
        offset: offset inside the region.
        size: access width in bytes; 0 means any.
        fd_index: index into the reply's file descriptors; 0xffffffff means none.
        type: `IoFdType`.
        flags: KVM_IOEVENTFD_FLAG_* or those of ioregionfd.
        datamatch: value to match, or the user data of an ioregionfd.
        shadow_mem_fd_index: index of the shadow memory's file descriptor; None in the short form.
        shadow_offset: offset in the shadow memory; None in the short form.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_REGION_IO_FDS (40-byte entries); libvfio-user, struct
    vfio_user_sub_region_ioeventfd (48-byte entries).
    """

    offset: int
    size: int
    fd_index: int
    type: int
    flags: int = 0
    datamatch: int = 0
    shadow_mem_fd_index: int | None = None
    shadow_offset: int | None = None


IO_FD_NONE = 0xFFFF_FFFF
REGION_IO_FDS_FIXED = 16
#: What an entry's length says about its form. The length itself is not on the wire: it is (argsz - 16) /
#: count, as the v1 specification and libvfio-user have it; the (argsz - 32) of the v2 text does not fit its
#: own fixed part.
IO_FD_ENTRY_LAYOUTS = {40: IO_FD_ENTRY_LAYOUT, 48: IO_FD_SHADOW_ENTRY_LAYOUT}

REGION_IO_FDS_LAYOUT = Struct(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "index" / Int32ul,
    "count" / Int32ul,
    "entries"
    / Switch(
        lambda context: (context.argsz - REGION_IO_FDS_FIXED) // context.count if context.count else 0,
        {size: GreedyRange(layout) for size, layout in IO_FD_ENTRY_LAYOUTS.items()},
    ),
)


class RegionIoFds(NamedTuple):
    """DEVICE_GET_REGION_IO_FDS, request and reply.

    Args:
        argsz: bytes of reply payload the client takes (request), bytes a full reply needs (reply).
        flags: 0.
        index: region index.
        count: number of sub-regions; 0 in the request.
        entries: the sub-regions, or nothing when argsz was too small for all of them.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_REGION_IO_FDS.
    """

    argsz: int
    flags: int
    index: int  # type: ignore[assignment]
    count: int = 0  # type: ignore[assignment]
    entries: tuple[IoFdEntry, ...] = ()


IRQ_INFO_LAYOUT = Struct("argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "count" / Int32ul)


class IrqInfo(NamedTuple):
    """DEVICE_GET_IRQ_INFO, request and reply.

    Args:
        argsz: bytes of reply payload the client takes; 16 in the reply.
        flags: `IrqInfoFlags`.
        index: `IrqIndex`.
        count: number of vectors.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_IRQ_INFO.
    """

    argsz: int
    flags: int
    index: int  # type: ignore[assignment]
    count: int = 0  # type: ignore[assignment]


SET_IRQS_LAYOUT = Struct(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "index" / Int32ul,
    "start" / Int32ul,
    "count" / Int32ul,
    "data" / GreedyBytes,
)


class SetIrqs(NamedTuple):
    """DEVICE_SET_IRQS request; its reply has no payload.

    Args:
        argsz: bytes of this payload; QEMU always says 20.
        flags: `IrqSetFlags`, one DATA and one ACTION bit.
        index: `IrqIndex`.
        start: first vector.
        count: number of vectors.
        data: one byte per vector with DATA_BOOL, else nothing.

    Spec: vfio-user, VFIO_USER_DEVICE_SET_IRQS.
    """

    argsz: int
    flags: int
    index: int  # type: ignore[assignment]
    start: int
    count: int  # type: ignore[assignment]
    data: bytes = b""


REGION_ACCESS_LAYOUT = Struct("offset" / Int64ul, "region" / Int32ul, "count" / Int32ul)
REGION_DATA_LAYOUT = Struct(
    "offset" / Int64ul, "region" / Int32ul, "count" / Int32ul, "data" / Bytes(this.count), Terminated
)


class RegionRead(NamedTuple):
    """REGION_READ request.

    Args:
        offset: offset inside the region, bytes.
        region: region index.
        count: bytes wanted.

    Spec: vfio-user, VFIO_USER_REGION_READ.
    """

    offset: int
    region: int
    count: int  # type: ignore[assignment]


class RegionReadReply(NamedTuple):
    """REGION_READ reply: the request's fields and the bytes that were read."""

    offset: int
    region: int
    count: int  # type: ignore[assignment]
    data: bytes


class RegionWrite(NamedTuple):
    """REGION_WRITE request, and one write of REGION_WRITE_MULTI.

    Args:
        offset: offset inside the region, bytes.
        region: region index.
        count: bytes to write.
        data: exactly `count` bytes.

    Spec: vfio-user, VFIO_USER_REGION_WRITE.
    """

    offset: int
    region: int
    count: int  # type: ignore[assignment]
    data: bytes


class RegionWriteReply(NamedTuple):
    """REGION_WRITE reply: the request's fields; `count` bytes were written."""

    offset: int
    region: int
    count: int  # type: ignore[assignment]


#: A write of REGION_WRITE_MULTI has room for eight bytes, of which the first `count` are meant.
MULTI_WRITE_ROOM = 8
MULTI_WRITE_LAYOUT = Struct(
    "offset" / Int64ul,
    "region" / Int32ul,
    "count" / Int32ul,
    "data" / FixedSized(MULTI_WRITE_ROOM, Bytes(this.count)),
)
REGION_WRITE_MULTI_LAYOUT = Struct(
    "wr_cnt" / Rebuild(Int64ul, len_(this.writes)),
    "writes" / Array(this.wr_cnt, MULTI_WRITE_LAYOUT),
    Terminated,
)


class RegionWriteMulti(NamedTuple):
    """REGION_WRITE_MULTI request: writes of at most eight bytes each, done in order.

    Args:
        writes: the writes.

    Spec: vfio-user, VFIO_USER_REGION_WRITE_MULTI; usable when both sides announced `write_multiple`.
    """

    writes: tuple[RegionWrite, ...]


REGION_WRITE_MULTI_REPLY_LAYOUT = Struct("wr_cnt" / Int64ul)


class RegionWriteMultiReply(NamedTuple):
    """REGION_WRITE_MULTI reply.

    Args:
        wr_cnt: writes that were done.
    """

    wr_cnt: int
