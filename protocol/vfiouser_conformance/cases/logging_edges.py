"""DMA logging by DEVICE_FEATURE: the edges of bitmaps, large pages, and what happens to maps meanwhile."""

from __future__ import annotations

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseEffect, Level, check, same
from vfiouser_conformance.cases.dma import out_of_device, pattern, ready
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE, unmap
from vfiouser_conformance.cases.logging_cases import AREA as AREA
from vfiouser_conformance.cases.logging_cases import start_request
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.migration import FEATURE
from vfiouser_conformance.trial import Trial

MUST, SHOULD = Level.MUST, Level.SHOULD
_PAGE = wire.PAGE
_STOP = 0x20007
_LARGE = 16 * _PAGE


def _begin(t: Trial, *sizes: int) -> RawLink:
    """A connection that logs, with files of these sizes mapped side by side."""
    t.facts.logs()
    t.facts.maps()
    link = t.attach()
    link.call(FEATURE, wire.feature(_STOP))
    t.at_end(lambda: link.call(FEATURE, wire.feature(_STOP)))
    address = BASE
    for size in sizes:
        link.ok(MAP, wire.dma_map(address, size), [t.memfd(size)])
        address += size
    link.ok(FEATURE, start_request())
    return link


def _dirty(t: Trial, link: RawLink, *pages: int) -> None:
    """Make the device write to these pages."""
    device = ready(t, link)
    for page in pages:
        out_of_device(link, device, BASE + page * _PAGE, pattern(_PAGE, page + 1))


def _report(link: RawLink, address: int, length: int, page_size: int = _PAGE) -> list[int]:
    """The pages of a report that has to succeed."""
    bitmap = link.ok(FEATURE, wire.log_report(address, length, page_size)).payload[32:]
    same(wire.bitmap_bytes(length, page_size), len(bitmap), "bytes of the bitmap")
    return [n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1]


@AREA.case(19, MUST, "R298 R305 R308", effect=CaseEffect.DEVICE)
def edges_of_bytes(t: Trial) -> None:
    """The first and the last page of each byte and of each word of a bitmap are reported.

    Sends: START; the device writes pages 0, 7, 8, 63 and 64 of a map of 65; REPORT.
    Expects: these bits, and no others.
    """
    pages = [0, 7, 8, 63, 64]
    link = _begin(t, 65 * _PAGE)
    _dirty(t, link, *pages)
    same(pages, _report(link, BASE, 65 * _PAGE), "dirty pages")


@AREA.case(20, MUST, "R300", effect=CaseEffect.DEVICE)
def much_larger_pages(t: Trial) -> None:
    """A report may have pages of 16 of the log's.

    Sends: START with 4096; the device writes page 17 of a map of 32; REPORT with 65536; the same with page 15.
    Expects: bit 1 of the first, bit 0 of the second.
    """
    link = _begin(t, 2 * _LARGE)
    for page in (17, 15):
        _dirty(t, link, page)
        same([page // 16], _report(link, BASE, 2 * _LARGE, _LARGE), f"dirty pages of {_LARGE} bytes")


@AREA.case(21, SHOULD, "R437")
def without_dma(t: Trial) -> None:
    """Logging can be started and stopped where there is nothing to log: no map, and no DMA.

    Sends: START without any map; DMA_MAP without a descriptor, REPORT of it; STOP.
    Expects: success; a report of that map, if there is one, has the size of its range and is clean.
    """
    t.facts.logs()
    link = t.attach()
    link.call(FEATURE, wire.feature(_STOP))
    t.at_end(lambda: link.call(FEATURE, wire.feature(_STOP)))
    link.ok(FEATURE, start_request())
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    reply = link.call(FEATURE, wire.log_report(BASE, SIZE, _PAGE))
    if not reply.failed:
        same(bytes(wire.bitmap_bytes(SIZE, _PAGE)).hex(), reply.payload[32:].hex(), "the bitmap")
    t.saw("REPORT of memory without a descriptor", "refused" if reply.failed else "clean", recommended=True)
    link.ok(FEATURE, wire.feature(_STOP))


@AREA.case(22, MUST, "R298", effect=CaseEffect.DEVICE)
def unmap_meanwhile(t: Trial) -> None:
    """Unmapping while logging goes on loses nothing of other maps.

    Sends: START; the device writes a page of each of two maps; DMA_UNMAP of the first; REPORT of the second.
    Expects: success; the page of the second.
    """
    link = _begin(t, SIZE, SIZE)
    _dirty(t, link, 2, 19)
    unmap(link, BASE, SIZE)
    found = _report(link, BASE + SIZE, SIZE)
    check(3 in found, f"page 3 of the map that stayed was written, but the report has {found}")
