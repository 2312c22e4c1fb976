"""REGION_READ and REGION_WRITE."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import (
    Area,
    CaseEffect,
    Level,
    NotApplicable,
    RefusedRequest,
    check,
    refusals,
    same,
)
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command, RegionFlags, RegionIndex

AREA = Area("REGION", "region access", CaseEffect.NONE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
CONFIG = int(RegionIndex.CONFIG)
READ, WRITE = int(Command.REGION_READ), int(Command.REGION_WRITE)


@AREA.case(1, MUST, "R110")
def read_echo(t: Trial) -> None:
    """A read repeats what was asked for and gives the data behind it.

    Sends: the golden bytes of REGION_READ of the first four bytes of config space.
    Expects: 20 bytes: offset, region, count, data.
    """
    t.facts.region(CONFIG)
    link = t.attach()
    link.send(vectors.message("read 4 bytes of config space"))
    reply = link.reply(9, READ)
    same(20, len(reply.payload), "payload of the reply")
    same((0, CONFIG, 4), wire.ACCESS.unpack_from(reply.payload), "offset, region, count")
    same(t.facts.config[:4].hex(), reply.payload[16:].hex(), "vendor and device id")


@AREA.case(2, MUST, "R111", effect=CaseEffect.DEVICE)
def write_echo(t: Trial) -> None:
    """A write is confirmed with what was written.

    Sends: REGION_WRITE to a register of config space of what is there already.
    Expects: 16 bytes: offset, region, count.
    """
    offset, width = t.scratch()
    link = t.attach()
    data = t.read_config(link, offset, width)
    reply = link.ok(WRITE, wire.access(CONFIG, offset, width, data))
    same(wire.access(CONFIG, offset, width).hex(), reply.payload.hex(), "payload of the reply")


@AREA.case(3, MUST, "R112", effect=CaseEffect.DEVICE)
def write_then_read(t: Trial) -> None:
    """What is written is read.

    Sends: REGION_WRITE of three values to a register that takes them, each followed by a read.
    Expects: the value.
    """
    offset, width = t.scratch()
    link = t.attach()
    found = t.read_config(link, offset, width)
    t.at_end(lambda: t.write(link, CONFIG, offset, found))
    for value in (0x55, 0xAA, 0x01):
        data = bytes([value]) * width
        t.write(link, CONFIG, offset, data)
        same(data.hex(), t.read_config(link, offset, width).hex(), f"register {offset:#x}")


@AREA.case(4, COMPAT, "R123", compat="QEMU 11")
def widths(t: Trial) -> None:
    """Config space can be read in bytes, words and double words anywhere.

    Sends: REGION_READ of 1, 2 and 4 bytes at every offset up to 64.
    Expects: the bytes of the whole.
    """
    link = t.attach()
    whole = t.read_config(link, 0, 68)
    for width in (1, 2, 4):
        for offset in range(64):
            same(whole[offset : offset + width].hex(), t.read_config(link, offset, width).hex(),
                 f"{width} bytes at {offset:#x}")  # fmt: skip


@AREA.case(5, MUST, "R124 R131")
def whole_config(t: Trial) -> None:
    """Config space can be read as a whole: QEMU begins with that and takes no less.

    Sends: one REGION_READ of all of it.
    Expects: all of it.
    """
    size = t.facts.region(CONFIG).size
    data = t.read_config(t.attach(), 0, size)
    # Vendor 0xffff is what a bus says where no device is; every other value, 0 too, is some device's own.
    check(data[:2] != b"\xff\xff", "config space begins with vendor id 0xffff: no device")


@AREA.case(6, MUST, "R133", effect=CaseEffect.DEVICE)
def rom_register(t: Trial) -> None:
    """The ROM register agrees with the ROM region.

    Sends: 0xfffff800 to the ROM register, a read, and the old value back.
    Expects: the mask of the region's size, or 0 without a ROM.
    """
    t.facts.region(CONFIG)
    link = t.attach()
    old = t.read_config(link, 0x30, 4)
    t.write(link, CONFIG, 0x30, struct.pack("<I", 0xFFFFF800))
    mask = int.from_bytes(t.read_config(link, 0x30, 4), "little") & 0xFFFFF800
    t.write(link, CONFIG, 0x30, old)
    size = t.facts.regions[RegionIndex.ROM].size
    same(hex(size), hex(-mask & 0xFFFFFFFF), "size of the ROM by its register")


@AREA.case(7, SHOULD, "R121")
def count_zero(t: Trial) -> None:
    """An access of no bytes is no error.

    Sends: REGION_READ and REGION_WRITE with count 0.
    Expects: success, with the 16 bytes of every reply (recommended) or without a payload (libvfio-user).
    """
    t.facts.region(CONFIG)
    link = t.attach()
    for command in (READ, WRITE):
        reply = link.ok(command, wire.access(CONFIG, 0, 0))
        check(len(reply.payload) in (0, 16), f"a payload of {len(reply.payload)} bytes")
        t.saw("reply to an access of 0 bytes", f"{len(reply.payload)} bytes", recommended=bool(reply.payload))


@AREA.case(8, SHOULD, "R120")
def read_with_surplus(t: Trial) -> None:
    """A read whose request is too long is answered all the same.

    Sends: REGION_READ with 8 more bytes.
    Expects: success.
    """
    t.facts.region(CONFIG)
    link = t.attach()
    link.ok(READ, wire.access(CONFIG, 0, 4, b"\0" * 8))


@AREA.case(9, MUST, "R132")
def largest_transfer(t: Trial) -> None:
    """A transfer of the announced size works in one message.

    Sends: REGION_READ of max_data_xfer_size bytes of a region that has them; needs a profile, as a read of an unknown
    device's registers could do anything.
    Expects: all of it.
    """
    if t.stimulus.name != "test":
        raise NotApplicable("only the test device's memory may be read at will")
    size = t.facts.transfer
    found = [region for region in t.facts.regions[:6] if region.size >= size]
    if not found:
        raise NotApplicable(f"the device has no BAR of {size:#x} bytes")
    t.read(t.attach(), found[0].index, 0, size)


@AREA.case(10, COMPAT, "R128", compat="QEMU 11", effect=CaseEffect.DEVICE)
def eight_bytes(t: Trial) -> None:
    """An access of 8 bytes reaches the device as one.

    Sends: REGION_WRITE and REGION_READ of a 64-bit register of a known device.
    Expects: the value.
    """
    link = t.attach()
    t.stimulus.prepare(link)
    region, offset, width = t.stimulus.scratch()
    if width != 8:
        raise NotApplicable("the device has no 64-bit register")
    for value in (b"\x01\x23\x45\x67\x89\xab\xcd\xef", b"\0" * 8):
        t.write(link, region, offset, value)
        same(value.hex(), t.read(link, region, offset, 8).hex(), "64-bit register")


@AREA.case(11, MUST, "R130 R004", effect=CaseEffect.DEVICE)
def device_error(t: Trial) -> None:
    """The device's own error number reaches the client.

    Sends: accesses that the device fails with EIO and ENOSPC.
    Expects: error replies with these numbers.
    """
    link = t.attach()
    t.stimulus.prepare(link)
    for number in (5, 28):
        region, offset = t.stimulus.failing_access(link, number)
        for command, data in ((READ, b""), (WRITE, b"\0" * 4)):
            same(number, link.refused(command, wire.access(region, offset, 4, data)), "error number")
    t.stimulus.failing_access(link, 0)
    link.alive()


@AREA.case(12, MUST, "R115 R119", effect=CaseEffect.DEVICE)
def refused_write_touches_nothing(t: Trial) -> None:
    """A write that is refused has written nothing.

    Sends: to a register: REGION_WRITE with count 8 and fewer data, and with count 1 and more; to the end of config
    space: a write that reaches beyond it.
    Expects: error replies; the bytes are as before.
    """
    offset, _ = t.scratch()
    size = t.facts.region(CONFIG).size
    link = t.attach()
    before = t.read_config(link, 0, size)
    other = bytes(byte ^ 0xFF for byte in before[offset : offset + 1])
    for request in (
        wire.access(CONFIG, offset, 8, other),
        wire.access(CONFIG, offset, 1, other * 4),
        wire.access(CONFIG, size - 2, 4, b"\x5a" * 4),
    ):
        link.refused(WRITE, request)
    after = t.read_config(link, 0, size)
    same(before[offset], after[offset], f"register {offset:#x} after refused writes")
    same(before[-2:].hex(), after[-2:].hex(), "end of config space after a refused write")


@AREA.case(13, MUST, "R131")
def never_more_than_asked(t: Trial) -> None:
    """A read never gives more than was asked for.

    Sends: REGION_READ of 1, 3, 4, 7 and 64 bytes.
    Expects: as many bytes, and count says so. Fewer are legal in the specification and reported.
    """
    t.facts.region(CONFIG)
    link = t.attach()
    for count in (1, 3, 4, 7, 64):
        reply = link.ok(READ, wire.access(CONFIG, 0, count))
        _, _, done = wire.ACCESS.unpack_from(reply.payload)
        same(done, len(reply.payload) - 16, "bytes of data; count says")
        check(done <= count, f"{done} bytes came where {count} were asked for")
        check(done, "no byte came")
        if done < count:
            t.saw("reads", "shorter than asked for", recommended=False)


def _past_config(t: Trial) -> int:
    return t.facts.region(CONFIG).size


def _one_way(t: Trial) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    for region in t.facts.regions:
        if region.size >= 4 and not region.flags & RegionFlags.WRITE:
            found.append((WRITE, wire.access(region.index, 0, 4, b"\0" * 4)))
        if region.size >= 4 and not region.flags & RegionFlags.READ:
            found.append((READ, wire.access(region.index, 0, 4)))
    if not found:
        raise NotApplicable("every region of the device can be read and written")
    return found


refusals(
    AREA,
    (
        RefusedRequest(
            20, MUST, "R113",
            "A region that is not implemented cannot be accessed.",
            "REGION_READ and REGION_WRITE of 4 bytes of a region of size 0",
            lambda t: [
                (READ, wire.access(t.facts.empty_region(), 0, 4)),
                (WRITE, wire.access(t.facts.empty_region(), 0, 4, b"\0" * 4)),
            ],
        ),
        RefusedRequest(
            21, MUST, "R114",
            "A region that does not exist cannot be accessed.",
            "REGION_READ and REGION_WRITE of region num_regions + 90 and 0xffffffff",
            lambda t: [
                (READ, wire.access(len(t.facts.regions) + 90, 0, 4)),
                (READ, wire.access(0xFFFFFFFF, 0, 4)),
                (WRITE, wire.access(len(t.facts.regions) + 90, 0, 4, b"\0" * 4)),
            ],
        ),
        RefusedRequest(
            22, MUST, "R115",
            "An access does not reach beyond its region.",
            "REGION_READ of 4 bytes at the size of config space minus 2, at its size, and far behind",
            lambda t: [(READ, wire.access(CONFIG, _past_config(t) + delta, 4)) for delta in (-2, 0, 1 << 40)],
        ),
        RefusedRequest(
            23, MUST, "R116",
            "Offset and count are added without wrapping.",
            "REGION_READ of 4 bytes at 2^64 - 1 and 2^64 - 4, and of 16 at 2^64 - 8",
            lambda t: [
                (READ, wire.access(CONFIG, wire.U64 - back, count)) for back, count in ((0, 4), (3, 4), (7, 16))
            ],
        ),
        RefusedRequest(
            24, MUST, "R117",
            "An access is not larger than the announced transfer size.",
            "REGION_READ of max_data_xfer_size + 1 and of 0xffffffff bytes",
            lambda t: [(READ, wire.access(0, 0, count)) for count in (t.facts.transfer + 1, 0xFFFFFFFF)],
        ),
        RefusedRequest(
            25, MUST, "R118",
            "A request that is shorter than its fixed part is refused.",
            "REGION_READ and REGION_WRITE with 8 and 15 bytes",
            lambda t: [(command, wire.access(CONFIG, 0, 4)[:size]) for command in (READ, WRITE) for size in (8, 15)],
        ),
        RefusedRequest(
            26, MUST, "R119",
            "The data of a write has the length that count says.",
            "REGION_WRITE with count 4 and 0, 2 and 8 bytes of data, to a register of config space that ignores writes",
            lambda t: [(WRITE, wire.access(CONFIG, 0, 4, b"\0" * size)) for size in (0, 2, 8)],
        ),
        RefusedRequest(
            27, SHOULD, "R122",
            "Not even an access of no bytes may start beyond the region.",
            "REGION_READ and REGION_WRITE with count 0 at the size of config space plus 1",
            lambda t: [(command, wire.access(CONFIG, _past_config(t) + 1, 0)) for command in (READ, WRITE)],
        ),
        RefusedRequest(
            28, MUST, "R125",
            "A config space of 256 bytes ends there.",
            "REGION_READ of 4 bytes at the size of config space",
            lambda t: [(READ, wire.access(CONFIG, _past_config(t), 4))],
        ),
        RefusedRequest(
            29, SHOULD, "R129",
            "A region that lacks the READ or WRITE flag cannot be accessed that way.",
            "REGION_WRITE to read-only regions, REGION_READ of write-only ones",
            _one_way,
        ),
    ),
)  # fmt: skip
