"""DIRTY_PAGES, the dirty log of the older generation."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, RefusedRequest, check, refusals, same
from vfiouser_conformance.cases.dma import out_of_device, pattern, ready
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE, UNMAP
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.migration_v1 import STOP_COPY, STOPPED, begin
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command

AREA = Area("DIRTY", "dirty pages (v1)", CaseEffect.SESSION)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
DIRTY = int(Command.DIRTY_PAGES)
_PAGE = wire.PAGE
START, STOP = struct.pack("<II", 8, 1), struct.pack("<II", 8, 2)


def _attach(t: Trial) -> RawLink:
    """A connection with logging off, whatever an earlier client left, and off again when the case ends."""
    t.facts.v1()
    t.facts.maps()  # what is not mapped is not logged
    link = t.attach()
    link.call(DIRTY, STOP)
    t.at_end(lambda: link.call(DIRTY, STOP))
    return link


def _begin(t: Trial, *, start: bool = True) -> RawLink:
    """A connection with 16 pages of file mapped, and logging started."""
    link = _attach(t)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    if start:
        link.ok(DIRTY, START)
    return link


def _get(link: RawLink) -> list[int]:
    """Dirty pages of the mapped file."""
    reply = link.ok(DIRTY, wire.dirty_get(BASE, SIZE))
    size = wire.bitmap_bytes(SIZE, _PAGE)
    same(40 + size, len(reply.payload), "payload of the DIRTY_PAGES reply")
    same(40 + size, struct.unpack_from("<I", reply.payload)[0], "argsz of the DIRTY_PAGES reply")
    bitmap = reply.payload[40:]
    return [n for n in range(8 * size) if bitmap[n // 8] >> n % 8 & 1]


@AREA.case(1, SHOULD, "R349")
def start_and_stop(t: Trial) -> None:
    """Logging can be started and stopped, each twice.

    Sends: START as its golden bytes, START, STOP, STOP.
    Expects: success without payloads.
    """
    link = _begin(t, start=False)
    link.send(vectors.message("start v1 dirty logging"))
    check(not link.reply(18, DIRTY).failed, "START failed")
    for request in (START, STOP, STOP):
        same(16, link.ok(DIRTY, request).size, "size of the DIRTY_PAGES reply")


@AREA.case(2, SHOULD, "R351")
def without_migration(t: Trial) -> None:
    """A device without migration logs nothing.

    Sends: DIRTY_PAGES START.
    Expects: an error; ENOTSUP is usual.
    """
    if t.facts.v1_region is not None:
        raise NotApplicable("the device has a migration region")
    link = t.attach()
    link.refused(DIRTY, START)
    link.alive()


@AREA.case(3, COMPAT, "R353", compat="QEMU's v1 forks")
def clean(t: Trial) -> None:
    """A clean report is all zero, and its bitmap is at byte 40.

    Sends: GET_BITMAP of a mapped file of 16 pages as its golden bytes.
    Expects: 48 bytes with argsz 48.
    """
    link = _begin(t)
    link.send(vectors.message("get v1 dirty pages"))
    reply = link.reply(19, DIRTY)
    check(not reply.failed, f"GET_BITMAP failed with error {reply.error}")
    same(48, len(reply.payload), "payload of the DIRTY_PAGES reply")
    same("3000000004000000", reply.payload[:8].hex(), "argsz and flags")
    same(b"\0" * 8, reply.payload[40:], "bitmap")


@AREA.case(4, MUST, "R353 R305", effect=CaseEffect.DEVICE)
def written_pages(t: Trial) -> None:
    """Pages that the device wrote are reported once.

    Sends: START; the device writes pages 2 and 9; GET_BITMAP twice.
    Expects: bits 2 and 9, then nothing.
    """
    link = _begin(t)
    device = ready(t, link)
    for page in (2, 9):
        out_of_device(link, device, BASE + page * _PAGE, pattern(_PAGE, page))
    same([2, 9], _get(link), "dirty pages")
    same([], _get(link), "dirty pages of the second report")


@AREA.case(5, MUST, "R354")
def small_argsz(t: Trial) -> None:
    """Without room for the bitmap the reply says how much is needed, and shows nothing else.

    Sends: GET_BITMAP with argsz 8 and 40.
    Expects: at most argsz bytes whose argsz is 48, with nothing that was not sent; or an error.
    """
    link = _begin(t)
    for argsz in (8, 40):
        request = wire.dirty_get(BASE, SIZE, argsz=argsz)
        reply = link.call(DIRTY, request)
        t.saw("GET_BITMAP without room", "refused" if reply.failed else "shortened", recommended=not reply.failed)
        if reply.failed:
            continue
        check(len(reply.payload) <= argsz, f"{len(reply.payload)} bytes came, argsz was {argsz}")
        same(48, struct.unpack_from("<I", reply.payload)[0], "argsz of the shortened reply")
        rest = reply.payload[8:]
        check(not rest.strip(b"\0") or rest == request[8 : 8 + len(rest)], f"a shortened reply has {rest.hex()}")


@AREA.case(6, SHOULD, "R357", effect=CaseEffect.DEVICE)
def sub_range(t: Trial) -> None:
    """A part of a map can be asked about.

    Sends: START; the device writes page 5; GET_BITMAP of pages 4 to 7.
    Expects: bit 1; an error (libvfio-user) is reported.
    """
    link = _begin(t)
    out_of_device(link, ready(t, link), BASE + 5 * _PAGE, pattern(_PAGE))
    reply = link.call(DIRTY, wire.dirty_get(BASE + 4 * _PAGE, 4 * _PAGE))
    if not reply.failed:
        same("0200000000000000", reply.payload[40:].hex(), "bitmap")
    t.saw("GET_BITMAP of a part of a map", "refused" if reply.failed else "accepted", recommended=not reply.failed)


@AREA.case(7, SHOULD, "R358")
def without_descriptor(t: Trial) -> None:
    """Memory without a descriptor is the client's to log.

    Sends: GET_BITMAP of a map that has none.
    Expects: an error, or a bitmap without bits.
    """
    link = _begin(t)
    link.ok(MAP, wire.dma_map(BASE + 4 * SIZE, SIZE))
    reply = link.call(DIRTY, wire.dirty_get(BASE + 4 * SIZE, SIZE))
    check(reply.failed or not reply.payload[40:].strip(b"\0"), "pages without a descriptor are reported dirty")


@AREA.case(8, COMPAT, "R360", compat="QEMU's v1 forks")
def bitmap_of_unmap(t: Trial) -> None:
    """DMA_UNMAP with a bitmap goes by the bitmap's size, not by argsz.

    Sends: START; DMA_UNMAP of 128 pages with GET_DIRTY_BITMAP, argsz 48 and a bitmap of 16 bytes.
    Expects: success with 56 bytes, or an error (libvfio-user), which is reported.
    """
    link = _attach(t)
    link.ok(MAP, wire.dma_map(BASE, 128 * _PAGE), [t.memfd(128 * _PAGE)])
    link.ok(DIRTY, START)
    request = wire.dma_unmap(BASE, 128 * _PAGE, 1, 48) + struct.pack("<QQ", _PAGE, 16)
    reply = link.call(UNMAP, request)
    t.saw("DMA_UNMAP with a bitmap and argsz 48", "refused" if reply.failed else "given", recommended=not reply.failed)
    if not reply.failed:
        same(56, len(reply.payload), "payload of the DMA_UNMAP reply")


@AREA.case(9, MUST, "R361", effect=CaseEffect.DEVICE)
def while_stopped(t: Trial) -> None:
    """The log can be read while the device is stopped.

    Sends: START, GET_BITMAP in stop-and-copy and in stopped.
    Expects: success.
    """
    t.facts.maps()
    view = begin(t)
    view.link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    view.link.ok(DIRTY, START)
    for state in (STOP_COPY, STOPPED):
        view.go(state)
        same([], _get(view.link), "dirty pages")


def _logged(t: Trial, *payloads: bytes, start: bool = True) -> list[tuple[int, bytes]]:
    t.drop(t.link)
    t.link = _begin(t, start=start)
    return [(DIRTY, payload) for payload in payloads]


refusals(
    AREA,
    (
        RefusedRequest(
            20, MUST, "R350",
            "A DIRTY_PAGES that is too small is refused.",
            "DIRTY_PAGES START with 4 bytes, and with argsz 4",
            lambda t: _logged(t, START[:4], struct.pack("<II", 4, 1), start=False),
        ),
        RefusedRequest(
            21, MUST, "R352",
            "Exactly one thing is asked for.",
            "DIRTY_PAGES with the flags 0, 3, 5 and 8",
            lambda t: _logged(
                t, *(struct.pack("<II", 48, flags) + wire.dirty_get(BASE, SIZE)[8:] for flags in (0, 3, 5, 8))
            ),
        ),
        RefusedRequest(
            22, MUST, "R355",
            "A GET_BITMAP without its range is refused.",
            "GET_BITMAP with 8 and 39 bytes",
            lambda t: _logged(t, *(wire.dirty_get(BASE, SIZE)[:size] for size in (8, 39))),
        ),
        RefusedRequest(
            23, MUST, "R356",
            "The bitmap has the size that range and page size give.",
            "GET_BITMAP with page size 0, with 3000, and with a bitmap of 16 bytes where 8 are needed",
            lambda t: _logged(
                t,
                wire.dirty_get(BASE, SIZE, 4096)[:24] + struct.pack("<QQ", 0, 8),
                wire.dirty_get(BASE, SIZE, 4096)[:24] + struct.pack("<QQ", 3000, 8),
                wire.dirty_get(BASE, SIZE, bitmap=16),
            ),
        ),
        RefusedRequest(
            24, SHOULD, "R359",
            "A report needs logging.",
            "GET_BITMAP before START",
            lambda t: _logged(t, wire.dirty_get(BASE, SIZE), start=False),
        ),
    ),
)  # fmt: skip
