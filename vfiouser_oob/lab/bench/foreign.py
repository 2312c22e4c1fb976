"""A blocking client of a server that may be anybody's.

It believes nothing, waits for nothing for ever, and says in plain words what was wrong.
Both servers of a comparison are asked by this client, so that what it costs is the same for both.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vfiouser_oob.lab.bench.raw import BenchFailed, attach_commands
from vfiouser_oob.transport.peer import peer_of
from vfiouser_protocol.capabilities import parse_version_reply
from vfiouser_protocol.codec import decode
from vfiouser_protocol.constants import HEADER_SIZE, Command, RegionFlags
from vfiouser_protocol.errors import ReplyError, VfioUserError
from vfiouser_protocol.header import command_name, pack_header, unpack_header
from vfiouser_protocol.limits import DEFAULT_MAX_DMA_MAPS
from vfiouser_protocol.messages import RegionInfo

#: Seconds that a server may be silent.
PATIENCE_S = 5.0
_RETURN_STEP_S = 0.02
#: The largest reply: a portion of state, with what is before it.
_LARGEST = (1 << 20) + 4096
#: More than the fixed part of a region's description, which is all that is looked at.
_REGION_INFO_SIZE = 32
#: BARs of a PCI function.
_BARS = range(6)


@dataclass(frozen=True, slots=True)
class ServerTraits:
    """What a server said of itself.

    Args:
        readable_bar: the first BAR with a register that can be read; None: there is none.
        takes_fds: whether a message may carry a descriptor.
        max_dma_maps: how many ranges it takes.
    """

    readable_bar: int | None
    takes_fds: bool
    max_dma_maps: int


class ForeignClient:
    """A connection.

    Args:
        path: where the server listens.
        patience_s: how long it may be silent.

    Raises:
        BenchFailed: nobody listens there, or nobody lets us in.
    """

    def __init__(self, path: Path, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._received = bytearray()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # The kernel's time-outs rather than Python's, which would poll before every call.
        limit = int(patience_s).to_bytes(8, "little") + int(patience_s % 1 * 1e6).to_bytes(8, "little")
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.sock.setsockopt(socket.SOL_SOCKET, option, limit)
        try:
            self.sock.connect(os.fspath(path))
        except BlockingIOError:
            self.close()
            raise BenchFailed(f"it lets no client in: its queue was full for {patience_s:g} s") from None
        except OSError as error:
            self.close()
            raise BenchFailed(f"nobody listens at {path}: {error.strerror or error}") from error

    @property
    def pid(self) -> int:
        """The process that listens; 0 if that cannot be told."""
        return peer_of(self.sock).pid

    # Messages

    def ask(self, command: Command, payload: bytes, fds: Sequence[int] = ()) -> bytes:
        """Send a command and return the reply's payload; descriptors that come with it are dropped.

        Raises:
            ReplyError: it was refused.
            BenchFailed: there was no answer, or none that could be made sense of.
        """
        self._send(command, payload, 1, fds)
        _, error, body = self._reply(command, 1)
        if error:
            raise ReplyError(f"it refuses {command_name(command)}: {os.strerror(error)}", error)
        return body

    def ask_all(self, command: Command, payloads: Sequence[bytes], fds: Sequence[int] = ()) -> list[int]:
        """Send commands one after the other, then take all replies, in whatever order they come.

        Args:
            command: the command.
            payloads: of each.
            fds: descriptors to attach to each.

        Returns:
            The error number of each; 0 for a success.

        Raises:
            BenchFailed: an answer was missing, or made no sense.
        """
        for number, payload in enumerate(payloads):
            self._send(command, payload, number, fds)
        errors: dict[int, int] = {}
        while len(errors) < len(payloads):
            number, error, _ = self._reply(command, None)
            if number >= len(payloads) or number in errors:
                raise BenchFailed(f"it answers a {command_name(command)} that was not asked")
            errors[number] = error
        return [errors[number] for number in range(len(payloads))]

    def times(self, command: Command, payload: bytes, count: int, limit_s: float) -> list[int]:
        """Ask the same again and again.

        Args:
            command: the command.
            payload: its payload.
            count: how often.
            limit_s: seconds after which it is enough, however often it was.

        Returns:
            Nanoseconds of each answer.

        Raises:
            ReplyError: it was refused.
            BenchFailed: see `ask`.
        """
        taken: list[int] = []
        now = time.perf_counter_ns
        last = now() + int(limit_s * 1e9)
        while len(taken) < count:
            began = now()
            self.ask(command, payload)
            ended = now()
            taken.append(ended - began)
            if ended > last:
                break
        return taken

    def _send(self, command: Command, payload: bytes, number: int, fds: Sequence[int]) -> None:
        data = pack_header(number, command, HEADER_SIZE + len(payload), 0) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.sock.sendmsg([data], rights) if rights else self.sock.send(data)
            if sent < len(data):
                self.sock.sendall(data[sent:])
        except BlockingIOError:
            raise BenchFailed(f"it took no {command_name(command)} for {self._patience_s:g} s") from None
        except OSError:
            raise BenchFailed(f"it closed the connection before {command_name(command)}") from None

    def _reply(self, command: Command, number: int | None) -> tuple[int, int, bytes]:
        name = command_name(command)
        deadline = time.monotonic() + self._patience_s
        head = unpack_header(self._take(HEADER_SIZE, name, deadline))
        if not HEADER_SIZE <= head.msg_size <= _LARGEST:
            raise BenchFailed(f"its answer to {name} claims to have {head.msg_size} bytes")
        body = self._take(head.payload_size, name, deadline, begun=True)
        if not head.is_reply:
            raise BenchFailed(f"it sent {command_name(head.command)} of its own instead of an answer to {name}")
        if head.command != command or number not in (None, head.msg_id):
            raise BenchFailed(f"its answer to {name} belongs to another command or id")
        # An error without a number is one nevertheless.
        return head.msg_id, (head.error or 5) if head.is_error else 0, body

    def _take(self, count: int, name: str, deadline: float, *, begun: bool = False) -> bytes:
        received = self._received
        while len(received) < count:
            try:
                # Without room for descriptors the kernel closes those that come.
                data = self.sock.recv(max(1 << 16, count))
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data == b"":
                raise BenchFailed(f"it closed the connection when it was asked {name}")
            if data is not None:
                received += data
            if len(received) < count and time.monotonic() >= deadline:
                what = "sent a part of an answer only" if received or begun else "said nothing"
                raise BenchFailed(f"it {what} for {self._patience_s:g} s when it was asked {name}")
        taken = bytes(received[:count])
        del received[:count]
        return taken

    # Attaching

    def attach(self) -> ServerTraits:
        """Ask what a VMM asks before its guest runs; only VERSION and DEVICE_GET_INFO may not be refused.

        Raises:
            ReplyError: one of them was.
            BenchFailed: see `ask`.
        """
        version, readable = b"", None
        bars = 0
        for command, payload in attach_commands():
            try:
                body = self.ask(command, payload)
            except ReplyError:
                if command in (Command.VERSION, Command.DEVICE_GET_INFO):
                    raise
                body = b""
            if command is Command.VERSION:
                version = body
            if command is Command.DEVICE_GET_REGION_INFO:
                if readable is None and bars in _BARS and _can_be_read(body):
                    readable = bars
                bars += 1
        return _traits(version, readable)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def returned(path: Path, patience_s: float, return_s: float) -> ForeignClient:
    """Connect again to a server whose last client has left.

    Args:
        path: where it listens.
        patience_s: how long it may be silent.
        return_s: seconds in which one may come back that ends with its client, and is started again by somebody.

    Raises:
        BenchFailed: it takes no further client.
    """
    deadline = time.monotonic() + return_s
    while True:
        try:
            return ForeignClient(path, patience_s)
        except BenchFailed:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETURN_STEP_S)


def _can_be_read(body: bytes) -> bool:
    """Whether a region's description says that it has a register of four bytes."""
    if len(body) < _REGION_INFO_SIZE:
        return False
    info = decode(RegionInfo, body[:_REGION_INFO_SIZE])
    return bool(info.flags & RegionFlags.READ) and info.size >= 4


def _traits(version: bytes, readable: int | None) -> ServerTraits:
    """What a server that may have said nothing of its capabilities is good for."""
    fds, maps = None, None
    try:
        said = parse_version_reply(version).capabilities
        fds, maps = said.max_msg_fds, said.max_dma_maps
    except VfioUserError:  # what it says cannot be read; the defaults of the specification are as good as any
        pass
    return ServerTraits(readable, fds is None or fds > 0, DEFAULT_MAX_DMA_MAPS if maps is None else maps)
