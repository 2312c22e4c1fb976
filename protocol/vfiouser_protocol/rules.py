"""What a request must say to be answered, and what a reply must say to be believed; both as tables.

This is about sizes only, which are the same for every device: argsz, transfer sizes, echoes. `argsz` is
*never* the length of the request; it is the largest reply payload that the client takes, and what a reply
says back is how much there is. Three commands have a shortened form of success for a client that takes too
little: DEVICE_GET_REGION_INFO (see `regions`), DEVICE_GET_REGION_IO_FDS and DIRTY_PAGES; all others are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import DirtyPagesFlags, Feature, IoFdType
from vfiouser_protocol.errors import CommandError, RemoteProtocolError
from vfiouser_protocol.limits import MAX_BITMAP_ARGSZ
from vfiouser_protocol.messages import (
    DeviceFeature,
    DeviceInfo,
    DirtyPages,
    DmaMap,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaWrite,
    DmaWriteReply,
    Empty,
    IoFdEntry,
    IrqInfo,
    MigDataRead,
    MigDataReadReply,
    MigDataWrite,
    Payload,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteMultiReply,
    RegionWriteReply,
    SetIrqs,
)
from vfiouser_protocol.messages_device import IO_FD_ENTRY_LAYOUTS, IO_FD_NONE, REGION_IO_FDS_FIXED

P = TypeVar("P", bound=Payload)

_UNBOUNDED = (1 << 32) - 1
_IO_FD_TYPES = frozenset(int(kind) for kind in IoFdType)
_FEATURE_FIXED = 8
#: Reply payloads of GET, as far as they are known without the device; a report's bitmap comes on top.
FEATURE_GET_REPLY = {
    Feature.MIGRATION: 16,
    Feature.MIG_DEVICE_STATE: 16,
    Feature.DMA_LOGGING_REPORT: 32,
    Feature.MIG_DATA_SIZE: 16,
}


class ArgszRule(NamedTuple):
    """Which argsz a request may have.

    Args:
        least: gives the smallest for a request, bytes.
        most: the largest, bytes.
    """

    least: Callable[[Any], int]
    most: int = _UNBOUNDED


def _fixed(size: int) -> Callable[[Any], int]:
    return lambda request: size


def _feature_least(request: DeviceFeature) -> int:
    """SET and PROBE echo the request; GET returns what the feature has."""
    if request.get and not request.probe:
        return FEATURE_GET_REPLY.get(request.index, _FEATURE_FIXED)  # type: ignore[call-overload, no-any-return]
    return _FEATURE_FIXED + len(request.data)


#: Spec: vfio-user, "Message sizes"; the upper bounds are libvfio-user's.
ARGSZ: Mapping[type[Payload], ArgszRule] = MappingProxyType(
    {
        DeviceInfo: ArgszRule(_fixed(16)),
        RegionInfo: ArgszRule(_fixed(32)),
        RegionIoFds: ArgszRule(_fixed(REGION_IO_FDS_FIXED), MAX_BITMAP_ARGSZ),
        IrqInfo: ArgszRule(_fixed(16)),
        SetIrqs: ArgszRule(_fixed(20)),
        DmaMap: ArgszRule(_fixed(32)),
        # With a bitmap, its size counts and not argsz: the v1 fork of QEMU always says 48.
        DmaUnmap: ArgszRule(lambda request: 24 if request.bitmap_size is None else 40, MAX_BITMAP_ARGSZ),
        DirtyPages: ArgszRule(_fixed(8), MAX_BITMAP_ARGSZ),
        DeviceFeature: ArgszRule(_feature_least),
        MigDataRead: ArgszRule(lambda request: 8 + request.size),
        MigDataWrite: ArgszRule(lambda request: 8 + request.size),
    }
)

#: How many data bytes a request moves.
TRANSFERS: Mapping[type[Payload], Callable[[Any], int]] = MappingProxyType(
    {
        RegionRead: lambda request: request.count,
        RegionWrite: lambda request: request.count,
        DmaRead: lambda request: request.count,
        DmaWrite: lambda request: request.count,
        MigDataRead: lambda request: request.size,
        MigDataWrite: lambda request: request.size,
    }
)


def check_request(request: Payload, max_data_xfer_size: int) -> None:
    """Refuse a request whose argsz, transfer size or bitmap size is impossible.

    Args:
        request: the decoded request.
        max_data_xfer_size: largest transfer, bytes: what this side announced, but for MIG_DATA_READ what the
            peer
            announced, if that is less.

    Raises:
        CommandError: EINVAL.

    Spec: vfio-user, "Message sizes" and capability `max_data_xfer_size`.
    """
    cls = type(request)
    transfer = TRANSFERS.get(cls)
    if transfer is not None and transfer(request) > max_data_xfer_size:
        raise CommandError(f"{cls.__name__} moves {transfer(request)} bytes, allowed are {max_data_xfer_size}; refused")
    rule = ARGSZ.get(cls)
    if rule is not None:
        argsz = request.argsz  # type: ignore[attr-defined]
        least = rule.least(request)
        if not least <= argsz <= rule.most:
            raise CommandError(
                f"{cls.__name__} has argsz {argsz}, allowed are {least} to {rule.most}; refused with EINVAL"
            )
        bitmap_size = getattr(request, "bitmap_size", None)
        most = MAX_BITMAP_ARGSZ - 40
        if bitmap_size is not None and bitmap_size > most:
            raise CommandError(f"{cls.__name__} wants {bitmap_size} bytes of bitmap, allowed are {most}; refused")


def require_argsz(argsz: int, needed: int) -> None:
    """Refuse a request that takes less than its reply has, where there is no shortened form.

    Args:
        argsz: reply payload that the client takes, bytes.
        needed: reply payload, bytes.

    Raises:
        CommandError: EINVAL.
    """
    if argsz < needed:
        raise CommandError(f"argsz is {argsz}, the reply needs {needed}; refused with EINVAL")


def region_io_fds_reply(request: RegionIoFds, entries: Sequence[IoFdEntry] = ()) -> tuple[RegionIoFds, bool]:
    """Return the reply to DEVICE_GET_REGION_IO_FDS: all entries, or only their number if argsz is too small.

    Args:
        request: the request.
        entries: the region's sub-regions; none is legal.

    Returns:
        The reply, and whether the entries, and so the file descriptors, are in it.

    Raises:
        CommandError: EINVAL, the request has flags or a count.

    Spec: vfio-user, VFIO_USER_DEVICE_GET_REGION_IO_FDS.
    """
    if request.flags or request.count:
        raise CommandError(f"flags are {request.flags:#x} and count is {request.count}, both must be 0; refused")
    short, long = sorted(IO_FD_ENTRY_LAYOUTS)
    stride = short if all(entry.shadow_offset is None for entry in entries) else long
    needed = REGION_IO_FDS_FIXED + stride * len(entries)
    complete = request.argsz >= needed
    shown = tuple(entries) if complete else ()
    return RegionIoFds(needed, 0, request.index, len(entries), shown), complete


def io_fd_numbers(entry: IoFdEntry) -> tuple[int, ...]:
    """Return the descriptors that a sub-region names, by their position in the reply."""
    numbers = (entry.fd_index, IO_FD_NONE if entry.shadow_mem_fd_index is None else entry.shadow_mem_fd_index)
    return tuple(number for number in numbers if number != IO_FD_NONE)


def check_io_fds(entries: Sequence[IoFdEntry], nfds: int, region_size: int) -> None:
    """Check the sub-regions that a server names in its reply to DEVICE_GET_REGION_IO_FDS.

    Args:
        entries: the sub-regions.
        nfds: descriptors that came with them.
        region_size: bytes of the region.

    Raises:
        RemoteProtocolError: one leaves the region, is of no known type, or names a descriptor that did not come.
    """
    for entry in entries:
        if entry.offset + max(1, entry.size) > region_size or entry.type not in _IO_FD_TYPES:
            raise RemoteProtocolError(
                f"a sub-region {entry.offset:#x}+{entry.size:#x} of type {entry.type} in a region of {region_size:#x} "
                f"bytes; none of them is used"
            )
        if any(number >= nfds for number in io_fd_numbers(entry)):
            raise RemoteProtocolError(
                f"a sub-region with descriptors {io_fd_numbers(entry)} of {nfds}; none of them is used"
            )


def dirty_pages_reply(request: DirtyPages, bitmap: bytes) -> bytes:
    """Return the payload of the reply to DIRTY_PAGES GET_BITMAP, shortened to what the client takes.

    Args:
        request: the request.
        bitmap: the whole bitmap.

    Returns:
        The payload; the first eight bytes of it, which say how much is needed, if argsz is too small.

    Spec: vfio-user 0.9.1, VFIO_USER_DIRTY_PAGES. libvfio-user fills a short reply with stale memory; we end
        it.
    """
    payload = encode(request._replace(argsz=40 + len(bitmap), bitmap=bitmap))
    return payload if len(payload) <= request.argsz else payload[:8]


# --- Replies, on the side that asked ---


def _echo(*names: str) -> Callable[[Any, Any], bool]:
    return lambda request, reply: all(getattr(request, name) == getattr(reply, name) for name in names)


#: When a reply fits its request. A region access may legally move less than was asked for, a DMA access may
#: not.
FITS: Mapping[type[Any], Callable[[Any, Any], bool]] = MappingProxyType(
    {
        RegionReadReply: lambda request, reply: request[:2] == reply[:2] and reply.count <= request.count,
        RegionWriteReply: lambda request, reply: request[:2] == reply[:2] and reply.count <= request.count,
        RegionWriteMultiReply: lambda request, reply: reply.wr_cnt <= len(request.writes),
        DmaReadReply: _echo("address", "count"),
        DmaWriteReply: _echo("address", "count"),
        DmaUnmap: lambda request, reply: request[2:6] == reply[2:6] and (reply.bitmap_size or 0) == len(reply.bitmap),
        MigDataReadReply: lambda request, reply: reply.size <= request.size,
    }
)

#: What a reply of the header alone is taken for: libvfio-user answers region accesses of no bytes so, and
#: unmaps of a device without DMA; older QEMU forks answer every DMA_WRITE so.
WITHOUT_PAYLOAD: Mapping[type[Any], Callable[[Any], Payload | None]] = MappingProxyType(
    {
        RegionReadReply: lambda request: None if request.count else RegionReadReply(request[0], request[1], 0, b""),
        RegionWriteReply: lambda request: RegionWriteReply(*request[:3]),
        DmaWriteReply: lambda request: DmaWriteReply(*request[:2]),
        DmaUnmap: lambda request: request if request.bitmap_size is None else None,
    }
)


def decode_reply(cls: type[P], request: Payload, payload: bytes) -> P:
    """Return the message in a success reply's payload, if it can be the answer to the request.

    Args:
        cls: the reply's class.
        request: what was asked.
        payload: the bytes behind the reply's header.

    Returns:
        The reply.

    Raises:
        CommandError: EINVAL, the reply is too short, contradicts itself or answers something else.
    """
    if cls is DirtyPages and len(payload) == 8 and isinstance(request, DirtyPages):
        # The shortened form: GET_BITMAP without anything behind argsz and flags.
        short: Any = decode(DirtyPages, payload[:4] + bytes(4))
        return short._replace(flags=int(DirtyPagesFlags.GET_BITMAP))  # type: ignore[no-any-return]
    if not payload and cls is not Empty:
        substitute: Any = WITHOUT_PAYLOAD.get(cls, lambda request: None)(request)
        if substitute is not None:
            return substitute  # type: ignore[no-any-return]
    reply = decode(cls, payload)
    fits = FITS.get(cls)
    if fits is not None and not fits(request, reply):
        raise CommandError(f"the {cls.__name__} does not answer the {type(request).__name__} that was sent")
    return reply
