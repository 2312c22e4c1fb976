"""Pieces of state on their way in: read to where they stay, whatever their sender does in between."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.message_socket import LARGE, EndOfStream, MessageSocket
from vfiouser_protocol.constants import HEADER_SIZE, Command
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import pack_header

LIMIT = 4 << 20


@contextmanager
def connected(activity: Activity | None = None) -> Iterator[tuple[MessageSocket, socket.socket]]:
    """A message socket, and its peer's end."""
    ours, theirs = socket.socketpair()
    with theirs:
        stream = MessageSocket(ours, LIMIT, activity)
        try:
            yield stream, theirs
        finally:
            stream.close()


def message(command: int, body: bytes) -> bytes:
    """A whole command."""
    return pack_header(7, command, HEADER_SIZE + len(body), 0) + body


def exchange(stream: MessageSocket, theirs: socket.socket, data: bytes, pieces: list[int]) -> list[Message]:
    """Send bytes in pieces of these lengths, again and again, and read after each what is there."""
    found: list[Message] = []
    at = turn = 0
    while at < len(data):
        size = pieces[turn % len(pieces)]
        theirs.sendall(data[at : at + size])
        at, turn = at + size, turn + 1
        while (got := stream.try_receive()) is not None:
            found.append(got)
    return found


@pytest.mark.parametrize("pieces", [[50_000], [16, 1, 70_000], [3, 100_000, 5]])
async def test_state_arrives_whole_however_it_is_cut(pieces: list[int]) -> None:
    """Messages with state and others, mixed, are the same whatever pieces they come in."""
    bodies = [(Command.MIG_DATA_WRITE, bytes([number]) * (LARGE + 77 * number)) for number in range(4)]
    bodies.insert(2, (Command.REGION_WRITE, b"r" * 100_000))
    bodies.insert(3, (Command.MIG_DATA_WRITE, b"small"))
    with connected() as (stream, theirs):
        found = exchange(stream, theirs, b"".join(message(*body) for body in bodies), pieces)
        # Those that were received are not changed by those that came later.
        assert [(int(command), body) for command, body in bodies] == [
            (got.header.command, got.payload) for got in found
        ]


async def test_state_is_read_only_and_its_memory_used_again() -> None:
    """Nobody can change what was received; once nobody looks at it, the next piece takes its place."""
    with connected() as (stream, theirs):
        places: list[object] = []
        for number in range(3):
            [got] = exchange(stream, theirs, message(Command.MIG_DATA_WRITE, bytes([number]) * LARGE), [50_000])
            view = cast(object, got.payload)  # declared as bytes, whose part it plays
            assert isinstance(view, memoryview)
            assert view.readonly
            places.append(view.obj)
            del got, view
        assert places[0] is places[1] is places[2]


async def test_memory_is_given_back_when_no_state_flows() -> None:
    """Any other message ends it."""
    with connected() as (stream, theirs):
        exchange(stream, theirs, message(Command.MIG_DATA_WRITE, bytes(LARGE)), [50_000])
        assert stream._pool is not None
        exchange(stream, theirs, message(Command.DEVICE_RESET, b""), [50_000])
        assert stream._pool is None


async def test_the_end_within_state_is_not_clean() -> None:
    """A peer that goes away in the middle is noticed."""
    with connected() as (stream, theirs):
        theirs.sendall(message(Command.MIG_DATA_WRITE, bytes(LARGE))[:50_000])
        assert stream.try_receive() is None
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EndOfStream) as caught:
            stream.try_receive()
        assert not caught.value.clean


async def test_a_sender_of_drops_is_never_waited_for() -> None:
    """Who sends state byte by byte gets no more of the reader's time than the reading of each byte."""
    activity = Activity()
    with connected(activity) as (stream, theirs):
        data = message(Command.MIG_DATA_WRITE, bytes(LARGE))
        theirs.sendall(data[:100])
        assert stream.try_receive() is None
        assert not stream.spin()
        for at in range(100, 1000):
            theirs.sendall(data[at : at + 1])
            assert stream.try_receive() is None
            assert not stream.spin()
    activity.close()


async def test_no_spinning_while_state_is_on_its_way() -> None:
    """Processors are left to those who carry it."""
    activity = Activity()
    activity._spin_ns = 10_000_000_000
    with connected(activity) as (stream, theirs):
        theirs.sendall(b"x")
        assert select.select([stream], [], [], 5)[0]
        assert activity.spin(stream.fileno())
        activity.busy = lambda: True
        assert not activity.spin(stream.fileno())
        assert stream.try_receive() is None
        began = time.monotonic()
        assert not activity.spin(stream.fileno())
        assert time.monotonic() - began < 5
    activity.close()
