"""DMA by messages: the server's own commands to the client, and their replies."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

import trio

from vfiouser_oob.server.dma_dialect import DmaDialect, RawRead
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.dma_layout import WRITES, DmaLayout
from vfiouser_protocol.errors import DmaFault, VfioUserError
from vfiouser_protocol.header import Header
from vfiouser_protocol.messages import DmaRead, DmaWriteReply
from vfiouser_protocol.session import ProtocolSession

#: Bytes of one DMA_READ, and of all that wait for their replies. QEMU 11.1 loses its place in the stream when a reply
#: does not fit into its socket's send buffer (208 KiB by default on Linux), although it announces transfers of 1 MiB.
MAX_READ = 64 << 10
MAX_READ_OUTSTANDING = 128 << 10

#: Commands under way at once. Message ids are 16 bits wide and shared with nobody, so this is about memory only.
MAX_OUTSTANDING = 256

#: Takes a reply to DMA_READ apart: an address, bytes, its payload; the data. Raises DmaFault.
ReadCheck: TypeAlias = Callable[[int, int, bytes], Awaitable[bytes]]


class BusRead:
    """A read of whatever is at an address of the client's bus, sent already.

    Args:
        address: the guest's.
        count: bytes.
        pending: its message.
        check: takes the reply apart.
    """

    __slots__ = ("_address", "_check", "_count", "_pending")

    def __init__(self, address: int, count: int, pending: PendingReply, check: ReadCheck) -> None:
        self._address = address
        self._count = count
        self._pending = pending
        self._check = check

    async def wait(self) -> bytes:
        """Wait for the client's answer, however long it takes.

        Raises:
            DmaFault: refused, nonsense, or gone.
        """
        await self._pending.event.wait()
        return await self._check(self._address, self._count, _payload(Command.DMA_READ, self._pending))


class PendingReply:
    """A command of ours that the client has not answered yet."""

    __slots__ = ("event", "fault", "header", "payload")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.header: Header | None = None
        self.payload = b""
        self.fault: DmaFault | None = None

    def resolve(self, header: Header, payload: bytes) -> None:
        """Take the reply."""
        self.header = header
        self.payload = payload
        self.event.set()

    def fail(self, fault: DmaFault) -> None:
        """Give up: there will be no reply."""
        self.fault = fault
        self.event.set()


class BusWrite:
    """A write to whatever is at an address of the client's bus, sent already.

    Args:
        parts: its messages, each with the address and bytes that it is about.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: list[tuple[int, int, PendingReply]]) -> None:
        self._parts = parts

    @property
    def answered(self) -> bool:
        """Whether the client has answered, or cannot any more."""
        return all(pending.event.is_set() for _, _, pending in self._parts)

    async def wait(self) -> None:
        """Wait for the client's answer, however long it takes.

        Raises:
            DmaFault: refused, nonsense, or gone.
        """
        for address, count, pending in self._parts:
            await pending.event.wait()
            _check_written(address, count, _payload(Command.DMA_WRITE, pending))


