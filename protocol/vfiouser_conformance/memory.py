"""Client memory that the server reaches by messages: what a VMM with private memory does."""

from __future__ import annotations

from collections.abc import Callable

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseFailed, check
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command

_ENODEV, _EINVAL = 19, 22


class ServedMemory:
    """Serves DMA_READ and DMA_WRITE on a range of addresses.

    Args:
        address: where it begins.
        data: what it holds.
        largest: the transfer size that we announced, in bytes; more in one message fails the case.
        writable: whether it is mapped for writing, too.
    """

    def __init__(
        self, address: int, data: bytes, largest: int = wire.DEFAULT_TRANSFER, *, writable: bool = True
    ) -> None:
        self.address = address
        self.data = bytearray(data)
        self._largest = largest
        self._writable = writable
        #: (command, address, count) of every message, in order.
        self.served: list[tuple[int, int, int]] = []
        #: Makes the reply from the right one, for servers that have to cope with others; may return b"" for none.
        self.spoil: Callable[[Received, bytes], bytes] = lambda message, reply: reply

    @property
    def moved(self) -> int:
        """Bytes that were asked for, in all."""
        return sum(count for _, _, count in self.served)

    def takes(self, address: int, count: int, *, writes: bool) -> bool:
        """Decide whether a transfer lies in it and is allowed, so that messages have to come.

        Args:
            address: first DMA address.
            count: bytes.
            writes: the server writes; else it reads.
        """
        inside = self.address <= address and address + count <= self.address + len(self.data)
        return inside and (self._writable or not writes)

    def __call__(self, link: RawLink, message: Received) -> None:
        """Answer a command of the server."""
        reply = self.spoil(message, self._answer(message))
        if reply:
            link.send(reply)

    def _answer(self, message: Received) -> bytes:
        check(message.command in (Command.DMA_READ, Command.DMA_WRITE), f"the server sent {message}")
        check(not message.fds, "the server sent a descriptor with a DMA command")
        check(len(message.payload) >= 16, f"{message} has a payload of {len(message.payload)} bytes")
        address, count = wire.DMA_ACCESS.unpack_from(message.payload)
        self.served.append((message.command, address, count))
        check(count <= self._largest, f"a DMA of {count} bytes, the client takes {self._largest}")
        begin = address - self.address
        writes = message.command == Command.DMA_WRITE
        same_length = len(message.payload) == 16 + (count if writes else 0)
        if not same_length:
            raise CaseFailed(f"{message} says count {count} and has {len(message.payload) - 16} bytes of data")
        if not 0 <= begin <= begin + count <= len(self.data):
            return self._error(message, _ENODEV)
        if writes:
            self.data[begin : begin + count] = message.payload[16:]
            return self.success(message, message.payload[:16])
        return self.success(message, message.payload[:16] + bytes(self.data[begin : begin + count]))

    @staticmethod
    def success(message: Received, payload: bytes) -> bytes:
        """Return a success reply.

        Args:
            message: the command that it answers.
            payload: what follows the header.
        """
        return wire.pack(message.command, payload, msg_id=message.msg_id, flags=wire.REPLY)

    @staticmethod
    def _error(message: Received, number: int) -> bytes:
        return wire.pack(message.command, msg_id=message.msg_id, flags=wire.REPLY | wire.ERROR, error=number)
