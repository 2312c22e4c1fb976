"""A region as its user sees it: loads and stores where it may be mapped, messages everywhere else."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from types import TracebackType

from vfiouser_oob.client.client import Client, ClientRegion
from vfiouser_protocol.constants import RegionFlags
from vfiouser_protocol.errors import LocalProtocolError

_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class _MappedArea:
    """A part that is mapped.

    `items` has one view per access width. An aligned item is one load or store of that width; slices of bytes
    may be torn, and a torn doorbell is a wrong doorbell.
    """

    start: int
    end: int
    memory: mmap.mmap
    items: dict[int, memoryview]

    def close(self) -> None:
        for view in self.items.values():
            view.release()
        self.memory.close()


class MappedRegion:
    """A region of a connected client's device, accessed in 1, 2, 4 or 8 bytes, naturally aligned,
    little-endian.

    Args:
        client: a connected client.
        region: the region; its descriptor is taken over.
        use_mapping: False: never map, send a message for every access.
    """

    def __init__(self, client: Client, region: ClientRegion, *, use_mapping: bool = True) -> None:
        self.description = region.description
        self._client = client
        self._areas: list[_MappedArea] = []
        #: Accesses that went by message, and those that went by memory.
        self.trapped = 0
        self.direct = 0
        try:
            if use_mapping and region.fd is not None:
                self._map(region.fd.fileno())
        except BaseException:
            self.close()
            raise
        finally:
            region.close()

    @classmethod
    async def open(cls, client: Client, index: int, *, use_mapping: bool = True) -> MappedRegion:
        """Ask for a region and map what may be mapped.

        Args:
            client: a connected client.
            index: region index.
            use_mapping: False: send a message for every access.
        """
        return cls(client, await client.get_region_info(index), use_mapping=use_mapping)

    def _map(self, fd: int) -> None:
        description = self.description
        writable = description.flags & RegionFlags.WRITE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        for area in description.mappable_areas:
            offset = description.offset + area.offset
            if not area.size or (offset | area.size) % mmap.PAGESIZE:
                continue  # cannot be mapped; messages reach it as well
            memory = mmap.mmap(fd, area.size, mmap.MAP_SHARED, protection, offset=offset)
            whole = memoryview(memory)
            items = {1: whole, 2: whole.cast("H"), 4: whole.cast("I"), 8: whole.cast("Q")}
            self._areas.append(_MappedArea(area.offset, area.offset + area.size, memory, items))

    @property
    def mapped_bytes(self) -> int:
        """How many bytes of the region are mapped."""
        return sum(area.end - area.start for area in self._areas)

    def is_mapped(self, offset: int, width: int) -> bool:
        """Whether an access would go by memory.

        Args:
            offset: where in the region, bytes.
            width: bytes of the access.
        """
        return self._area_of(offset, width) is not None

    def _area_of(self, offset: int, width: int) -> _MappedArea | None:
        for area in self._areas:
            if area.start <= offset and offset + width <= area.end:
                return area
        return None

    async def read(self, offset: int, width: int) -> int:
        """Read a register.

        Args:
            offset: offset inside the region, a multiple of `width`.
            width: 1, 2, 4 or 8 bytes.
        """
        area = self._check(offset, width)
        if area is not None:
            self.direct += 1
            value: int = area.items[width][(offset - area.start) // width]
            return value
        self.trapped += 1
        return int.from_bytes(await self._client.region_read(self.description.index, offset, width), "little")

    async def write(self, offset: int, width: int, value: int) -> None:
        """Write a register.

        Args:
            offset: offset inside the region, a multiple of `width`.
            width: 1, 2, 4 or 8 bytes.
            value: what to write.
        """
        area = self._check(offset, width)
        if area is not None:
            self.direct += 1
            area.items[width][(offset - area.start) // width] = value
            return
        self.trapped += 1
        await self._client.region_write(self.description.index, offset, value.to_bytes(width, "little"))

    def _check(self, offset: int, width: int) -> _MappedArea | None:
        if width not in _WIDTHS or offset % width:
            raise LocalProtocolError(f"a register access of {width} bytes at {offset:#x} is not aligned")
        return self._area_of(offset, width)

    def view(self, offset: int, count: int) -> memoryview:
        """Return mapped bytes themselves; release the view before `close`.

        Args:
            offset: offset inside the region.
            count: bytes.

        Raises:
            LocalProtocolError: they are not mapped.
        """
        area = self._area_of(offset, count)
        if area is None:
            raise LocalProtocolError(f"{count} bytes at {offset:#x} are not mapped")
        return area.items[1][offset - area.start : offset - area.start + count]

    def close(self) -> None:
        """Unmap everything."""
        areas, self._areas = self._areas, []
        for area in areas:
            area.close()

    def __enter__(self) -> MappedRegion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
