"""Large values of msgpack-RPC messages are read and sent where they lie; the messages are those of any msgpack peer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_agents.errors import ProtocolError
from vfiouser_agents.rpc.messages import Message, Notification, Request, Response
from vfiouser_agents.rpc.msgpack_bulk import HEAD, LEAST, find_bulk
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_protocol.buffers import KEPT, LARGEST_KEPT, BufferPool

NOISE = random.Random(1).randbytes(2 * LEAST)
SIZES = st.sampled_from([0, 1, 200, LEAST - 1, LEAST, LEAST + 1, 2 * LEAST])
LARGE = st.builds(lambda size, turn: NOISE[turn:size] + NOISE[:turn], SIZES, st.integers(0, 5))
VALUES = (
    LARGE | st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=40) | st.floats(width=64)
)
NESTED = VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(st.text(max_size=4), VALUES, max_size=2)
MAPS = st.dictionaries(st.text(max_size=40), NESTED, max_size=20)
IDS = st.sampled_from([0, 127, 128, 2**16, 2**32 - 1])
MESSAGES = st.one_of(
    st.builds(Request, IDS, st.text(max_size=40), MAPS),
    st.builds(Response, IDS, MAPS | NESTED),
    st.builds(Notification, st.text(max_size=20), MAPS),
)
#: How much of the bytes comes at once, again and again.
CUTS = st.lists(st.sampled_from([1, 5, 9, 60, 600, 5000, LEAST - 3, LEAST, 3 * LEAST]), min_size=1, max_size=6)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The bytes cut again and again at these lengths; the short ones only in the first part, or it takes minutes."""
    at, turn = 0, 0
    while at < len(data):
        size = cuts[turn % len(cuts)] if turn < 300 else LEAST
        yield data[at : at + size]
        at += size
        turn += 1


def through_room(codec: MsgpackCodec, data: bytes) -> list[Message]:
    """Give bytes to a codec as a socket does: to where it wants them, if it says so."""
    found: list[Message] = []
    room = codec.room()
    if room is None:
        found += codec.feed(data)
        return found
    now = data[: len(room)]
    room[: len(now)] = now
    found += codec.filled(len(now))
    if data[len(now) :]:
        found += codec.feed(data[len(now) :])
    return found


@settings(deadline=None, max_examples=60)
@given(st.lists(MESSAGES, min_size=1, max_size=3), CUTS, st.booleans())
def test_messages_with_large_values_come_back_however_they_are_cut(
    messages: list[Message], cuts: list[int], room: bool
) -> None:
    """The bytes are those of plain msgpack, and give the same messages in whatever pieces they come."""
    codec = MsgpackCodec()
    data = b"".join(codec.encode(message) for message in messages)
    assert data == b"".join(bytes(piece) for message in messages for piece in codec.encode_apart(message))
    found: list[Message] = []
    for piece in pieces(data, cuts):
        found += through_room(codec, piece) if room else list(codec.feed(piece))
    assert repr(messages) == repr([plain(message) for message in found])
    assert codec.room() is None


def plain(message: Message) -> Message:
    """The message with bytes for views."""
    match message:
        case Response(id=id_, result=dict(result), error=error):
            return Response(id_, {key: as_bytes(value) for key, value in result.items()}, error)
        case Request(id=id_, method=method, params=params):
            return Request(id_, method, {key: as_bytes(value) for key, value in params.items()})
    return message


def as_bytes(value: Any) -> Any:
    """The value, with bytes for a view."""
    return bytes(value) if isinstance(value, memoryview) else value


def pack(value: Any) -> bytes:
    """As any peer would."""
    packed: bytes = msgpack.packb(value)
    return packed


def doubled(first: bytes, second: bytes) -> bytes:
    """A response whose result has the same key twice."""
    return b"\x94\x01\x05\xc0\x82" + pack("data") + pack(first) + pack("data") + pack(second)


