"""argsz, transfer sizes, shortened replies, and replies that answer something else."""

from __future__ import annotations

import errno

import pytest

from vfiouser_protocol import messages as m
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import Payload
from vfiouser_protocol.rules import (
    check_request,
    decode_reply,
    dirty_pages_reply,
    region_io_fds_reply,
    require_argsz,
)

MIB = 1 << 20

ALLOWED = [
    m.DeviceInfo(16),
    m.DeviceInfo(1000),
    m.RegionInfo(32, 0, 0),
    m.RegionIoFds(16, 0, 0),
    m.RegionIoFds(MIB, 0, 0),
    m.IrqInfo(16, 0, 0),
    m.SetIrqs(20, 0x22, 0, 0, 4, bytes(4)),
    m.DmaMap(64, 3, 0, 0, 4096),
    m.DmaUnmap(24, 0, 0, 4096),
    m.DmaUnmap(MIB, 0, 0, 4096),
    # The v1 fork of QEMU says 48 whatever the bitmap's size.
    m.DmaUnmap(48, 1, 0, 1 << 20, 4096, 32),
    m.DirtyPages(8, 1),
    m.DirtyPages(40, 4, 0, 4096, 4096, 8),
    m.DeviceFeature(16, 0x10001),
    m.DeviceFeature(16, 0x20002, bytes(8)),
    m.DeviceFeature(8, 0x50001),
    m.MigDataRead(72, 64),
    m.MigDataRead(8, 0),
    m.MigDataWrite(11, 3, b"abc"),
    m.RegionRead(0, 0, MIB),
    m.RegionWrite(0, 0, 0, b""),
    m.RegionWriteMulti(()),
    m.Empty(),
]
REFUSED = [
    m.DeviceInfo(15),
    m.RegionInfo(31, 0, 0),
    m.RegionIoFds(15, 0, 0),
    m.RegionIoFds(MIB + 1, 0, 0),
    m.IrqInfo(8, 0, 0),
    m.SetIrqs(19, 0x21, 0, 0, 0),
    m.DmaMap(31, 3, 0, 0, 4096),
    m.DmaUnmap(23, 0, 0, 4096),
    m.DmaUnmap(MIB + 1, 0, 0, 4096),
    m.DmaUnmap(39, 1, 0, 4096, 4096, 8),
    m.DmaUnmap(MIB, 1, 0, 1 << 50, 4096, 1 << 40),
    m.DirtyPages(4, 1),
    m.DirtyPages(MIB + 1, 4, 0, 4096, 4096, 8),
    m.DirtyPages(MIB, 4, 0, 1 << 50, 4096, MIB),
    m.DeviceFeature(8, 0x10001),
    m.DeviceFeature(31, 0x10008, bytes(24)),
    m.DeviceFeature(15, 0x20002, bytes(8)),
    m.DeviceFeature(0, 0x50001),
    m.MigDataRead(71, 64),
    m.MigDataRead(8 + MIB + 1, MIB + 1),
    m.MigDataWrite(10, 3, b"abc"),
    m.RegionRead(0, 0, MIB + 1),
    m.DmaRead(0, MIB + 1),
    m.DmaWrite(0, 1 << 63, b""),
]


@pytest.mark.parametrize("request_", ALLOWED, ids=repr)
def test_allowed_sizes(request_: Payload) -> None:
    """Proves that sizes which real clients use pass."""
    check_request(request_, MIB)


@pytest.mark.parametrize("request_", REFUSED, ids=repr)
def test_refused_sizes(request_: Payload) -> None:
    """Proves that sizes which libvfio-user refuses are EINVAL."""
    with pytest.raises(CommandError) as caught:
        check_request(request_, MIB)
    assert caught.value.errno == errno.EINVAL
    assert "allowed" in str(caught.value)


def test_require_argsz() -> None:
    """Proves that a reply without shortened form needs all its room."""
    require_argsz(40, 40)
    with pytest.raises(CommandError, match="argsz is 39, the reply needs 40"):
        require_argsz(39, 40)


SHORT = m.IoFdEntry(0, 8, 0, 0)
SHADOW = m.IoFdEntry(0, 8, 0, 2, 0, 0, 1, 0)


@pytest.mark.parametrize(
    ("entries", "argsz", "needed", "complete"),
    [
        ((), 16, 16, True),
        ((), MIB, 16, True),
        ((SHORT,), 16, 56, False),
        ((SHORT,), 55, 56, False),
        ((SHORT,), 56, 56, True),
        ((SHADOW,) * 3, 159, 160, False),
        ((SHADOW,) * 3, 160, 160, True),
    ],
)
def test_region_io_fds(entries: tuple[m.IoFdEntry, ...], argsz: int, needed: int, complete: bool) -> None:
    """Proves that entries come all or not at all, with the true count and the room they need."""
    reply, whole = region_io_fds_reply(m.RegionIoFds(argsz, 0, 2), entries)
    assert (reply.argsz, reply.flags, reply.index, reply.count) == (needed, 0, 2, len(entries))
    assert (whole, reply.entries) == (complete, entries if complete else ())
    assert len(encode(reply)) == (needed if complete else 16)
    assert decode(m.RegionIoFds, encode(reply)) == reply


