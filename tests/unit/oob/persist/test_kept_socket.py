"""A stream that another process goes on with: what is there after each step, with a peer that sends as it likes."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest
import trio

from vfiouser_oob.persist.kept_socket import LARGEST_HELD, KeptSocket
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.stream_memory import OUTBOX_SIZE, CommandStage, StreamMemory, Torn
from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_protocol.header import pack_header

_WRITE = 10


def command(number: int, size: int = 8) -> bytes:
    """A command with a payload that tells it from others."""
    return pack_header(number, _WRITE, 16 + size, 0) + bytes([number % 256]) * size


def reply(number: int, size: int = 8) -> bytes:
    """Its reply."""
    return pack_header(number, _WRITE, 16 + size, 1) + bytes([number % 256]) * size


class Stream:
    """A socket that goes from one process to the next, played by one."""

    def __init__(self) -> None:
        self.peer, ours = socket.socketpair()
        memory = StreamMemory.create("test")
        self._socket, self._memory = OwnedFd(os.dup(ours.fileno())), OwnedFd(os.dup(memory.fileno()))
        self.kept = KeptSocket(ours, 1 << 22, memory)

    def die(self) -> None:
        """The process ends, and another one goes on."""
        self.kept.leave()
        self.kept.close()
        memory = StreamMemory.resume(self._memory.duplicate())
        self.kept = KeptSocket(socket.socket(fileno=self._socket.duplicate().detach()), 1 << 22, memory)

    def refused(self) -> str:
        """Why no other process can go on."""
        with self._memory.duplicate() as copy, pytest.raises(UnusableRecord) as refusal:
            StreamMemory.resume(copy)
        return str(refusal.value)

    def damage(self, at: int, data: bytes) -> None:
        """Change what the next process will read."""
        os.pwrite(self._memory.fileno(), data, at)

    def stage(self) -> CommandStage:
        """What the process before has left of the first command."""
        return self.kept.inherited

    def heard(self) -> bytes:
        """What the peer has got."""
        with suppress(BlockingIOError):
            return self.peer.recv(1 << 20, socket.MSG_DONTWAIT)
        return b""

    def ids(self) -> list[int]:
        """Ids of all messages that are there, with whatever came with them closed."""
        found = []
        while (message := self.kept.try_receive()) is not None:
            close_fds(message.fds)
            found.append(message.header.msg_id)
        return found

    def counts(self) -> list[int]:
        """How many descriptors each message has that is there."""
        found = []
        while (message := self.kept.try_receive()) is not None:
            found.append(len(message.fds))
            close_fds(message.fds)
        return found

    def close(self) -> None:
        """End it."""
        self.kept.close()
        self._socket.close()
        self._memory.close()
        self.peer.close()


@pytest.fixture
async def stream() -> Stream:
    """A new one."""
    return Stream()


async def test_what_is_not_answered_is_there_for_the_next(stream: Stream) -> None:
    """Commands that were looked at, one of them begun, and half of one that comes later."""
    stream.peer.send(command(1) + command(2) + command(3)[:20])
    assert stream.ids() == [1, 2]
    stream.kept.begin()
    stream.die()
    assert stream.stage() is CommandStage.BEGUN
    stream.peer.send(command(3)[20:])
    assert stream.ids() == [1, 2, 3]
    stream.kept.answer(reply(1))
    assert stream.heard() == reply(1)
    stream.die()
    assert stream.stage() is CommandStage.IDLE
    assert stream.ids() == [2, 3]
    stream.close()


async def test_descriptors_come_again(stream: Stream) -> None:
    """Each process gets those of a command that was not answered, and of no other one."""
    stream.peer.send(command(1))
    with OwnedFd(os.eventfd(7)) as event:
        socket.send_fds(stream.peer, [command(2)], [event.fileno()])
    stream.peer.send(command(3))
    for _ in range(2):
        assert stream.counts() == [0, 1, 0]
        stream.die()
    assert stream.ids() == [1, 2, 3]
    for number in (1, 2, 3):
        stream.kept.answer(reply(number))
    assert stream.heard() == reply(1) + reply(2) + reply(3)
    stream.close()


@pytest.mark.parametrize("ahead", [0, 1, 5])
@pytest.mark.parametrize("glued", [2, 3, 40])
async def test_descriptors_of_several_messages_in_one_sendmsg(stream: Stream, ahead: int, glued: int) -> None:
    """They belong to the first of them, for each process, also for one that goes on in between."""
    for number in range(ahead):
        stream.peer.send(command(number))
    last = ahead + glued
    with OwnedFd(os.eventfd(7)) as event:
        together = b"".join(command(number, 200) for number in range(ahead, last))
        socket.send_fds(stream.peer, [together], [event.fileno()])
    stream.peer.send(command(last))
    wanted = [number == ahead for number in range(last + 1)]
    assert stream.counts() == wanted
    for number in range(last + 1):
        stream.die()
        assert stream.counts() == wanted[number:]
        stream.kept.answer(reply(number))
        assert stream.heard() == reply(number)
    stream.close()


@pytest.mark.parametrize("cut", [10, 16, 20])
async def test_descriptors_with_the_rest_of_a_message_and_more(stream: Stream, cut: int) -> None:
    """One sendmsg ends a message and has a whole one and half of another: the descriptors are the first one's."""
    first = command(1)
    stream.peer.send(first[:cut])
    assert stream.counts() == []
    with OwnedFd(os.eventfd(7)) as event:
        socket.send_fds(stream.peer, [first[cut:] + command(2) + command(3)[:cut]], [event.fileno()])
    assert stream.counts() == [1, 0]
    stream.die()
    assert stream.counts() == [1, 0]
    with OwnedFd(os.eventfd(7)) as event:
        socket.send_fds(stream.peer, [command(3)[cut:] + command(4)], [event.fileno(), event.fileno()])
    assert stream.counts() == [2, 0]
    stream.die()
    assert stream.counts() == [1, 0, 2, 0]
    for number in (1, 2, 3, 4):
        stream.kept.answer(reply(number))
    assert stream.heard() == b"".join(reply(number) for number in (1, 2, 3, 4))
    stream.close()


