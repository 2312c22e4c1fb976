"""Payloads about the device: version, information, interrupts, region access and reset.

Variable parts come last and are plain bytes; what the parts mean is told by `regions` and `irq`. The fields `index` and
`count`, named so by the specification, hide tuple methods that nobody needs here; mypy wants to be told.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, NamedTuple

from construct import (
    Array,
    Bytes,
    FixedSized,
    GreedyRange,
    Int32ul,
    Int64ul,
    Rebuild,
    Struct,
    Switch,
    Terminated,
    len_,
    this,
)

from vfiouser_protocol.constants import DeviceInfoFlags, IrqIndex, IrqInfoFlags, IrqSetFlags, RegionIndex
from vfiouser_protocol.fields import (
    AT,
    REGISTER_VALUE,
    U16,
    U32,
    U64,
    Rest,
    Show,
    member_name,
    quoted,
    register_value,
    shown,
    shown_flags,
    shown_hex,
    shown_length,
    shown_letters,
    shown_member,
)

REGION = shown_member("region=", RegionIndex)
IRQ = shown_member("irq=", IrqIndex)
MINOR = Show(lambda minor: f".{minor}", close=True)
FIRST = Show(lambda start: f"[{start}", close=True)
VECTORS = Show(lambda count: f"+{count}]", close=True)


class Version(NamedTuple):
    """VERSION, request and reply.

    Args:
        major: protocol major; only 0 exists.
        minor: highest minor that is understood (request), minor that is used (reply).
        data: JSON text and its NUL, or nothing; see `capabilities`.

    Spec: vfio-user, VFIO_USER_VERSION.
    """

    major: Annotated[U16, Show()]
    minor: Annotated[U16, MINOR]
    data: Annotated[Rest, Show(quoted, unless=b"")] = b""


class Empty(NamedTuple):
    """No payload: DEVICE_RESET, and the replies to DMA_MAP, SET_IRQS, DEVICE_RESET and MIG_DATA_WRITE."""


class DeviceInfo(NamedTuple):
    """DEVICE_GET_INFO, request and reply.

    Args:
        argsz: bytes of reply payload the client takes; 16 in the reply.
        flags: `DeviceInfoFlags`; 0 in the request.
        num_regions: highest region index + 1.
        num_irqs: number of IRQ indices.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_INFO.
    """

    argsz: Annotated[U32, shown("argsz=")]
    flags: Annotated[U32, shown_flags(DeviceInfoFlags)] = 0
    num_regions: Annotated[U32, shown("regions=", unless=0)] = 0
    num_irqs: Annotated[U32, shown("irqs=", unless=0)] = 0


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

    argsz: Annotated[U32, shown("argsz=")]
    flags: Annotated[U32, shown_letters("rwmc")]
    index: Annotated[U32, REGION]  # type: ignore[assignment]
    cap_offset: U32 = 0
    size: Annotated[U64, shown_hex("size=")] = 0
    offset: U64 = 0
    capabilities: Annotated[Rest, shown_length("caps=")] = b""


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
_IO_FD_ENTRIES = Switch(
    lambda context: (context.argsz - REGION_IO_FDS_FIXED) // context.count if context.count else 0,
    {size: GreedyRange(layout) for size, layout in IO_FD_ENTRY_LAYOUTS.items()},
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

    argsz: U32
    flags: U32
    index: Annotated[U32, REGION]  # type: ignore[assignment]
    count: Annotated[U32, shown("count=")] = 0  # type: ignore[assignment]
    entries: Annotated[tuple[IoFdEntry, ...], _IO_FD_ENTRIES] = ()


class IrqInfo(NamedTuple):
    """DEVICE_GET_IRQ_INFO, request and reply.

    Args:
        argsz: bytes of reply payload the client takes; 16 in the reply.
        flags: `IrqInfoFlags`.
        index: `IrqIndex`.
        count: number of vectors.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_IRQ_INFO.
    """

    argsz: U32
    flags: Annotated[U32, shown_flags(IrqInfoFlags)]
    index: Annotated[U32, IRQ]  # type: ignore[assignment]
    count: Annotated[U32, shown("count=", unless=0)] = 0  # type: ignore[assignment]


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

    argsz: U32
    flags: Annotated[U32, shown_flags(IrqSetFlags)]
    index: Annotated[U32, IRQ]  # type: ignore[assignment]
    start: Annotated[U32, FIRST]
    count: Annotated[U32, VECTORS]  # type: ignore[assignment]
    data: Rest = b""


class RegionRead(NamedTuple):
    """REGION_READ request.

    Args:
        offset: offset inside the region, bytes.
        region: region index.
        count: bytes wanted.

    Spec: vfio-user, VFIO_USER_REGION_READ.
    """

    offset: Annotated[U64, AT]
    region: Annotated[U32, REGION]
    count: Annotated[U32, shown("count=")]  # type: ignore[assignment]


class RegionReadReply(NamedTuple):
    """REGION_READ reply: the request's fields and the bytes that were read."""

    offset: Annotated[U64, AT]
    region: Annotated[U32, REGION]
    count: Annotated[U32, shown("count=")]  # type: ignore[assignment]
    data: Annotated[bytes, Bytes(this.count), Terminated, REGISTER_VALUE]


