"""Any segmentation of a stream gives the same messages, each with its own file descriptors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_protocol.errors import LocalProtocolError, StreamError
from vfiouser_protocol.framing import Framer, Message
from vfiouser_protocol.header import pack_header
from wire_pair import Wire
from wire_strategies import u16, u32

LIMIT = 256


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[bytes, list[int]]]:
    """A few messages as (bytes, fds), the descriptors numbered so that each is unique."""
    messages = []
    next_fd = 100
    for _ in range(draw(st.integers(1, 5))):
        payload = draw(st.binary(max_size=40))
        count = draw(st.integers(0, 3))
        fds = list(range(next_fd, next_fd + count))
        next_fd += count
        header = pack_header(draw(u16), draw(u16), 16 + len(payload), draw(u32), draw(u32))
        messages.append((header + payload, fds))
    return messages


@given(streams(), st.integers(1, 80))
def test_any_piece_size(messages: list[tuple[bytes, list[int]]], piece: int) -> None:
    """Proves that messages and their descriptors come out whole however small the reads are."""
    wire = Wire(Framer(LIMIT), piece)
    for data, fds in messages:
        wire.send(data, fds)
    expected = [(data[16:], fds) for data, fds in messages]
    assert expected == [(message.payload, message.fds) for message in wire.messages()]
    assert wire.framer.at_boundary
    assert wire.framer.pending_fds == []


@given(st.binary(max_size=40), st.lists(st.integers(3, 999), max_size=4), st.data())
def test_every_cut(payload: bytes, fds: list[int], data: st.DataObject) -> None:
    """Proves that one message cut at arbitrary places, descriptors on its first byte, is the same message."""
    whole = pack_header(7, 9, 16 + len(payload), 0) + payload
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=len(whole) - 1)))
    framer = Framer(LIMIT)
    found: list[Message] = []
    attached = fds
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        piece = whole[start:end]
        while piece:
            # A reader never takes more than is wanted, whatever is there.
            taken, piece = piece[: framer.bytes_wanted], piece[framer.bytes_wanted :]
            message = framer.feed(taken, attached)
            attached = []
            found += [message] if message is not None else []
    assert [(payload, fds)] == [(message.payload, message.fds) for message in found]


@given(u32.filter(lambda size: size < 16 or size > LIMIT), u32)
def test_impossible_lengths(size: int, flags: int) -> None:
    """Proves that an impossible length ends the stream, keeps the descriptors, and stores nothing."""
    framer = Framer(LIMIT)
    with pytest.raises(StreamError) as caught:
        framer.feed(pack_header(5, 9, size, flags), [42])
    answered = flags & 0x1F == 0
    expected = pack_header(5, 9, 16, 0x21, 22) if answered else None
    assert expected == caught.value.reply
    assert framer.pending_fds == [42]
    assert framer.bytes_wanted == 0
    with pytest.raises(LocalProtocolError):
        framer.feed(b"x")


@given(st.binary(max_size=200), st.integers(1, 20))
def test_garbage(garbage: bytes, piece: int) -> None:
    """Proves that random bytes give messages or end the stream, nothing else, within the limit."""
    wire = Wire(Framer(LIMIT), piece)
    wire.send(garbage)
    try:
        messages = wire.messages()
    except StreamError:
        assert wire.framer.bytes_wanted == 0
    else:
        assert all(message.header.msg_size == 16 + len(message.payload) for message in messages)
        assert wire.framer.bytes_wanted <= LIMIT
