"""The v1 generation as QEMU's code used it: the registers and the data section of the migration region."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.lab.vmm.side import Generation, MigrationFailed, MigrationSide, Portion, check_pages
from vfiouser_protocol.constants import REGION_SUBTYPE_MIGRATION, REGION_TYPE_MIGRATION, DeviceStateV1
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.migration_v1 import (
    ERROR,
    PRE_COPY,
    REGISTERS,
    RESUMING,
    RUNNING,
    STATE_MASK,
    STOP_COPY,
    STOPPED,
    MigrationRegister,
)
from vfiouser_protocol.regions import RegionType

_MIGRATION = RegionType(REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION)
#: Plain numbers: the complement of a flag would have the named bits only.
_ITERATING = int(DeviceStateV1.SAVING | DeviceStateV1.RESUMING)
_RUNNING_BIT = int(DeviceStateV1.RUNNING)
#: QEMU accesses what it has not mapped in such pieces.
_NATURAL = (8, 4, 2, 1)


class V1Side(MigrationSide):
    """One function's v1 interface; `open` finds it.

    Args:
        client: connected to the function.
        region: the migration region.
        chunk_size: bytes of state written at once, at most; None: as much as fits.
        natural: access what is not mapped in naturally aligned pieces of at most 8 bytes, each a message, as
            QEMU does, instead of by few large ones.
    """

    generation = Generation.V1

    def __init__(
        self, client: Client, region: MappedRegion, *, chunk_size: int | None = None, natural: bool = False
    ) -> None:
        super().__init__(client)
        self._region = region
        self._index = region.description.index
        self._size = region.description.size
        self._chunk = chunk_size
        self._natural = natural

    @classmethod
    async def open(
        cls, client: Client, *, use_mapping: bool = True, chunk_size: int | None = None, natural: bool = False
    ) -> Self:
        """Look through all regions for the one with the type of the migration region.

        Args:
            client: connected to the function.
            use_mapping: whether the data section is mapped.
            chunk_size: see the class.
            natural: see the class.

        Raises:
            MigrationFailed: there is none.
        """
        for index in range((await client.get_info()).num_regions):
            region = await client.get_region_info(index)
            if region.description.type == _MIGRATION and region.description.size:
                mapped = MappedRegion(client, region, use_mapping=use_mapping)
                return cls(client, mapped, chunk_size=chunk_size, natural=natural)
            region.close()
        raise MigrationFailed("the function has no migration region, so v1 cannot migrate it")

    def close(self) -> None:
        """Unmap the data section."""
        self._region.close()

    # Registers

    async def _read(self, register: MigrationRegister) -> int:
        rule = REGISTERS[register]
        return int.from_bytes(await self._client.region_read(self._index, rule.offset, rule.size), "little")

    async def _write(self, register: MigrationRegister, value: int) -> None:
        rule = REGISTERS[register]
        await self._client.region_write(self._index, rule.offset, value.to_bytes(rule.size, "little"))

    async def state(self) -> int:
        """Read device_state."""
        return await self._read(MigrationRegister.DEVICE_STATE)

    async def _change(self, keep: int, value: int) -> None:
        """Read, modify and write device_state; QEMU never writes it otherwise."""
        old = await self.state()
        try:
            await self._write(MigrationRegister.DEVICE_STATE, old & keep | value)
        except ReplyError as error:
            now = await self.state()
            if now & STATE_MASK == ERROR:
                raise MigrationFailed(f"the function is in the error state, where QEMU would abort: {error}") from error
            raise

    async def _enter(self, state: int) -> None:
        await self._change(~STATE_MASK, state)

    # Source

    async def save_setup(self) -> bool:
        """1 → 3."""
        await self._enter(PRE_COPY)
        return True

    async def read(self) -> Portion:
        """One iteration: pending_bytes, data_offset, data_size, the data."""
        if not await self._read(MigrationRegister.PENDING_BYTES):
            return Portion(b"", True)
        offset = await self._read(MigrationRegister.DATA_OFFSET)
        size = await self._read(MigrationRegister.DATA_SIZE)
        if not size:
            return Portion(b"", True)
        if offset + size > self._size:
            raise MigrationFailed(f"the function says {size} bytes at {offset:#x} of a region of {self._size} bytes")
        return Portion(b"".join([await self._fetch(*part) for part in self._parts(offset, size)]), False)

    async def stop(self) -> None:
        """3 → 2 when the VM stops, and 2 → 2 when the rest is saved, as QEMU does it."""
        await self._enter(STOP_COPY)
        await self._enter(STOP_COPY)

    async def save_cleanup(self) -> None:
        """2 → 0."""
        await self._enter(STOPPED)

    async def cancel(self) -> None:
        """Clear SAVING and RESUMING, set RUNNING."""
        await self._change(~_ITERATING, _RUNNING_BIT)

    # Destination

    async def load_setup(self) -> None:
        """1 → 4."""
        await self._enter(RESUMING)

    async def load(self, data: bytes) -> None:
        """Write a piece, in rounds if the data section is smaller than it: data_offset, the data, data_size."""
        view, done = memoryview(data), 0
        while done < len(data):
            offset = await self._read(MigrationRegister.DATA_OFFSET)
            room = self._size - offset
            if room <= 0:
                raise MigrationFailed(f"the function takes data at {offset:#x} of a region of {self._size} bytes")
            count = min(room, len(data) - done, self._chunk or room)
            position = done
            for start, length in self._parts(offset, count):
                await self._store(start, bytes(view[position : position + length]))
                position += length
            await self._write(MigrationRegister.DATA_SIZE, count)
            done += count

    async def start(self) -> None:
        """4 → 1."""
        await self._enter(RUNNING)

    # The data section

    def _parts(self, offset: int, count: int) -> Iterator[tuple[int, int]]:
        """Cut an access so that each part lies in a mapped area or in none."""
        end = offset + count
        for area in self._region.description.mappable_areas if self._region.mapped_bytes else ():
            start, stop = max(offset, area.offset), min(end, area.offset + area.size)
            if start >= stop:
                continue
            if offset < start:
                yield offset, start - offset
            yield start, stop - start
            offset = stop
        if offset < end:
            yield offset, end - offset

    def _pieces(self, offset: int, count: int) -> Iterator[tuple[int, int]]:
        """Cut a part that is not mapped into messages."""
        while self._natural and count:
            width = next(width for width in _NATURAL if width <= count and not offset % width)
            yield offset, width
            offset, count = offset + width, count - width
        if count:
            yield offset, count

    async def _fetch(self, offset: int, count: int) -> bytes:
        if self._region.is_mapped(offset, count):
            with self._region.view(offset, count) as view:
                return bytes(view)
        pieces = self._pieces(offset, count)
        return b"".join([await self._client.region_read(self._index, *piece) for piece in pieces])

    async def _store(self, offset: int, data: bytes) -> None:
        if self._region.is_mapped(offset, len(data)):
            with self._region.view(offset, len(data)) as view:
                view[:] = data
            return
        for start, count in self._pieces(offset, len(data)):
            await self._client.region_write(self._index, start, data[start - offset : start - offset + count])

    # Dirty pages

    async def start_logging(self, memory: ClientMemory) -> None:
        """DIRTY_PAGES START."""
        check_pages(memory)
        await self._client.start_dirty_pages()

    async def dirty(self, memory: ClientMemory) -> bytes:
        """DIRTY_PAGES GET_BITMAP."""
        return await self._client.dirty_pages(memory.base, memory.size, check_pages(memory))

    async def stop_logging(self) -> None:
        """DIRTY_PAGES STOP."""
        await self._client.stop_dirty_pages()
