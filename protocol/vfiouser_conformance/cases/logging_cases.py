"""DMA logging by DEVICE_FEATURE, and the bitmap of DMA_UNMAP."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, RefusedRequest, check, refusals, same
from vfiouser_conformance.cases.dma import into_device, out_of_device, pattern, ready
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE, UNMAP
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.migration import FEATURE
from vfiouser_conformance.trial import Trial
from vfiouser_conformance.wire import Received

AREA = Area("LOGGING", "DMA logging (DEVICE_FEATURE)", CaseEffect.SESSION)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
_PAGE = wire.PAGE
_START, _STOP = 0x20006, 0x20007


def start_request(page_size: int = _PAGE, ranges: int = 0, data: bytes = b"") -> bytes:
    """DMA_LOGGING_START."""
    return wire.feature(_START, struct.pack("<QII", page_size, ranges, 0) + data)


def _offered(t: Trial) -> None:
    t.facts.logs()
    t.facts.maps()  # what is not mapped is not logged


def _begin(t: Trial, *, start: bool = True) -> RawLink:
    """A connection with 16 pages of file mapped, and logging started."""
    link = _attach(t)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    if start:
        _start(link)
    return link


def _attach(t: Trial) -> RawLink:
    """A connection with logging off, whatever an earlier client left, and off again when the case ends."""
    _offered(t)
    link = t.attach()
    _end(link)
    t.at_end(lambda: _end(link))
    return link


def _end(link: RawLink) -> None:
    """STOP; some servers refuse to stop what is stopped."""
    link.call(FEATURE, wire.feature(_STOP))


def _start(link: RawLink, page_size: int = _PAGE) -> Received:
    return link.ok(FEATURE, start_request(page_size))


def _report(link: RawLink, address: int = BASE, length: int = SIZE, page_size: int = _PAGE) -> bytes:
    """A report that has to succeed; returns its bitmap."""
    request = wire.log_report(address, length, page_size)
    reply = link.ok(FEATURE, request)
    same(request[8:32].hex(), reply.payload[8:32].hex(), "iova, length, page_size of the report")
    bitmap = reply.payload[32:]
    same(wire.bitmap_bytes(length, page_size), len(bitmap), "bytes of the bitmap")
    same(len(reply.payload), struct.unpack_from("<I", reply.payload)[0], "argsz of the report")
    return bitmap


def _pages(bitmap: bytes) -> list[int]:
    return [n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1]


def _dirty(t: Trial, link: RawLink, *pages: int) -> None:
    """Make the device write to pages of the mapped file."""
    device = ready(t, link)
    for page in pages:
        out_of_device(link, device, BASE + page * _PAGE, pattern(_PAGE, page + 1))


@AREA.case(1, MUST, "R290")
def start(t: Trial) -> None:
    """Logging starts, and the reply says with which page size.

    Sends: START with page size 4096 and no ranges.
    Expects: the request's payload with the page size that is used, a power of two.
    """
    link = _attach(t)
    payload = _start(link).payload
    same(24, len(payload), "payload")
    size = struct.unpack_from("<Q", payload, 8)[0]
    check(size and size & (size - 1) == 0, f"a page size of {size}")


@AREA.case(2, SHOULD, "R292")
def start_twice(t: Trial) -> None:
    """A second START changes nothing.

    Sends: START twice with the same page size; REPORT.
    Expects: success (libvfio-user) or an error (the kernel) for the second; the report works.
    """
    link = _begin(t)
    reply = link.call(FEATURE, start_request())
    t.saw("a second START of logging", "refused" if reply.failed else "accepted", recommended=not reply.failed)
    _report(link)


@AREA.case(3, SHOULD, "R294")
def odd_page_size(t: Trial) -> None:
    """A page size that is no power of two is refused or replaced.

    Sends: START with page size 3000.
    Expects: an error, or success with a power of two; libvfio-user keeps 3000, which is reported.
    """
    reply = _attach(t).call(FEATURE, start_request(3000))
    if reply.failed:
        t.saw("START with page size 3000", "refused", recommended=True)
        return
    size = struct.unpack_from("<Q", reply.payload, 8)[0]
    check(size == 3000 or (size and size & (size - 1) == 0), f"a page size of {size}")
    t.saw("START with page size 3000", f"page size {size}", recommended=size != 3000)


@AREA.case(4, SHOULD, "R296")
def stop_twice(t: Trial) -> None:
    """Logging can be stopped when it is stopped.

    Sends: STOP, START, STOP, STOP.
    Expects: success.
    """
    link = _attach(t)
    for request in (wire.feature(_STOP), start_request(), wire.feature(_STOP), wire.feature(_STOP)):
        link.ok(FEATURE, request)


@AREA.case(5, MUST, "R297")
def clean_report(t: Trial) -> None:
    """What the device did not write is reported clean.

    Sends: START, REPORT of a mapped file of 16 pages.
    Expects: a bitmap of 8 bytes, all zero.
    """
    link = _begin(t)
    same([], _pages(_report(link)), "dirty pages")


@AREA.case(6, MUST, "R308")
def bitmap_sizes(t: Trial) -> None:
    """A bitmap is of whole 64-bit words, and the bits behind its end are zero.

    Sends: REPORT of mapped files of 1, 64 and 65 pages.
    Expects: 8, 8 and 16 bytes.
    """
    link = _attach(t)
    _start(link)
    for n, pages in enumerate((1, 64, 65)):
        address = BASE + n * 0x100000
        link.ok(MAP, wire.dma_map(address, pages * _PAGE), [t.memfd(pages * _PAGE)])
        same([], _pages(_report(link, address, pages * _PAGE)), "dirty pages")


@AREA.case(7, MUST, "R298 R305", effect=CaseEffect.DEVICE)
def written_page(t: Trial) -> None:
    """A page that the device wrote is reported, as bit n % 8 of byte n // 8.

    Sends: START; the device writes page 3 and page 11; REPORT.
    Expects: bits 3 and 11, and no others.
    """
    link = _begin(t)
    _dirty(t, link, 3, 11)
    same([3, 11], _pages(_report(link)), "dirty pages")


@AREA.case(8, MUST, "R299", effect=CaseEffect.DEVICE)
def reporting_clears(t: Trial) -> None:
    """A report forgets what it reported.

    Sends: START; the device writes; REPORT twice; the device writes another page; REPORT.
    Expects: the page, nothing, the other page.
    """
    link = _begin(t)
    _dirty(t, link, 2)
    same([2], _pages(_report(link)), "dirty pages")
    same([], _pages(_report(link)), "dirty pages of the second report")
    _dirty(t, link, 5)
    same([5], _pages(_report(link)), "dirty pages of the third report")


@AREA.case(9, MUST, "R300", effect=CaseEffect.DEVICE)
def other_page_sizes(t: Trial) -> None:
    """A report may have larger or smaller pages than the log.

    Sends: START with 4096; the device writes page 3; REPORT with 8192, and after another write with 2048.
    Expects: bit 1 of the larger, bits 6 and 7 of the smaller.
    """
    link = _begin(t)
    _dirty(t, link, 3)
    same([1], _pages(_report(link, page_size=8192)), "dirty pages of 8192 bytes")
    _dirty(t, link, 3)
    found = _pages(_report(link, page_size=2048))
    check(found and set(found) <= {6, 7}, f"dirty pages of 2048 bytes: {found}")


@AREA.case(10, SHOULD, "R304", effect=CaseEffect.DEVICE)
def any_range(t: Trial) -> None:
    """A report may be of a part of a map, or of several.

    Sends: two maps side by side; the device writes a page of each; REPORT of a part of the first, then of both.
    Expects: the right bits. libvfio-user refuses the first and gives no bitmap for the second, which is reported.
    """
    link = _begin(t)
    link.ok(MAP, wire.dma_map(BASE + SIZE, SIZE), [t.memfd(SIZE)])
    _dirty(t, link, 4, 18)
    reply = link.call(FEATURE, wire.log_report(BASE + 3 * _PAGE, 4 * _PAGE, _PAGE))
    if reply.failed:
        t.saw("REPORT of a part of a map", "refused", recommended=False)
    else:
        same([1], _pages(reply.payload[32:]), "dirty pages of a part")
        t.saw("REPORT of a part of a map", "accepted", recommended=True)
    reply = link.call(FEATURE, wire.log_report(BASE, 2 * SIZE, _PAGE))
    if reply.failed or len(reply.payload) <= 32:
        t.saw("REPORT of two maps", "refused", recommended=False)
        return
    check(18 in _pages(reply.payload[32:]), "page 18, which the device wrote, is not in the report of both maps")
    t.saw("REPORT of two maps", "accepted", recommended=True)


@AREA.case(11, SHOULD, "R306", effect=CaseEffect.DEVICE)
def mapped_later(t: Trial) -> None:
    """What is mapped after START is logged, too.

    Sends: START, DMA_MAP; the device writes; REPORT.
    Expects: the page.
    """
    link = _attach(t)
    _start(link)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    _dirty(t, link, 6)
    same([6], _pages(_report(link)), "dirty pages")


@AREA.case(12, MUST, "R307", effect=CaseEffect.DEVICE)
def reads_are_clean(t: Trial) -> None:
    """What the device reads is not dirty.

    Sends: START; the device reads a page; REPORT.
    Expects: nothing.
    """
    link = _begin(t)
    into_device(link, ready(t, link), BASE + 2 * _PAGE, _PAGE)
    same([], _pages(_report(link)), "dirty pages")


@AREA.case(13, SHOULD, "R309", effect=CaseEffect.DEVICE)
def across_pages(t: Trial) -> None:
    """A write across a border makes both pages dirty.

    Sends: START; the device writes two pages, or a few bytes across a border; REPORT.
    Expects: both pages.
    """
    link = _begin(t)
    device = ready(t, link)
    if device.granule == 1:
        out_of_device(link, device, BASE + 5 * _PAGE - 2, b"\1\2\3\4")
    else:
        out_of_device(link, device, BASE + 4 * _PAGE, pattern(2 * _PAGE))
    same([4, 5], _pages(_report(link)), "dirty pages")


@AREA.case(14, SHOULD, "R311", effect=CaseEffect.DEVICE)
def restart(t: Trial) -> None:
    """A new START begins clean.

    Sends: START; the device writes; STOP; START; REPORT.
    Expects: nothing.
    """
    link = _begin(t)
    _dirty(t, link, 7)
    link.ok(FEATURE, wire.feature(_STOP))
    _start(link)
    same([], _pages(_report(link)), "dirty pages")


@AREA.case(15, COMPAT, "R312", compat="libvfio-user")
def ends_with_the_connection(t: Trial) -> None:
    """Logging ends with its connection.

    Sends: START; closes; DMA_MAP and REPORT on a new connection.
    Expects: an error for the report, as nothing is logged.
    """
    _offered(t)
    link = t.attach()
    _start(link)
    t.drop(link)
    again = t.attach()
    t.at_end(lambda: _end(again))
    again.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    again.refused(FEATURE, wire.log_report(BASE, SIZE, _PAGE))


@AREA.case(16, MUST, "R297")
def golden(t: Trial) -> None:
    """The golden bytes of REPORT get a golden reply.

    Sends: REPORT, byte by byte as it is written down.
    Expects: a clean report, as it is written down.
    """
    link = _begin(t)
    link.send(vectors.message("report dirty pages"))
    reply = link.receive()
    head = wire.HEADER.pack(reply.msg_id, reply.command, reply.size, reply.flags, reply.error)
    same("0f001000380000000100000000000000", head.hex(), "header")
    expected = "2800000008000100000010000000000000000100000000000010000000000000" + "00" * 8
    same(expected, reply.payload.hex(), "payload")


@AREA.case(17, COMPAT, "R173 R161", effect=CaseEffect.DEVICE, compat="libvfio-user")
def bitmap_of_unmap(t: Trial) -> None:
    """DMA_UNMAP can give the bitmap of what it unmaps.

    Sends: START; the device writes page 3; DMA_UNMAP with GET_DIRTY_BITMAP.
    Expects: 24 bytes of request, 16 of bitmap header, the bitmap; the map is gone. An error is reported: the current
    specification has no such flag.
    """
    link = _begin(t)
    _dirty(t, link, 3)
    size = wire.bitmap_bytes(SIZE, _PAGE)
    request = wire.dma_unmap(BASE, SIZE, 1, 40 + size) + struct.pack("<QQ", _PAGE, size)
    reply = link.call(UNMAP, request)
    t.saw("DMA_UNMAP with a bitmap", "refused" if reply.failed else "given", recommended=not reply.failed)
    if not reply.failed:
        same(40 + size, len(reply.payload), "payload of the DMA_UNMAP reply")
        same([3], _pages(reply.payload[40:]), "dirty pages")
        link.refused(UNMAP, wire.dma_unmap(BASE, SIZE))


@AREA.case(18, COMPAT, "R174", compat="libvfio-user")
def bad_bitmap_of_unmap(t: Trial) -> None:
    """A DMA_UNMAP whose bitmap does not fit is refused, and the map stays.

    Sends: DMA_UNMAP with GET_DIRTY_BITMAP without logging, and with a wrong bitmap size; then without the flag.
    Expects: errors; then success.
    """
    link = _begin(t, start=False)
    size = wire.bitmap_bytes(SIZE, _PAGE)
    link.refused(UNMAP, wire.dma_unmap(BASE, SIZE, 1, 40 + size) + struct.pack("<QQ", _PAGE, size))
    _start(link)
    link.refused(UNMAP, wire.dma_unmap(BASE, SIZE, 1, 40 + size + 8) + struct.pack("<QQ", _PAGE, size + 8))
    link.ok(UNMAP, wire.dma_unmap(BASE, SIZE))


def _logged(t: Trial, *payloads: bytes) -> list[tuple[int, bytes]]:
    t.drop(t.link)
    t.link = _attach(t)
    t.link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    _start(t.link)
    return [(FEATURE, payload) for payload in payloads]


def _unlogged(t: Trial, *payloads: bytes) -> list[tuple[int, bytes]]:
    t.drop(t.link)
    t.link = _attach(t)
    t.link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    return [(FEATURE, payload) for payload in payloads]


refusals(
    AREA,
    (
        RefusedRequest(
            30, MUST, "R291",
            "Logging needs a page size.",
            "START with page size 0",
            lambda t: _unlogged(t, start_request(0)),
        ),
        RefusedRequest(
            31, SHOULD, "R293",
            "Logging that is started cannot be started with another page size.",
            "START with 4096, then with 65536",
            lambda t: _logged(t, start_request(65536)),
        ),
        RefusedRequest(
            32, SHOULD, "R295",
            "Ranges that a START announces have to be there.",
            "START with num_ranges 2 and none, with one, and with 2^32 - 1",
            lambda t: _unlogged(
                t, start_request(_PAGE, 2), start_request(_PAGE, 2, b"\0" * 16), start_request(_PAGE, 0xFFFFFFFF)
            ),
        ),
        RefusedRequest(
            33, MUST, "R301",
            "A report needs a page size that is a power of two and fits into its range.",
            "REPORT with page size 0, 3000, and one larger than the range",
            lambda t: _logged(
                t, *(wire.log_report(BASE, SIZE, size, 4096) for size in (0, 3000, 2 * SIZE))
            ),
        ),
        RefusedRequest(
            34, SHOULD, "R302",
            "A report needs logging.",
            "REPORT of a mapped range before START",
            lambda t: _unlogged(t, wire.log_report(BASE, SIZE, _PAGE)),
        ),
        RefusedRequest(
            35, SHOULD, "R303",
            "A report needs a mapped range.",
            "REPORT of a range where nothing is mapped",
            lambda t: _logged(t, wire.log_report(BASE + 16 * SIZE, SIZE, _PAGE)),
        ),
        RefusedRequest(
            36, MUST, "R256",
            "A report without room for its bitmap is refused.",
            "REPORT with argsz 32 and 39, where 40 are needed",
            lambda t: _logged(t, *(wire.log_report(BASE, SIZE, _PAGE, size) for size in (32, 39))),
        ),
    ),
)  # fmt: skip
