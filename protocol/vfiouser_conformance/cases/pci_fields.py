"""PCI configuration space: fields inside capabilities that say what the function is, and BARs beyond 4 GiB."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vfiouser_conformance import wire
from vfiouser_conformance.case import Level, NotApplicable, same
from vfiouser_conformance.cases.pci import AREA as AREA
from vfiouser_conformance.cases.pci import CONFIG, EXPRESS, config_of, extended, find, unwritable
from vfiouser_conformance.facts import Region
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command

MUST, SHOULD = Level.MUST, Level.SHOULD
_POWER = 0x01
#: Read-only fields of the PCI Express capability, as (offset, bytes): those of version 1, and what version 2 adds.
_EXPRESS_V1, _EXPRESS_V2 = ((0x02, 2), (0x04, 4), (0x0C, 4)), ((0x24, 4), (0x2C, 4))
_DEVCAP2, _DEVCTL2, _LNKCAP, _LNKCTL2 = 0x24, 0x28, 0x0C, 0x30
#: Bits of device control 2, and those of device capabilities 2 one of which has to be set for them.
_ENABLES = ((0x000F, 0x0000000F), (0x0010, 0x00000010), (0x0400, 0x00000800), (0x6000, 0x000C0000))
#: Read-only fields of extended capabilities, by id: serial number, vendor-specific, access control, ARI.
_EXTENDED = {0x0003: (4, 8), 0x000B: (4, 4), 0x000D: (4, 2), 0x000E: (4, 2)}
_LARGE = 1 << 32
_BAR0 = 0x10


@AREA.case(8, MUST, "R417")
def power_management(t: Trial) -> None:
    """What the function can do about power cannot be written.

    Sends: the complement of the capabilities register of the power management capability.
    Expects: the old value, whether the write is dropped (PCI) or refused (libvfio-user), which is reported.
    """
    at = find(t, _POWER, "power management")
    unwritable(t, t.attach(), at + 2, 2, "power management capabilities")


@AREA.case(9, MUST, "R418")
def express(t: Trial) -> None:
    """What device and link can do cannot be written.

    Sends: the complement of the PCI Express capabilities register, of device and link capabilities, and of device and
    link capabilities 2 where the capability has them.
    Expects: the old values, whether the writes are dropped (PCI) or refused (libvfio-user), which is reported.
    """
    at = find(t, EXPRESS, "PCI Express")
    link = t.attach()
    for offset, count in (*_EXPRESS_V1, *(_EXPRESS_V2 if _second(t, at) else ())):
        unwritable(t, link, at + offset, count, f"the PCI Express capability's field at +{offset:#x}")


@AREA.case(10, MUST, "R419")
def extended_fields(t: Trial) -> None:
    """What an extended capability says of the function cannot be written.

    Sends: the complement of the serial number, of the header of a vendor-specific capability, and of the capability
    registers of access control and ARI, as far as they are there.
    Expects: the old values, whether the writes are dropped (PCI) or refused (libvfio-user), which is reported.
    """
    config = config_of(t)
    found = [(at, _EXTENDED.get(struct.unpack_from("<H", config, at)[0])) for at in extended(config)]
    fields = [(at + field[0], field[1]) for at, field in found if field and at + sum(field) <= len(config)]
    if not fields:
        raise NotApplicable("config space has no extended capability whose fields we know to be read-only")
    link = t.attach()
    for offset, count in fields:
        unwritable(t, link, offset, count, f"the extended capability's field at {offset:#x}")


@AREA.case(11, SHOULD, "R420")
def device_control_2(t: Trial) -> None:
    """What device capabilities 2 lacks is not enabled in device control 2.

    Sends: timeouts, LTR and OBFF all enabled in device control 2; the speed above the last in link control 2.
    Expects: nothing is enabled that the function does not say it has. What becomes of the speed is reported.
    """
    at = find(t, EXPRESS, "PCI Express")
    if not _second(t, at):
        raise NotApplicable("the PCI Express capability is of version 1, or not whole")
    has = struct.unpack_from("<I", t.facts.config, at + _DEVCAP2)[0]
    link = t.attach()
    _try(t, link, at + _DEVCTL2, sum(bits for bits, _ in _ENABLES), 0)
    now = _word(t, link, at + _DEVCTL2)
    beyond = [bits for bits, needs in _ENABLES if not has & needs]
    same(0, now & sum(beyond), f"bits of device control 2 that device capabilities 2 ({has:#x}) does not allow")
    most = t.facts.config[at + _LNKCAP] & 15
    speed = min(15, most + 1)
    _try(t, link, at + _LNKCTL2, speed, 15)
    kept = _word(t, link, at + _LNKCTL2) & 15 == speed
    t.saw("a link speed beyond the function's in link control 2", "kept" if kept else "not kept", recommended=True)


@AREA.case(12, MUST, "R099 R421")
def large_bar_size(t: Trial) -> None:
    """A BAR of 4 GiB or more has its size in both registers.

    Sends: 0xffffffff to both registers of each 64-bit BAR whose region has 4 GiB or more, a read, the old values back.
    Expects: the mask of the region's size: no bit of the lower register, the right ones of the upper.
    """
    link = t.attach()
    for region in _large(t):
        at = _BAR0 + 4 * region.index
        old = t.read_config(link, at, 8)
        t.write(link, CONFIG, at, b"\xff" * 4)
        t.write(link, CONFIG, at + 4, b"\xff" * 4)
        low, high = struct.unpack("<II", t.read_config(link, at, 8))
        for n in (0, 4):
            t.write(link, CONFIG, at + n, old[n : n + 4])
        size = -(high << 32 | low & ~15) & wire.U64
        same(hex(region.size), hex(size), f"size of BAR{region.index} by its registers")


@AREA.case(13, MUST, "R110 R421")
def large_bar_access(t: Trial) -> None:
    """Offsets beyond 4 GiB are offsets like any other.

    Sends: REGION_READ of the last four bytes of each BAR of 4 GiB or more, and of four bytes behind its end.
    Expects: the first repeats its whole offset, or the device refuses it; the second fails.
    """
    link = t.attach()
    for region in _large(t):
        last = region.size - 4
        reply = link.call(Command.REGION_READ, wire.access(region.index, last, 4))
        if not reply.failed:
            same((last, region.index), wire.ACCESS.unpack_from(reply.payload)[:2], "offset and region of REGION_READ")
        link.refused(Command.REGION_READ, wire.access(region.index, region.size, 4))


def _second(t: Trial, at: int) -> bool:
    """Whether the PCI Express capability is one of version 2, whole."""
    return t.facts.config[at + 2] & 15 >= 2 and at + 0x3C <= 256


def _word(t: Trial, link: RawLink, offset: int) -> int:
    return int(struct.unpack("<H", t.read_config(link, offset, 2))[0])


def _try(t: Trial, link: RawLink, offset: int, bits: int, field: int) -> None:
    """Set bits of a word in place of a field, which may be refused; what was there is put back in the end."""
    found = t.read_config(link, offset, 2)
    t.at_end(lambda: link.call(Command.REGION_WRITE, wire.access(CONFIG, offset, 2, found)))
    value = struct.unpack("<H", found)[0] & ~field | bits
    link.call(Command.REGION_WRITE, wire.access(CONFIG, offset, 2, struct.pack("<H", value)))


def _large(t: Trial) -> Iterator[Region]:
    """The regions of 64-bit BARs of 4 GiB or more."""
    config = config_of(t)
    registers = struct.unpack_from("<5I", config, _BAR0)
    t.facts.known(*(f"GET_REGION_INFO {bar}" for bar in range(5)))
    found = [bar for bar in t.facts.regions[:5] if bar.size >= _LARGE and registers[bar.index] & 7 == 4]
    if not found:
        raise NotApplicable("the device has no 64-bit BAR of 4 GiB or more")
    yield from found