async def test_answers_that_nobody_reads_are_sent_by_the_next(stream: Stream) -> None:
    """The outbox holds what the socket does not take, and the next process sends it, each byte once."""
    expected, number = b"", 0
    while not stream.kept.memory.unsent:
        number += 1
        stream.peer.send(command(number))
        assert stream.ids() == [number]
        stream.kept.begin()
        stream.kept.answer(reply(number, 4000))
        expected += reply(number, 4000)
    stream.die()
    got = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.kept.run_sender)
        while len(got) < len(expected):
            got += stream.heard()
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert got == expected
    stream.close()


@pytest.mark.parametrize("size", [100, 20_000])
async def test_the_outbox_is_used_again_and_again(stream: Stream, size: int) -> None:
    """What the peer has not read yet stays as it was when the outbox begins anew."""
    for number in range(3 * OUTBOX_SIZE // size):
        stream.peer.send(command(number))
        assert stream.ids() == [number]
        stream.kept.answer(reply(number, size))
        if number % 50 == 49:
            stream.die()
        assert stream.heard() == reply(number, size)
    stream.close()


async def test_a_message_that_no_socket_holds_costs_the_stream(stream: Stream) -> None:
    """While it is read nobody can go on; once it is answered, anybody can."""
    large = command(1, 4 * LARGEST_HELD)
    stream.peer.setblocking(False)
    sent, message = stream.peer.send(large), None
    while message is None:
        message = stream.kept.try_receive()
        with suppress(BlockingIOError):
            sent += stream.peer.send(large[sent:])
        if message is None:
            assert "a large message" in stream.refused()
    assert bytes(message.payload) == large[16:]
    stream.kept.begin()
    stream.kept.answer(reply(1))
    stream.die()
    assert stream.heard() == reply(1)
    stream.close()


async def test_an_answer_with_descriptors_is_repeated_for_who_is_silent(stream: Stream) -> None:
    """Who asks on has got it; who does not within the time gets it again."""
    for asks_on in (True, False):
        stream.peer.send(command(1))
        assert stream.ids() == [1]
        stream.kept.begin()
        stream.kept.memory.direct()
        stream.die()
        if asks_on:
            stream.peer.send(command(2))
        await stream.kept.answer_was_heard(0.01)
        expected = [2] if asks_on else [1]
        assert stream.ids() == expected
        stream.kept.answer(reply(expected[0]))
        assert stream.heard() == reply(expected[0])
    stream.close()


async def test_killed_between_an_answer_and_the_next_step(stream: Stream) -> None:
    """The answer counts and its command is still in the socket: the next process takes it out, and answers no more."""
    stream.peer.send(command(1) + command(2))
    assert stream.ids() == [1, 2]
    memory = stream.kept.memory
    memory.put(reply(1))
    memory.consuming(24, 48, command=True)
    memory.commit()
    stream.die()
    assert stream.ids() == [2]
    stream.kept.answer(reply(2))
    assert stream.heard() == reply(1) + reply(2)
    stream.close()


@pytest.mark.parametrize(
    ("at", "data", "words"),
    [
        (0, b"X", "not the memory of a stream"),
        (8, b"\2", "a newer version, 2; 1 is understood"),
        (16, b"\xff\xff\xff", "damaged"),
        (32, bytes([Torn.SENDING]), "a large message"),
    ],
)
async def test_what_is_refused(stream: Stream, at: int, data: bytes, words: str) -> None:
    """Damage and versions that are not known, with a reason."""
    stream.damage(at, data)
    assert words in stream.refused()
    stream.close()
