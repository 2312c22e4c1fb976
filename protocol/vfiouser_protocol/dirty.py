"""Dirty pages: which parts of its memory a client must copy again.

A bitmap on the wire has bit *n* (bit n % 8 of byte n // 8) for the page at iova + n * page_size; it is a
whole number of 64-bit words, and bits beyond the range are 0. (The formula printed in the v2 specification
mixes up pages and addresses; the kernel and libvfio-user do what this page says.)

`DirtyLog` keeps bits for the pages that are dirty only, in chunks that are big integers: marking a buffer is
one OR per chunk that it touches, however many pages it has.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator

from .dirty_bits import cut, gather_bits, put, replicate_bits
from .errors import CommandError
from .limits import DEFAULT_MAX_BITMAP_SIZE

#: Smallest and largest page that is logged: finer and coarser hints get these. A report may ask for any page
#: size.
MIN_PAGE_SIZE = 4096
MAX_PAGE_SIZE = 2 << 20
_ADDRESS_SPACE = 1 << 64
#: Pages per chunk: 512 bytes of bits.
_CHUNK_SHIFT = 12
_CHUNK_PAGES = 1 << _CHUNK_SHIFT
_CHUNK_MASK = _CHUNK_PAGES - 1
_FULL_CHUNK = (1 << _CHUNK_PAGES) - 1
#: Bytes of a foreign bitmap that are looked at in one go.
_BITMAP_STEP = 512
#: Bits of a bitmap that are made in one step, and chunks that are passed over in one.
_UNITS_PER_STEP = 1 << 19
_SKIPPED_PER_STEP = 1024
#: Bytes of ones that are put into a bitmap in one step.
_FILLED_PER_STEP = 1 << 20


def bitmap_size(length: int, page_size: int) -> int:
    """Bytes of the bitmap for a range.

    Args:
        length: bytes of the range.
        page_size: bytes per bit.

    Spec: DMA_LOGGING_REPORT, DIRTY_PAGES: one bit for each page begun, rounded up to 64 bits.
    """
    pages = -(-length // page_size)
    return (pages + 63) // 64 * 8


def logging_page_size(wanted: int) -> int:
    """The page size to log with, for the one that a client hints at.

    Args:
        wanted: page_size of DMA_LOGGING_START.

    Returns:
        The size to announce in the reply.

    Raises:
        CommandError: EINVAL for a size that is not a power of two; logging does not start.

    Spec: DMA_LOGGING_START: page_size is a hint, the reply carries what is used. The kernel knows powers of
        two only.
    """
    if not _is_power_of_two(wanted):
        raise CommandError(
            f"dirty logging with pages of {wanted} bytes: a power of two is needed; not started", errno.EINVAL
        )
    return min(max(wanted, MIN_PAGE_SIZE), MAX_PAGE_SIZE)


def check_report_pages(iova: int, length: int, page_size: int) -> None:
    """Refuse a report that cannot be made, whatever is mapped or logged.

    Args:
        iova: first address of the range; any alignment.
        length: bytes.
        page_size: bytes per bit.

    Raises:
        CommandError: EINVAL for a page size that is 0, no power of two or larger than the range, or a range past 2^64.

    Spec: DMA_LOGGING_REPORT, DIRTY_PAGES GET_BITMAP.
    """
    what = f"dirty report of {iova:#x}+{length:#x} with pages of {page_size} bytes"
    if not _is_power_of_two(page_size) or length < page_size:
        raise CommandError(
            f"{what}: a power of two that is no larger than the range is needed; nothing reported", errno.EINVAL
        )
    if not 0 <= iova <= _ADDRESS_SPACE - length:
        raise CommandError(f"{what}: the range must end at 2^64; nothing reported", errno.EINVAL)


def check_report(iova: int, length: int, page_size: int, max_bitmap_size: int) -> int:
    """Refuse a report that cannot be made, or is too large.

    Args:
        iova: first address of the range; any alignment.
        length: bytes.
        page_size: bytes per bit.
        max_bitmap_size: bytes of the largest bitmap.

    Returns:
        Bytes of the bitmap.

    Raises:
        CommandError: EINVAL, as `check_report_pages`, or for a bitmap over the limit.
    """
    check_report_pages(iova, length, page_size)
    size = bitmap_size(length, page_size)
    if size > max_bitmap_size:
        raise CommandError(
            f"dirty report of {iova:#x}+{length:#x} with pages of {page_size} bytes: a bitmap of {size} bytes, "
            f"{max_bitmap_size} are allowed; nothing reported",
            errno.EINVAL,
        )
    return size


def fill_in_steps(bitmap: bytearray, iova: int, page_size: int, start: int, end: int) -> Generator[None, None, None]:
    """Set the bits of all pages that share a byte with a range, a bounded number at each step.

    Args:
        bitmap: the bitmap.
        iova: address of its first page.
        page_size: bytes per bit.
        start: first address of the range, not before `iova`.
        end: one past its last address; it is not beyond the bitmap.
    """
    first, last = (start - iova) // page_size, -(-(end - iova) // page_size)
    while first < last:
        if first % 8 or last - first < 8:
            bitmap[first >> 3] |= 1 << first % 8
            first += 1
            continue
        count = min(last - first >> 3, _FILLED_PER_STEP)
        bitmap[first >> 3 : (first >> 3) + count] = b"\xff" * count
        first += 8 * count
        yield


class DirtyLog:
    """The pages that a device has written since they were last reported.

    Args:
        page_size: bytes per logged page, a power of two (see `logging_page_size`).
        max_bitmap_size: largest bitmap that is reported, in bytes.
    """

    __slots__ = ("_chunks", "_reported", "_shift", "max_bitmap_size", "page_size")

    def __init__(self, page_size: int, max_bitmap_size: int = DEFAULT_MAX_BITMAP_SIZE) -> None:
        if not _is_power_of_two(page_size) or page_size > MAX_PAGE_SIZE:
            raise ValueError(f"pages of {page_size} bytes; a power of two up to {MAX_PAGE_SIZE} is needed")
        self.page_size = page_size
        self.max_bitmap_size = max_bitmap_size
        self._shift = page_size.bit_length() - 1
        self._chunks: dict[int, int] = {}
        self._reported: list[tuple[int, int]] = []

    def mark(self, iova: int, length: int) -> None:
        """Note that a range was written; every page that it touches is dirty.

        Args:
            iova: first address.
            length: bytes; 0 marks nothing. The cost grows with it, so ranges of a peer's choice must have
                been clipped to memory that is there.
        """
        if length <= 0:
            return
        first = iova >> self._shift
        last = (iova + length - 1) >> self._shift
        chunks = self._chunks
        if first == last:
            number = first >> _CHUNK_SHIFT
            chunks[number] = chunks.get(number, 0) | 1 << (first & _CHUNK_MASK)
            return
        for number, bits in _spread(first, last + 1):
            # Full chunks share one integer, so that marking all of a big guest costs next to nothing.
            chunks[number] = bits if bits is _FULL_CHUNK else chunks.get(number, 0) | bits

    def mark_bitmap(self, iova: int, page_size: int, bitmap: bytes) -> None:
        """Note what another log reported: a logged page is dirty if it shares a byte with a dirty one of the bitmap.

        Args:
            iova: address of the bitmap's first page; any alignment.
            page_size: bytes per bit, a power of two.
            bitmap: bit n is the page at iova + n * page_size. The cost grows with the pages that are set only.
        """
        unit = min(page_size, self.page_size)
        spread = page_size // unit
        gather = self.page_size // unit
        first, crooked = divmod(iova, unit)
        for start in range(0, len(bitmap), _BITMAP_STEP):
            bits = int.from_bytes(bitmap[start : start + _BITMAP_STEP], "little")
            if not bits:
                continue
            if spread > 1:
                bits = replicate_bits(bits, spread)
            if crooked:
                bits |= bits << 1
            self._merge(*gather_bits(bits, first + 8 * start * spread, gather))

    def _merge(self, bits: int, position: int) -> None:
        """OR bits in, of which the first is the logged page `position`."""
        number, shift = divmod(position, _CHUNK_PAGES)
        bits <<= shift
        data = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
        for start in range(0, len(data), _CHUNK_PAGES // 8):
            low = int.from_bytes(data[start : start + _CHUNK_PAGES // 8], "little")
            if low:
                self._chunks[number] = self._chunks.get(number, 0) | low
            number += 1

    def discard(self, iova: int, length: int) -> None:
        """Forget the pages that lie wholly in the `length` bytes from `iova` on, as when they are unmapped."""
        for _ in self.discard_in_steps(iova, length):
            pass

    def discard_in_steps(self, iova: int, length: int) -> Generator[None, None, None]:
        """`discard` with the same `iova` and `length`, a bounded piece of work at each step."""
        first, end = -(-iova >> self._shift), iova + length >> self._shift
        for number in self._overlapping(first, end):
            if number is not None:
                self._take(number, first, end)
            yield

    def absorb(self, other: DirtyLog) -> None:
        """Note whatever another log of the same page size has noted.

        Args:
            other: the other one; it keeps what it has.
        """
        for number, bits in other._chunks.items():
            self._chunks[number] = self._chunks.get(number, 0) | bits

    def ranges(self) -> Iterator[tuple[int, int]]:
        """What is dirty, as addresses and bytes in ascending order; a range never spans two chunks."""
        for number in sorted(self._chunks):
            bits, page = self._chunks[number], number << _CHUNK_SHIFT
            while bits:
                skip = (bits & -bits).bit_length() - 1
                bits >>= skip
                page += skip
                pages = (~bits & bits + 1).bit_length() - 1
                yield page << self._shift, pages << self._shift
                bits >>= pages
                page += pages

    @property
    def pages(self) -> int:
        """How many pages are dirty."""
        return sum(bits.bit_count() for bits in self._chunks.values())

    def clear(self) -> None:
        """Forget everything."""
        self._chunks.clear()
        self._reported = []

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def report(self, iova: int, length: int, page_size: int) -> bytes:
        """Read and clear the dirty bits of a range.

        Args:
            iova: first address of the range; any alignment.
            length: bytes.
            page_size: bytes per bit of the answer; smaller than a logged page repeats its bit, larger ORs.

        Returns:
            `bitmap_size(length, page_size)` bytes. A logged page that the range covers only in part is
            reported and stays dirty, since its other part has not been told to anybody.

        Raises:
            CommandError: EINVAL for a page size that is 0, no power of two or larger than the range, a range
                past 2^64, or a bitmap over the limit; nothing is cleared then.

        Spec: DMA_LOGGING_REPORT, DIRTY_PAGES GET_BITMAP, DMA_UNMAP GET_DIRTY_BITMAP. Ranges need not match
            mappings.
        """
        steps = self.report_in_steps(iova, length, page_size)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return bytes(end.value)

    def report_in_steps(self, iova: int, length: int, page_size: int) -> Generator[None, None, bytearray]:
        """`report`, a bounded piece of work at each step; what is marked meanwhile is told, or stays dirty.

        Args:
            iova: first address of the range; any alignment.
            length: bytes.
            page_size: bytes per bit of the answer.

        Returns:
            The bitmap. If the generator is closed before its end, everything is dirty that was.

        Raises:
            CommandError: as `report`.
        """
        size = check_report(iova, length, page_size, self.max_bitmap_size)
        bitmap = bytearray(size)
        first, end = iova >> self._shift, -(-(iova + length) >> self._shift)
        whole, whole_end = -(-iova >> self._shift), iova + length >> self._shift
        taken: list[tuple[int, int]] = []
        complete = False
        try:
            for number in self._overlapping(first, end):
                if number is not None:
                    bits = self._chunks[number]
                    taken.append(self._take(number, whole, whole_end))
                    yield from self._render(iova, length, page_size, number, bits, bitmap)
                yield
            complete = True
        finally:
            if not complete:
                self._give_back(taken)
        self._reported = taken
        return bitmap

    def undo_report(self) -> None:
        """The last report did not reach the client: what it cleared is dirty again."""
        self._give_back(self._reported)
        self._reported = []

    def _give_back(self, taken: list[tuple[int, int]]) -> None:
        for number, bits in taken:
            if bits:
                self._chunks[number] = self._chunks.get(number, 0) | bits

    def _render(
        self, iova: int, length: int, page_size: int, number: int, chunk: int, bitmap: bytearray
    ) -> Generator[None, None, None]:
        """Put a chunk's dirty pages into a bitmap of its own page size and alignment.

        Both page sizes are powers of two, so there is a common unit, the smaller of them. The chunk goes through at
        most four steps: cut to the range, spread logged pages into units, move units to where the range begins, and
        gather units into the pages of the report. A chunk whose pages become very many is cut into parts.
        """
        unit = min(page_size, self.page_size)
        spread = self.page_size // unit
        gather = page_size // unit
        first = iova >> self._shift
        pages = -(-(iova + length) >> self._shift) - first
        lead, crooked = divmod(iova - (first << self._shift), unit)
        units = -(-length // unit)
        at = (number << _CHUNK_SHIFT) - first
        if spread == gather == 1 and not lead and not crooked and not at % 8 and 0 <= at <= units - _CHUNK_PAGES:
            bitmap[at >> 3 : at + _CHUNK_PAGES >> 3] = chunk.to_bytes(_CHUNK_PAGES >> 3, "little")
            return
        part = max(1, min(_CHUNK_PAGES, _UNITS_PER_STEP // spread))
        for start in range(0, _CHUNK_PAGES, part):
            bits = chunk >> start & (1 << part) - 1
            if not bits:
                continue
            bits, position = cut(bits, at + start, pages)
            if spread > 1:
                bits = replicate_bits(bits, spread)
                position *= spread
            position -= lead
            if crooked:
                # The range begins inside a unit: each unit of it lies over two logged ones.
                bits |= bits << 1
                position -= 1
            bits, position = cut(bits, position, units)
            if bits:
                put(bitmap, *gather_bits(bits, position, gather))
            if spread > 1:
                yield

    def _overlapping(self, first: int, end: int) -> Iterator[int | None]:
        """The dirty chunks that share pages with [first, end), in any order; now and then None, for whoever counts."""
        if first >= end:
            return
        low, high = first >> _CHUNK_SHIFT, end - 1 >> _CHUNK_SHIFT
        chunks = self._chunks
        numbers = range(low, high + 1) if high - low < len(chunks) else list(chunks)
        for count, number in enumerate(numbers):
            if low <= number <= high and number in chunks:
                yield number
            elif not count % _SKIPPED_PER_STEP:
                yield None

    def _take(self, number: int, first: int, end: int) -> tuple[int, int]:
        """Clear the pages of a chunk that lie in [first, end); returns the chunk and what was dirty."""
        bits = self._chunks[number]
        base = number << _CHUNK_SHIFT
        low = max(first - base, 0)
        high = min(end - base, _CHUNK_PAGES)
        inside = bits & ((1 << high) - (1 << low)) if low < high else 0
        if inside == bits:
            del self._chunks[number]
        else:
            self._chunks[number] = bits ^ inside
        return number, inside


def _spread(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Chunk numbers and bits of pages [first, end)."""
    for number in range(first >> _CHUNK_SHIFT, (end - 1 >> _CHUNK_SHIFT) + 1):
        base = number << _CHUNK_SHIFT
        low = max(first - base, 0)
        high = min(end - base, _CHUNK_PAGES)
        full = low == 0 and high == _CHUNK_PAGES
        yield number, _FULL_CHUNK if full else (1 << high) - (1 << low)


def _is_power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)