class ByteBudget:
    """Lets so many bytes be under way at once; who wants more waits for its turn.

    Args:
        limit: bytes; a single request of more is let through alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting = trio.lowlevel.ParkingLot()

    async def take(self, count: int) -> None:
        """Wait until `count` more bytes may be under way."""
        if self._waiting:
            await self._waiting.park()
        while self._used and self._used + count > self._limit:
            await self._waiting.park()
        self._used += count
        if self._used < self._limit:
            self._waiting.unpark()

    def give_back(self, count: int) -> None:
        """Say that `count` bytes have arrived."""
        self._used -= count
        self._waiting.unpark()


class DmaLink:
    """Sends DMA_READ and DMA_WRITE to the client and waits for the answers.

    Args:
        session: protocol state of the connection.
        send: sends one whole message on the channel for our commands (main or twin socket).
        permit: raises DmaFault unless an address, a count and a direction (write) are mapped. Asked before each
            message, since a long transfer takes several and the client may unmap in between.
        max_transfer: the client's `max_data_xfer_size`, in bytes.
        budget_s: seconds after which a transfer that was not answered is a DMA fault.
        learned: told in which layout the client speaks, when that is known.
    """

    def __init__(
        self,
        session: ProtocolSession,
        send: Callable[[bytes], None],
        permit: Callable[[int, int, bool], object],
        max_transfer: int,
        budget_s: float,
        learned: Callable[[DmaLayout], object] = lambda layout: None,
    ) -> None:
        self._session = session
        self._send = send
        self._permit = permit
        self._max_transfer = max_transfer
        # 0 is legal and means that nothing can be transferred, which is found out when the first message is due.
        self._step = max(1, max_transfer)
        self._budget_s = budget_s
        self._slots = trio.Semaphore(MAX_OUTSTANDING)
        self._read_budget = ByteBudget(MAX_READ_OUTSTANDING)
        self._pending: set[PendingReply] = set()
        self._closed = False
        self.dialect = DmaDialect(self._read_part, learned)
        #: Transfers and bytes in each direction, for `status`.
        self.reads = self.writes = self.read_bytes = self.written_bytes = 0

    async def read(self, address: int, count: int) -> bytes:
        """Read client memory, split by what the client takes per message, in ascending order.

        Raises:
            DmaFault: refused, nonsense, gone, or too late.
        """
        parts = []
        end = address + count
        while address < end:
            size = min(self._step, MAX_READ, end - address)
            parts.append(await self._checked(address, size, await self._read_part(address, size)))
            address += size
        self.reads += 1
        self.read_bytes += count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_part(self, address: int, size: int) -> bytes:
        await self._read_budget.take(size)
        try:
            return await self._call(Command.DMA_READ, address, size, encode(DmaRead(address, size)))
        finally:
            self._read_budget.give_back(size)

    async def _checked(self, address: int, size: int, payload: bytes, again: RawRead | None = None) -> bytes:
        reply = await self.dialect.decode_read(address, size, payload, again)
        if reply.address != address:
            raise DmaFault(
                f"the client answered DMA_READ {address:#x}+{size:#x} with {reply.address:#x}+{reply.count:#x}",
                errno.EPROTO,
            )
        return reply.data

    async def write(self, address: int, data: bytes) -> None:
        """Write client memory, split like `read`.

        Raises:
            DmaFault: refused, nonsense, gone, or too late.
        """
        if self.dialect.layout is None and data:
            await self._write_first(address, data)
        else:
            await self._write_parts(address, data, self.dialect.spoken)
        self.writes += 1
        self.written_bytes += len(data)

    async def _write_first(self, address: int, data: bytes) -> None:
        """Write to a client of which it is not known yet how it reads that."""
        dialect = self.dialect
        readable = await dialect.look(address, len(data))
        told = await self._write_parts(address, data, dialect.spoken)
        if dialect.layout is not None:
            return
        if told:
            dialect.settle(DmaLayout.SPECIFIED)
        elif readable and any(data):
            await self._verify_first(address, data)

    async def _verify_first(self, address: int, data: bytes) -> None:
        """See how a client read the first write, which it answered without a payload, to memory that was all zeros."""
        written = next(at for at, byte in enumerate(data) if byte)
        await self.dialect.look(address + written, len(data) - written)
        if self.dialect.layout is not DmaLayout.SPECIFIED:
            # It is at the wrong place, or only the zeros in front of it have arrived.
            await self._write_parts(address, data, DmaLayout.NARROW)
            await self.dialect.look(address + written, len(data) - written)

    async def _write_parts(self, address: int, data: bytes, layout: DmaLayout) -> bool:
        """Write; returns whether each reply had a payload, which older clients leave out."""
        told = True
        for start in range(0, len(data), self._step):
            part = data[start : start + self._step]
            target = address + start
            request = encode(WRITES[layout](target, len(part), part))
            payload = await self._call(Command.DMA_WRITE, target, len(part), request)
            told = told and bool(payload)
            _check_written(target, len(part), payload)
        return told

    async def bus_read(self, address: int, count: int) -> bytes:
        """Read whatever is at an address of the client's bus, mapped as memory or not.

        Args:
            address: the guest's.
            count: bytes; no more than the client takes in one message.

        Raises:
            DmaFault: refused, nonsense, gone, or too late.
        """
        return await self._checked(address, count, await self._read_bus(address, count), self._read_bus)

    async def _read_bus(self, address: int, count: int) -> bytes:
        return await self._call(Command.DMA_READ, address, count, encode(DmaRead(address, count)), mapped=False)

    def bus_write(self, address: int, data: bytes) -> BusWrite:
        """Send a write to whatever is at an address of the client's bus, mapped as memory or not.

        Nothing is waited for, so that it can be sent to a client that does not answer now. The client carries such
        writes out in the order in which they are sent.

        Args:
            address: the guest's.
            data: what is written.

        Raises:
            DmaFault: the client takes no messages, or has gone.
        """
        if not self._max_transfer:
            raise _takes_nothing()
        if self._closed:
            raise _gone()
        self._pending = {pending for pending in self._pending if not pending.event.is_set()}
        parts = []
        for start in range(0, len(data), self._step):
            part = data[start : start + self._step]
            pending = PendingReply()
            request = encode(WRITES[self.dialect.spoken](address + start, len(part), part))
            _, message = self._session.command(Command.DMA_WRITE, request, pending)
            self._pending.add(pending)
            self._send(message)
            parts.append((address + start, len(part), pending))
        return BusWrite(parts)

    async def _call(self, command: Command, address: int, count: int, payload: bytes, *, mapped: bool = True) -> bytes:
        if not self._max_transfer:
            raise _takes_nothing()
        pending = PendingReply()
        async with self._slots:
            if self._closed:
                raise _gone()
            # Asked when nothing is waited for any more: an unmap that was answered meanwhile must be the last word.
            if mapped:
                self._permit(address, count, command == Command.DMA_WRITE)
            msg_id, message = self._session.command(command, payload, pending)
            self._pending.add(pending)
            answered = False
            try:
                self._send(message)
                with trio.move_on_after(self._budget_s):
                    await pending.event.wait()
                    answered = True
            finally:
                self._pending.discard(pending)
                if not answered:
                    self._session.forget(msg_id)
        if not answered:
            raise DmaFault(f"the client did not answer {command.name} within {self._budget_s:g} s", errno.ETIMEDOUT)
        return _payload(command, pending)

    def summary(self) -> dict[str, int]:
        """What was transferred, for `status`."""
        return {
            "reads": self.reads,
            "writes": self.writes,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
        }

    def send_read(self, address: int, count: int) -> BusRead:
        """Send a read of whatever is at an address of the client's bus, mapped as memory or not; see `bus_write`.

        Args:
            address: the guest's.
            count: bytes; no more than the client takes in one message, and than a reply may have.

        Raises:
            DmaFault: the client takes no such messages, or has gone.
        """
        if count > min(self._max_transfer, MAX_READ):
            raise DmaFault(f"the client accepts no reads of {count} bytes", errno.E2BIG)
        if self._closed:
            raise _gone()
        pending = PendingReply()
        _, message = self._session.command(Command.DMA_READ, encode(DmaRead(address, count)), pending)
        self._pending.add(pending)
        self._send(message)
        return BusRead(address, count, pending, partial(self._checked, again=self._read_bus))

    def close(self) -> None:
        """Fail everything that is under way: the client has gone."""
        self._closed = True
        for pending in tuple(self._pending):
            pending.fail(_gone())


def _payload(command: Command, pending: PendingReply) -> bytes:
    if pending.fault is not None:
        raise pending.fault
    if pending.header is not None and pending.header.is_error:
        raise DmaFault(f"the client refused {command.name}", pending.header.error or errno.EIO)
    return pending.payload


def _check_written(address: int, size: int, payload: bytes) -> None:
    if not payload:  # older clients send the header alone
        return
    reply = _decoded(payload)
    if (reply.address, reply.count) != (address, size):
        raise DmaFault(
            f"the client answered DMA_WRITE {address:#x}+{size:#x} with {reply.address:#x}+{reply.count:#x}",
            errno.EPROTO,
        )


def _takes_nothing() -> DmaFault:
    return DmaFault("the client accepts no data in messages (max_data_xfer_size 0)", errno.E2BIG)


def _decoded(payload: bytes) -> DmaWriteReply:
    try:
        return decode(DmaWriteReply, payload)
    except VfioUserError as error:
        raise DmaFault(f"the client's reply makes no sense: {error}", errno.EPROTO) from error


def _gone() -> DmaFault:
    return DmaFault("the client has gone", errno.ENODEV)
