"""Two real sessions joined by a wire: negotiation, both directions at once, and the twin socket."""

from __future__ import annotations

import pytest

from vfiouser_protocol import messages as m
from vfiouser_protocol.capabilities import TwinSocket, VersionCapabilities
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.rules import decode_reply
from vfiouser_protocol.session import CommandReceived, ConnectionPhase, MessageRefused, ReplyReceived
from wire_pair import SessionPair, joined

PIECES = [1, 7, 16, 1 << 20]


def serve(pair: SessionPair) -> None:
    """Let the server answer every region read with its offset as data, in order."""
    for received in pair.receive(pair.server):
        assert isinstance(received, CommandReceived)
        request = decode(m.RegionRead, received.payload)
        data = request.offset.to_bytes(request.count, "little")
        payload = encode(m.RegionReadReply(*request, data))
        pair.send(pair.server, pair.server.reply(received.header, payload))


@pytest.mark.parametrize("piece", PIECES)
def test_negotiation(piece: int) -> None:
    """Proves that two sessions agree, whatever the segmentation, and see the same agreement."""
    pair = SessionPair(piece)
    answer = pair.negotiate(VersionCapabilities(write_multiple=True), VersionCapabilities(write_multiple=True))
    assert answer.token == "version"
    assert pair.client.phase is pair.server.phase is ConnectionPhase.READY
    assert pair.client.negotiated is not None
    assert pair.server.negotiated is not None
    assert pair.client.negotiated.write_multiple
    assert pair.server.negotiated.write_multiple
    assert pair.client.negotiated.minor == pair.server.negotiated.minor == 2


@pytest.mark.parametrize("piece", PIECES)
def test_burst(piece: int) -> None:
    """Proves that fifty pipelined commands get fifty replies, in order."""
    pair = joined(piece=piece)
    for offset in range(50):
        _, data = pair.client.command(Command.REGION_READ, encode(m.RegionRead(offset, 0, 4)), offset)
        pair.send(pair.client, data)
    serve(pair)
    answers = pair.receive(pair.client)
    assert len(answers) == 50
    for offset, answer in enumerate(answers):
        assert isinstance(answer, ReplyReceived)
        assert answer.token == offset
        reply = decode_reply(m.RegionReadReply, m.RegionRead(offset, 0, 4), answer.payload)
        assert reply.data == offset.to_bytes(4, "little")


@pytest.mark.parametrize("piece", PIECES)
def test_both_directions_interleave(piece: int) -> None:
    """Proves that commands and replies of both sides share the stream, with equal ids in both directions."""
    pair = joined(piece=piece)
    for round_ in range(20):
        read_id, read = pair.client.command(Command.REGION_READ, encode(m.RegionRead(round_, 0, 8)), round_)
        dma_id, dma = pair.server.command(Command.DMA_READ, encode(m.DmaRead(round_, 4)), -round_)
        assert (read_id, dma_id) == (round_ + 2, round_ + 1)  # VERSION was the client's first
        pair.send(pair.client, read)
        pair.send(pair.server, dma)
        # The server's DMA_READ goes out before its answer to the read.
        serve(pair)
        received, answer = pair.receive(pair.client)
        assert isinstance(received, CommandReceived)
        assert received.spec.command is Command.DMA_READ
        assert isinstance(answer, ReplyReceived)
        assert answer.token == round_
        request = decode(m.DmaRead, received.payload)
        reply = encode(m.DmaReadReply(request.address, request.count, b"abcd"))
        pair.send(pair.client, pair.client.reply(received.header, reply))
        [dma_answer] = pair.receive(pair.server)
        assert isinstance(dma_answer, ReplyReceived)
        assert dma_answer.token == -round_
        assert decode_reply(m.DmaReadReply, request, dma_answer.payload).data == b"abcd"


def test_command_arrives_while_dma_is_outstanding() -> None:
    """Proves that a client command that overtakes a DMA reply is delivered as a command."""
    pair = joined()
    pair.send(pair.server, pair.server.command(Command.DMA_READ, encode(m.DmaRead(0, 4)), "dma")[1])
    [dma] = pair.receive(pair.client)
    assert isinstance(dma, CommandReceived)
    pair.send(pair.client, pair.client.command(Command.DEVICE_RESET, b"")[1])
    pair.send(pair.client, pair.client.reply(dma.header, encode(m.DmaReadReply(0, 4, b"abcd"))))
    reset, answer = pair.receive(pair.server)
    assert isinstance(reset, CommandReceived)
    assert isinstance(answer, ReplyReceived)
    assert answer.token == "dma"


