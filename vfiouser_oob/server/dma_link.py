"""DMA by messages: the server's own commands to the client, and their replies."""

from __future__ import annotations

import errno
from collections.abc import Callable

import trio

from vfiouser_oob.server.dma_dialect import DmaDialect
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
            reply = await self.dialect.decode_read(address, size, await self._read_part(address, size))
            if reply.address != address:
                raise DmaFault(
                    f"the client answered DMA_READ {address:#x}+{size:#x} with {reply.address:#x}+{reply.count:#x}",
                    errno.EPROTO,
                )
            parts.append(reply.data)
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
            if not payload:
                continue
            reply = _decoded(payload)
            if (reply.address, reply.count) != (target, len(part)):
                raise DmaFault(
                    f"the client answered DMA_WRITE {target:#x}+{len(part):#x} with "
                    f"{reply.address:#x}+{reply.count:#x}",
                    errno.EPROTO,
                )
        return told

    async def _call(self, command: Command, address: int, count: int, payload: bytes) -> bytes:
        if not self._max_transfer:
            raise DmaFault("the client takes no data by messages (max_data_xfer_size 0)", errno.E2BIG)
        pending = PendingReply()
        async with self._slots:
            if self._closed:
                raise _gone()
            # Asked when nothing is waited for any more: an unmap that was answered meanwhile must be the last word.
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
        if pending.fault is not None:
            raise pending.fault
        if pending.header is not None and pending.header.is_error:
            raise DmaFault(f"the client refused {command.name}", pending.header.error or errno.EIO)
        return pending.payload

    def summary(self) -> dict[str, int]:
        """What was transferred, for `status`."""
        return {
            "reads": self.reads,
            "writes": self.writes,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
        }

    def close(self) -> None:
        """Fail everything that is under way: the client has gone."""
        self._closed = True
        for pending in tuple(self._pending):
            pending.fail(_gone())


def _decoded(payload: bytes) -> DmaWriteReply:
    try:
        return decode(DmaWriteReply, payload)
    except VfioUserError as error:
        raise DmaFault(f"the client's reply makes no sense: {error}", errno.EPROTO) from error


def _gone() -> DmaFault:
    return DmaFault("the client has gone", errno.ENODEV)
