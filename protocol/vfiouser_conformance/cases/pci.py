"""PCI configuration space: what identifies the function, the lists of capabilities, and the reset of one function."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

from vfiouser_conformance import wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, check, same
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE, unmap
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command, RegionIndex

AREA = Area("PCI", "PCI configuration space", CaseEffect.DEVICE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
CONFIG = int(RegionIndex.CONFIG)
_HEADER, _POINTER, _EXTENDED = 0x40, 0x34, 0x100
_MSI, EXPRESS, _MSIX = 0x05, 0x10, 0x11
#: PCIe: device capabilities and control, and the bits that announce and start a function level reset.
_DEVCAP, _DEVCTL, _CAN_FLR, _FLR = 4, 8, 1 << 28, 1 << 15
#: A function may take so long for its reset, in seconds.
_FLR_S = 0.1
#: Read-only fields that say what the function is: vendor and device, revision and class, header type.
_IDENTITY = ((0x00, 4), (0x08, 4), (0x0E, 1))


def capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """Id and offset of each capability of the first 256 bytes."""
    at, seen = config[_POINTER] & 0xFC if len(config) >= 256 else 0, set[int]()
    while at >= _HEADER and at not in seen:
        seen.add(at)
        yield config[at], at
        at = config[at + 1] & 0xFC


def extended(config: bytes) -> Iterator[int]:
    """Offset of each extended capability."""
    at, seen = _EXTENDED if len(config) >= 4096 else 0, set[int]()
    while at >= _EXTENDED and at not in seen and config[at : at + 4].strip(b"\0"):
        seen.add(at)
        yield at
        at = struct.unpack_from("<I", config, at)[0] >> 20 & 0xFFC


def config_of(t: Trial) -> bytes:
    """Config space as it was found.

    Raises:
        NotApplicable: the device has none.
    """
    if len(t.facts.config) < 256:
        t.facts.known("GET_INFO", "config space")
        raise NotApplicable("the device has no config space of at least 256 bytes")
    return t.facts.config


def find(t: Trial, wanted: int, name: str) -> int:
    """Offset of a capability.

    Raises:
        NotApplicable: config space has none of this id.
    """
    found = dict(capabilities(config_of(t)))
    if wanted not in found:
        raise NotApplicable(f"config space has no {name} capability")
    return found[wanted]


def unwritable(t: Trial, link: RawLink, offset: int, count: int, what: str) -> None:
    """Write the complement of what is there, and expect what was there; the write may be refused or dropped."""
    found = t.read_config(link, offset, count)
    data = bytes(byte ^ 0xFF for byte in found)
    refused = link.call(Command.REGION_WRITE, wire.access(CONFIG, offset, count, data)).failed
    t.saw("writes of read-only fields of config space", "refused" if refused else "dropped", recommended=not refused)
    now = t.read_config(link, offset, count)
    if now != found:
        t.write(link, CONFIG, offset, found)
    same(found.hex(), now.hex(), f"{what}, after a write of it")


@AREA.case(1, MUST, "R411")
def identity(t: Trial) -> None:
    """What says which function this is cannot be written.

    Sends: the complement of vendor and device id, of revision and class code, and of the header type.
    Expects: the old values, whether the writes are dropped (PCI) or refused (libvfio-user), which is reported.
    """
    config_of(t)
    link = t.attach()
    for offset, count in _IDENTITY:
        unwritable(t, link, offset, count, f"config space at {offset:#x}")


@AREA.case(2, MUST, "R412")
def headers(t: Trial) -> None:
    """The list of capabilities cannot be written.

    Sends: the complement of the pointer to the list, and of id and next pointer of each capability.
    Expects: the old values, whether the writes are dropped (PCI) or refused (libvfio-user), which is reported.
    """
    found = list(capabilities(config_of(t)))
    if not found:
        raise NotApplicable("config space has no capabilities")
    link = t.attach()
    unwritable(t, link, _POINTER, 1, "the pointer to the capabilities")
    for number, offset in found:
        unwritable(t, link, offset, 2, f"the header of capability {number:#x} at {offset:#x}")


@AREA.case(3, MUST, "R412")
def extended_headers(t: Trial) -> None:
    """The list of extended capabilities cannot be written.

    Sends: the complement of the header of each extended capability.
    Expects: the old values, whether the writes are dropped (PCI) or refused (libvfio-user), which is reported.
    """
    found = list(extended(config_of(t)))
    if not found:
        raise NotApplicable("config space has no extended capabilities")
    link = t.attach()
    for offset in found:
        unwritable(t, link, offset, 4, f"the header of the extended capability at {offset:#x}")


@AREA.case(4, MUST, "R413")
def msix_control(t: Trial) -> None:
    """The size of the MSI-X table cannot be written; the bits beside it can, a byte alone too.

    Sends: the complement of the low byte of MSI-X's message control, then 0xff to the high byte alone.
    Expects: the table's size as before; enable and mask bits set by the second.
    """
    at = find(t, _MSIX, "MSI-X")
    link = t.attach()
    control = t.read_config(link, at + 2, 2)
    size = struct.unpack("<H", control)[0] & 0x7FF
    t.at_end(lambda: t.write(link, CONFIG, at + 2, control))
    unwritable(t, link, at + 2, 1, "the low byte of MSI-X's message control")
    alone = link.call(Command.REGION_WRITE, wire.access(CONFIG, at + 3, 1, b"\xff"))
    t.saw("a write of one byte of MSI-X's message control", "refused" if alone.failed else "accepted",
          recommended=not alone.failed)  # fmt: skip
    now = struct.unpack("<H", t.read_config(link, at + 2, 2))[0]
    same(size, now & 0x7FF, "size of the MSI-X table after a write of the high byte")
    if not alone.failed:
        same(hex(0xC000), hex(now & 0xC000), "enable and mask bits after they were written alone")


@AREA.case(5, SHOULD, "R414")
def msi_vectors(t: Trial) -> None:
    """More MSI vectors than the function can have are not enabled.

    Sends: 7 to the number of enabled vectors of MSI's message control, and the complement of the possible ones.
    Expects: the number of possible vectors is as before; no more than those are said to be enabled, or 7 is kept, which
    is reported.
    """
    at = find(t, _MSI, "MSI")
    link = t.attach()
    found = t.read_config(link, at + 2, 2)
    t.at_end(lambda: t.write(link, CONFIG, at + 2, found))
    before = struct.unpack("<H", found)[0]
    link.call(Command.REGION_WRITE, wire.access(CONFIG, at + 2, 2, struct.pack("<H", before ^ 0xE | 7 << 4)))
    now = struct.unpack("<H", t.read_config(link, at + 2, 2))[0]
    same(before >> 1 & 7, now >> 1 & 7, "possible vectors of MSI, as a power of two")
    t.saw("more MSI vectors than possible", "kept" if now >> 4 & 7 > now >> 1 & 7 else "cut", recommended=True)


@AREA.case(6, MUST, "R415")
def function_level_reset(t: Trial) -> None:
    """A function level reset resets the function.

    Sends: a write that enables memory and bus mastering; the bit in PCIe's device control that starts the reset; 100 ms
    later reads.
    Expects: the bit reads as 0, and both enables are off.
    """
    link, at = _resettable(t)
    t.write(link, CONFIG, 4, b"\x06\x00")
    _reset(t, link, at)
    same(0, struct.unpack("<H", t.read_config(link, at + _DEVCTL, 2))[0] & _FLR, "the bit that starts the reset")
    same(0, t.read_config(link, 4, 2)[0] & 6, "memory and bus master bits after the reset")


@AREA.case(7, SHOULD, "R416")
def maps_survive_function_level_reset(t: Trial) -> None:
    """Maps survive a function level reset: they are the client's, not the function's.

    Sends: DMA_MAP; a function level reset; DMA_UNMAP.
    Expects: the unmap succeeds.
    """
    t.facts.maps()
    link, at = _resettable(t)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    _reset(t, link, at)
    unmap(link, BASE, SIZE)


def _resettable(t: Trial) -> tuple[RawLink, int]:
    """A connection to a function that can be reset by itself, and the offset of its PCIe capability."""
    at = find(t, EXPRESS, "PCI Express")
    if not struct.unpack_from("<I", t.facts.config, at + _DEVCAP)[0] & _CAN_FLR:
        raise NotApplicable("the function has no function level reset")
    return t.attach(), at


def _reset(t: Trial, link: RawLink, at: int) -> None:
    control = struct.unpack("<H", t.read_config(link, at + _DEVCTL, 2))[0]
    t.write(link, CONFIG, at + _DEVCTL, struct.pack("<H", control | _FLR))
    time.sleep(_FLR_S)
    check(t.read_config(link, 0, 4) == t.facts.config[:4], "config space names another device after the reset")
