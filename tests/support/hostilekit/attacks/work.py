"""Requests that are legal and mean a great deal of work."""

from __future__ import annotations

import os
import struct
import time

from hostilekit.case import Scene, Stage, attack
from hostilekit.wire import Peer
from rawmessages import DMA_MAP, DMA_UNMAP, SET_IRQS, WRITE_MULTI, map_request

#: Ranges that may be mapped.
RANGES = 65_535
_BURST = 64


def _map_all(peer: Peer) -> None:
    """Map as many ranges as we may, in bursts."""
    for first in range(0, RANGES, _BURST):
        count = min(_BURST, RANGES - first)
        peer.send(b"".join(peer.pack(DMA_MAP, map_request((first + n) << 13, 4096)) for n in range(count)))
        for _ in range(count):
            assert peer.receive().flags == 1


@attack(seconds=8.0, spare_mb=48.0)
def unmap_of_everything(stage: Stage) -> None:
    """As many mappings as may be, unmapped at once, again and again."""
    going = stage.clock()
    with Peer(stage.first, timeout=30.0) as peer:
        peer.negotiate()
        while going():
            _map_all(peer)
            peer.succeed(DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 0))


@attack(seconds=8.0, spare_mb=48.0)
def departure_with_everything_mapped(stage: Stage) -> None:
    """Clients that go with as many mappings as may be."""
    going = stage.clock()
    while going():
        with Peer(stage.first, timeout=30.0) as peer:
            try:
                peer.negotiate()
            except AssertionError:  # the one before is still being seen off
                time.sleep(0.01)
                continue
            _map_all(peer)


@attack(Scene.NVME, spare_mb=48.0)
def batches_of_writes(stage: Stage) -> None:
    """Batches with as many writes as may be, each of which rings two doorbells."""
    going = stage.clock()
    write = struct.pack("<QII8s", 0x1000, 0, 8, b"\1\0\0\0\1\0\0\0")
    with Peer(stage.first, timeout=30.0) as peer:
        peer.negotiate()
        while going():
            for count in (4096, 43_000) * 4:
                peer.send(peer.pack(WRITE_MULTI, struct.pack("<Q", count) + write * count))
            for _ in range(8):
                peer.receive()


@attack(Scene.NVME, spare_mb=48.0)
def commands_behind_a_batch(stage: Stage) -> None:
    """Thousands of commands that queue up behind one that has to be waited for, and are carried out in one go then."""
    going = stage.clock()
    write = struct.pack("<QII8s", 0x1000, 0, 8, b"\1\0\0\0\1\0\0\0")
    batch = struct.pack("<Q", 200) + write * 200
    with Peer(stage.first, timeout=30.0) as peer:
        peer.negotiate()
        while going():
            peer.send(b"".join(peer.pack(WRITE_MULTI, batch) for _ in range(100)))
            for _ in range(100):
                peer.receive()


@attack(Scene.NVME, spare_mb=48.0)
def interrupts_of_all_vectors(stage: Stage) -> None:
    """SET_IRQS that trigger, mask and assign all vectors, many in flight."""
    going = stage.clock()
    with Peer(stage.first, timeout=30.0) as peer:
        peer.negotiate()
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(32)]
        peer.set_irqs(0x24, 2, 0, 32, fds)
        requests = [struct.pack("<5I", 20, flags, 2, 0, 32) for flags in (0x21, 0x09, 0x11)]
        while going():
            peer.send(b"".join(peer.pack(SET_IRQS, request) for request in requests * 50))
            for _ in range(150):
                peer.receive()
        for fd in fds:
            os.close(fd)
