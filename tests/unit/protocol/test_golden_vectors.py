"""Bytes of the wire, written out by hand: from the specification, and as implementations send them."""

from __future__ import annotations

import pytest

from vfiouser_protocol import codec
from vfiouser_protocol import messages as m
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.fields import Payload
from vfiouser_protocol.header import Header, error_reply, pack_header, unpack_header


def hexed(text: str) -> bytes:
    """Bytes from hex with spaces; one group per field keeps the vectors readable."""
    return bytes.fromhex(text.replace("\n", " "))


HEADERS = {
    "a DMA_MAP command": (Header(17, 2, 48, 0), "1100 0200 30000000 00000000 00000000"),
    "a posted REGION_WRITE": (Header(0xFFFF, 10, 36, 0x10), "ffff 0a00 24000000 10000000 00000000"),
    "a success reply": (Header(17, 2, 16, 1), "1100 0200 10000000 01000000 00000000"),
    "an EINVAL reply": (Header(17, 2, 16, 0x21, 22), "1100 0200 10000000 21000000 16000000"),
}

#: name: (message, payload)
PAYLOADS: dict[str, tuple[Payload, str]] = {
    "VERSION 0.1 without JSON": (m.Version(0, 1), "0000 0100"),
    "VERSION 0.0 with {}": (m.Version(0, 0, b"{}\0"), "0000 0000 7b7d00"),
    "DMA_MAP of RAM at 1 MiB": (
        m.DmaMap(32, 3, 0x100000, 0x100000, 0x3F00000),
        "20000000 03000000 0000100000000000 0000100000000000 0000f00300000000",
    ),
    "DMA_UNMAP": (
        m.DmaUnmap(24, 0, 0, 0x4000000),
        "18000000 00000000 0000000000000000 0000000400000000",
    ),
    "DMA_UNMAP with a dirty bitmap": (
        m.DmaUnmap(48, 1, 0x1000, 0x4000, 4096, 8, hexed("0500000000000000")),
        """30000000 01000000 0010000000000000 0040000000000000
        0010000000000000 0800000000000000 0500000000000000""",
    ),
    "DEVICE_GET_INFO reply": (m.DeviceInfo(16, 3, 9, 5), "10000000 03000000 09000000 05000000"),
    "DEVICE_GET_REGION_INFO with two sparse areas": (
        m.RegionInfo(
            80,
            0xF,
            0,
            32,
            0x4000,
            0,
            hexed(
                "0100 0100 00000000 02000000 00000000 "
                "0010000000000000 0010000000000000 0020000000000000 0020000000000000"
            ),
        ),
        """50000000 0f000000 00000000 20000000 0040000000000000 0000000000000000
        0100 0100 00000000 02000000 00000000
        0010000000000000 0010000000000000 0020000000000000 0020000000000000""",
    ),
    "GET_REGION_IO_FDS without sub-regions": (
        m.RegionIoFds(16, 0, 2),
        "10000000 00000000 02000000 00000000",
    ),
    "GET_REGION_IO_FDS, one 40-byte entry": (
        m.RegionIoFds(56, 0, 2, 1, (m.IoFdEntry(0x10, 8, 0, 0, 1, 0x77),)),
        """38000000 00000000 02000000 01000000
        1000000000000000 0800000000000000 00000000 00000000 01000000 00000000 7700000000000000""",
    ),
    "GET_REGION_IO_FDS, one 48-byte entry": (
        m.RegionIoFds(64, 0, 2, 1, (m.IoFdEntry(0x10, 8, 0, 2, 1, 0x77, 1, 0x40),)),
        """40000000 00000000 02000000 01000000
        1000000000000000 0800000000000000 00000000 02000000 01000000 01000000
        4000000000000000 7700000000000000""",
    ),
    "DEVICE_GET_IRQ_INFO reply": (m.IrqInfo(16, 9, 2, 64), "10000000 09000000 02000000 40000000"),
    "SET_IRQS eventfd trigger": (
        m.SetIrqs(20, 0x24, 2, 0, 4),
        "14000000 24000000 02000000 00000000 04000000",
    ),
    "SET_IRQS bool trigger": (
        m.SetIrqs(23, 0x22, 2, 0, 3, b"\1\0\1"),
        "17000000 22000000 02000000 00000000 03000000 010001",
    ),
    "REGION_READ": (m.RegionRead(0x10, 7, 4), "1000000000000000 07000000 04000000"),
    "REGION_READ reply": (
        m.RegionReadReply(0x10, 7, 4, b"\x0c\0\0\xfe"),
        "1000000000000000 07000000 04000000 0c0000fe",
    ),
    "REGION_WRITE": (m.RegionWrite(0x1000, 0, 2, b"\1\2"), "0010000000000000 00000000 02000000 0102"),
    "REGION_WRITE reply": (m.RegionWriteReply(0x1000, 0, 2), "0010000000000000 00000000 02000000"),
    "DMA_READ": (m.DmaRead(0x1000, 0x200), "0010000000000000 0002000000000000"),
    "DMA_READ reply": (m.DmaReadReply(0x1000, 1, b"\xaa"), "0010000000000000 0100000000000000 aa"),
    "DMA_WRITE": (m.DmaWrite(0x1000, 1, b"\xaa"), "0010000000000000 0100000000000000 aa"),
    "DMA_WRITE reply, 64-bit count": (m.DmaWriteReply(0x1000, 1), "0010000000000000 0100000000000000"),
    "DMA_READ reply of QEMU 10": (
        m.NarrowDmaReadReply(0x1000, 2, b"\xaa\xbb"),
        "0010000000000000 02000000 aabb 00000000",
    ),
    "DMA_WRITE of QEMU 10": (m.NarrowDmaWrite(0x1000, 2, b"\xaa\xbb"), "0010000000000000 02000000 aabb 00000000"),
    "DEVICE_RESET": (m.Empty(), ""),
    "DIRTY_PAGES START": (m.DirtyPages(8, 1), "08000000 01000000"),
    "DIRTY_PAGES GET_BITMAP reply, bitmap at 40": (
        m.DirtyPages(48, 4, 0, 0x4000, 4096, 8, hexed("0800000000000000")),
        """30000000 04000000 0000000000000000 0040000000000000 0010000000000000 0800000000000000
        0800000000000000""",
    ),
    "REGION_WRITE_MULTI": (
        m.RegionWriteMulti((m.RegionWrite(0x10, 0, 4, b"\1\2\3\4"), m.RegionWrite(0x18, 2, 8, b"abcdefgh"))),
        """0200000000000000
        1000000000000000 00000000 04000000 0102030400000000
        1800000000000000 02000000 08000000 6162636465666768""",
    ),
    "REGION_WRITE_MULTI reply": (m.RegionWriteMultiReply(2), "0200000000000000"),
    "DEVICE_FEATURE GET MIGRATION reply": (
        m.DeviceFeature(16, 0x10001, encode(m.FeatureMigration(5))),
        "10000000 01000100 0500000000000000",
    ),
    "DEVICE_FEATURE PROBE GET MIGRATION": (m.DeviceFeature(8, 0x50001), "08000000 01000500"),
    "DEVICE_FEATURE GET state RUNNING": (
        m.DeviceFeature(16, 0x10002, encode(m.FeatureDeviceState(2))),
        "10000000 02000100 02000000 00000000",
    ),
    "logging start": (
        m.FeatureLoggingStart(4096, (m.LoggingRange(0, 0x1000), m.LoggingRange(0x10000, 0x2000))),
        """0010000000000000 02000000 00000000
        0000000000000000 0010000000000000 0000010000000000 0020000000000000""",
    ),
    "logging report": (
        m.FeatureLoggingReport(0, 0x2000, 4096, hexed("0300000000000000")),
        "0000000000000000 0020000000000000 0010000000000000 0300000000000000",
    ),
    "MIG_DATA_READ": (m.MigDataRead(72, 64), "48000000 40000000"),
    "MIG_DATA_READ reply": (m.MigDataReadReply(11, 3, b"abc"), "0b000000 03000000 616263"),
    "MIG_DATA_WRITE": (m.MigDataWrite(11, 3, b"abc"), "0b000000 03000000 616263"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header(name: str) -> None:
    """Proves that headers are written and read as they stand on the wire."""
    header, text = HEADERS[name]
    assert hexed(text) == pack_header(*header)
    assert header == unpack_header(hexed(text))


@pytest.mark.parametrize("name", PAYLOADS)
def test_payload(name: str) -> None:
    """Proves that every payload is written and read as it stands on the wire."""
    message, text = PAYLOADS[name]
    assert hexed(text) == encode(message)
    assert message == decode(type(message), hexed(text))


def test_every_payload_class_has_a_vector() -> None:
    """Proves that no class is left out above; the feature that has only a number is inside another vector."""
    covered = {type(message) for message, _ in PAYLOADS.values()} | {m.FeatureMigration, m.FeatureDeviceState}
    assert codec.PAYLOADS == covered


def test_error_reply_is_the_header_alone() -> None:
    """Proves that an error reply echoes id and command, drops NO_REPLY and has no payload."""
    reply = error_reply(Header(9, 10, 36, 0xFFFF_FFD0, 5), 22)
    assert hexed("0900 0a00 10000000 21000000 16000000") == reply
