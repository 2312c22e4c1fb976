"""The v1 generation's face: the migration region.

The register page is trapped; the data section behind it is a memfd that the client may map, and accepts trapped
accesses as well, for every chunk.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_oob.migration.inherited import NO_V1_MARK, TransferNotes, V1Mark
from vfiouser_oob.migration.transfer import Left, Transfer
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.buffers import BufferPool
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.migration_v1 import (
    DataAccess,
    Iteration,
    MigrationRegister,
    RegionLayout,
    device_state_value,
    pack_register,
    require_transition,
    require_writable,
    unpack_register,
)
from vfiouser_protocol.regions import RegionSpec

ReadAnswer: TypeAlias = "bytes | Awaitable[bytes]"
#: What pending_bytes says at least until the end was taken: the size of a record's head.
_SOMETHING = 32


class V1View:
    """The migration region of one connection.

    Args:
        transfer: moves the state.
        name: the function's name, for the shared memory.
        index: of the region.
        data_size: bytes of the data section, whole pages.
        notes: takes down what the client knows; None: nobody does.
    """

    def __init__(
        self, transfer: Transfer, name: str, index: int, data_size: int, notes: TransferNotes | None = None
    ) -> None:
        self._transfer = transfer
        self._notes = notes
        self._noted = NO_V1_MARK
        self._name = name
        self._layout = RegionLayout(mmap.PAGESIZE, data_size)
        self._iteration = Iteration(self._layout)
        self._memory: SharedMemory | None = None
        #: Told of the memory when it is made: another process needs it.
        self.on_memory: Callable[[int, SharedMemory], None] | None = None
        #: What the client wrote to device_state last.
        self._written = 0
        self._pool = BufferPool()
        self.index = index
        self._readers: Mapping[MigrationRegister, Callable[[], ReadAnswer]] = {
            MigrationRegister.DEVICE_STATE: self._read_state,
            MigrationRegister.RESERVED: lambda: pack_register(MigrationRegister.RESERVED, 0),
            MigrationRegister.PENDING_BYTES: self._read_pending,
            MigrationRegister.DATA_OFFSET: self._read_offset,
            MigrationRegister.DATA_SIZE: self._read_size,
        }

    @property
    def spec(self) -> RegionSpec:
        """What the region says about itself."""
        spec = self._layout.spec()
        return RegionSpec(self.index, spec.size, spec.flags, spec.areas, type=spec.type, mappable=True)

    @property
    def memory(self) -> SharedMemory:
        """The whole region's memory; made when it is first needed."""
        if self._memory is None:
            self._memory = SharedMemory(f"vfiouser-{self._name}-migration", self._layout.size)
            if self.on_memory is not None:
                self.on_memory(self.index, self._memory)
        return self._memory

    def adopt(self, fd: OwnedFd) -> None:
        """Go on with the memory that a client got of another process.

        Args:
            fd: that; taken.

        Raises:
            OSError: it cannot be mapped.
            ValueError: it is too small.
        """
        self._memory = SharedMemory(f"vfiouser-{self._name}-migration", self._layout.size, fd)

    def fileno(self) -> int:
        """Return the descriptor that maps the data section; it stays ours."""
        return self.memory.fileno()

    def close(self) -> None:
        """Give the memory back."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def read(self, offset: int, count: int) -> ReadAnswer:
        """Read a register or a part of the data section.

        Args:
            offset: in the region, bytes.
            count: bytes, at least 1.

        Raises:
            CommandError: EINVAL for what is no such access, or out of sequence.
        """
        place = self._layout.locate(offset, count)
        self._follow()
        if isinstance(place, DataAccess):
            start = self._layout.data_start
            return bytes(self.memory.view[start + place.start : start + place.end])
        answer = self._readers[place]()
        if self._notes is None:
            return answer
        if not isinstance(answer, bytes):
            return self._note_later(answer)
        self._note(self._notes)
        return answer

    async def _note_later(self, answer: Awaitable[bytes]) -> bytes:
        data = await answer
        if self._notes is not None:
            self._note(self._notes)
        return data

    def _note(self, notes: TransferNotes) -> None:
        """Take down what the client knows as soon as it is answered, if that is something else than before."""
        mark = V1Mark(self._iteration.mark, self._written)
        if mark != self._noted:
            notes.iterated(self._noted, mark)
            self._noted = mark

    def restore(self, mark: V1Mark) -> None:
        """Go on with what a client of another daemon knows.

        Args:
            mark: what was taken down of it.
        """
        self._iteration.restore(mark.iteration)
        self._written, self._noted = mark.state, mark

    def write(self, offset: int, data: bytes) -> Awaitable[None] | None:
        """Write a register or a part of the data section.

        Args:
            offset: in the region, bytes.
            data: what is written, at least one byte.

        Raises:
            CommandError: EINVAL as for `read`, EBUSY while the other generation migrates.
        """
        place = self._layout.locate(offset, len(data))
        self._transfer.require("a write to the migration region")
        self._follow()
        if isinstance(place, DataAccess):
            self._iteration.require_data_access(write=True)
            start = self._layout.data_start
            self.memory.view[start + place.start : start + place.end] = data
            return None
        require_writable(place, self._iteration.state)
        if place is MigrationRegister.DEVICE_STATE:
            return self._write_state(unpack_register(data))
        if place is MigrationRegister.DATA_SIZE:
            return self._consume(self._iteration.write_size(unpack_register(data)))
        return None

    def _follow(self) -> None:
        """Let the iteration follow the engine; while the other generation migrates, there is nothing to iterate."""
        self._iteration.enter(self._transfer.state if self._transfer.mine else DeviceState.RUNNING)

    # Registers

    def _read_state(self) -> bytes:
        return pack_register(MigrationRegister.DEVICE_STATE, device_state_value(self._transfer.state, self._written))

    async def _write_state(self, value: int) -> None:
        await self._transfer.request(lambda current: require_transition(current, value))
        self._written = value
        self._pool.drop()
        self._follow()
        if self._notes is not None:
            self._note(self._notes)

    def _read_pending(self) -> ReadAnswer:
        self._iteration.begin_pending()
        left = self._transfer.left
        if left is None and self._iteration.state is DeviceState.STOP_COPY and self._transfer.mine:
            # Nothing would say that everything was taken.
            raise CommandError("what is left of the state was lost", errno.EIO)
        if left is None or self._iteration.state not in (DeviceState.PRE_COPY, DeviceState.STOP_COPY):
            return self._pending(0)
        if left.final or left.buffered or self._iteration.chunk:
            return self._pending(self._amount(left))
        return self._pending_later()

    async def _pending_later(self) -> bytes:
        """Before the stop it says 0 if the agent has nothing now."""
        await self._transfer.prepare(1)
        left = self._transfer.left
        return self._pending(self._amount(left) if left is not None and left.buffered else 0)

    def _pending(self, amount: int) -> bytes:
        return pack_register(MigrationRegister.PENDING_BYTES, self._iteration.pending(amount))

    def _amount(self, left: Left) -> int:
        """Bytes that are there or expected."""
        if left.exhausted:
            return self._iteration.chunk
        return max(_SOMETHING, self._iteration.chunk + left.buffered + left.remaining)

    def _read_offset(self) -> ReadAnswer:
        if not self._iteration.offset():
            return self._offset_read()
        if self._transfer.left is None:
            raise CommandError("data_offset was read while no state is being saved")
        if not self._transfer.has(self._layout.data_size):
            return self._offset_later()
        self._fill()
        return self._offset_read()

    async def _offset_later(self) -> bytes:
        await self._transfer.prepare(self._layout.data_size)
        self._fill()
        return self._offset_read()

    def _offset_read(self) -> bytes:
        return pack_register(MigrationRegister.DATA_OFFSET, self._layout.data_start)

    def _fill(self) -> None:
        """Put the next portion into the data section."""
        start = end = self._layout.data_start
        for piece in self._transfer.read(self._layout.data_size):
            self.memory.view[end : end + len(piece)] = piece
            end += len(piece)
        self._iteration.prepared(end - start)

    def _read_size(self) -> bytes:
        size = self._iteration.size()
        self._transfer.delivered()  # the client knows now how much of the chunk there is, and has it
        return pack_register(MigrationRegister.DATA_SIZE, size)

    async def _consume(self, size: int) -> None:
        if self._notes is not None:
            self._note(self._notes)
        if not self._transfer.loading:
            raise CommandError("data_size was written while no state is being loaded")
        if size:
            start = self._layout.data_start
            # Copied once: the client can still write the original.
            copy = self._pool.take(size)
            copy[:] = self.memory.view[start : start + size]
            await self._transfer.write(copy.toreadonly())
