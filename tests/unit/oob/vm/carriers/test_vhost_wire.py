"""vhost-user messages out of hostile hands: descriptors with the right message, and closed on every path."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.transport.fds import ForeignFd, close_fds
from vfiouser_oob.transport.reaper import REAPER, Account
from vfiouser_oob.vm.carriers.vhost_messages import (
    HEADER_SIZE,
    PAYLOAD_MAX,
    REQUESTS,
    LogArea,
    MemoryTable,
    Number,
    VhostRegion,
    VhostRequest,
    VringState,
)
from vfiouser_oob.vm.carriers.vhost_wire import VhostFramer, VhostMessage, VhostWireError, reply


def packed(request: int, payload: bytes = b"", flags: int = 1) -> bytes:
    """A message by hand."""
    return struct.pack("<III", request, flags, len(payload)) + payload


def fed(data: bytes, fds: int = 0, step: int = 1000) -> list[VhostMessage]:
    """What a stream is read as; the descriptors come with its first byte."""
    account = Account("test")
    framer = VhostFramer()
    found = []
    given_fds = [ForeignFd(os.dup(0), account) for _ in range(fds)]
    try:
        while data:
            size = min(framer.bytes_wanted, step)
            message = framer.feed(data[:size], given_fds)
            given_fds, data = [], data[size:]
            if message is not None:
                close_fds(message.fds)
                found.append(message)
    finally:
        framer.close()
        assert REAPER.settle(5)
        assert not account.held
    return found


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize(
    ("request_number", "payload", "fds", "expected"),
    [
        (VhostRequest.SET_FEATURES, struct.pack("<Q", 1 << 30), 0, Number(1 << 30)),
        (VhostRequest.SET_LOG_BASE, struct.pack("<QQ", 4096, 0), 1, LogArea(4096, 0)),
        (VhostRequest.SET_VRING_BASE, struct.pack("<II", 1, 9), 0, VringState(1, 9)),
    ],
)
def test_messages_are_read(request_number: VhostRequest, payload: bytes, fds: int, expected: object, step: int) -> None:
    """However they are cut."""
    (message,) = fed(packed(request_number, payload), fds, step)
    assert (message.request, message.payload, len(message.fds)) == (request_number, expected, fds)


def test_the_table_of_memory_is_read() -> None:
    """A region each, with its descriptor."""
    payload = struct.pack("<II4Q", 1, 0, 0, 1 << 20, 0x7F00_0000, 0)
    (message,) = fed(packed(VhostRequest.SET_MEM_TABLE, payload), 1)
    assert message.payload == MemoryTable(1, 0, (VhostRegion(0, 1 << 20, 0x7F00_0000, 0),))


@pytest.mark.parametrize(
    ("data", "fds", "reason"),
    [
        (packed(7), 0, "request 7 is unknown"),
        (packed(VhostRequest.SET_OWNER, flags=2), 0, "flags 0x2"),
        (packed(VhostRequest.SET_OWNER, flags=5), 0, "flags 0x5"),
        (packed(VhostRequest.SET_OWNER, bytes(PAYLOAD_MAX + 1)), 0, "bytes of payload"),
        (packed(VhostRequest.SET_FEATURES, bytes(4)), 0, "4 bytes of payload"),
        (packed(VhostRequest.SET_LOG_BASE, bytes(16)), 0, "0 descriptors"),
        (packed(VhostRequest.SET_LOG_BASE, bytes(16)), 2, "2 descriptors"),
        (packed(VhostRequest.SET_OWNER), 1, "1 descriptors"),
        (packed(VhostRequest.SET_MEM_TABLE, struct.pack("<II", 9, 0) + bytes(256)), 0, "SET_MEM_TABLE"),
    ],
)
def test_what_is_not_understood_breaks_the_stream(data: bytes, fds: int, reason: str) -> None:
    """Nobody can tell whether an answer is waited for; no descriptor stays open."""
    with pytest.raises(VhostWireError, match=reason):
        fed(data, fds)


@given(st.binary(max_size=300))
def test_noise_never_raises_anything_else(noise: bytes) -> None:
    """Whatever comes."""
    for data in (noise, packed(VhostRequest.SET_MEM_TABLE, noise[:PAYLOAD_MAX])):
        try:
            fed(data)
        except VhostWireError:
            pass


def test_replies_are_as_qemu_reads_them() -> None:
    """Version 1, the reply's flag, and the request that is answered."""
    assert reply(VhostRequest.GET_FEATURES, Number(5)) == struct.pack("<IIIQ", 1, 5, 8, 5)
    assert reply(VhostRequest.GET_VRING_BASE, VringState(1, 2)) == struct.pack("<IIIII", 11, 5, 8, 1, 2)
    assert HEADER_SIZE == 12
    assert set(REQUESTS) == set(VhostRequest)
