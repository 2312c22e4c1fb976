"""Descriptors that hurt whoever touches them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial

from hostilekit.case import Scene, Stage, attack
from hostilekit.fuse import Fuse
from hostilekit.wire import PAYLOADS, Peer
from rawmessages import CONFIG, DMA_MAP, GET_INFO, REGION_READ, SET_IRQS, VERSION, map_request, memfd

LINGER_S = 45
MSIX = 2


class Lingerer:
    """A socket whose last close waits for `LINGER_S`: what it has to send cannot be sent."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.sock = socket.create_connection(server.getsockname())
            self._silent, _ = server.accept()  # never reads
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
        self.sock.setblocking(False)
        try:
            while True:
                self.sock.send(bytes(1 << 16))
        except BlockingIOError:
            pass

    def send(self, peer: Peer, data: bytes) -> None:
        """Send it with a message, and let go of it before it arrives, so that whoever gets it has the last one."""
        fd = self.sock.detach()
        try:
            peer.send(data, [fd])
        except OSError:
            pass
        # Where it had arrived and was closed there before, ours is the last; a signal ends the wait.
        rescue = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
        rescue.start()
        try:
            os.close(fd)
        except OSError:
            pass
        rescue.cancel()


signal.signal(signal.SIGUSR1, lambda *_: None)


def _offer(stage: Stage, command: int, send: Callable[[Peer, bytes], None]) -> None:
    """Let a command be sent with a descriptor, wait a moment for the answer, and leave."""
    try:
        with Peer(stage.first, timeout=1.0) as peer:
            if command != VERSION:
                peer.negotiate()
            send(peer, peer.pack(command, PAYLOADS.get(command, b"")))
            peer.sock.settimeout(0.1)
            peer.receive()
    except (OSError, EOFError, AssertionError):
        pass


@attack(seconds=3.0, waits=True)
def lingering_sockets(stage: Stage) -> None:
    """Every command comes with a socket that takes 45 s to close, and the client leaves."""
    going = stage.clock()
    kept: list[Lingerer] = []
    for command in (DMA_MAP, GET_INFO, SET_IRQS, VERSION, *sorted(PAYLOADS), 99):
        kept.append(Lingerer())
        _offer(stage, command, kept[-1].send)
        if not going():
            break


@attack(Scene.SOC, seconds=3.0, waits=True)
def lingering_sockets_behind_an_upstream(stage: Stage) -> None:
    """The same through a function whose descriptors are passed on."""
    lingering_sockets(stage)


@attack(seconds=3.0, waits=True)
def lingering_sockets_of_one_client(stage: Stage) -> None:
    """One client that stays sends socket after socket, with commands that want none."""
    going = stage.clock()
    kept: list[Lingerer] = []
    with Peer(stage.first) as peer:
        peer.negotiate()
        while going() and len(kept) < 50:
            kept.append(Lingerer())
            kept[-1].send(peer, peer.pack(REGION_READ, PAYLOADS[REGION_READ]))


def _send_with(fd: int, peer: Peer, data: bytes) -> None:
    peer.send(data, [fd])


@attack(seconds=3.0, possible=os.geteuid() == 0 and os.path.exists("/dev/fuse"), waits=True)
def silent_fuse_file(stage: Stage) -> None:
    """A file whose server stops answering: in DMA_MAP's fstat, in every close, in the close of a leaving client."""
    place = stage.directory / "fuse"
    place.mkdir()
    fuse = Fuse(place)
    going = stage.clock()
    files = [fuse.open() for _ in range(2 * len(PAYLOADS))]
    with Peer(stage.first) as peer:
        peer.negotiate()
        peer.dma_map(0x1000_0000, 4096, files[0])
        peer.command(SET_IRQS, PAYLOADS[SET_IRQS], [files[1]])
        fuse.be_silent()
    for command, fd in zip((DMA_MAP, GET_INFO, SET_IRQS, VERSION, *sorted(PAYLOADS)), files[2:], strict=False):
        _offer(stage, command, partial(_send_with, fd))
        if not going():
            break
    fuse.end()


