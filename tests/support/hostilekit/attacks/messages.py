"""Floods, trickles and halves of messages."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable

from hostilekit.case import Stage, attack
from hostilekit.wire import PAYLOADS, Peer
from rawmessages import DMA_MAP, HEADER, NO_REPLY, REGION_READ, REGION_WRITE, map_request, memfd


def _pour(peer: Peer, data: bytes, going: Callable[[], bool], *, read: bool) -> None:
    """Send the same bytes again and again, and throw replies away or leave them where they are."""
    peer.sock.settimeout(0.05)
    view = memoryview(data)
    sent = 0
    while going():
        try:
            sent = (sent + peer.sock.send(view[sent:])) % len(data)
        except TimeoutError:
            pass
        except OSError:
            return
        if read:
            try:
                peer.sock.recv(1 << 20)
            except TimeoutError:  # a busy machine: no reply is there yet
                pass


@attack()
def register_flood(stage: Stage) -> None:
    """Reads without a pause, whose replies are taken."""
    with Peer(stage.first) as peer:
        peer.negotiate()
        _pour(peer, peer.pack(REGION_READ, PAYLOADS[9]) * 1000, stage.clock(), read=True)


@attack()
def no_reply_flood(stage: Stage) -> None:
    """Writes, maps and unmaps that want no reply, so that nothing ever holds their sender up."""
    with Peer(stage.first) as peer:
        peer.negotiate()
        write = struct.pack("<QII", 0, 1, 65536) + bytes(65536)
        data = b"".join(
            peer.pack(command, payload, NO_REPLY)
            for command, payload in ((REGION_WRITE, write), (DMA_MAP, PAYLOADS[2]), (3, PAYLOADS[3]), (13, b""))
        )
        _pour(peer, data * 20, stage.clock(), read=False)


@attack()
def refusal_flood(stage: Stage) -> None:
    """Commands that have to be refused, as fast as they can be sent."""
    with Peer(stage.first) as peer:
        peer.negotiate()
        _pour(peer, peer.pack(REGION_READ, struct.pack("<QII", 1 << 60, 0, 4)) * 1000, stage.clock(), read=True)


@attack()
def reset_flood(stage: Stage) -> None:
    """Resets without a pause."""
    with Peer(stage.first) as peer:
        peer.negotiate()
        _pour(peer, peer.pack(13) * 1000, stage.clock(), read=True)


@attack()
def trickling_bytes(stage: Stage) -> None:
    """A message that comes byte by byte, and its negotiation as well."""
    going = stage.clock()
    with Peer(stage.first) as peer:
        hello = peer.pack(1, PAYLOADS[1])
        write = peer.pack(REGION_WRITE, struct.pack("<QII", 0, 1, 1 << 20) + bytes(1 << 20))
        for byte in (hello + write)[: len(hello) + 100_000]:
            if not going():
                break
            peer.send(bytes([byte]))


@attack()
def halves_of_messages(stage: Stage) -> None:
    """Clients that leave in the middle of a header or a payload, with a descriptor on its way."""
    going = stage.clock()
    cut = 1
    memory = memfd(4096)
    while going():
        try:
            with Peer(stage.first) as peer:
                data = peer.pack(1, PAYLOADS[1]) + peer.pack(DMA_MAP, PAYLOADS[2])
                cut = cut % len(data) + 1
                peer.send(data[:cut], [memory])
        except OSError:
            pass
    os.close(memory)


@attack()
def truncated_ancillary_data(stage: Stage) -> None:
    """As many descriptors with one byte as the kernel passes, more than any message may bring."""
    going = stage.clock()
    memory = memfd(4096)
    while going():
        try:
            with Peer(stage.first) as peer:
                peer.negotiate()
                data = peer.pack(DMA_MAP, PAYLOADS[2])
                peer.send(data[:1], [memory] * 253)
                peer.send(data[1:2], [memory] * 253)
                peer.send(data[2:])
                peer.receive()
        except (OSError, EOFError, AssertionError):
            pass
    os.close(memory)


@attack()
def connection_storm(stage: Stage) -> None:
    """Connections that say nothing, garbage, or hello, and go again."""
    going = stage.clock()
    number = 0
    while going():
        number += 1
        try:
            with Peer(stage.first) as peer:
                if number % 3 == 1:
                    peer.send(os.urandom(64))
                elif number % 3 == 2:
                    peer.send(peer.pack(1, PAYLOADS[1]))
        except OSError:
            pass


@attack(seconds=3.0)
def kills_in_bursts_of_maps(stage: Stage) -> None:
    """Clients killed by SIGKILL while they map memory in bursts, as a VMM does at its start."""
    going = stage.clock()
    while going():
        child = os.fork()
        if child == 0:
            try:
                memory = memfd(1 << 20)
                peer = Peer(stage.first).negotiate()
                for number in range(1, 1 << 16):
                    peer.send(peer.pack(DMA_MAP, map_request(number << 20, 1 << 20)), [memory])
            finally:
                os._exit(0)
        time.sleep(0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@attack()
def sizes_that_lie(stage: Stage) -> None:
    """Headers that announce more than there may be, and than comes."""
    going = stage.clock()
    sizes = [0, 15, 17, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 20]
    number = 0
    while going():
        number += 1
        try:
            with Peer(stage.first) as peer:
                peer.negotiate()
                peer.send(HEADER.pack(1, number % 20, sizes[number % len(sizes)], 0, 0) + bytes(1 << 14))
        except (OSError, EOFError, AssertionError):
            pass


@attack(waits=True)
def replies_nobody_takes(stage: Stage) -> None:
    """Reads of a whole region without a pause, whose replies stay in the socket."""
    with Peer(stage.first) as peer:
        peer.negotiate()
        _pour(peer, peer.pack(REGION_READ, struct.pack("<QII", 0, 1, 1 << 20)) * 100, stage.clock(), read=False)
