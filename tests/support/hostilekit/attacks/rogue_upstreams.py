"""Upstream servers that are somebody's."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable

from hostilekit.attacks.descriptors import Lingerer
from hostilekit.case import Scene, Stage, attack
from hostilekit.upstream import Handler, Link, Reply, Upstream, region_info
from hostilekit.wire import PAYLOADS, Peer
from rawmessages import (
    CONFIG,
    DMA_MAP,
    GET_INFO,
    HEADER,
    IRQ_INFO,
    REGION_INFO,
    REGION_READ,
    map_request,
    memfd,
)

_ABSURD = 1 << 26
_FILES = 64


def _visit(stage: Stage) -> None:
    """A client of the function, as far as it is let in."""
    try:
        with Peer(stage.first, timeout=1.5) as peer:
            peer.negotiate()
            for command in (4, 5, 7, 9):
                peer.command(command, PAYLOADS[command])
    except (OSError, EOFError, AssertionError):
        pass


@attack(Scene.UPSTREAM, seconds=3.0)
def absurd_numbers(stage: Stage) -> None:
    """Counts and sizes of 2^26 and more, in each of the answers from which a device is made."""
    going = stage.clock()
    chosen = 0

    def region(link: Link, msg_id: int, payload: bytes) -> Reply:
        index = int.from_bytes(payload[8:12], "little")
        if chosen == 1:
            return region_info(index, 1 << 62), ()
        if chosen == 2:  # a chain of as many areas as fit into a message
            areas = b"".join(struct.pack("<QQ", number << 12, 4096) for number in range(60_000))
            chain = struct.pack("<HHI", 1, 1, 0) + struct.pack("<II", 60_000, 0) + areas
            return struct.pack("<IIIIQQ", 32 + len(chain), 0xF, index, 32, 1 << 40, 0) + chain, ()
        return region_info(index, 256 if index == CONFIG else 0), ()

    handlers: dict[int, Handler] = {
        IRQ_INFO: lambda link, msg_id, payload: (
            struct.pack("<4I", 16, 1, int.from_bytes(payload[8:12], "little"), _ABSURD if chosen == 0 else 1),
            (),
        ),
        REGION_INFO: region,
        GET_INFO: lambda link, msg_id, payload: (
            struct.pack("<4I", 16, 3, *((_ABSURD, _ABSURD) if chosen == 3 else (9, 5))),
            (),
        ),
    }
    Upstream(stage.upstream, handlers)
    while going():
        _visit(stage)
        chosen = (chosen + 1) % 4


@attack(Scene.UPSTREAM, seconds=3.0, waits=True)
def lingering_reply_descriptors(stage: Stage) -> None:
    """Each answer comes with a socket that takes 45 s to close."""
    kept: list[Lingerer] = []

    def answer(link: Link, msg_id: int, payload: bytes) -> Reply | None:
        kept.append(Lingerer())
        body = region_info(int.from_bytes(payload[8:12], "little"), 256, 7)
        kept[-1].send(link, HEADER.pack(msg_id, REGION_INFO, 16 + len(body), 1, 0) + body)
        return None

    going = stage.clock()
    Upstream(stage.upstream, {REGION_INFO: answer})
    while going():
        _visit(stage)


@attack(Scene.UPSTREAM, seconds=3.0, waits=True)
def upstream_replies_never_late_or_wrong(stage: Stage) -> None:
    """Answers to reads that never come, come too late, twice, for other ids, or with another size."""
    going = stage.clock()
    turn = 0

    def answer(link: Link, msg_id: int, payload: bytes) -> Reply | None:
        nonlocal turn
        turn += 1
        count = int.from_bytes(payload[12:16], "little")
        good = payload[:16] + bytes(count)
        match turn % 6:
            case 0:
                return good, ()
            case 1:
                return None
            case 2:
                threading.Timer(1.3, _say_late, (link, msg_id, good)).start()
                return None
            case 3:
                link.say(msg_id, REGION_READ, good)
                return good, ()
            case 4:
                link.say(msg_id ^ 0x5555, REGION_READ, good)
                return None
            case _:
                return good + bytes(100), ()

    Upstream(stage.upstream, {REGION_READ: answer})
    while going():
        _visit(stage)


def _say_late(link: Link, msg_id: int, payload: bytes) -> None:
    try:
        link.say(msg_id, REGION_READ, payload)
    except OSError:
        pass


@attack(Scene.UPSTREAM, seconds=5.0)
def memory_of_another_by_a_double_close(stage: Stage) -> None:
    """Maps queue up behind a slow read, the client leaves, and the numbers of its descriptors are another's by then."""
    going = stage.clock()

    def slow_read(link: Link, msg_id: int, payload: bytes) -> Reply:
        time.sleep(0.002)
        return payload[:16] + bytes(int.from_bytes(payload[12:16], "little")), ()

    def slow_map(link: Link, msg_id: int, payload: bytes) -> Reply:
        time.sleep(0.03)
        return b"", ()

    Upstream(stage.upstream, {REGION_READ: slow_read, DMA_MAP: slow_map})
    memory = memfd(1 << 20)
    victim = threading.Thread(target=_victim, args=(stage, going), daemon=True)
    victim.start()
    number = 0
    while going():
        number += 1
        try:
            with Peer(stage.first) as peer:
                peer.negotiate()
                for item in range(1, 2):
                    peer.send(peer.pack(REGION_READ, PAYLOADS[REGION_READ]))
                    peer.send(peer.pack(DMA_MAP, map_request(item << 20, 4096)), [memory])
                time.sleep(0.004 + 0.001 * (number % 10))
        except (OSError, EOFError, AssertionError):
            pass
    victim.join(15.0)
    assert not _HARM, _HARM


_HARM: list[str] = []


def _victim(stage: Stage, going: Callable[[], bool]) -> None:
    """Another client that maps file after file, and whose device must reach them and nothing else."""
    files = []
    for number in range(_FILES):
        files.append(memfd(4096))
        os.pwrite(files[-1], struct.pack("<Q", number + 1) * 512, 0)
    try:
        with Peer(stage.third) as peer:
            peer.negotiate()
            peer.write(CONFIG, 4, b"\x06\x04")
            peer.write(0, 0x20, struct.pack("<I", 4096))
            while going() and not _HARM:
                _map_and_look(peer, files)
    except (OSError, EOFError, AssertionError) as error:
        _HARM.append(f"the victim was not served: {type(error).__name__}: {error}")
    for number, file in enumerate(files):
        if os.pread(file, 4096, 0) != struct.pack("<Q", number + 1) * 512:
            _HARM.append("the victim's memory was written")


def _map_and_look(peer: Peer, files: list[int]) -> None:
    """Map all files, pipelined as a VMM does, let the device read some, and unmap them."""
    for number, file in enumerate(files):
        peer.send(peer.pack(DMA_MAP, map_request(number << 12, 4096)), [file])
    for _ in files:
        answer = peer.receive()
        assert answer.flags == 1, f"a map failed with errno {answer.error}"
    for number in range(0, len(files), 8):
        peer.write(0, 0x18, struct.pack("<Q", number << 12))
        peer.write(0, 0x24, struct.pack("<I", 1))
        while (status := peer.read(0, 0x28, 4)[0]) == 1:
            pass
        if status != 2:
            _HARM.append(f"the victim's device cannot reach its memory: status {status}")
        elif peer.read(1, 0, 4096) != struct.pack("<Q", number + 1) * 512:
            _HARM.append("the victim's device read another's memory")
    for number in range(len(files)):
        peer.dma_unmap(number << 12, 4096)
