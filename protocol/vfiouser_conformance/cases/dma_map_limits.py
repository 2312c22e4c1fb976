"""DMA_MAP and DMA_UNMAP at limits that nobody announces: of size, of number, of a reply's length."""

from __future__ import annotations

import struct

from vfiouser_conformance import wire
from vfiouser_conformance.case import Level, check
from vfiouser_conformance.cases.dma_map import AREA as AREA
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE, UNMAP, unmap
from vfiouser_conformance.cases.logging_cases import start_request
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command

SHOULD = Level.SHOULD
_PAGE = wire.PAGE
#: Where what is too large is put, clear of what is not.
_FAR = 1 << 40
#: More than the addresses of a process, and more than any device's.
_SPARSE, _GIANT = 1 << 47, 1 << 62
#: The size limit of replies that libvfio-user has.
_ROOM = 1 << 20
#: So many mappings are tried on a server that does not say how many it takes.
_MANY = 600
_LOGGING_STOP = 0x20007
_GET_BITMAP = 1


@AREA.case(24, SHOULD, "R427")
def giant_mapping(t: Trial) -> None:
    """A mapping that is too large is refused, or does no harm.

    Sends: DMA_MAP of 64 KiB; of a sparse file of 2^47 bytes, and of 2^62 bytes without a descriptor; DMA_UNMAP of the
    first, and of what was accepted.
    Expects: success or an error for the large ones, which is reported; the first is as it was.
    """
    t.facts.maps()
    link = t.attach()
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    for size, fds in ((_SPARSE, [t.memfd(_SPARSE)]), (_GIANT, [])):
        failed = link.call(MAP, wire.dma_map(_FAR, size), fds).failed
        what = f"DMA_MAP of 2^{size.bit_length() - 1} bytes {'with' if fds else 'without'} a descriptor"
        t.saw(what, "refused" if failed else "accepted", recommended=True)
        if not failed:
            unmap(link, _FAR, size)
    unmap(link, BASE, SIZE)
    link.alive()


@AREA.case(25, SHOULD, "R428")
def unannounced_limit(t: Trial) -> None:
    """One mapping too many is refused where no limit was announced, and changes nothing of the others.

    Sends: VERSION without capabilities; 600 DMA_MAP without descriptors, or as many as are accepted; DMA_UNMAP of the
    first and the last.
    Expects: the unmaps succeed. How many mappings were accepted is reported.
    """
    t.facts.maps()
    link = t.attach(b"")
    taken = 0
    while taken < _MANY and not link.call(MAP, wire.dma_map(BASE + taken * _PAGE, _PAGE)).failed:
        taken += 1
    check(taken, "not one mapping was accepted")
    t.saw("mappings without an announced limit", "refused at some number" if taken < _MANY else f"at least {_MANY}",
          recommended=True)  # fmt: skip
    unmap(link, BASE, _PAGE)
    if taken > 1:
        unmap(link, BASE + (taken - 1) * _PAGE, _PAGE)


@AREA.case(26, SHOULD, "R429")
def unmap_with_much_room(t: Trial) -> None:
    """A DMA_UNMAP that has room for more than a megabyte is refused, or done like any other.

    Sends: DMA_MAP; DMA_UNMAP of it with argsz 1 MiB + 1, then with argsz 0xffffffff; DMA_UNMAP with argsz 24.
    Expects: an error (libvfio-user), after which the mapping is there, or a reply of 24 bytes, after which it is not.
    """
    t.facts.maps()
    link = t.attach()
    for argsz in (_ROOM + 1, 0xFFFFFFFF):
        link.ok(MAP, wire.dma_map(BASE, SIZE))
        reply = link.call(UNMAP, wire.dma_unmap(BASE, SIZE, argsz=argsz))
        t.saw("DMA_UNMAP with room for more than 1 MiB", "refused" if reply.failed else "done", recommended=True)
        if reply.failed:
            unmap(link, BASE, SIZE)
        else:
            check(len(reply.payload) == 24, f"the reply has {len(reply.payload)} bytes of payload, not 24")
            link.refused(UNMAP, wire.dma_unmap(BASE, SIZE))


@AREA.case(27, SHOULD, "R430")
def giant_bitmap(t: Trial) -> None:
    """A bitmap that no reply can hold is refused, and the mapping stays.

    Sends: where the server logs DMA, START; DMA_MAP; DMA_UNMAP with GET_DIRTY_BITMAP and a bitmap of 2^64 - 40,
    2^64 - 8 and 2^64 - 1 bytes; DMA_UNMAP.
    Expects: errors, then success.
    """
    t.facts.maps()
    link = t.attach()
    if t.facts.logging:
        link.ok(Command.DEVICE_FEATURE, start_request())
        t.at_end(lambda: link.call(Command.DEVICE_FEATURE, wire.feature(_LOGGING_STOP)))
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    for less in (40, 8, 1):
        bitmap = struct.pack("<QQ", _PAGE, (1 << 64) - less)
        link.refused(UNMAP, wire.dma_unmap(BASE, SIZE, _GET_BITMAP, 48) + bitmap)
    unmap(link, BASE, SIZE)
