"""GET_REGION_INFO: sizes, the two forms of the reply, capabilities, and what mapping shows."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

from vfiouser_conformance import wire
from vfiouser_conformance.case import (
    Area,
    CannotTell,
    CaseEffect,
    Level,
    NotApplicable,
    RefusedRequest,
    check,
    refusals,
    same,
)
from vfiouser_conformance.facts import Region
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command, RegionCapId, RegionFlags, RegionIndex

AREA = Area("REGION-INFO", "region information and mapping", CaseEffect.NONE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
_KNOWN_FLAGS = 0xF
_BARS = range(6)


def _ask(link: RawLink, index: int, argsz: int = 32) -> Received:
    reply = link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index, argsz))
    check(32 <= len(reply.payload) <= max(argsz, 32), f"{len(reply.payload)} bytes came, argsz was {argsz}")
    return reply


def _fields(reply: Received) -> tuple[int, int, int, int, int, int]:
    argsz, flags, index, cap_offset, size, offset = wire.REGION_INFO.unpack_from(reply.payload)
    return argsz, flags, index, cap_offset, size, offset


def _with_caps(t: Trial) -> list[Region]:
    found = [region for region in t.facts.regions if region.argsz > 32]
    if not found:
        raise NotApplicable("no region of the device has capabilities")
    return found


def _mappable(t: Trial) -> list[Region]:
    found = [region for region in t.facts.regions if region.mappable]
    if not found:
        raise NotApplicable("no region of the device may be mapped")
    return found


@AREA.case(1, MUST, "R085")
def every_index(t: Trial) -> None:
    """Every region below num_regions can be asked about.

    Sends: GET_REGION_INFO with argsz 32 for each index.
    Expects: success, at least argsz 32, the same index, known flags.
    """
    link = t.attach()
    check(t.facts.regions, "the device has no regions at all")
    for region in t.facts.regions:
        argsz, flags, index, _, _, _ = _fields(_ask(link, region.index))
        check(argsz >= 32, f"argsz {argsz} of region {region.index}")
        same(region.index, index, "index of the reply")
        check(not flags & ~_KNOWN_FLAGS, f"region {index} has the unknown flags {flags:#x}")


@AREA.case(2, MUST, "R087")
def empty_regions(t: Trial) -> None:
    """A region that is not implemented has size 0 and flags 0.

    Sends: GET_REGION_INFO for each region of size 0.
    Expects: flags 0, no capabilities, no descriptor.
    """
    link = t.attach()
    found = [region for region in t.facts.regions if not region.size]
    if not found:
        raise NotApplicable("every region of the device is implemented")
    for region in found:
        reply = _ask(link, region.index)
        same((32, 0, 0), (*_fields(reply)[:2], _fields(reply)[3]), f"argsz, flags, cap_offset of region {region.index}")
        same((), reply.fds, "descriptors")


@AREA.case(3, MUST, "R089")
def larger_argsz(t: Trial) -> None:
    """More room than needed changes nothing for a region without capabilities.

    Sends: GET_REGION_INFO with argsz 40 and 1000 for regions without capabilities.
    Expects: 32 bytes, argsz 32, cap_offset 0, no CAPS.
    """
    link = t.attach()
    plain = [region for region in t.facts.regions if region.argsz == 32]
    if not plain:
        raise NotApplicable("every region of the device has capabilities")
    for region in plain:
        for argsz in (40, 1000):
            reply = _ask(link, region.index, argsz)
            size, flags, _, cap_offset, _, _ = _fields(reply)
            same((32, 32, 0, 0), (len(reply.payload), size, flags & RegionFlags.CAPS, cap_offset), "32-byte form")


@AREA.case(4, MUST, "R090 R093")
def short_form(t: Trial) -> None:
    """Without room for the capabilities the reply is 32 bytes and says how much room is needed.

    Sends: GET_REGION_INFO with argsz 32 for regions with capabilities.
    Expects: 32 bytes, argsz of the whole. CAPS with cap_offset 32 and no data (rust-vmm) is reported.
    """
    link = t.attach()
    for region in _with_caps(t):
        reply = _ask(link, region.index)
        argsz, flags, _, _, size, _ = _fields(reply)
        same(32, len(reply.payload), "payload of the short form")
        same(region.argsz, argsz, "argsz of the short form")
        same(region.size, size, "size in the short form")
        clear = not flags & RegionFlags.CAPS
        t.saw("CAPS in a short GET_REGION_INFO reply", "clear" if clear else "set", recommended=clear)


@AREA.case(5, COMPAT, "R094", compat="QEMU 11")
def short_form_flag(t: Trial) -> None:
    """CAPS never comes with cap_offset 0, as the kernel does it and QEMU does not take it over the socket.

    Sends: GET_REGION_INFO with argsz 32 and the full argsz for regions with capabilities.
    Expects: with CAPS, cap_offset is at least 32 and at most argsz; without, it is 0.
    """
    link = t.attach()
    for region in _with_caps(t):
        for room in (32, region.argsz):
            argsz, flags, _, cap_offset, _, _ = _fields(_ask(link, region.index, room))
            if flags & RegionFlags.CAPS:
                check(32 <= cap_offset <= argsz, f"cap_offset {cap_offset} with CAPS and argsz {argsz}")
            else:
                same(0, cap_offset, "cap_offset without CAPS")


@AREA.case(6, SHOULD, "R090")
def short_form_without_fd(t: Trial) -> None:
    """The descriptor comes with the full form only: clients keep the one of the last reply.

    Sends: GET_REGION_INFO with argsz 32 for mappable regions with capabilities.
    Expects: no descriptor.
    """
    link = t.attach()
    found = [region for region in _with_caps(t) if region.mappable]
    if not found:
        raise NotApplicable("no mappable region has capabilities")
    for region in found:
        same((), _ask(link, region.index).fds, f"descriptors in the short form of region {region.index}")


@AREA.case(7, SHOULD, "R091")
def room_for_a_part(t: Trial) -> None:
    """Capabilities come whole or not at all.

    Sends: GET_REGION_INFO with an argsz of 8 bytes less than needed.
    Expects: at most argsz bytes, no CAPS, no descriptor, and zeros behind the first 32.
    """
    link = t.attach()
    for region in _with_caps(t):
        reply = _ask(link, region.index, region.argsz - 8)
        check(not reply.payload[32:].strip(b"\0"), "bytes of capabilities in a reply that has no room for them")
        same((), reply.fds, "descriptors")
        same(region.argsz, _fields(reply)[0], "argsz")


@AREA.case(8, MUST, "R092 R107")
def full_form(t: Trial) -> None:
    """With enough room everything comes.

    Sends: GET_REGION_INFO with the argsz that the short form gave, and with 64 more.
    Expects: CAPS, cap_offset at least 32, as many bytes as argsz says, at most one descriptor.
    """
    link = t.attach()
    for region in _with_caps(t):
        for room in (region.argsz, region.argsz + 64):
            reply = _ask(link, region.index, room)
            argsz, flags, _, cap_offset, _, _ = _fields(reply)
            check(flags & RegionFlags.CAPS and cap_offset >= 32, f"flags {flags:#x}, cap_offset {cap_offset}")
            same((region.argsz, region.argsz), (argsz, len(reply.payload)), "argsz and length of the full form")
            check(len(reply.fds) <= 1, f"{len(reply.fds)} descriptors came")


@AREA.case(9, MUST, "R092")
def descriptor(t: Trial) -> None:
    """A region that may be mapped comes with exactly one descriptor, which can be mapped.

    Sends: GET_REGION_INFO with the full argsz for mappable regions.
    Expects: one descriptor of a file that can be mapped shared.
    """
    link = t.attach()
    for region in _mappable(t):
        reply = _ask(link, region.index, region.argsz)
        same(1, len(reply.fds), f"descriptors of region {region.index}")
        for offset, size in region.areas:
            if size:
                _view(t, region, reply.fds[0], offset, size)


@AREA.case(10, COMPAT, "R028", compat="QEMU 11")
def descriptor_with_header(t: Trial) -> None:
    """The descriptor comes with the first byte of the reply.

    Sends: GET_REGION_INFO with the full argsz for mappable regions; the header is received alone.
    Expects: the descriptor arrives with the header.
    """
    link = t.attach()
    for region in _mappable(t):
        reply = _ask(link, region.index, region.argsz)
        check(reply.fds and reply.fds_in_header, "the descriptor did not come with the header of the reply")


@AREA.case(11, MUST, "R093")
def never_more_than_argsz(t: Trial) -> None:
    """No reply is larger than the client's room for it.

    Sends: GET_REGION_INFO for every region with argsz from 32 to 128 in steps of 8.
    Expects: at most argsz bytes.
    """
    link = t.attach()
    for region in t.facts.regions:
        for argsz in range(32, 129, 8):
            _ask(link, region.index, argsz)


@AREA.case(12, MUST, "R095 R096")
def capability_chain(t: Trial) -> None:
    """Capabilities form a chain inside the reply.

    Sends: GET_REGION_INFO with the full argsz for regions with capabilities.
    Expects: each starts 8-aligned behind the fixed part and inside argsz; version 1; the last has next 0.
    """
    link = t.attach()
    for region in _with_caps(t):
        for at, number, version in _chain(region, _ask(link, region.index, region.argsz).payload):
            check(number, f"a capability with id 0 at {at}")
            same(1, version, f"version of capability {number}")


def _chain(region: Region, payload: bytes) -> Iterator[tuple[int, int, int]]:
    """Offset, id and version of each capability; a chain that goes anywhere else than on fails the case."""
    at, seen = wire.REGION_INFO.unpack_from(payload)[3], set[int]()
    while at:
        check(at not in seen, f"the chain of capabilities of region {region.index} runs in a circle at {at}")
        seen.add(at)
        check(at >= 32, f"a capability of region {region.index} at {at}, inside the fixed part of the reply")
        check(at % 8 == 0, f"a capability of region {region.index} at {at}, which is not a multiple of 8")
        check(
            at + 8 <= len(payload), f"a capability of region {region.index} at {at} of a reply of {len(payload)} bytes"
        )
        number, version, following = struct.unpack_from("<HHI", payload, at)
        yield at, number, version
        at = following


@AREA.case(13, MUST, "R095")
def sparse_areas(t: Trial) -> None:
    """Mappable areas are pages inside their region and do not overlap.

    Sends: GET_REGION_INFO with the full argsz for regions with sparse areas.
    Expects: reserved 0, all areas whole, page-aligned, inside the region, apart from each other.
    """
    link = t.attach()
    found = False
    for region in _with_caps(t):
        payload = _ask(link, region.index, region.argsz).payload
        for at, number, _ in _chain(region, payload):
            if number == RegionCapId.SPARSE_MMAP:
                found = True
                check(at + 16 <= len(payload), f"the sparse capability of region {region.index} is not whole")
                count, reserved = struct.unpack_from("<II", payload, at + 8)
                same(0, reserved, "reserved field")
                check(at + 16 + 16 * count <= len(payload), f"{count} areas do not fit into the reply")
                _check_areas(region, [struct.unpack_from("<QQ", payload, at + 16 + 16 * n) for n in range(count)])
    if not found:
        raise NotApplicable("no region of the device has sparse areas")


def _check_areas(region: Region, areas: list[tuple[int, ...]]) -> None:
    end = 0
    for offset, size in sorted((area[0], area[1]) for area in areas):
        check(offset % wire.PAGE == 0 and size % wire.PAGE == 0, f"area {offset:#x}+{size:#x} is not of whole pages")
        check(offset + size <= region.size, f"area {offset:#x}+{size:#x} is not inside region {region.index}")
        check(offset >= end, f"area {offset:#x}+{size:#x} overlaps another one")
        end = offset + size


def _view(t: Trial, region: Region, fd: int, offset: int, size: int) -> mmap.mmap:
    """Map an area as clients do: at the region's offset plus the area's."""
    check(os.fstat(fd).st_size >= region.offset + offset + size or not os.fstat(fd).st_size,
          f"the file of region {region.index} ends before its area {offset:#x}+{size:#x}")  # fmt: skip
    return t.map(fd, size, region.offset + offset)


@AREA.case(14, MUST, "R097 R127")
def mapping_shows_reads(t: Trial) -> None:
    """A mapped area shows what REGION_READ gives.

    Sends: REGION_READ of the begin and the end of each mappable area.
    Expects: the same bytes as in the mapping; nothing can be told from memory whose bytes are all equal.
    """
    link = t.attach()
    shown = set[int]()
    for region in _mappable(t):
        if region.index == t.facts.v1_region:
            continue  # its data can be read while it is saved only
        fd = _ask(link, region.index, region.argsz).fds[0]
        for offset, size in region.areas:
            view = _view(t, region, fd, offset, size)
            for at in {0, size - 64}:
                read = t.read(link, region.index, offset + at, 64)
                same(read.hex(), view[at : at + 64].hex(), f"bytes of region {region.index} at {offset + at:#x}")
                shown.update(read)
    if len(shown) < 2:
        raise CannotTell("all bytes that were read are equal: any mapping of such memory would show the same")


@AREA.case(15, MUST, "R097 R098 R396", effect=CaseEffect.DEVICE)
def mapping_is_shared(t: Trial) -> None:
    """What is written through the mapping is read by messages, and the other way round.

    Sends: writes of 8 bytes both ways in the middle of each mappable area of the test device; needs a profile, as a
    write to an unknown device's memory could do anything.
    Expects: each side sees the other's bytes.
    """
    if t.stimulus.name != "test":
        raise NotApplicable("only the test device's memory may be written anywhere")
    link = t.attach()
    for region in _mappable(t):
        if region.index not in _BARS:
            continue
        fd = _ask(link, region.index, region.argsz).fds[0]
        for offset, size in region.areas:
            view, at = _view(t, region, fd, offset, size), size // 2
            view[at : at + 8] = b"mapped!!"
            same(b"mapped!!", t.read(link, region.index, offset + at, 8), "bytes written through the mapping")
            t.write(link, region.index, offset + at, b"trapped!")
            same(b"trapped!", bytes(view[at : at + 8]), "bytes written by message, in the mapping")
            t.write(link, region.index, offset + at, b"\0" * 8)


@AREA.case(16, MUST, "R099")
def bar_sizes(t: Trial) -> None:
    """The size of every BAR is a power of two, or 0.

    Sends: GET_REGION_INFO for regions 0 to 5.
    Expects: sizes with one bit set, at least 16 bytes; other sizes abort QEMU.
    """
    for region in t.facts.regions[:6]:
        size = region.size
        check(size & (size - 1) == 0, f"BAR{region.index} has {size:#x} bytes")


@AREA.case(17, MUST, "R099 R126", effect=CaseEffect.DEVICE)
def bar_masks(t: Trial) -> None:
    """The BAR registers of config space tell the sizes of the regions.

    Sends: 0xffffffff to each BAR register, a read, and the old value back.
    Expects: the mask of the region's size; all zeros for a region that is not there.
    """
    link = t.attach()
    found = t.read_config(link, 0x10, 24)
    upper = False
    for bar, region in enumerate(t.facts.regions[:6]):
        if upper:
            upper = False
            continue
        old = struct.unpack_from("<I", found, 4 * bar)[0]
        upper = not old & 1 and old & 6 == 4
        mask = _mask(t, link, bar, upper)
        if not region.size:
            same(0, mask, f"mask of BAR{bar}, which is not there")
        else:
            low = 3 if old & 1 else 15
            width = 64 if upper else 32
            same(hex(region.size), hex((~(mask & ~low) + 1) & ((1 << width) - 1)), f"size of BAR{bar} by its register")


def _mask(t: Trial, link: RawLink, bar: int, wide: bool) -> int:
    value = 0
    for n in range(1 + wide):
        offset = 0x10 + 4 * (bar + n)
        old = t.read_config(link, offset, 4)
        t.write(link, RegionIndex.CONFIG, offset, b"\xff" * 4)
        value |= int.from_bytes(t.read_config(link, offset, 4), "little") << 32 * n
        t.write(link, RegionIndex.CONFIG, offset, old)
    return value


@AREA.case(18, MUST, "R100")
def upper_halves(t: Trial) -> None:
    """The region behind a 64-bit BAR has size 0.

    Sends: GET_REGION_INFO and a read of the BAR registers.
    Expects: size 0 for the region of each upper half.
    """
    if len(t.facts.config) < 64:
        raise NotApplicable("config space is too small")
    found = False
    for bar in range(5):
        value = struct.unpack_from("<I", t.facts.config, 0x10 + 4 * bar)[0]
        if t.facts.regions[bar].size and not value & 1 and value & 6 == 4:
            found = True
            same(0, t.facts.regions[bar + 1].size, f"size of region {bar + 1}, the upper half of BAR{bar}")
    if not found:
        raise NotApplicable("the device has no 64-bit BAR")


@AREA.case(19, MUST, "R101")
def config_size(t: Trial) -> None:
    """Config space has 256 or 4096 bytes, for reading and writing.

    Sends: GET_REGION_INFO 7.
    Expects: one of these sizes; READ and WRITE.
    """
    if len(t.facts.regions) <= RegionIndex.CONFIG:
        raise NotApplicable("the device is not a PCI device")
    region = t.facts.regions[RegionIndex.CONFIG]
    check(region.size in (256, 4096), f"config space has {region.size} bytes")
    both = RegionFlags.READ | RegionFlags.WRITE
    same(int(both), region.flags & both, "READ and WRITE of config space")


@AREA.case(20, MUST, "R107")
def stable(t: Trial) -> None:
    """A region's description does not change.

    Sends: GET_REGION_INFO with full argsz twice, the second time on another connection.
    Expects: equal replies.
    """
    first: dict[int, bytes] = {}
    second: dict[int, bytes] = {}
    for found in (first, second):
        link = t.attach()
        for region in t.facts.regions:
            found[region.index] = _ask(link, region.index, region.argsz).payload
        t.drop(link)
    same(first, second, "region descriptions")


_INFO = int(Command.DEVICE_GET_REGION_INFO)

refusals(
    AREA,
    (
        RefusedRequest(
            30, MUST, "R086",
            "A region index that does not exist is refused.",
            "GET_REGION_INFO of region num_regions and 0xffffffff",
            lambda t: [(_INFO, wire.region_info(len(t.facts.regions))), (_INFO, wire.region_info(0xFFFFFFFF))],
        ),
        RefusedRequest(
            31, MUST, "R088",
            "A client without room for the fixed part is refused.",
            "GET_REGION_INFO with argsz 0, 8 and 31",
            lambda t: [(_INFO, wire.region_info(0, argsz)) for argsz in (0, 8, 31)],
        ),
        RefusedRequest(
            32, MUST, "R088",
            "A request that is shorter than its fixed part is refused.",
            "GET_REGION_INFO with 8, 16 and 31 bytes",
            lambda t: [(_INFO, wire.region_info(0)[:size]) for size in (8, 16, 31)],
        ),
    ),
)  # fmt: skip
