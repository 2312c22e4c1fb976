"""An IOMMU: what is mapped where, with the rules of type 1 version 2."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

PAGE = 4096
WINDOWS = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1))


@dataclass
class View:
    """What a process has mapped: a part of a file."""

    fd: int
    offset: int
    size: int
    writable: bool
    there: bool = True


@dataclass
class Mapping:
    """One range of device addresses."""

    iova: int
    size: int
    flags: int
    fd: int
    offset: int
    #: What it was mapped by, which a mediated device's driver looks pages up in.
    view: View | None = None


def fail(number: int) -> OSError:
    """Return the error of a system call."""
    return OSError(number, os.strerror(number))


class FakeIommu:
    """One address space; it keeps the files of what is mapped, as the pages stay pinned.

    Attributes:
        emulated: no IOMMU: nothing is looked up before a driver wants it, and by the view that must be there still.
        dirty: pages that a mediated device's driver wrote while they were logged; None while nothing is logged.
    """

    def __init__(self) -> None:
        self.emulated = False
        self.dirty: set[int] | None = None
        self.mappings: dict[int, Mapping] = {}
        self.max_maps = 65535
        self.memlock: int | None = None

    @property
    def ranges(self) -> list[tuple[int, int, int]]:
        """Address, size and access flags of all that is mapped."""
        return sorted((mapping.iova, mapping.size, mapping.flags) for mapping in self.mappings.values())

    def map(self, view: View, delta: int, iova: int, size: int, flags: int) -> None:
        """Map a part of a view that starts `delta` bytes into it; flags: 1 read, 2 write."""
        inside = self.emulated or any(first <= iova and iova + size - 1 <= last for first, last in WINDOWS)
        if (iova | size | (view.offset + delta)) % PAGE or not size or not inside or not flags & 3:
            raise fail(errno.EINVAL)
        if any(iova < other.iova + other.size and other.iova < iova + size for other in self.mappings.values()):
            raise fail(errno.EEXIST)
        if len(self.mappings) >= self.max_maps:
            raise fail(errno.ENOSPC)
        locked = sum(mapping.size for mapping in self.mappings.values())
        if self.memlock is not None and locked + size > self.memlock:
            raise fail(errno.ENOMEM)
        if self.emulated:
            self.mappings[iova] = Mapping(iova, size, flags, os.dup(view.fd), view.offset + delta, view)
            return
        too_short = view.offset + delta + size > os.fstat(view.fd).st_size
        if too_short or delta + size > view.size or (flags & 2 and not view.writable):
            raise fail(errno.EFAULT)
        self.mappings[iova] = Mapping(iova, size, flags, os.dup(view.fd), view.offset + delta)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap whole mappings; a part of one is refused. Returns the bytes unmapped."""
        hit = [m for m in self.mappings.values() if iova < m.iova + m.size and m.iova < iova + size]
        if any(m.iova < iova or m.iova + m.size > iova + size for m in hit):
            raise fail(errno.EINVAL)
        for mapping in hit:
            del self.mappings[mapping.iova]
            os.close(mapping.fd)
        return sum(mapping.size for mapping in hit)

    def clear(self) -> None:
        """Unmap everything."""
        self.unmap(0, 1 << 64)

    def written(self, iova: int, size: int, page: int) -> bytes:
        """Give a bitmap of a range's dirty pages, and forget them: of a real function, every page that is mapped."""
        if self.dirty is None or page != PAGE or (iova | size) % PAGE:
            raise fail(errno.EINVAL)
        bits = 0
        for mapping in self.mappings.values():
            cut = not (iova <= mapping.iova and mapping.iova + mapping.size <= iova + size)
            if mapping.iova < iova + size and iova < mapping.iova + mapping.size and cut:
                raise fail(errno.EINVAL)
            if not cut:
                for address in range(mapping.iova, mapping.iova + mapping.size, PAGE):
                    if not self.emulated or address in self.dirty:
                        bits |= 1 << (address - iova) // PAGE
        self.dirty = {address for address in self.dirty if not iova <= address < iova + size}
        return bits.to_bytes(-(-size // PAGE // 64) * 8, "little")

    def dma(self, iova: int, data: bytes | None, count: int = 0) -> bytes:
        """Write `data`, or read `count` bytes, as the device does; a fault is a KeyError."""
        size, needed = (count, 1) if data is None else (len(data), 2)
        for mapping in self.mappings.values():
            if mapping.iova <= iova and iova + size <= mapping.iova + mapping.size and mapping.flags & needed:
                place = mapping.offset + iova - mapping.iova
                if self.emulated and (mapping.view is None or not mapping.view.there):
                    raise KeyError(hex(iova))
                if data is not None and self.dirty is not None:
                    self.dirty |= {address - address % PAGE for address in range(iova, iova + size)}
                if data is None:
                    return os.pread(mapping.fd, count, place)
                os.pwrite(mapping.fd, data, place)
                return b""
        raise KeyError(hex(iova))
