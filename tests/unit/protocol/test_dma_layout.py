"""Which layout a reply to DMA_READ can have, and where else to read when it can have both."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_protocol.codec import decode, describe, encode
from vfiouser_protocol.dma_layout import READ_REPLIES, WRITES, DmaLayout, DmaProbe, fitting, probes
from vfiouser_protocol.header import Header
from vfiouser_protocol.messages import DmaReadReply, NarrowDmaReadReply

SPECIFIED, NARROW = DmaLayout.SPECIFIED, DmaLayout.NARROW
BOTH = {SPECIFIED, NARROW}
CONTENT = st.lists(st.sampled_from([0, 0, 0, 7]), min_size=1, max_size=24).map(bytes)


def specified(data: bytes) -> bytes:
    """A reply as the specification has it."""
    return encode(DmaReadReply(0x1000, len(data), data))


def narrow(data: bytes) -> bytes:
    """A reply as QEMU 10 sends it."""
    return encode(NarrowDmaReadReply(0x1000, len(data), data))


@pytest.mark.parametrize(
    ("payload", "count", "expected"),
    [
        (specified(b"abcdefgh"), 8, {SPECIFIED}),
        (narrow(b"abcdefgh"), 8, {NARROW}),
        (specified(b"a"), 1, {SPECIFIED}),
        (narrow(b"a"), 1, {NARROW}),
        (specified(b"abcd\0\0\0\0"), 8, BOTH),
        (narrow(b"\0\0\0\0abcd"), 8, BOTH),
        (specified(bytes(8)), 8, BOTH),
        (specified(b"abcdefgh"), 7, set()),
        (specified(b"abcdefgh")[:-1], 8, set()),
        (struct.pack("<QQ", 0, 8 | 7 << 32) + b"abcdefgh", 8, set()),
        (b"", 0, set()),
        (struct.pack("<QQ", 0, 0), 0, BOTH),
    ],
)
def test_fitting(payload: bytes, count: int, expected: set[DmaLayout]) -> None:
    """The upper half of a count and the four bytes behind the data decide."""
    assert expected == fitting(payload, count)


@given(CONTENT)
def test_a_reply_fits_its_own_layout(data: bytes) -> None:
    """No reply is ever thought to be of the other layout only."""
    assert SPECIFIED in fitting(specified(data), len(data))
    assert NARROW in fitting(narrow(data), len(data))
    assert data == decode(READ_REPLIES[NARROW], narrow(data)).data
    assert len(specified(data)) == len(narrow(data))
    assert len(encode(WRITES[NARROW](0, len(data), data))) == len(encode(WRITES[SPECIFIED](0, len(data), data)))


@given(CONTENT, st.sampled_from([specified, narrow]))
def test_probes_settle_it(data: bytes, reply: object) -> None:
    """Of the places to read at, one has a reply that only the client's own layout fits; none is needed for zeros."""
    make = specified if reply is specified else narrow
    if len(fitting(make(data), len(data))) == 1:
        return
    settled = [fitting(make(data[at : at + size]), size) for at, size in probes(make(data), len(data))]
    assert any(data) == bool(settled)
    assert {SPECIFIED if make is specified else NARROW} in settled or not settled
    assert all(size >= 1 and at + size <= len(data) for at, size in probes(make(data), len(data)))


def test_places() -> None:
    """The first byte that is not 0 is looked for at both places where it may be."""
    assert (DmaProbe(0, 4), DmaProbe(4, 2)) == probes(specified(b"ab\0\0\0\0"), 6)
    assert (DmaProbe(1, 4), DmaProbe(5, 1)) == probes(narrow(b"\0\0\0\0\0a"), 6)
    assert () == probes(specified(bytes(6)), 6)


def test_a_debug_line_knows_both() -> None:
    """A reply in the narrow layout is told like any other, where it used to be called malformed."""
    header = Header(7, 11, 40, 1, 0)
    assert "count=8" in describe(header, narrow(b"abcdefgh"), 0, "<")
    assert "malformed" in describe(header, narrow(b"abcdefgh")[:-1], 0, "<")
