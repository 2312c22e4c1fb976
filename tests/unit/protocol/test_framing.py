"""The framer's contract with the transport: how much to read, whose descriptors, and when it is over."""

from __future__ import annotations

import pytest

from vfiouser_protocol.errors import LocalProtocolError, StreamError
from vfiouser_protocol.framing import Framer
from vfiouser_protocol.header import pack_header
from vfiouser_protocol.limits import Limits


@pytest.fixture
def framer() -> Framer:
    """A framer with a small limit."""
    return Framer(max_message_size=64, max_fds=3)


def test_header_then_exactly_the_body(framer: Framer) -> None:
    """Proves that the wanted bytes are 16, then the body's length, then 16 again."""
    assert framer.bytes_wanted == 16
    assert framer.feed(pack_header(1, 9, 32, 0)) is None
    assert framer.bytes_wanted == 16
    assert framer.feed(bytes(10)) is None
    assert framer.bytes_wanted == 6
    message = framer.feed(bytes(6))
    assert message is not None
    assert message.payload == bytes(16)
    assert framer.bytes_wanted == 16


def test_header_alone_is_a_message(framer: Framer) -> None:
    """Proves that a message without payload is complete with its header."""
    message = framer.feed(pack_header(1, 13, 16, 0), [5])
    assert message is not None
    assert (message.payload, message.fds, message.header.command) == (b"", [5], 13)


def test_more_than_wanted_is_refused(framer: Framer) -> None:
    """Proves that reading past the end of a message, which mixes up descriptors, is our own error."""
    framer.feed(pack_header(1, 9, 20, 0))
    with pytest.raises(LocalProtocolError, match="5 bytes were read where 4 were wanted"):
        framer.feed(b"12345")


def test_descriptors_stay_with_their_message(framer: Framer) -> None:
    """Proves that the descriptors of a glued next message are not given to the message before it."""
    stream = [(pack_header(1, 2, 20, 0), []), (b"rom.", []), (pack_header(2, 2, 20, 0), [7]), (b"ram.", [])]
    messages = [message for data, fds in stream if (message := framer.feed(data, fds))]
    assert [(m.payload, m.fds) for m in messages] == [(b"rom.", []), (b"ram.", [7])]


def test_descriptors_of_every_piece_are_collected(framer: Framer) -> None:
    """Proves that descriptors of a split header and of the body belong to the one message, in order."""
    whole = pack_header(1, 8, 17, 0)
    framer.feed(whole[:3], [4])
    framer.feed(whole[3:], [5])
    assert framer.pending_fds == [4, 5]
    message = framer.feed(b"x", [6])
    assert message is not None
    assert message.fds == [4, 5, 6]
    assert framer.pending_fds == []


def test_too_many_descriptors_end_the_stream(framer: Framer) -> None:
    """Proves that descriptors are bounded even if they come in many pieces, and stay closable."""
    whole = pack_header(1, 8, 16, 0)
    framer.feed(whole[:1], [4, 5, 6])
    with pytest.raises(StreamError, match="more than 3 file descriptors"):
        framer.feed(whole[1:2], [7])
    assert framer.pending_fds == [4, 5, 6, 7]
    assert framer.bytes_wanted == 0


@pytest.mark.parametrize("size", [0, 8, 15, 65, 0x7FFFFFFF, 0xFFFFFFFF])
def test_hostile_lengths(framer: Framer, size: int) -> None:
    """Proves that impossible lengths get one EINVAL reply and end the stream for good."""
    with pytest.raises(StreamError) as caught:
        framer.feed(pack_header(3, 4, size, 0))
    assert caught.value.reply == pack_header(3, 4, 16, 0x21, 22)
    assert not framer.at_boundary
    for data in (b"", b"x"):
        with pytest.raises(LocalProtocolError):
            framer.feed(data)


@pytest.mark.parametrize("flags", [0x10, 0x01, 0x0F], ids=["no-reply", "reply", "bad type"])
def test_hostile_length_without_answer(framer: Framer, flags: int) -> None:
    """Proves that replies, undefined types and NO_REPLY commands are not answered."""
    with pytest.raises(StreamError) as caught:
        framer.feed(pack_header(3, 4, 8, flags))
    assert caught.value.reply is None


def test_longest_message_is_taken(framer: Framer) -> None:
    """Proves that the limit itself is allowed."""
    framer.feed(pack_header(3, 10, 64, 0))
    message = framer.feed(bytes(48))
    assert message is not None
    assert len(message.payload) == 48


def test_bad_type_is_framed(framer: Framer) -> None:
    """Proves that the body of an undefined type is consumed, so that it is never taken for a header."""
    framer.feed(pack_header(3, 4, 20, 15))
    message = framer.feed(pack_header(9, 9, 16, 0)[:4])
    assert message is not None
    assert message.header.type == 15
    assert framer.at_boundary


def test_boundary(framer: Framer) -> None:
    """Proves that the end of a stream inside a message, or with descriptors only, is not a clean end."""
    found = [(False, framer.at_boundary)]
    for data, fds in ((b"", []), (b"", [9]), (pack_header(1, 9, 20, 0), []), (b"body", []), (b"x", [])):
        whole = framer.feed(data, fds) is not None
        found.append((whole, framer.at_boundary))
    assert [(False, True), (False, True), (False, False), (False, False), (True, True), (False, False)] == found


def test_repr_says_where_it_stands(framer: Framer) -> None:
    """Proves that a framer in a log shows what it waits for."""
    assert repr(framer) == "<Framer: 16 bytes of header wanted, 0 fds pending>"
    framer.feed(pack_header(1, 2, 48, 0), [5])
    assert repr(framer) == "<Framer: 32 bytes of body of DMA_MAP wanted, 1 fds pending>"


def test_default_limit_takes_a_full_transfer() -> None:
    """Proves that the largest announced transfer fits, with the longest fixed part."""
    framer = Framer(Limits().max_message_size)
    framer.feed(pack_header(1, 10, 16 + 16 + (1 << 20), 0))
    assert framer.feed(bytes(16 + (1 << 20))) is not None
