"""Dirty logging as both generations ask for it: when it runs, for what, and what may be reported.

One log serves DEVICE_FEATURE (features 6 to 8), DIRTY_PAGES and DMA_UNMAP with a bitmap. Which memory is mapped and
what the device wrote is told by the caller, so nothing here waits.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Generator, Iterable, Sequence

from vfiouser_protocol.dirty import DirtyLog, bitmap_size, check_report_pages, logging_page_size
from vfiouser_protocol.dma import ADDRESS_SPACE
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.limits import DEFAULT_MAX_BITMAP_SIZE
from vfiouser_protocol.messages import DmaUnmap, LoggingRange

#: What no ranges stand for.
EVERYTHING = (LoggingRange(0, ADDRESS_SPACE),)


class DmaLogging:
    """Whether the device's writes are logged, and the log.

    Args:
        max_bitmap_size: largest bitmap that is reported, bytes.
    """

    def __init__(self, max_bitmap_size: int = DEFAULT_MAX_BITMAP_SIZE) -> None:
        self.max_bitmap_size = max_bitmap_size
        self._log: DirtyLog | None = None
        self._wished = 0
        self._ranges: tuple[LoggingRange, ...] = ()

    @property
    def active(self) -> bool:
        """True while writes are logged."""
        return self._log is not None

    @property
    def page_size(self) -> int:
        """Bytes per logged page, 0 while nothing is logged."""
        return 0 if self._log is None else self._log.page_size

    @property
    def ranges(self) -> tuple[LoggingRange, ...]:
        """What is logged: sorted, whole pages, apart from each other; nothing while nothing is logged."""
        return self._ranges

    def plan(self, page_size: int, ranges: Iterable[LoggingRange] = ()) -> tuple[int, tuple[LoggingRange, ...]]:
        """Judge a start without starting.

        Args:
            page_size: the size that the client would like, bytes.
            ranges: what to log; nothing means everything, and what is mapped later too.

        Returns:
            The page size that will be used, bytes, and the ranges: sorted, whole pages, merged.

        Raises:
            CommandError: EINVAL for a page size that is not a power of two, for a range that is empty or leaves the
                address space, and while logging runs for another page size or for ranges that it does not cover.

        Spec: DMA_LOGGING_START. The kernel refuses every second start, libvfio-user none with the same page size.
        """
        chosen = logging_page_size(page_size)
        wanted = _normalized(ranges, chosen)
        log = self._log
        if log is None:
            return chosen, wanted
        if page_size not in (self._wished, log.page_size):
            raise CommandError(
                f"logging with pages of {page_size} bytes while {log.page_size} are used; goes on as it was"
            )
        if not all(_covers(self._ranges, item) for item in wanted):
            raise CommandError("logging of more ranges than those that are logged; stop first; goes on as it was")
        return log.page_size, self._ranges

    def start(self, page_size: int, ranges: Iterable[LoggingRange] = ()) -> int:
        """Start to log, or go on with it; see `plan`.

        Args:
            page_size: the size that the client would like, bytes.
            ranges: what to log; nothing means everything.

        Returns:
            The page size that is used, bytes.

        Raises:
            CommandError: as `plan`.
        """
        chosen, wanted = self.plan(page_size, ranges)
        if self._log is None:
            self._log = DirtyLog(chosen, self.max_bitmap_size)
            self._wished = page_size
            self._ranges = wanted
        return chosen

    def stop(self) -> None:
        """Stop logging, and forget the log; legal at any time."""
        self._log = None
        self._wished = 0
        self._ranges = ()

    def mark(self, iova: int, length: int) -> None:
        """Note that the device wrote.

        Args:
            iova: first address.
            length: bytes; the range has to be mapped memory, since the cost grows with it.
        """
        if self._log is not None:
            self._log.mark(iova, length)

    def mark_bitmap(self, iova: int, page_size: int, bitmap: bytes) -> None:
        """Note what the agent reported; see `DirtyLog.mark_bitmap`.

        Args:
            iova: address of the bitmap's first page.
            page_size: bytes per bit.
            bitmap: bit n is the page at iova + n * page_size.
        """
        if self._log is not None:
            self._log.mark_bitmap(iova, page_size, bitmap)

    def unmapped(self, iova: int, length: int) -> None:
        """Forget the dirty pages of memory that went away.

        Args:
            iova: first address.
            length: bytes.
        """
        if self._log is not None:
            self._log.discard(iova, length)

    def require_report(self, iova: int, length: int, *, mapped: bool) -> None:
        """Refuse a report on memory that is not mapped, or while nothing is logged.

        Args:
            iova: first address of the range.
            length: bytes.
            mapped: whether any of it is mapped.

        Raises:
            CommandError: ENOENT if nothing is mapped there, logged or not; EINVAL while nothing is logged.

        Spec: DMA_LOGGING_REPORT, with libvfio-user's order of checks but for any range: QEMU asks for ranges that have
            nothing to do with single mappings.
        """
        if not mapped:
            raise CommandError(f"dirty report of {iova:#x}+{length:#x}: nothing is mapped there", errno.ENOENT)
        self._require_active()

    def unmapped_in_steps(self, iova: int, length: int) -> Generator[None, None, None]:
        """`unmapped` with the same `iova` and `length`, a bounded piece of work at each step."""
        if self._log is not None:
            yield from self._log.discard_in_steps(iova, length)

    def report_in_steps(self, iova: int, length: int, page_size: int) -> Generator[None, None, bytearray]:
        """`report` of `iova`, `length` and `page_size`, a bounded piece of work at each step."""
        return self._require_active().report_in_steps(iova, length, page_size)

    def report(self, iova: int, length: int, page_size: int) -> bytes:
        """Read and clear the dirty bits of a range; see `DirtyLog.report`.

        Args:
            iova: first address of the range.
            length: bytes.
            page_size: bytes per bit of the answer.

        Returns:
            The bitmap.

        Raises:
            CommandError: EINVAL for impossible pages or a bitmap over the limit, or while nothing is logged.
        """
        return self._require_active().report(iova, length, page_size)

    def undo_report(self) -> None:
        """The last report did not reach the client: what it said is dirty again."""
        if self._log is not None:
            self._log.undo_report()

    def _require_active(self) -> DirtyLog:
        if self._log is None:
            raise CommandError("dirty report while nothing is logged; start first")
        return self._log


def _normalized(ranges: Iterable[LoggingRange], page_size: int) -> tuple[LoggingRange, ...]:
    """Ranges widened to whole pages, sorted, and merged where they touch."""
    given = sorted(ranges)
    merged: list[LoggingRange] = []
    for iova, length in given:
        end = iova + length
        if not 0 <= iova < end <= ADDRESS_SPACE:
            raise CommandError(f"logging of {iova:#x}+{length:#x}: it must not be empty and end at 2^64; not started")
        start = iova // page_size * page_size
        end = -(-end // page_size) * page_size
        if merged and start <= merged[-1].iova + merged[-1].length:
            start = merged[-1].iova
            end = max(end, start + merged.pop().length)
        merged.append(LoggingRange(start, end - start))
    return tuple(merged) if given else EVERYTHING


def _covers(logged: Sequence[LoggingRange], wanted: LoggingRange) -> bool:
    """Whether one of the ranges, which are sorted and apart, holds all of another."""
    index = bisect_right(logged, wanted.iova, key=lambda item: item.iova) - 1
    if index < 0:
        return False
    item = logged[index]
    return wanted.iova + wanted.length <= item.iova + item.length


def require_unmap_bitmap(request: DmaUnmap, logging: DmaLogging) -> None:
    """Refuse a DMA_UNMAP whose dirty bitmap cannot be made; the mapping stays then.

    Args:
        request: with GET_DIRTY_BITMAP.
        logging: the function's log.

    Raises:
        CommandError: EINVAL: nothing is logged, impossible pages, or a bitmap of another size than it has.

    Spec: vfio-user 0.9.1, VFIO_USER_DMA_UNMAP. Pages of another size than the logged are converted, as in libvfio-user.
    """
    pgsize = request.bitmap_pgsize or 0
    if not logging.active:
        raise CommandError("DMA_UNMAP with a dirty bitmap while nothing is logged; the mapping stays")
    check_report_pages(request.address, request.size, pgsize)
    if request.bitmap_size != (size := bitmap_size(request.size, pgsize)):
        raise CommandError(
            f"DMA_UNMAP with a bitmap of {request.bitmap_size} bytes for a range that needs {size}; the mapping stays"
        )
