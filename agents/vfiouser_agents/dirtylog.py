"""Dirty pages on the agent's side: which pages of the given ranges were written."""

from __future__ import annotations

from collections.abc import Sequence

from .api import Range
from .errors import InvalidArgument

#: Bits of one report at most; the caller asks in pieces.
MAX_PAGES = 8 << 20


class PageLog:
    """Dirty pages of some ranges.

    Args:
        ranges: where pages are logged.
        wanted: page size that was wished for.
        page_sizes: those that can be used, ascending.

    Raises:
        InvalidArgument: no power of two, an empty or a wrapping range.
    """

    def __init__(self, ranges: Sequence[Range], wanted: int, page_sizes: Sequence[int]) -> None:
        if wanted <= 0 or wanted & (wanted - 1):
            raise InvalidArgument(f"page size {wanted}: a power of two is needed")
        for span in ranges:
            if span.length <= 0 or span.iova < 0 or span.iova + span.length > 1 << 64:
                raise InvalidArgument(f"range of {span.length} bytes at {span.iova:#x} is empty or too long")
        self.page_size = next((size for size in page_sizes if size >= wanted), page_sizes[-1])
        self._spans = _merged(ranges)
        self._dirty: set[int] = set()

    def mark(self, iova: int, length: int) -> None:
        """A write happened; parts outside the ranges are not logged."""
        for begin, end in self._spans:
            low, high = max(begin, iova), min(end, iova + length)
            if low < high:
                self._dirty.update(range(low // self.page_size, (high - 1) // self.page_size + 1))

    def take(self, iova: int, length: int) -> bytes:
        """The bitmap of a range; its pages are clean afterwards.

        Raises:
            InvalidArgument: not in whole pages, not logged, or too large for one report.
        """
        if length <= 0 or iova % self.page_size or length % self.page_size:
            raise InvalidArgument(f"report of {length} bytes at {iova:#x}: pages have {self.page_size} bytes")
        if length // self.page_size > MAX_PAGES:
            raise InvalidArgument(f"report of {length // self.page_size} pages; at most {MAX_PAGES} at once")
        if not any(
            _page_down(begin, self.page_size) <= iova and iova + length <= _page_up(end, self.page_size)
            for begin, end in self._spans
        ):
            raise InvalidArgument(f"report of {length} bytes at {iova:#x}, which is not being logged")
        first, count = iova // self.page_size, length // self.page_size
        bitmap = bytearray(-(-count // 8))
        found = [page for page in self._dirty if first <= page < first + count]
        for page in found:
            bitmap[(page - first) // 8] |= 1 << (page - first) % 8
        self._dirty.difference_update(found)
        return bytes(bitmap)


def _page_down(address: int, page_size: int) -> int:
    return address // page_size * page_size


def _page_up(address: int, page_size: int) -> int:
    return -(-address // page_size) * page_size


def _merged(ranges: Sequence[Range]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for span in sorted(ranges, key=lambda span: span.iova):
        end = span.iova + span.length
        if spans and span.iova <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((span.iova, end))
    return spans
