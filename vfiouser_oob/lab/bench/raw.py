"""The least of a client: blocking calls and ready-made messages, so that what is measured is the server."""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vfiouser_protocol.capabilities import MigrationCapability, VersionCapabilities, encode_version
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import HEADER_SIZE, Command, RegionIndex
from vfiouser_protocol.errors import ReplyError, VfioUserError
from vfiouser_protocol.header import command_name, pack_header, unpack_header
from vfiouser_protocol.messages import DeviceInfo, IrqInfo, RegionInfo, RegionRead

#: A daemon that is silent for so long has failed; its own answer to everything is due within seconds.
_TIMEOUT_S = 20
_ANCILLARY_SIZE = socket.CMSG_SPACE(4 * 16)
_REGION_INFO_ROOM = 1024
_ERROR_BIT = 0x20


class BenchFailed(VfioUserError):
    """A measurement could not be made."""


def message(command: int, payload: bytes, msg_id: int = 1) -> bytes:
    """A whole command message."""
    return pack_header(msg_id, command, HEADER_SIZE + len(payload), 0) + payload


def attach_commands(*, migration: bool = False) -> Iterator[tuple[Command, bytes]]:
    """What a VMM says before its guest runs, as far as every VMM says it.

    Args:
        migration: whether to announce the v1 generation of migration.
    """
    announced = VersionCapabilities(max_msg_fds=16, migration=MigrationCapability() if migration else None)
    yield Command.VERSION, encode_version(announced, 0)
    yield Command.DEVICE_GET_INFO, encode(DeviceInfo(16))
    for index in (*range(6), RegionIndex.CONFIG):
        yield Command.DEVICE_GET_REGION_INFO, encode(RegionInfo(_REGION_INFO_ROOM, 0, int(index)))
    for index in range(5):
        yield Command.DEVICE_GET_IRQ_INFO, encode(IrqInfo(16, 0, index))
    yield Command.REGION_READ, encode(RegionRead(0, RegionIndex.CONFIG, 256))


class RawClient:
    """A blocking connection.

    Args:
        sock: a connected socket; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        # A kernel time-out rather than Python's, which would poll before every call.
        seconds = _TIMEOUT_S.to_bytes(8, "little") + bytes(8)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        self.sock = sock

    @classmethod
    def attach(cls, path: Path, *, migration: bool = False) -> RawClient:
        """Connect to a server and do what a VMM does before its guest runs, as far as every VMM does it.

        Args:
            path: where it listens.
            migration: whether to announce the v1 generation of migration.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(path))
            client = cls(sock)
            for command, payload in attach_commands(migration=migration):
                client.call(command, payload)
        except BaseException:
            sock.close()
            raise
        return client

    @contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # what the kernel says when its receive time-out has passed
            raise BenchFailed(f"the server was silent for {_TIMEOUT_S} s") from None

    def call(self, command: int, payload: bytes) -> bytes:
        """Send a command and return the reply's payload; descriptors that come with it are closed.

        Raises:
            ReplyError: the server refused.
            BenchFailed: it closed the connection.
        """
        body, fds = self.call_for_fds(command, payload)
        for fd in fds:
            os.close(fd)
        return body

    def call_from(self, command: int, pieces: Sequence[bytes]) -> bytes:
        """Like `call`, with a payload that is sent from where it lies.

        Raises:
            ReplyError: the server refused.
            BenchFailed: it closed the connection.
        """
        size = HEADER_SIZE + sum(map(len, pieces))
        whole = (pack_header(1, command, size, 0), *pieces)
        with self._patience():
            sent = self.sock.sendmsg(whole)
            if sent < size:
                self.sock.sendall(b"".join(whole)[sent:])
        return self._reply(command)[0]

    def call_for_fds(self, command: int, payload: bytes) -> tuple[bytes, list[int]]:
        """Send a command and return the reply's payload with its descriptors, which are the caller's.

        Raises:
            ReplyError: the server refused.
            BenchFailed: it closed the connection.
        """
        with self._patience():
            self.sock.sendall(message(command, payload))
        return self._reply(command)

    def _reply(self, command: int) -> tuple[bytes, list[int]]:
        with self._patience():
            data, ancillary, _, _ = self.sock.recvmsg(HEADER_SIZE, _ANCILLARY_SIZE, socket.MSG_WAITALL)
        fds = [fd for _, _, raw in ancillary for fd in array.array("i", raw)]
        if len(data) != HEADER_SIZE:
            raise BenchFailed(f"the server closed the connection at {command_name(command)}")
        header = unpack_header(data)
        body = self.sock.recv(header.payload_size, socket.MSG_WAITALL) if header.payload_size else b""
        if header.is_error:
            raise ReplyError(f"the server refused {command_name(command)}", header.error)
        return body, fds

    def round_trips(self, request: bytes, reply_size: int, count: int) -> list[int]:
        """Exchange the same message again and again.

        Args:
            request: what to send.
            reply_size: bytes of each reply.
            count: how often.

        Returns:
            Nanoseconds of each round trip.

        Raises:
            BenchFailed: a reply was short.
        """
        send, receive, now = self.sock.send, self.sock.recv, time.perf_counter_ns
        times = []
        with self._patience():
            for _ in range(count):
                start = now()
                send(request)
                reply = receive(reply_size)
                times.append(now() - start)
                if len(reply) != reply_size:
                    raise BenchFailed(f"a reply of {len(reply)} bytes came, {reply_size} were expected")
        return times

    def burst(self, requests: Sequence[bytes], fds: Sequence[int], reply_size: int) -> None:
        """Send several commands, then take all their replies.

        Args:
            requests: whole messages.
            fds: descriptors to attach to each of them.
            reply_size: bytes of each reply.

        Raises:
            BenchFailed: a command was refused.
        """
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            for request in requests:
                self.sock.sendmsg([request], ancillary)
        else:
            for request in requests:
                self.sock.send(request)
        expected = reply_size * len(requests)
        received = 0
        with self._patience():
            while received < expected:
                data = self.sock.recv(expected - received)
                # An error reply is shorter than a success or has this bit, and comes first in what is read.
                if not data or data[8] & _ERROR_BIT:
                    raise BenchFailed("the server refused a command of a burst")
                received += len(data)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
