"""The other end of every comparison: processes that do nothing but read and answer.

Run as ``python -m vfiouser_oob.bench.peers KIND FD``. They read and write as the protocol demands and leave
out everything else: no look at the message, no state, blocking calls.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

from vfiouser_oob.systemd.notify import Notifier
from vfiouser_protocol.constants import HEADER_SIZE, Command
from vfiouser_protocol.header import pack_header, unpack_header

READ_REQUEST_SIZE = 32
READ_REPLY_SIZE = 36
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


KINDS: Mapping[str, Callable[[socket.socket], None]] = {"echo": echo, "empty-loop": empty_loop}


def main(arguments: Sequence[str]) -> None:
    """Serve one inherited, connected socket until the peer closes it."""
    kind, fd = arguments
    with socket.socket(fileno=int(fd)) as sock:
        Notifier.from_environment().ready()
        KINDS[kind](sock)


if __name__ == "__main__":
    main(sys.argv[1:])
