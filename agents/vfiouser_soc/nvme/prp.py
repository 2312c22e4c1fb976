"""Physical region page entries: from PRP1/PRP2 to the pieces of memory that hold a command's data.

Spec: NVMe 1.4, 4.3.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

from vfiouser_soc.nvme.spec import NvmeError, StatusCode

Segment = tuple[int, int]


async def walk_prps(
    read: Callable[[int, int], Awaitable[bytes]], prp1: int, prp2: int, length: int, page_size: int
) -> list[Segment]:
    """Find the memory that a pair of PRP entries describes.

    Args:
        read: reads (address, count) bytes of list pages.
        prp1: first entry; may have an offset into its page.
        prp2: second page, or pointer to a PRP list, or unused.
        length: bytes to transfer, > 0.
        page_size: memory page size in bytes.

    Returns:
        (address, bytes) in order, with adjacent pages merged.

    Raises:
        NvmeError: an entry has an offset that it must not have.
        DmaFault: a list page cannot be read.
    """
    if prp1 & 3:
        raise _offset_error(prp1, "a multiple of 4")
    first = page_size - (prp1 & (page_size - 1))
    if length <= first:
        return [(prp1, length)]
    remaining = length - first
    if remaining <= page_size:
        if prp2 & (page_size - 1):
            raise _offset_error(prp2, "page aligned")
        return _merge(prp1, first, (prp2,), remaining, page_size)
    pages = await _read_list(read, prp2, -(-remaining // page_size), page_size)
    return _merge(prp1, first, pages, remaining, page_size)


async def _read_list(
    read: Callable[[int, int], Awaitable[bytes]], pointer: int, needed: int, page_size: int
) -> list[int]:
    """Read `needed` entries of a list that may be chained over several pages."""
    if pointer & 7:
        raise _offset_error(pointer, "a multiple of 8")
    pages: list[int] = []
    while True:
        slots = (page_size - (pointer & (page_size - 1))) // 8
        count = min(slots, needed)
        entries = struct.unpack(f"<{count}Q", await read(pointer, count * 8))
        if count == needed:
            pages += entries
            return pages
        # The page is too small for what is left, so its last entry points to the next list page.
        pages += entries[:-1]
        needed -= count - 1
        pointer = entries[-1]
        if pointer & (page_size - 1):
            raise _offset_error(pointer, "page aligned")


def _merge(start: int, count: int, pages: tuple[int, ...] | list[int], remaining: int, page_size: int) -> list[Segment]:
    """Join the first piece and whole pages into as few segments as possible."""
    segments: list[Segment] = []
    mask = page_size - 1
    for page in pages:
        if page & mask:
            raise _offset_error(page, "page aligned")
        size = min(page_size, remaining)
        remaining -= size
        if page == start + count:
            count += size
        else:
            segments.append((start, count))
            start, count = page, size
    segments.append((start, count))
    return segments


def _offset_error(entry: int, allowed: str) -> NvmeError:
    return NvmeError(StatusCode.INVALID_PRP_OFFSET, f"PRP entry {entry:#x} is not {allowed}")
