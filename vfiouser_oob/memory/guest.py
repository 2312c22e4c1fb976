"""Guest memory as a device sees it: DMA addresses, resolved to the client's files or to messages to the client."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import trio

from vfiouser_oob.memory.files import FileFacts, FileTable, GuestFile, examine, is_memory
from vfiouser_oob.memory.recorder import DmaRoute, SentWrite, WriteRecorder
from vfiouser_oob.persist.successor.descriptors import file_name
from vfiouser_oob.persist.successor.things import RangeThing
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_oob.transport.reaper import STRANGERS, Account
from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_oob.transport.worker import Worker
from vfiouser_protocol.dma import DmaRegion, DmaTable
from vfiouser_protocol.dma_logging import DmaLogging
from vfiouser_protocol.errors import CommandError, DmaFault
from vfiouser_protocol.messages import DmaMap as DmaMapRequest
from vfiouser_protocol.messages import DmaUnmap as DmaUnmapRequest

T = TypeVar("T")
_MAP_SIZE = 32
#: Ranges of one access that are looked up and used in one turn: a client may map its memory in windows of a few bytes.
_RANGES_PER_TURN = 64


class DmaMessages(Protocol):
    """How to reach memory that has no file: DMA_READ and DMA_WRITE to the client."""

    async def dma_read(self, address: int, count: int) -> bytes:
        """Read client memory by message."""
        ...

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write client memory by message."""
        ...

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Send a write, behind all that were sent before."""
        ...


class GuestMemory:
    """The DMA mappings of one connection.

    Args:
        messages: how to reach ranges without a file.
        max_maps: how many ranges may be mapped at once.
        by_message: whether even ranges with a file are reached by messages.
        check_files: whether this process accesses the files itself, so that they must be accessible.
        account: whose files they are.
    """

    def __init__(
        self,
        messages: DmaMessages,
        max_maps: int,
        *,
        by_message: bool,
        check_files: bool,
        account: Account = STRANGERS,
    ) -> None:
        self._messages = messages
        #: Whether even ranges with a file are reached by messages.
        self.by_message = by_message
        #: Pages that were written through a file here, and whatever else is known to be dirty, while that is wanted.
        self.log = DmaLogging()
        #: Decides which way writes go, and knows which of them the client does not; None if nobody needs that.
        self.recorder: WriteRecorder | None = None
        self._check_files = check_files
        self._in_flight = 0
        self._quiet = trio.Event()
        self._lane = FunctionQueue()
        self._worker = Worker(account)
        self.map = DmaTable(max_maps)
        self.files = FileTable(account)

    def must_wait_for(self, fds: Sequence[OwnedFd]) -> bool:
        """Whether the file of a DMA_MAP has to be examined by `examine_later`, as its file system may not answer."""
        return bool(fds) and not is_memory(fds[0])

    def examine(self, fds: Sequence[OwnedFd]) -> FileFacts | None:
        """Look at the file of a DMA_MAP, which is memory; None if there is no file."""
        return examine(fds[0], in_memory=True) if fds else None

    async def examine_later(self, fds: Sequence[OwnedFd]) -> FileFacts:
        """Look at the file of a DMA_MAP in the client's thread.

        Raises:
            CommandError: EACCES when the descriptor is unusable, EBUSY when too much waits for the client already.
        """
        try:
            copy = fds[0].duplicate()
            return await self._worker.run(partial(examine, copy, in_memory=False), copy.close)
        except OSError as error:
            raise CommandError(f"cannot examine the file of a DMA_MAP: {error.strerror}", error.errno) from error

    def add(self, request: DmaMapRequest, fds: Sequence[OwnedFd], facts: FileFacts | None) -> DmaRegion | None:
        """Map a range (DMA_MAP).

        Args:
            request: the decoded command.
            fds: descriptors that came with it; the first is taken if it is a file that is not known yet.
            facts: what `examine` found out about that one.

        Returns:
            The new region; None when the identical mapping was there already.

        Raises:
            CommandError: with the errno of the refusal; nothing has changed.
        """
        file: GuestFile | None = None
        try:
            if facts is not None:
                file = self.files.adopt(
                    fds[0],
                    facts,
                    flags=request.flags,
                    offset=request.offset,
                    size=request.size,
                    check=self._check_files and not self.by_message,
                )
            region = self.map.map(
                request.address,
                request.size,
                request.flags,
                request.offset,
                file.identity if file is not None else None,
                file,
            )
        except CommandError:
            if file is not None:
                self.files.release(file)
            raise
        if region is None and file is not None:
            self.files.release(file)
        return region

    def remove(self, request: DmaUnmapRequest) -> DmaRegion:
        """Unmap one range (DMA_UNMAP).

        Raises:
            CommandError: ENOENT when there is no such range.
        """
        region = self.map.unmap(request.address, request.size)
        self._drop(region)
        return region

    def require(self, request: DmaUnmapRequest) -> None:
        """Check that a range is mapped exactly as a DMA_UNMAP says.

        Raises:
            CommandError: ENOENT when it is not.
        """
        region = self.map.find(request.address)
        if region is None or (region.address, region.size) != (request.address, request.size):
            raise CommandError(f"nothing is mapped at exactly {request.address:#x}+{request.size:#x}", errno.ENOENT)

    def written_down(self, region: DmaRegion) -> tuple[RangeThing, OwnedFd | None]:
        """A range as another process gets to know it, and its file.

        Args:
            region: the range.
        """
        file: GuestFile | None = region.owner
        name = None if file is None else file_name(*file.key)
        thing = RangeThing(region.address, region.size, region.flags, region.offset, name)
        return thing, None if file is None else file.fd

    def restore(self, thing: RangeThing, fd: OwnedFd | None) -> None:
        """Map a range that a client has mapped with another process.

        Args:
            thing: what was written down.
            fd: its file; it stays the caller's.

        Raises:
            CommandError: it cannot be mapped.
            OSError: it is no file that can be used.
        """
        request = DmaMapRequest(_MAP_SIZE, thing.flags, thing.offset, thing.address, thing.size)
        if fd is None:
            self.add(request, (), None)
            return
        with fd.duplicate() as copy:
            self.add(request, (copy,), examine(copy, in_memory=is_memory(copy)))

    def discard(self, region: DmaRegion) -> None:
        """Take back a mapping that the device refused."""
        self._drop(self.map.unmap(region.address, region.size))

    def remove_all(self) -> list[DmaRegion]:
        """Unmap everything; returns what was mapped."""
        regions = self.map.unmap_all()
        for region in regions:
            self._drop(region)
        return regions

    def _drop(self, region: DmaRegion) -> None:
        if region.owner is not None:
            self.files.release(region.owner)
            region.owner = None

    def __iter__(self) -> Iterator[DmaRegion]:
        return iter(self.map)

    @property
    def total_bytes(self) -> int:
        """Bytes of all ranges."""
        return sum(region.size for region in self.map)

    async def read(self, address: int, count: int) -> bytes:
        """Read client memory (device DMA read).

        Args:
            address: DMA address.
            count: bytes.

        Raises:
            DmaFault: no mapping allows it, or the client could not serve it.
        """
        parts = []
        end = address + count
        by_message = self.by_message and (self.recorder is None or self.recorder.route is not DmaRoute.HELD)
        while True:
            for region, offset, length in self.map.segments(address, end - address, False, _RANGES_PER_TURN):
                file: GuestFile | None = region.owner
                if file is None or by_message:
                    parts.append(await self._messages.dma_read(region.address + offset, length))
                elif file.in_memory:
                    parts.append(file.read(region.offset + offset, length))
                else:
                    parts.append(await self._in_thread(file, partial(file.read, region.offset + offset, length)))
                address += length
            if address >= end:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            await self._lane.turn()

    async def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write client memory (device DMA write).

        Args:
            address: DMA address.
            data: what to write.

        Raises:
            DmaFault: no mapping allows it, or the client could not take it.
        """
        view = memoryview(data)
        done = 0
        while True:
            for region, offset, length in self.map.segments(address + done, len(view) - done, True, _RANGES_PER_TURN):
                if done:  # one that the thread has finished goes on at once, and there may be very many
                    await self._lane.turn()
                await self._write_part(region, offset, view[done : done + length])
                done += length
            if done == len(view):
                return

    async def relay_read(self, address: int, count: int) -> bytes:
        """Read for a device that asks by messages: by a message of ours, or the file if the client may not answer now.

        Args:
            address: DMA address.
            count: bytes.

        Raises:
            DmaFault: as `read`.
        """
        recorder = self.recorder
        if recorder is None or recorder.route is DmaRoute.FILES or not self._in_memory(address, count, write=False):
            return await self._messages.dma_read(address, count)
        return await self.read(address, count)

    async def relay_write(self, address: int, data: bytes) -> None:
        """Write for a device that asks by messages: by a message of ours, or the file if the client may not answer now.

        Args:
            address: DMA address.
            data: what to write.

        Raises:
            DmaFault: as `write`.
        """
        recorder = self.recorder
        if recorder is None:
            await self._messages.dma_write(address, data)
        elif not self._in_memory(address, len(data), write=True):
            await self._by_message(recorder, address, data, has_file=False)
        elif recorder.route is DmaRoute.HELD or not await self._by_message(recorder, address, data, has_file=True):
            await self.write(address, data)

    def _in_memory(self, address: int, count: int, *, write: bool) -> bool:
        """Whether a range can be reached by files whose access waits for nobody else."""
        parts = self.map.segments(address, count, write, _RANGES_PER_TURN)
        reached = sum(length for _, _, length in parts)
        return reached == count and all(region.owner is not None and region.owner.in_memory for region, _, _ in parts)

    async def place(self, address: int, data: bytes) -> list[SentWrite]:
        """Write what the function wrote elsewhere: into files, and where there are none by messages.

        Args:
            address: DMA address.
            data: what to write.

        Returns:
            The messages, none of which was waited for: the client may not answer now.

        Raises:
            DmaFault: nothing writable is mapped there, or its file cannot be written.
        """
        sent: list[SentWrite] = []
        view = memoryview(data)
        while view:
            for region, offset, length in self.map.segments(address, len(view), True, _RANGES_PER_TURN):
                if region.owner is None:
                    sent.append(self._messages.bus_write(address, bytes(view[:length])))
                else:
                    await self._write_file(address, region.owner, region.offset + offset, view[:length])
                address += length
                view = view[length:]
        return sent

    async def _write_part(self, region: DmaRegion, offset: int, part: memoryview) -> None:
        file: GuestFile | None = region.owner
        address = region.address + offset
        if file is None or self._prefers_messages:
            await self._message_or_file(address, part, file, region.offset + offset)
        else:
            await self._write_file(address, file, region.offset + offset, part)

    @property
    def _prefers_messages(self) -> bool:
        """Whether what has a file is written by messages all the same."""
        route = DmaRoute.FILES if self.recorder is None else self.recorder.route
        return route is DmaRoute.MESSAGES or (self.by_message and route is not DmaRoute.HELD)

    async def _message_or_file(self, address: int, part: memoryview, file: GuestFile | None, offset: int) -> None:
        data, recorder = bytes(part), self.recorder
        if recorder is None:
            await self._messages.dma_write(address, data)
        elif not await self._by_message(recorder, address, data, has_file=file is not None) and file is not None:
            await self._write_file(address, file, offset, memoryview(data))

    async def _by_message(self, recorder: WriteRecorder, address: int, data: bytes, *, has_file: bool) -> bool:
        """Write by a message; returns whether that was done, or it has to go into the file after all."""
        with recorder.sending(address, data, has_file=has_file) as scope:
            await self._messages.dma_write(address, data)
        return not scope.cancelled_caught

    async def _write_file(self, address: int, file: GuestFile, offset: int, part: memoryview) -> None:
        # What could change while the thread is at it, is copied.
        kept = part if part.readonly else bytes(part)
        await self._write_in_thread(address, file, offset, kept)
        self._wrote(address, len(part))
        if self.recorder is not None and self.recorder.contested(address, len(part)):
            data = bytes(kept)
            self.recorder.sent_again(address, data, self._messages.bus_write(address, data))

    async def _write_in_thread(self, address: int, file: GuestFile, offset: int, part: bytes | memoryview) -> None:
        try:
            await self._in_thread(file, partial(file.write, offset, part))
        except trio.Cancelled:
            # The thread goes on without us, so the pages may be written at any moment from now on.
            self._wrote(address, len(part))
            raise

    def _wrote(self, address: int, length: int) -> None:
        self.log.mark(address, length)
        if self.recorder is not None:
            self.recorder.wrote(address, length)

    async def _in_thread(self, file: GuestFile, access: Callable[[], T]) -> T:
        """Access a file in the client's thread; the file stays open until that returns."""
        file.accesses += 1
        self._in_flight += 1
        try:
            return await self._worker.run(access, partial(self._landed, file))
        except OSError as error:
            raise DmaFault(f"cannot access client memory now: {error.strerror}", error.errno) from error

    def _landed(self, file: GuestFile) -> None:
        file.landed()
        self._in_flight -= 1
        if not self._in_flight:
            self._quiet.set()
            self._quiet = trio.Event()

    @property
    def is_quiet(self) -> bool:
        """Whether no access to client memory is under way in a thread."""
        return not self._in_flight

    async def quiet(self) -> None:
        """Wait until no access is under way, which an unmap has to before it is answered."""
        while self._in_flight:
            await self._quiet.wait()

    def close(self) -> None:
        """Unmap everything and close every file."""
        self.remove_all()
        self.files.close()
        self._worker.close()