def test_posted_write_then_read() -> None:
    """Proves that a NO_REPLY write comes before the read that follows it, and costs no reply."""
    pair = joined()
    write = encode(m.RegionWrite(0, 0, 4, b"abcd"))
    pair.send(pair.client, pair.client.command(Command.REGION_WRITE, write, no_reply=True)[1])
    pair.send(pair.client, pair.client.command(Command.DEVICE_RESET, b"", "reset")[1])
    posted, reset = pair.receive(pair.server)
    assert isinstance(posted, CommandReceived)
    assert isinstance(reset, CommandReceived)
    assert posted.header.no_reply
    pair.send(pair.server, pair.server.reply(posted.header, bytes(16)))
    pair.send(pair.server, pair.server.reply(reset.header))
    [answer] = pair.receive(pair.client)
    assert isinstance(answer, ReplyReceived)
    assert answer.token == "reset"


def test_write_multi_when_agreed() -> None:
    """Proves that REGION_WRITE_MULTI passes once both sides announced it, and its count comes back."""
    pair = SessionPair()
    pair.negotiate(VersionCapabilities(write_multiple=True), VersionCapabilities(write_multiple=True))
    request = m.RegionWriteMulti(tuple(m.RegionWrite(8 * i, 0, 4, bytes(4)) for i in range(200)))
    assert len(encode(request)) == 4808
    pair.send(pair.client, pair.client.command(Command.REGION_WRITE_MULTI, encode(request))[1])
    [received] = pair.receive(pair.server)
    assert isinstance(received, CommandReceived)
    assert decode(m.RegionWriteMulti, received.payload) == request
    pair.send(pair.server, pair.server.reply(received.header, encode(m.RegionWriteMultiReply(200))))
    [answer] = pair.receive(pair.client)
    assert isinstance(answer, ReplyReceived)
    assert decode_reply(m.RegionWriteMultiReply, request, answer.payload).wr_cnt == 200


def twins(piece: int = 1 << 20) -> SessionPair:
    """A pair with a twin socket."""
    pair = SessionPair(piece)
    answer = pair.negotiate(VersionCapabilities(twin_socket=TwinSocket(True)), VersionCapabilities(), grant_twin=True)
    assert list(answer.fds) == [70]
    assert list(answer.surplus_fds) == []
    return pair


@pytest.mark.parametrize("piece", PIECES)
def test_twin_socket(piece: int) -> None:
    """Proves that with a twin socket each socket carries one side's commands and their replies."""
    pair = twins(piece)
    pair.send(pair.server, pair.server.command(Command.DMA_READ, encode(m.DmaRead(0, 4)), "dma")[1], twin=True)
    pair.send(pair.client, pair.client.command(Command.REGION_READ, encode(m.RegionRead(1, 0, 4)), "read")[1])
    serve(pair)
    [answer] = pair.receive(pair.client)
    assert isinstance(answer, ReplyReceived)
    assert answer.token == "read"
    [dma] = pair.receive(pair.client, twin=True)
    assert isinstance(dma, CommandReceived)
    pair.send(pair.client, pair.client.reply(dma.header, encode(m.DmaReadReply(0, 4, b"abcd"))), twin=True)
    [answer] = pair.receive(pair.server, twin=True)
    assert isinstance(answer, ReplyReceived)
    assert answer.token == "dma"


@pytest.mark.parametrize("what", ["client command", "server command", "client reply", "server reply"])
def test_wrong_socket(what: str) -> None:
    """Proves that a message on the wrong one of two sockets ends the connection."""
    pair = twins()
    if what == "client command":
        pair.send(pair.client, pair.client.command(Command.DEVICE_RESET, b"")[1], twin=True)
        [refused] = pair.receive(pair.server, twin=True)
    elif what == "server command":
        pair.send(pair.server, pair.server.command(Command.DMA_READ, bytes(16))[1])
        [refused] = pair.receive(pair.client)
    elif what == "client reply":
        pair.send(pair.server, pair.server.command(Command.DMA_READ, bytes(16))[1], twin=True)
        [dma] = pair.receive(pair.client, twin=True)
        assert isinstance(dma, CommandReceived)
        pair.send(pair.client, pair.client.reply(dma.header, bytes(16)))
        [refused] = pair.receive(pair.server)
    else:
        pair.send(pair.client, pair.client.command(Command.DEVICE_RESET, b"")[1])
        [reset] = pair.receive(pair.server)
        assert isinstance(reset, CommandReceived)
        pair.send(pair.server, pair.server.reply(reset.header), twin=True)
        [refused] = pair.receive(pair.client, twin=True)
    assert isinstance(refused, MessageRefused)
    assert refused.close
    assert refused.reply is None


def test_descriptors_travel_with_their_messages() -> None:
    """Proves that DMA_MAP without a descriptor, then one with, glued on the wire, keep them apart."""
    pair = joined()
    for address, fds in ((0xFFFC0000, []), (0, [21])):
        payload = encode(m.DmaMap(32, 3, 0, address, 0x40000))
        pair.send(pair.client, pair.client.command(Command.DMA_MAP, payload)[1], fds)
    rom, ram = pair.receive(pair.server)
    assert isinstance(rom, CommandReceived)
    assert isinstance(ram, CommandReceived)
    assert (list(rom.fds), list(ram.fds)) == ([], [21])