class RegionWrite(NamedTuple):
    """REGION_WRITE request, and one write of REGION_WRITE_MULTI.

    Args:
        offset: offset inside the region, bytes.
        region: region index.
        count: bytes to write.
        data: exactly `count` bytes.

    Spec: vfio-user, VFIO_USER_REGION_WRITE.
    """

    offset: Annotated[U64, AT]
    region: Annotated[U32, REGION]
    count: Annotated[U32, shown("count=")]  # type: ignore[assignment]
    data: Annotated[bytes, Bytes(this.count), Terminated, REGISTER_VALUE]


class RegionWriteReply(NamedTuple):
    """REGION_WRITE reply: the request's fields; `count` bytes were written."""

    offset: Annotated[U64, AT]
    region: Annotated[U32, REGION]
    count: Annotated[U32, shown("count=")]  # type: ignore[assignment]


#: A write of REGION_WRITE_MULTI has room for eight bytes, of which the first `count` are meant.
MULTI_WRITE_ROOM = 8
MULTI_WRITE_LAYOUT = Struct(
    "offset" / Int64ul,
    "region" / Int32ul,
    "count" / Int32ul,
    "data" / FixedSized(MULTI_WRITE_ROOM, Bytes(this.count)),
)
_WR_CNT = "wr_cnt" / Rebuild(Int64ul, len_(this.writes))


#: Writes of one message that are shown.
_MOST_SHOWN = 4


def _writes(writes: tuple[RegionWrite, ...]) -> str:
    """Return how many writes there are, and the first of them."""
    first = (f" {member_name(one.region, RegionIndex)}+{one.offset:#x}{register_value(one.data)}" for one in writes)
    more = " …" if len(writes) > _MOST_SHOWN else ""
    return f"{len(writes)}{''.join(islice(first, _MOST_SHOWN))}{more}"


class RegionWriteMulti(NamedTuple):
    """REGION_WRITE_MULTI request: writes of at most eight bytes each, done in order.

    Args:
        writes: the writes.

    Spec: vfio-user, VFIO_USER_REGION_WRITE_MULTI; usable when both sides announced `write_multiple`.
    """

    writes: Annotated[
        tuple[RegionWrite, ...], _WR_CNT, Array(this.wr_cnt, MULTI_WRITE_LAYOUT), Terminated, Show(_writes, "writes=")
    ]


class RegionWriteMultiReply(NamedTuple):
    """REGION_WRITE_MULTI reply.

    Args:
        wr_cnt: writes that were done.
    """

    wr_cnt: Annotated[U64, shown("done=")]
