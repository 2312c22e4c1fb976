"""Region information: what a server says about a region, and what a client may believe of it.

The server half renders a `RegionSpec` into a DEVICE_GET_REGION_INFO reply; the client half reads a reply
whose every offset and count may be a lie.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from construct import Int16ul, Int32ul, Rebuild, Struct

from .constants import RegionCapId, RegionFlags
from .errors import CommandError, RemoteProtocolError
from .fields import U32, U64, layout_of
from .limits import MAX_FILE_OFFSET, MAX_REGION_CAPABILITIES, MAX_SPARSE_AREAS
from .messages_device import RegionInfo
from .packed import packed

#: `next` is the payload offset of the capability that follows, 0 for none.
CAP_HEADER_LAYOUT = Struct("id" / Int16ul, "version" / Int16ul, "next" / Int32ul)
#: In front of the areas of a sparse mmap capability.
SPARSE_LAYOUT = Struct("nr_areas" / Int32ul, "reserved" / Rebuild(Int32ul, 0))
_CAP_VERSION = 1
_ACCESS = int(RegionFlags.READ | RegionFlags.WRITE)


class SparseArea(NamedTuple):
    """A part of a region that may be mapped.

    Args:
        offset: start in the region, in bytes.
        size: length in bytes.
    """

    offset: U64
    size: U64


class RegionType(NamedTuple):
    """What a device-specific region is (VFIO_REGION_INFO_CAP_TYPE).

    Args:
        type: for example REGION_TYPE_MIGRATION.
        subtype: its meaning depends on the type.
    """

    type: U32
    subtype: U32


#: What runs, derived from the declarations: all of a region's information but its capabilities, and their parts.
_FIXED = packed(layout_of(RegionInfo))
_CAP_HEADER = packed(CAP_HEADER_LAYOUT)
_SPARSE_COUNT = packed(SPARSE_LAYOUT)
_AREA = packed(layout_of(SparseArea))
_TYPE = packed(layout_of(RegionType))


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """A region as the server describes it.

    Args:
        index: region index.
        size: length in bytes; 0 means not implemented.
        flags: READ and WRITE of `RegionFlags`; the other bits follow from the rest.
        areas: what of it may be mapped; empty means all of it.
        offset: where the region starts in its file, in bytes.
        type: what it is, for device-specific regions.
        msix_mappable: the MSI-X table lies in a part that may be mapped.
        mappable: a file descriptor exists for it.
    """

    index: int
    size: int
    flags: int = _ACCESS
    areas: tuple[SparseArea, ...] = ()
    offset: int = 0
    type: tuple[int, int] | None = None
    msix_mappable: bool = False
    mappable: bool = False

    @classmethod
    def absent(cls, index: int) -> RegionSpec:
        """A region that the function does not implement."""
        return cls(index, 0, 0)


@dataclass(frozen=True, slots=True)
class RegionDescription:
    """A region as a client learned of it.

    Args:
        index: region index that the server named.
        size: length in bytes; 0 means not implemented.
        flags: `RegionFlags` as sent.
        offset: where the region starts in its file, in bytes.
        argsz: payload bytes that a complete reply needs.
        complete: False if the server had more to say than fitted; ask again with `argsz`.
        areas: what may be mapped; None if no such capability came (then all of it, if MMAP is set).
        type: what it is, if the server said so.
        msix_mappable: the MSI-X table may be mapped too.
        unknown: ids of capabilities that are not understood.
    """

    index: int
    size: int
    flags: int
    offset: int
    argsz: int
    complete: bool = True
    areas: tuple[SparseArea, ...] | None = None
    type: RegionType | None = None
    msix_mappable: bool = False
    unknown: tuple[int, ...] = ()

    @property
    def mappable_areas(self) -> tuple[SparseArea, ...]:
        """What may be mapped, whichever way the server said it."""
        if not self.flags & RegionFlags.MMAP or not self.size:
            return ()
        return (SparseArea(0, self.size),) if self.areas is None else self.areas


def region_info_reply(spec: RegionSpec, argsz: int) -> tuple[bytes, bool]:
    """Render the reply to DEVICE_GET_REGION_INFO.

    Args:
        spec: the region.
        argsz: payload bytes that the client can take, from its request.

    Returns:
        The payload, and whether the region's descriptor goes with it: once, with the complete form.

    Raises:
        CommandError: EINVAL for an argsz below the fixed part.

    Spec: DEVICE_GET_REGION_INFO. When capabilities do not fit, the reply says how much they need, has CAPS
        clear, cap_offset 0 and zero bytes up to the client's argsz (libvfio-user). The kernel's way (CAPS
        with cap_offset 0) makes QEMU refuse the device.
    """
    if argsz < _FIXED.size:
        raise CommandError(
            f"DEVICE_GET_REGION_INFO index {spec.index}: argsz {argsz} is below {_FIXED.size}; refused",
            errno.EINVAL,
        )
    chain = _render_chain(spec)
    needed = _FIXED.size + len(chain)
    flags = spec.flags & _ACCESS
    if spec.mappable and spec.size:
        flags |= RegionFlags.MMAP
    cap_offset = 0
    if not chain or argsz < needed:
        body = bytes(min(needed, argsz) - _FIXED.size)
        attach = spec.mappable and spec.size > 0 and not chain
    else:
        flags |= RegionFlags.CAPS
        cap_offset = _FIXED.size
        body = chain
        attach = spec.mappable and spec.size > 0
    return _FIXED.pack(needed, flags, spec.index, cap_offset, spec.size, spec.offset) + body, attach


def _render_chain(spec: RegionSpec) -> bytes:
    """All capabilities of a region, linked; their offsets count from the start of the payload."""
    bodies: list[tuple[int, bytes]] = []
    if spec.type is not None:
        bodies.append((RegionCapId.TYPE, _TYPE.pack(*spec.type)))
    if spec.mappable and spec.size:
        areas = spec.areas or (SparseArea(0, spec.size),)
        packed = b"".join(_AREA.pack(*area) for area in areas)
        bodies.append((RegionCapId.SPARSE_MMAP, _SPARSE_COUNT.pack(len(areas), 0) + packed))
        if spec.msix_mappable:
            bodies.append((RegionCapId.MSIX_MAPPABLE, b""))
    chain = b""
    for number, (cap_id, body) in enumerate(bodies, 1):
        # Every body is a multiple of 8 bytes, so each capability is aligned as required.
        end = _FIXED.size + len(chain) + _CAP_HEADER.size + len(body)
        chain += _CAP_HEADER.pack(cap_id, _CAP_VERSION, end if number < len(bodies) else 0) + body
    return chain


def parse_region_info(payload: bytes) -> RegionDescription:
    """Read a DEVICE_GET_REGION_INFO reply from a server that is not trusted.

    Args:
        payload: the reply's payload.

    Returns:
        The region. Areas of size 0 are left out, unknown capabilities listed.

    Raises:
        RemoteProtocolError: too short, a size that no such region can have, a capability chain that leaves the
            payload, goes backwards or in circles or is endless, or areas that leave the region or are too many.

    Spec: DEVICE_GET_REGION_INFO. A reply whose argsz exceeds its length is a short form, whether or not CAPS
        is set: libvfio-user clears it, the kernel and rust-vmm keep it.
    """
    if len(payload) < _FIXED.size:
        raise RemoteProtocolError(f"region info of {len(payload)} bytes, {_FIXED.size} are needed; not used")
    argsz, flags, index, cap_offset, size, offset = _FIXED.unpack_from(payload)
    found = _Found(index, size)
    # What cannot be mapped may say any offset: it means nothing there.
    if size > MAX_FILE_OFFSET or (flags & RegionFlags.MMAP and size + offset > MAX_FILE_OFFSET):
        raise found.error(f"{size:#x} bytes at {offset:#x} of its file, of at most {MAX_FILE_OFFSET:#x}")
    complete = argsz <= len(payload)
    if complete and flags & RegionFlags.CAPS and cap_offset:
        _walk_chain(payload[:argsz], cap_offset, found)
    return RegionDescription(
        index=index,
        size=size,
        flags=flags,
        offset=offset,
        argsz=argsz,
        complete=complete,
        areas=found.areas,
        type=found.type,
        msix_mappable=found.msix_mappable,
        unknown=tuple(found.unknown),
    )


class _Found:
    """What the capabilities of one reply have said so far."""

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.size = size
        self.areas: tuple[SparseArea, ...] | None = None
        self.type: RegionType | None = None
        self.msix_mappable = False
        self.unknown: list[int] = []

    def error(self, reason: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"region {self.index} info: {reason}; the region is not used")


def _walk_chain(payload: bytes, position: int, found: _Found) -> None:
    end = _FIXED.size
    read = 0
    while position:
        read += 1
        if read > MAX_REGION_CAPABILITIES:
            raise found.error(f"more than {MAX_REGION_CAPABILITIES} capabilities")
        # Each capability must lie behind the one before: that bounds the walk and rules out circles and
        # overlaps.
        if position < end or position + _CAP_HEADER.size > len(payload):
            raise found.error(f"a capability at {position}, allowed are {end} to {len(payload) - _CAP_HEADER.size}")
        cap_id, _, following = _CAP_HEADER.unpack_from(payload, position)
        body = position + _CAP_HEADER.size
        reader = _READERS.get(cap_id)
        if reader is None:
            found.unknown.append(cap_id)
            end = body
        else:
            end = reader(payload, body, found)
        position = following


def _read_sparse(payload: bytes, body: int, found: _Found) -> int:
    if body + _SPARSE_COUNT.size > len(payload):
        raise found.error("a sparse mmap capability is cut off")
    count: int = _SPARSE_COUNT.unpack_from(payload, body)[0]
    start = body + _SPARSE_COUNT.size
    end = start + count * _AREA.size
    if count > MAX_SPARSE_AREAS:
        raise found.error(f"{count} sparse areas, of at most {MAX_SPARSE_AREAS}")
    if end > len(payload):
        raise found.error(f"{count} sparse areas do not fit in {len(payload)} bytes")
    areas = [SparseArea(*pair) for pair in _AREA.iter_unpack(payload[start:end])]
    for area in areas:
        if area.offset + area.size > found.size:
            raise found.error(f"sparse area {area.offset:#x}+{area.size:#x} leaves its {found.size:#x} bytes")
    found.areas = tuple(area for area in areas if area.size)
    return end


def _read_type(payload: bytes, body: int, found: _Found) -> int:
    end = body + _TYPE.size
    if end > len(payload):
        raise found.error("a type capability is cut off")
    found.type = RegionType(*_TYPE.unpack_from(payload, body))
    return end


def _read_msix_mappable(payload: bytes, body: int, found: _Found) -> int:
    found.msix_mappable = True
    return body


_READERS: dict[int, Callable[[bytes, int, _Found], int]] = {
    RegionCapId.SPARSE_MMAP: _read_sparse,
    RegionCapId.TYPE: _read_type,
    RegionCapId.MSIX_MAPPABLE: _read_msix_mappable,
}
