"""What the codec refuses, what it tolerates, and what it tells people."""

from __future__ import annotations

import errno

import pytest

from vfiouser_protocol import messages as m
from vfiouser_protocol.codec import decode, describe, encode
from vfiouser_protocol.errors import CommandError, LocalProtocolError
from vfiouser_protocol.fields import LayoutRow, Payload, layout_table
from vfiouser_protocol.header import HEADER_LAYOUT, Header, command_name, pack_header, unpack_header

TOO_SHORT = {
    m.Version: 3,
    m.DmaMap: 31,
    m.DmaUnmap: 23,
    m.DeviceInfo: 15,
    m.RegionInfo: 31,
    m.RegionIoFds: 15,
    m.IrqInfo: 15,
    m.SetIrqs: 19,
    m.RegionRead: 15,
    m.RegionReadReply: 15,
    m.RegionWrite: 15,
    m.RegionWriteReply: 15,
    m.RegionWriteMulti: 7,
    m.RegionWriteMultiReply: 7,
    m.DmaRead: 15,
    m.DmaReadReply: 15,
    m.DmaWrite: 15,
    m.DmaWriteReply: 15,
    m.NarrowDmaReadReply: 15,
    m.NarrowDmaWrite: 15,
    m.DirtyPages: 7,
    m.DeviceFeature: 7,
    m.FeatureMigration: 7,
    m.FeatureDeviceState: 7,
    m.FeatureLoggingStart: 15,
    m.FeatureLoggingReport: 23,
    m.MigDataRead: 7,
    m.MigDataReadReply: 7,
    m.MigDataWrite: 7,
}


@pytest.mark.parametrize("cls", TOO_SHORT, ids=lambda cls: cls.__name__)
def test_one_byte_short_is_refused(cls: type[Payload]) -> None:
    """Proves that a payload one byte below its fixed part is EINVAL, and that the full length is not."""
    with pytest.raises(CommandError) as caught:
        decode(cls, bytes(TOO_SHORT[cls]))
    assert caught.value.errno == errno.EINVAL
    assert cls.__name__ in str(caught.value)
    assert isinstance(decode(cls, bytes(TOO_SHORT[cls] + 1)), cls)


