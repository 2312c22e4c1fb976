"""Guest memory on its way from one VM to another, page by page."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory

#: Bytes compared at once.
_COMPARED = 1 << 20
_RUN = re.compile("1+")


class MemoryCopier:
    """Copies what is dirty of a source's memory to a destination's.

    Args:
        source: guest memory here.
        destination: guest memory there, at the same addresses.
    """

    def __init__(self, source: ClientMemory, destination: ClientMemory) -> None:
        if (source.base, source.size) != (destination.base, destination.size):
            raise ValueError(
                f"guest memory at {source.base:#x}+{source.size:#x} cannot be carried "
                f"to {destination.base:#x}+{destination.size:#x}"
            )
        self._source = source
        self._destination = destination
        self._pages = source.size // PAGE_SIZE
        self._dirty = 0

    @property
    def dirty_pages(self) -> int:
        """How many pages have to be copied."""
        return self._dirty.bit_count()

    def mark_all(self) -> None:
        """Everything has to be copied, as at the start of a migration."""
        self._dirty = (1 << self._pages) - 1

    def mark(self, bitmap: bytes | int) -> int:
        """Add dirty pages.

        Args:
            bitmap: one bit per page, the lowest one for the first page.

        Returns:
            How many pages it names.
        """
        bits = bitmap if isinstance(bitmap, int) else int.from_bytes(bitmap, "little")
        bits &= (1 << self._pages) - 1
        self._dirty |= bits
        return bits.bit_count()

    def copy(self) -> int:
        """Copy every dirty page; returns how many bytes that were."""
        done = 0
        for first, count in self._runs():
            start, size = self._source.base + first * PAGE_SIZE, count * PAGE_SIZE
            self._destination.view(start, size)[:] = self._source.view(start, size)
            done += size
        self._dirty = 0
        return done

    def equal(self) -> bool:
        """Whether both memories hold the same."""
        starts = range(self._source.base, self._source.base + self._source.size, _COMPARED)
        end = self._source.base + self._source.size
        return all(
            bytes(self._source.view(start, size)) == bytes(self._destination.view(start, size))
            for start in starts
            if (size := min(_COMPARED, end - start))
        )

    def _runs(self) -> Iterator[tuple[int, int]]:
        """First page and length of each run of dirty pages."""
        # The lowest bit comes last in the text, so positions count from its end.
        text = f"{self._dirty:b}"
        for run in _RUN.finditer(text):
            yield len(text) - run.end(), run.end() - run.start()
