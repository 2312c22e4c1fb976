"""The other end of every comparison: processes that do nothing but read and answer.

Run as ``python -m vfiouser_oob.lab.bench.peers KIND FD…``. They read and write as the protocol demands and leave
out everything else: no look at the message, no state, blocking calls.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from vfiouser_oob.systemd.notify import Notifier
from vfiouser_protocol.constants import HEADER_SIZE, Command
from vfiouser_protocol.header import pack_header, unpack_header

READ_REQUEST_SIZE = 32
READ_REPLY_SIZE = 36
#: What a stream is sent and copied in, at most; and the size of a request for a stream.
STREAM_PIECE = 1 << 20
_COUNT_SIZE = 8
_ANCILLARY_SIZE = socket.CMSG_SPACE(4)
#: Payload bytes of the replies to what the map benchmark sends.
_REPLY_PAYLOADS = {Command.DMA_MAP: 0, Command.DMA_UNMAP: 24}


def echo(sock: socket.socket) -> None:
    """Answer each 32 bytes with 36: the sizes of a 4-byte REGION_READ and its reply, nothing looked at."""
    reply = bytes(READ_REPLY_SIZE)
    while sock.recv(READ_REQUEST_SIZE, socket.MSG_WAITALL):
        sock.send(reply)


def empty_loop(sock: socket.socket) -> None:
    """Read messages with their descriptors and answer each with a success of the right size."""
    while True:
        data, ancillary, _, _ = sock.recvmsg(HEADER_SIZE, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        header = unpack_header(data)
        sock.recv(header.payload_size)
        for _, _, raw in ancillary:
            os.close(int.from_bytes(raw[:4], sys.byteorder))
        payload = bytes(_REPLY_PAYLOADS[Command(header.command)])
        size = HEADER_SIZE + len(payload)
        sock.send(pack_header(header.msg_id, header.command, size, 1) + payload)


def stream(sock: socket.socket) -> None:
    """Send as many bytes as an eight-byte number asks for, again and again."""
    data = memoryview(random.Random(1).randbytes(STREAM_PIECE))
    while request := sock.recv(_COUNT_SIZE, socket.MSG_WAITALL):
        left = int.from_bytes(request, "little")
        while left:
            left -= sock.send(data[: min(left, STREAM_PIECE)])


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Pass requests for so many bytes from the sink to the source, and the bytes from the source to the sink."""
    buffer = memoryview(bytearray(STREAM_PIECE))
    while request := sink.recv(_COUNT_SIZE, socket.MSG_WAITALL):
        source.sendall(request)
        left = int.from_bytes(request, "little")
        while left:
            count = source.recv_into(buffer, min(left, STREAM_PIECE))
            sink.sendall(buffer[:count])
            left -= count


KINDS: Mapping[str, Callable[..., None]] = {
    "echo": echo,
    "empty-loop": empty_loop,
    "stream": stream,
    "copy": copy,
}


def main(arguments: Sequence[str]) -> None:
    """Serve inherited, connected sockets until the peer closes them."""
    kind, *fds = arguments
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(fileno=int(fd))) for fd in fds]
        Notifier.from_environment().ready()
        KINDS[kind](*sockets)


if __name__ == "__main__":
    main(sys.argv[1:])
