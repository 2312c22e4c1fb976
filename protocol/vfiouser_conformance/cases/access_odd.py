"""REGION_READ and REGION_WRITE as no processor makes them: of odd sizes, and over two registers."""

from __future__ import annotations

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseEffect, Level, NotApplicable, same
from vfiouser_conformance.cases.access import AREA as AREA
from vfiouser_conformance.cases.access import CONFIG, READ, WRITE
from vfiouser_conformance.trial import Trial

SHOULD = Level.SHOULD
#: Accesses that reach over two registers or have an odd size, as (offset, bytes).
_ODD = ((0, 3), (1, 2), (2, 4), (3, 2), (0, 5), (4, 7))


@AREA.case(30, SHOULD, "R115 R431", effect=CaseEffect.DEVICE)
def odd_writes(t: Trial) -> None:
    """A write of an odd size, or over two registers, is refused or done whole.

    Sends: REGION_WRITE of 3 bytes, and of 2 bytes in two double words, each with a register of config space that holds
    what is written; the bytes beside it as they are.
    Expects: an error and the old value (libvfio-user), or success and the new one; which of both is reported.
    """
    offset, _ = t.scratch()
    link = t.attach()
    old = t.read_config(link, offset, 1)
    t.at_end(lambda: t.write(link, CONFIG, offset, old))
    first = offset % 4 == 0
    new = bytes([old[0] ^ 0x40])
    for count in (3, 2):
        # Three bytes in one double word, two of them in two: the register is the first or the last of both.
        start = offset if first == (count == 3) else offset - (count - 1)
        data = bytearray(t.read_config(link, start, count))
        data[offset - start] = new[0]
        failed = link.call(WRITE, wire.access(CONFIG, start, count, bytes(data))).failed
        what = "of 3 bytes" if count == 3 else "over two registers"
        t.saw(f"writes {what}", "refused" if failed else "done", recommended=True)
        wanted = old if failed else new
        same(wanted.hex(), t.read_config(link, offset, 1).hex(), f"register {offset:#x} after a write {what}")
        t.write(link, CONFIG, offset, old)


@AREA.case(31, SHOULD, "R131 R431", effect=CaseEffect.DEVICE)
def odd_reads(t: Trial) -> None:
    """A read of an odd size, or over two registers, is refused or done whole.

    Sends: REGION_READ of 2, 3, 4, 5 and 7 bytes that are not aligned, from the beginning of each BAR.
    Expects: an error, or as many bytes as were asked for; which of both is reported.
    """
    bars = [region.index for region in t.facts.regions[:6] if region.size >= 16]
    if not bars:
        raise NotApplicable("the device has no BAR of 16 bytes or more")
    link = t.attach()
    for bar in bars:
        for offset, count in _ODD:
            reply = link.call(READ, wire.access(bar, offset, count))
            t.saw("reads of odd sizes, or over two registers", "refused" if reply.failed else "done", recommended=True)
            if not reply.failed:
                same(count, wire.ACCESS.unpack_from(reply.payload)[2], "count of the reply")
                same(count, len(reply.payload) - 16, "bytes that came")
    link.alive()
