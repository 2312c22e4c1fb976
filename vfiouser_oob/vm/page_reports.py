"""What a function's agent, its kernel driver or the IOMMU says was written, as one log of pages."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.memory.recorder import PAGE_SIZE
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_protocol.dirty import DirtyLog
from vfiouser_protocol.dma import DmaRegion

#: Bytes that are asked about at once: a bitmap of 256 KiB.
_SPAN = 8 << 30


class DirtyReports:
    """The reports of one client's function; asked through its dirty log, which takes what nobody can say for dirty.

    Args:
        dirty: that log.
        memory: the client's memory.
        call_s: seconds for all that is asked at one time.
    """

    def __init__(self, dirty: DirtyTracker, memory: GuestMemory, call_s: float) -> None:
        self._dirty = dirty
        self._memory = memory
        self._call_s = call_s

    async def begin(self) -> None:
        """Have it logged what the function writes from now on.

        Raises:
            CommandError: nobody can.
        """
        await self._dirty.start(PAGE_SIZE, (), trio.current_time() + self._call_s)

    async def collect(self) -> DirtyLog:
        """The pages that were written since it was asked last; all of those that nobody can tell about.

        Raises:
            CommandError: nothing is logged.
        """
        deadline = trio.current_time() + self._call_s
        found = DirtyLog(PAGE_SIZE)
        for region in [each for each in self._memory if each.owner is not None]:
            for start, length in _cut(region):
                bitmap = await self._dirty.report(start, length, PAGE_SIZE, deadline, [region])
                found.mark_bitmap(start, PAGE_SIZE, bytes(bitmap))
        return found

    async def end(self) -> None:
        """Have nothing logged any more."""
        await self._dirty.stop(trio.current_time() + self._call_s)


def _cut(region: DmaRegion) -> Iterator[tuple[int, int]]:
    """Pieces of a range that can be asked about; each has at least one page."""
    start = region.address
    while start < region.end:
        length = min(region.end - start, _SPAN)
        yield start, max(length, PAGE_SIZE)
        start += length