@attack(seconds=3.0)
def full_blocking_eventfd(stage: Stage) -> None:
    """An eventfd whose flag is cleared and whose counter is full, triggered by the client and by the device."""
    going = stage.clock()
    with Peer(stage.first) as peer:
        peer.negotiate()
        eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        assert peer.set_irqs(0x24, MSIX, 0, 1, [eventfd]).flags == 1
        peer.write(CONFIG, 4, b"\x06\x04")
        os.set_blocking(eventfd, True)
        os.eventfd_write(eventfd, (1 << 64) - 2)
        peer.sock.settimeout(0.2)
        while going():
            try:
                peer.set_irqs(0x21, MSIX, 0, 1)
                peer.write(0, 0x10, struct.pack("<I", MSIX << 16))
            except (OSError, EOFError, AssertionError):
                break
    time.sleep(0.3)


@attack(seconds=2.0)
def stolen_unmask_eventfd(stage: Stage) -> None:
    """An eventfd by which the client unmasks INTx: blocking, and read by the client before the daemon can."""
    going = stage.clock()
    with Peer(stage.first) as peer:
        peer.negotiate()
        trigger, unmask = os.eventfd(0, 0), os.eventfd(0, os.EFD_NONBLOCK)
        assert peer.set_irqs(0x24, 0, 0, 1, [trigger]).flags == 1
        if peer.set_irqs(0x14, 0, 0, 1, [unmask]).flags == 1:
            reader = os.dup(unmask)
            while going():
                os.eventfd_write(unmask, 1)
                os.set_blocking(reader, False)
                try:
                    os.eventfd_read(reader)
                except BlockingIOError:
                    pass
                os.set_blocking(reader, True)


@attack(seconds=4.0)
def punched_memory(stage: Stage) -> None:
    """The client holds the lock of its memory's file, by allocating and freeing it, while the device writes to it."""
    going = stage.clock()
    size = 1 << 30
    memory = memfd(size)
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None)
        while going():
            libc.fallocate(memory, 0, ctypes.c_long(0), ctypes.c_long(size))
            libc.fallocate(memory, 3, ctypes.c_long(0), ctypes.c_long(size))
        os._exit(0)
    with Peer(stage.first) as peer:
        peer.negotiate()
        peer.dma_map(0, size, memory)
        peer.write(CONFIG, 4, b"\x06\x00")
        peer.write(0, 0x18, struct.pack("<Q", 0))
        peer.write(0, 0x20, struct.pack("<I", 1 << 16))
        while going():
            for direction in (2, 1):
                try:
                    peer.write(0, 0x24, struct.pack("<I", direction))
                    while going() and peer.read(0, 0x28, 4) == b"\1\0\0\0":
                        time.sleep(0.001)
                except (OSError, EOFError, AssertionError):
                    break
    os.waitpid(child, 0)


@attack(seconds=3.0, descriptors=256)
def descriptors_up_to_the_limit(stage: Stage) -> None:
    """One client keeps as many descriptors as it gets; others are served, can connect, and status answers."""
    going = stage.clock()
    while going():
        try:
            with Peer(stage.first) as peer:
                peer.negotiate()
                for number in range(1, 600):
                    memory = memfd(4096)
                    try:
                        peer.command(DMA_MAP, map_request(number << 20, 4096), [memory])
                    finally:
                        os.close(memory)
                    if number % 50 == 0:
                        _other_client(stage)
                        _ask_status(stage)
        except (OSError, EOFError):
            pass  # the client that takes everything may be thrown out


def _other_client(stage: Stage) -> None:
    """A client of another function is let in."""
    try:
        with Peer(stage.third) as other:
            other.negotiate().read(0, 0, 4)
    except (OSError, EOFError) as error:
        raise AssertionError(f"another client is kept out: {error!r}") from error


def _ask_status(stage: Stage) -> None:
    """The control socket answers."""
    try:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(3.0)
            control.connect(str(stage.control))
            control.sendall(b'{"id": 1, "method": "status"}\n')
            said = b""
            while b'"result"' not in said:
                more = control.recv(1 << 16)
                assert more, "status did not answer"
                said += more
    except OSError as error:
        raise AssertionError(f"status is kept out: {error!r}") from error