CONTRADICTIONS = {
    "REGION_WRITE count 8 with 4 bytes": (m.RegionWrite, bytes(8) + b"\0\0\0\0\x08\0\0\0abcd"),
    "REGION_WRITE count 4 with 8 bytes": (m.RegionWrite, bytes(8) + b"\0\0\0\0\x04\0\0\0abcdefgh"),
    "DMA_WRITE count 2^64-1": (m.DmaWrite, bytes(8) + b"\xff" * 8),
    "DMA_READ reply with too much": (m.DmaReadReply, bytes(16) + b"x"),
    "narrow DMA_READ reply without its zeros": (m.NarrowDmaReadReply, bytes(8) + b"\4\0\0\0abcdxyz"),
    "narrow DMA_WRITE with too much": (m.NarrowDmaWrite, bytes(8) + b"\1\0\0\0abcdef"),
    "WRITE_MULTI of 2^61 writes": (m.RegionWriteMulti, (1 << 61).to_bytes(8, "little")),
    "WRITE_MULTI one byte short": (m.RegionWriteMulti, (1).to_bytes(8, "little") + bytes(23)),
    "WRITE_MULTI one byte over": (m.RegionWriteMulti, (1).to_bytes(8, "little") + bytes(25)),
    "WRITE_MULTI of 9 bytes": (m.RegionWriteMulti, b"\1" + bytes(7) + bytes(12) + b"\x09\0\0\0" + bytes(8)),
    "MIG_DATA_WRITE size 4 with 3 bytes": (m.MigDataWrite, b"\x0c\0\0\0\x04\0\0\0abc"),
    "DMA_UNMAP with bitmap flag, no bitmap": (m.DmaUnmap, b"\x18\0\0\0\x01\0\0\0" + bytes(31)),
    "DIRTY_PAGES GET without range": (m.DirtyPages, b"\x28\0\0\0\x04\0\0\0" + bytes(31)),
    "logging start of 2 ranges, 1 there": (m.FeatureLoggingStart, bytes(8) + b"\2" + bytes(7) + bytes(16)),
    "IO_FDS entries of 44 bytes": (m.RegionIoFds, b"\x3c\0\0\0" + bytes(8) + b"\1\0\0\0" + bytes(44)),
    "IO_FDS one entry of two": (m.RegionIoFds, b"\x60\0\0\0" + bytes(8) + b"\2\0\0\0" + bytes(40)),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(name: str) -> None:
    """Proves that a payload whose counts do not fit its length is EINVAL."""
    cls, payload = CONTRADICTIONS[name]
    with pytest.raises(CommandError) as caught:
        decode(cls, payload)
    assert caught.value.errno == errno.EINVAL


SURPLUS = [m.DmaMap(32, 3, 0, 0, 4096), m.DmaUnmap(24, 0, 0, 4096), m.DeviceInfo(20), m.RegionRead(0, 7, 4)]
SURPLUS += [
    m.IrqInfo(16, 0, 1),
    m.Empty(),
    m.MigDataRead(8, 0),
    m.MigDataWrite(9, 1, b"x"),
    m.DirtyPages(8, 1),
]


@pytest.mark.parametrize("message", SURPLUS, ids=lambda message: type(message).__name__)
def test_surplus_is_ignored(message: Payload) -> None:
    """Proves that clients with longer structures (20-byte GET_INFO, padded MIG_DATA) are understood."""
    assert message == decode(type(message), encode(message) + b"\xee\xee\xee\xee")


def test_padded_migration_data_is_cut() -> None:
    """Proves that libvfio-user's padded MIG_DATA_READ reply loses its padding."""
    payload = encode(m.MigDataReadReply(16, 8, b"eight by")) + bytes(56)
    assert decode(m.MigDataReadReply, payload).data == b"eight by"


def test_shortened_io_fds() -> None:
    """Proves that the reply to a too small argsz, a true count without entries, goes both ways."""
    short = m.RegionIoFds(16 + 3 * 48, 0, 2, 3)
    assert short == decode(m.RegionIoFds, encode(short))


UNSENDABLE: dict[str, Payload] = {
    "count without its data": m.RegionWrite(0, 0, 4, b"abc"),
    "a negative offset": m.RegionRead(-1, 0, 4),
    "65-bit address": m.DmaMap(32, 3, 0, 1 << 64, 4096),
    "a missing bitmap size": m.DmaUnmap(48, 1, 0, 4096),
    "a multi-write of nine bytes": m.RegionWriteMulti((m.RegionWrite(0, 0, 9, b"123456789"),)),
    "IO_FDS of mixed entries": m.RegionIoFds(
        16 + 96, 0, 0, 2, (m.IoFdEntry(0, 0, 0, 0), m.IoFdEntry(0, 0, 0, 0, 0, 0, 0, 0))
    ),
    "IO_FDS with a wrong argsz": m.RegionIoFds(16, 0, 0, 1, (m.IoFdEntry(0, 0, 0, 0),)),
    "a cold field that overflows": m.DeviceInfo(1 << 32),
}


@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_does_not_fit_is_not_sent(name: str) -> None:
    """Proves that our own mistakes are LocalProtocolError, never a malformed message."""
    with pytest.raises(LocalProtocolError):
        encode(UNSENDABLE[name])


def test_header_mistakes_are_ours() -> None:
    """Proves that a header that does not fit, and a buffer that is none, are LocalProtocolError."""
    with pytest.raises(LocalProtocolError, match="does not fit"):
        pack_header(1 << 16, 1, 16, 0)
    with pytest.raises(LocalProtocolError, match="16 bytes"):
        unpack_header(b"short")


@pytest.mark.parametrize("number", [0, 19, 99, 0xFFFF])
def test_no_such_command(number: int) -> None:
    """Proves that unknown numbers have a name in logs."""
    assert command_name(number) == f"command {number}"


def test_feature_flags_in_words() -> None:
    """Proves the views of DEVICE_FEATURE's flags."""
    feature = m.DeviceFeature(8, 0x50002)
    assert (feature.index, feature.get, feature.set, feature.probe) == (2, True, False, True)


def test_layout_table() -> None:
    """Proves that layout tables are derived with offsets, sizes and names as in the specification."""
    assert [row[:3] for row in layout_table(m.DmaMap)] == [
        (0, 4, "argsz"),
        (4, 4, "flags"),
        (8, 8, "offset"),
        (16, 8, "address"),
        (24, 8, "size"),
    ]
    assert layout_table(m.DmaUnmap)[-1] == LayoutRow(40, None, "bitmap", conditional=True)
    assert layout_table(m.RegionReadReply)[-1] == LayoutRow(16, None, "data")
    assert layout_table(m.Empty) == []
    assert [row.offset for row in layout_table(HEADER_LAYOUT)] == [0, 2, 4, 8, 12]


LINES = {
    "< DMA_MAP #17 rw- iova=0xc0000+0x10000 fds=1": (
        Header(17, 2, 48, 0),
        encode(m.DmaMap(32, 3, 0, 0xC0000, 0x10000)),
        1,
    ),
    "< DMA_MAP #17 reply": (Header(17, 2, 16, 1), b"", 0),
    "< DMA_MAP #17 reply EEXIST": (Header(17, 2, 16, 0x21, 17), b"", 0),
    "< DMA_MAP #17 reply errno=0": (Header(17, 2, 16, 0x21, 0), b"", 0),
    "< DMA_UNMAP #3 ALL iova=0x0+0x0": (Header(3, 3, 40, 0), encode(m.DmaUnmap(24, 2, 0, 0)), 0),
    "< REGION_WRITE #4 no-reply +0x1000 region=BAR0 count=4": (
        Header(4, 10, 36, 0x10),
        encode(m.RegionWrite(0x1000, 0, 4, b"abcd")),
        0,
    ),
    "< REGION_READ #4 malformed payload=3": (Header(4, 9, 19, 0), b"abc", 0),
    "< DEVICE_SET_IRQS #5 DATA_EVENTFD|ACTION_TRIGGER irq=MSIX[0+4] fds=4": (
        Header(5, 8, 36, 0),
        encode(m.SetIrqs(20, 0x24, 2, 0, 4)),
        4,
    ),
    "< DEVICE_GET_INFO #6 reply argsz=16 RESET|PCI regions=9 irqs=5": (
        Header(6, 4, 32, 1),
        encode(m.DeviceInfo(16, 3, 9, 5)),
        0,
    ),
    "< DEVICE_GET_REGION_INFO #7 reply argsz=80 rwmc region=BAR2 size=0x4000 caps=48 fds=1": (
        Header(7, 5, 96, 1),
        encode(m.RegionInfo(80, 15, 2, 32, 0x4000, 0, bytes(48))),
        1,
    ),
    "< DEVICE_FEATURE #8 SET MIG_DEVICE_STATE data=8": (
        Header(8, 16, 32, 0),
        encode(m.DeviceFeature(16, 0x20002, bytes(8))),
        0,
    ),
    "< DIRTY_PAGES #9 reply": (Header(9, 14, 16, 1), b"", 0),
    "< command 99 #9 payload=4": (Header(9, 99, 20, 0), b"abcd", 0),
    "< VERSION #0 type=7 payload=4": (Header(0, 1, 20, 7), b"abcd", 0),
    "< VERSION #0 0.1 '{}\\n\\u20ac'": (Header(0, 1, 25, 0), b"\0\0\1\0{}\n\xe2\x82\xac\0", 0),
}


@pytest.mark.parametrize("line", LINES)
def test_describe(line: str) -> None:
    """Proves the debug lines: one readable line per message, data counted and not shown."""
    header, payload, nfds = LINES[line]
    assert line == describe(header, payload, nfds, "<")


def test_describe_elides_long_version_text() -> None:
    """Proves that a stranger's text does not flood the log."""
    line = describe(Header(0, 1, 70000, 0), bytes(4) + b"x" * 60000 + b"\0", 0, "<")
    assert len(line) < 400
