"""Upstream servers that lie about their numbers, or never stop."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hostilekit.case import Scene, Stage, attack
from hostilekit.wire import Peer
from rawmessages import DMA_WRITE, GET_INFO, HEADER, IRQ_INFO, REGION_INFO, VERSION

#: Replies by command, made of the request's payload.
Answers = Mapping[int, Callable[[bytes], bytes]]


def _index(payload: bytes) -> int:
    return int(struct.unpack_from("<I", payload, 8)[0])


def _region(payload: bytes) -> bytes:
    return struct.pack("<IIIIQQ", 32, 3, _index(payload), 0, 4096, 0)


def _vectors(payload: bytes) -> bytes:
    return struct.pack("<4I", 16, 1, _index(payload), 1 << 26)


def _areas(payload: bytes) -> bytes:
    count = 60_000
    chain = struct.pack("<HHIII", 1, 1, 0, count, 0) + struct.pack("<QQ", 0, 4096) * count
    return struct.pack("<IIIIQQ", 32 + len(chain), 0xF, _index(payload), 32, 1 << 40, 0) + chain


def _capabilities(payload: bytes) -> bytes:
    count = 120_000
    chain = b"".join(struct.pack("<HHI", 77, 1, 40 + 8 * number) for number in range(count)) + bytes(8)
    return struct.pack("<IIIIQQ", 32 + len(chain), 0xF, _index(payload), 32, 4096, 0) + chain


#: A dull device: nine regions of a page, no interrupts; everything else succeeds without a payload.
_DULL: Answers = {
    VERSION: lambda payload: struct.pack("<HH", 0, 0) + b'{"capabilities":{"max_dma_maps":18446744073709551615}}\0',
    GET_INFO: lambda payload: struct.pack("<4I", 16, 3, 9, 5),
    REGION_INFO: _region,
    IRQ_INFO: lambda payload: struct.pack("<4I", 16, 1, _index(payload), 0),
}
_LIES: tuple[Answers, ...] = (
    {IRQ_INFO: _vectors},
    {REGION_INFO: _areas},
    {REGION_INFO: _capabilities},
    {GET_INFO: lambda payload: struct.pack("<4I", 16, 3, 1 << 31, 1 << 31)},
)


def _serve(sock: socket.socket, answers: Answers, attached: Callable[[socket.socket], None]) -> None:
    """Answer until the daemon goes; `attached` is called once it has written a register."""
    with Peer(sock) as peer:
        try:
            while True:
                request = peer.receive()
                if request.flags & 1:
                    continue
                make = answers.get(request.command)
                body = make(request.payload) if make is not None else b""
                peer.send(HEADER.pack(request.msg_id, request.command, 16 + len(body), 1, 0) + body)
                if request.command == 2:
                    attached(peer.sock)
        except (EOFError, OSError):
            return


@contextmanager
def _server(
    stage: Stage, lies: Iterator[Answers], attached: Callable[[socket.socket], None] = lambda sock: None
) -> Iterator[None]:
    """Be the upstream server of the first function; each connection gets the next lie."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(stage.upstream))
        listener.listen()

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=_serve, args=(sock, {**_DULL, **next(lies)}, attached), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@attack(Scene.UPSTREAM, waits=True)
def upstream_numbers(stage: Stage) -> None:
    """2^26 vectors, 60,000 mapped areas, 120,000 capabilities, 2^31 regions, claimed to one client after another."""
    going = stage.clock()
    turns = iter(range(1 << 30))
    with _server(stage, (_LIES[turn % len(_LIES)] for turn in turns)):
        while going():
            with Peer(stage.first) as peer:
                answer = peer.command(VERSION, struct.pack("<HH", 0, 0) + b'{"capabilities":{}}\0')
                assert answer.error, "the daemon believes what cannot be"


@attack(Scene.UPSTREAM)
def upstream_dma_flood(stage: Stage) -> None:
    """Megabytes of DMA_WRITE without waiting for a reply, for a client that never answers the first of them."""
    going = stage.clock()
    data = struct.pack("<QQ", 0, 1 << 16) + bytes(1 << 16)
    message = HEADER.pack(7, DMA_WRITE, 16 + len(data), 0, 0) + data

    def flood(sock: socket.socket) -> None:
        while going():
            sock.sendall(message)

    with _server(stage, iter(dict, None), flood):
        while going():
            with Peer(stage.first) as peer:
                try:  # the one before may be on its way out still
                    peer.negotiate()
                    peer.sock.settimeout(0.3)
                    peer.dma_map(0, 1 << 20)
                    while going():
                        peer.sock.recv(1 << 16)
                except (OSError, EOFError, AssertionError):
                    pass