@pytest.mark.parametrize(("first", "second"), [(NOISE, b"s"), (b"s", NOISE), (NOISE, NOISE[::-1])])
def test_the_last_one_of_two_equal_keys_counts(first: bytes, second: bytes) -> None:
    """As it does in msgpack itself, large or not."""
    data = doubled(first, second)
    codec = MsgpackCodec()
    [message] = [message for at in range(0, len(data), 1000) for message in codec.feed(data[at : at + 1000])]
    assert Response(5, {"data": second}) == plain(message)


def test_large_values_do_not_share_memory_while_somebody_looks() -> None:
    """A value stays as it was when the next ones have come, and memory is used again when nobody looks any more."""
    codec = MsgpackCodec()
    kept = []
    for number in range(4):
        data = codec.encode(Response(number, {"data": bytes([number]) * LEAST}))
        for half in (data[:1000], data[1000:]):
            kept += [message.result["data"] for message in codec.feed(half)]  # type: ignore[union-attr]
    assert [bytes([number]) * LEAST for number in range(4)] == kept
    assert all(view.readonly for view in kept)
    held = kept[0].obj
    kept.clear()
    for half in (data[:1000], data[1000:]):
        kept += [message.result["data"] for message in codec.feed(half)]  # type: ignore[union-attr]
    assert held is kept[0].obj


def test_a_claimed_length_above_the_limit_is_refused_at_once() -> None:
    """Nothing is held for a length that no message may have."""
    codec = MsgpackCodec(1 << 20)
    head = b"\x94\x01\x05\xc0\x81" + pack("data") + b"\xc6" + (1 << 20).to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="more than 1048576 bytes"):
        list(codec.feed(head))
    assert codec.room() is None


def test_what_follows_a_large_value_counts() -> None:
    """A message may not grow above the limit behind its large value."""
    codec = MsgpackCodec(4 * LEAST)
    head = b"\x94\x01\x05\xc0\x82" + pack("data") + pack(bytes(3 * LEAST)) + pack("more") + b"\xc6"
    list(codec.feed(head[:100]))
    list(codec.feed(head[100:] + (2 * LEAST).to_bytes(4, "big")))
    with pytest.raises(ProtocolError, match="more than"):
        list(codec.feed(bytes(LEAST)))


@settings(deadline=None)
@given(st.binary(max_size=HEAD))
def test_any_beginning_is_looked_at_without_harm(head: bytes) -> None:
    """Bytes of any kind hold a large value, may hold one later, or have another shape."""
    for data in (head, b"\x94\x01\x05\xc0" + head, b"\x94\x00\x05\xa1m\x91" + head):
        try:
            found = find_bulk(data)
        except ValueError:
            continue
        assert found is None or (found.size >= LEAST and found.data <= len(data))


def test_the_token_cannot_be_sent() -> None:
    """A value that looks like what another connection's parser was given in place of a large one is left alone."""
    token = MsgpackCodec()._token
    codec = MsgpackCodec()
    data = codec.encode(Response(1, {"a": token, "data": NOISE, "b": token}))
    [message] = [message for half in (data[:900], data[900:]) for message in codec.feed(half)]
    assert Response(1, {"a": token, "data": NOISE, "b": token}) == plain(message)


def test_a_pool_keeps_little() -> None:
    """It keeps a bounded number of buffers of a bounded size, and none after `drop`."""
    pool = BufferPool()
    held = [pool.take(LEAST) for _ in range(KEPT + 3)]
    assert KEPT == len(pool)
    held.clear()
    large = pool.take(LARGEST_KEPT + 1)
    assert (LARGEST_KEPT + 1, KEPT) == (len(large), len(pool))
    pool.drop()
    assert 0 == len(pool)


def test_a_pool_replaces_what_is_too_small() -> None:
    """A larger payload takes the place of a smaller buffer that nobody looks at."""
    pool = BufferPool()
    pool.take(100)
    view = pool.take(1000)
    assert (1000, 1) == (len(view), len(pool))
    del view
    assert 10 == len(pool.take(10))
    assert 1 == len(pool)