@pytest.mark.parametrize("request_", [m.RegionIoFds(16, 1, 0), m.RegionIoFds(16, 0, 0, 1)])
def test_region_io_fds_refuses(request_: m.RegionIoFds) -> None:
    """Proves that a request with flags or a count is EINVAL."""
    with pytest.raises(CommandError):
        region_io_fds_reply(request_)


@pytest.mark.parametrize(("argsz", "length"), [(48, 48), (MIB, 48), (47, 8), (8, 8)])
def test_dirty_pages_reply(argsz: int, length: int) -> None:
    """Proves that a bitmap that does not fit is left out, the room is named, and a client can read both."""
    request = m.DirtyPages(argsz, 4, 0, 1 << 18, 4096, 8)
    payload = dirty_pages_reply(request, b"\x0f" + bytes(7))
    assert len(payload) == length
    reply = decode_reply(m.DirtyPages, request, payload)
    assert (reply.argsz, reply.flags) == (48, 4)
    assert reply.bitmap == (b"\x0f" + bytes(7) if length == 48 else b"")


READ = m.RegionRead(8, 0, 4)
MISFITS: dict[str, tuple[Payload, Payload]] = {
    "more data than asked": (READ, m.RegionReadReply(8, 0, 5, b"12345")),
    "another offset": (READ, m.RegionReadReply(9, 0, 4, b"1234")),
    "another region": (m.RegionWrite(8, 0, 1, b"x"), m.RegionWriteReply(8, 1, 1)),
    "more written than sent": (m.RegionWrite(8, 0, 1, b"x"), m.RegionWriteReply(8, 0, 2)),
    "another address": (m.DmaRead(0, 4), m.DmaReadReply(4, 4, b"abcd")),
    "another count": (m.DmaRead(0, 4), m.DmaReadReply(0, 3, b"abc")),
    "another DMA_WRITE count": (m.DmaWrite(0, 4, b"abcd"), m.DmaWriteReply(0, 3)),
    "another unmap": (m.DmaUnmap(24, 0, 0, 4096), m.DmaUnmap(24, 0, 0, 8192)),
    "unmap without its bitmap": (
        m.DmaUnmap(48, 1, 0, 4096, 4096, 8),
        m.DmaUnmap(48, 1, 0, 4096, 4096, 8),
    ),
    "more migration data": (m.MigDataRead(16, 1), m.MigDataReadReply(10, 2, b"ab")),
    "more writes than sent": (m.RegionWriteMulti(()), m.RegionWriteMultiReply(1)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_replies_that_do_not_fit(name: str) -> None:
    """Proves that a reply which answers something else is refused."""
    request, reply = MISFITS[name]
    with pytest.raises(CommandError, match="does not answer"):
        decode_reply(type(reply), request, encode(reply))


FITTING = [
    (READ, m.RegionReadReply(8, 0, 2, b"12")),
    (m.DmaRead(0, 4), m.DmaReadReply(0, 4, b"abcd")),
    (m.DmaUnmap(48, 1, 0, 4096, 4096, 8), m.DmaUnmap(48, 1, 0, 4096, 4096, 8, bytes(8))),
    (m.MigDataRead(72, 64), m.MigDataReadReply(8, 0, b"")),
    (m.DmaMap(32, 3, 0, 0, 4096), m.Empty()),
    (m.DeviceInfo(16), m.DeviceInfo(16, 3, 9, 5)),
]


@pytest.mark.parametrize(("request_", "reply"), FITTING)
def test_replies_that_fit(request_: Payload, reply: Payload) -> None:
    """Proves that legal replies, partial ones included, are read."""
    assert reply == decode_reply(type(reply), request_, encode(reply))


HEADER_ONLY = [
    (m.RegionRead(8, 0, 0), m.RegionReadReply(8, 0, 0, b"")),
    (m.RegionWrite(8, 0, 1, b"x"), m.RegionWriteReply(8, 0, 1)),
    (m.DmaWrite(8, 1, b"x"), m.DmaWriteReply(8, 1)),
    (m.DmaUnmap(24, 0, 0, 4096), m.DmaUnmap(24, 0, 0, 4096)),
]


@pytest.mark.parametrize(("request_", "reply"), HEADER_ONLY)
def test_replies_of_the_header_alone(request_: Payload, reply: Payload) -> None:
    """Proves that the header-only replies of known implementations are taken as success."""
    assert reply == decode_reply(type(reply), request_, b"")


@pytest.mark.parametrize(
    ("cls", "request_"),
    [(m.RegionReadReply, READ), (m.DmaReadReply, m.DmaRead(0, 1)), (m.DeviceInfo, m.DeviceInfo(16))],
)
def test_missing_data_is_no_success(cls: type[Payload], request_: Payload) -> None:
    """Proves that where data is due, a header alone is refused."""
    with pytest.raises(CommandError):
        decode_reply(cls, request_, b"")
