"""GET_REGION_IO_FDS."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, RefusedRequest, check, refusals, same
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command

AREA = Area("IO-FD", "ioeventfds", CaseEffect.NONE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
IO_FDS = int(Command.DEVICE_GET_REGION_IO_FDS)
NO_FD = 0xFFFFFFFF


def ask(link: RawLink, index: int, argsz: int) -> tuple[int, int, int, bytes, tuple[int, ...]]:
    """Ask for a region's ioeventfds; returns argsz, index, count, entries and descriptors."""
    reply = link.ok(IO_FDS, wire.info(argsz, 0, index))
    check(16 <= len(reply.payload) <= argsz, f"a payload of {len(reply.payload)} bytes, argsz was {argsz}")
    size, flags, echoed, count = wire.INFO.unpack_from(reply.payload)
    same(0, flags, "flags")
    same(index, echoed, "index")
    return size, echoed, count, reply.payload[16:], reply.fds


def bars(t: Trial) -> list[int]:
    """The BARs that the device has.

    Raises:
        NotApplicable: it has none.
    """
    found = [region.index for region in t.facts.regions[:6] if region.size]
    if not found:
        raise NotApplicable("the device has no BAR")
    return found


@AREA.case(1, SHOULD, "R213 R214")
def counts(t: Trial) -> None:
    """Every BAR can be asked for its ioeventfds.

    Sends: GET_REGION_IO_FDS with argsz 16 for each BAR.
    Expects: 16 bytes: flags 0, the index, the count and the argsz that it needs; no descriptors.
    """
    link = t.attach()
    for index in bars(t):
        size, _, count, entries, fds = ask(link, index, 16)
        same((b"", ()), (entries, fds), "entries and descriptors in 16 bytes")
        stride = (size - 16) // count if count else 0
        check(size == 16 if not count else stride in (40, 48), f"argsz {size} for {count} sub-regions")


@AREA.case(2, MUST, "R215 R216")
def entries(t: Trial) -> None:
    """The full answer has entries whose descriptors came along.

    Sends: GET_REGION_IO_FDS with the argsz that the short answer gave.
    Expects: entries of 40 or 48 bytes, each naming a descriptor that came, or none; each inside the region.
    """
    link = t.attach()
    found = False
    for index in bars(t):
        size, _, count, _, _ = ask(link, index, 16)
        if not count:
            continue
        found = True
        full, _, again, data, fds = ask(link, index, size)
        same((size, count), (full, again), "argsz and count of the full answer")
        stride = (full - 16) // count
        t.saw("entries of GET_REGION_IO_FDS", f"{stride} bytes", recommended=True)
        for n in range(count):
            offset, width, number = struct.unpack_from("<QQI", data, n * stride)
            check(number == NO_FD or number < len(fds), f"fd_index {number} with {len(fds)} descriptors")
            check(offset + width <= t.facts.regions[index].size, f"a sub-region at {offset:#x} outside the region")
    if not found:
        raise NotApplicable("no BAR of the device has ioeventfds")


@AREA.case(3, SHOULD, "R218 R213")
def empty_region(t: Trial) -> None:
    """A region that is not implemented has no ioeventfds.

    Sends: GET_REGION_IO_FDS for a region of size 0.
    Expects: count 0, or an error.
    """
    link = t.attach()
    reply = link.call(IO_FDS, wire.info(16, 0, t.facts.empty_region()))
    if not reply.failed:
        same(0, wire.INFO.unpack_from(reply.payload)[3], "count")
    t.saw("ioeventfds of an empty region", "refused" if reply.failed else "count 0", recommended=not reply.failed)


@AREA.case(4, SHOULD, "R213")
def golden(t: Trial) -> None:
    """The golden bytes of GET_REGION_IO_FDS get an answer.

    Sends: GET_REGION_IO_FDS of region 1, byte by byte as it is written down.
    Expects: success with index 1, or an error if the device has no BAR1.
    """
    link = t.attach()
    link.send(vectors.message("get io fds 1"))
    reply = link.reply(5, IO_FDS)
    if reply.failed:
        check(not t.facts.regions[1].size, f"BAR1 exists, and error {reply.error} came")
        raise NotApplicable("the device has no BAR1")
    same("0000000001000000", reply.payload[4:12].hex(), "flags and index")


refusals(
    AREA,
    (
        RefusedRequest(
            10, MUST, "R210",
            "Flags and count of the request are 0.",
            "GET_REGION_IO_FDS with flags 1, and with count 1",
            lambda t: [(IO_FDS, wire.info(16, 1, 0, 0)), (IO_FDS, wire.info(16, 0, 0, 1))],
        ),
        RefusedRequest(
            11, MUST, "R211",
            "A client without room for the fixed part is refused.",
            "GET_REGION_IO_FDS with argsz 0 and 15, and with 15 bytes",
            lambda t: [(IO_FDS, wire.info(0)), (IO_FDS, wire.info(15)), (IO_FDS, wire.info()[:15])],
        ),
        RefusedRequest(
            12, MUST, "R212",
            "A region index that does not exist is refused.",
            "GET_REGION_IO_FDS of region num_regions and 0xffffffff",
            lambda t: [(IO_FDS, wire.info(16, 0, index)) for index in (len(t.facts.regions), 0xFFFFFFFF)],
        ),
    ),
)  # fmt: skip
