"""The DMA map: which windows of its memory a client has given to the server.

Why not a plain sorted list: inserting into and deleting from 65 535 entries moves half a megabyte each time.
Why not `sortedcontainers`: a position there costs a walk through its index, several per operation, and bursts
of DMA_MAP and DMA_UNMAP are what an attach and memory hot-plug are made of. So `DmaTable` keeps a two-level
sorted list of its own. Its rules:

* `_leaves` are short sorted lists of start addresses; leaf *i* holds the starts from `_floors[i]` up to below
  `_floors[i + 1]`.
* `_floors[0]` is 0, so every address has a leaf. A floor need not be an existing start: it stays when the
  first entry of its leaf goes away, which saves a search on every unmap.
* No leaf is empty unless it is the only one, so a neighbour is never more than one leaf away.
* Every region knows its leaf; a split tells the ones that move.
"""

from __future__ import annotations

import errno
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator
from typing import Any, NoReturn

from .constants import DmaMapFlags
from .errors import CommandError, DmaFault
from .limits import DEFAULT_MAX_DMA_MAPS

#: One past the highest address; a region may end exactly here.
ADDRESS_SPACE = 1 << 64
#: libvfio-user's limit for one region, 8 TiB.
DEFAULT_MAX_REGION_SIZE = 1 << 43
#: File offsets are signed in every call that could use one.
MAX_FILE_OFFSET = 1 << 63

_READ = int(DmaMapFlags.READ)
_WRITE = int(DmaMapFlags.WRITE)
_KNOWN_FLAGS = int(DmaMapFlags.READ | DmaMapFlags.WRITE | DmaMapFlags.MMAP | DmaMapFlags.FILE_IO)
_NEEDS_FILE = int(DmaMapFlags.MMAP | DmaMapFlags.FILE_IO)
#: Longest leaf. Inserting into this many pointers costs less than one step of a bisection.
_LEAF_CAPACITY = 128


class DmaRegion:
    """One window of client memory.

    Args:
        address: DMA address of its first byte.
        size: its length in bytes.
        flags: `DmaMapFlags` as the client sent them.
        offset: where it starts in the file, in bytes.
        file: identity of the file that backs it, None if only messages can reach it.
        owner: whatever the caller keeps with it, such as the holder of the file descriptor.
    """

    __slots__ = ("_leaf", "address", "end", "file", "flags", "offset", "owner", "size")

    def __init__(
        self,
        address: int,
        size: int,
        flags: int,
        offset: int = 0,
        file: Hashable | None = None,
        owner: Any = None,
    ) -> None:
        self.address = address
        self.size = size
        self.end = address + size
        self.flags = flags
        self.offset = offset
        self.file = file
        self.owner = owner
        self._leaf: list[int] = []

    @property
    def readable(self) -> bool:
        """True if the device may read this memory."""
        return bool(self.flags & _READ)

    @property
    def writable(self) -> bool:
        """True if the device may write this memory."""
        return bool(self.flags & _WRITE)

    def __repr__(self) -> str:
        access = f"{'r' if self.readable else '-'}{'w' if self.writable else '-'}"
        backing = f"file {self.file} +{self.offset:#x}" if self.file is not None else "messages"
        return f"<DmaRegion {self.address:#x}+{self.size:#x} {access} {backing}>"


class DmaTable:
    """The windows that are mapped now: no two overlap, each operation is O(log n).

    Args:
        max_regions: how many may be mapped at a time.
        max_region_size: largest single region, in bytes.
    """

    __slots__ = ("_by_address", "_floors", "_leaves", "max_region_size", "max_regions")

    def __init__(self, max_regions: int = DEFAULT_MAX_DMA_MAPS, max_region_size: int = DEFAULT_MAX_REGION_SIZE) -> None:
        self.max_regions = max_regions
        self.max_region_size = max_region_size
        self._by_address: dict[int, DmaRegion] = {}
        self._floors = [0]
        self._leaves: list[list[int]] = [[]]

    def map(
        self,
        address: int,
        size: int,
        flags: int,
        offset: int = 0,
        file: Hashable | None = None,
        owner: Any = None,
    ) -> DmaRegion | None:
        """Add a region.

        Args:
            address: DMA address of the first byte.
            size: length in bytes.
            flags: `DmaMapFlags`.
            offset: start in the file, in bytes.
            file: identity of the file, such as (st_dev, st_ino); None if the client sent no descriptor.
            owner: kept with the region, never looked at.

        Returns:
            The new region, or None if exactly this mapping existed already: a success, and the caller closes
            the duplicate descriptor.

        Raises:
            CommandError: EINVAL for a size of 0, a range past 2^64, unknown flags, MMAP or FILE_IO without a
                file, or an offset no file has; ENOSPC for a region too big or one too many; EEXIST for a
                range that overlaps a different mapping. Nothing changes then.

        Spec: DMA_MAP. The specification wants EEXIST for every existing range; the identical mapping succeeds
            as in libvfio-user, because clients that recover repeat themselves.
        """
        end = address + size
        if (
            not 0 <= address < end <= ADDRESS_SPACE
            or size > self.max_region_size
            or flags & ~_KNOWN_FLAGS
            or (flags & _NEEDS_FILE and file is None)
            or offset + size > MAX_FILE_OFFSET
        ):
            self._refuse(address, size, flags, offset, file)
        regions = self._by_address
        known = regions.get(address)
        if known is not None:
            if known.size == size and known.flags == flags and known.offset == offset and known.file == file:
                return None
            self._refuse_overlap(address, size, known)
        index = bisect_right(self._floors, address) - 1
        leaf = self._leaves[index]
        position = bisect_left(leaf, address)
        other = self._neighbour_in_the_way(index, position, address, end)
        if other is not None:
            self._refuse_overlap(address, size, other)
        if len(regions) >= self.max_regions:
            self._refuse_full(address, size)
        region = DmaRegion(address, size, flags, offset, file, owner)
        region._leaf = leaf
        leaf.insert(position, address)
        regions[address] = region
        if len(leaf) > _LEAF_CAPACITY:
            self._split(index)
        return region

    def unmap(self, address: int, size: int) -> DmaRegion:
        """Remove the region that has exactly this address and size.

        Args:
            address: DMA address of its first byte.
            size: its length in bytes.

        Returns:
            The region that was removed; the caller disposes of its owner.

        Raises:
            CommandError: ENOENT if no region matches exactly; nothing changes then.

        Spec: DMA_UNMAP: address and size must match a mapping; no splitting, no merging.
        """
        region = self._by_address.get(address)
        if region is None or region.size != size:
            raise CommandError(
                f"DMA_UNMAP {address:#x}+{size:#x}: no mapping has exactly this address and size; nothing unmapped",
                errno.ENOENT,
            )
        del self._by_address[address]
        leaf = region._leaf
        del leaf[bisect_left(leaf, address)]
        if not leaf:
            self._drop_leaf(address)
        return region

    def unmap_all(self) -> list[DmaRegion]:
        """Remove every region; return them in address order."""
        removed = list(self)
        self._by_address.clear()
        self._floors = [0]
        self._leaves = [[]]
        return removed

    def find(self, address: int) -> DmaRegion | None:
        """The region that contains this address, or None."""
        if address < 0:
            return None
        index = bisect_right(self._floors, address) - 1
        leaf = self._leaves[index]
        position = bisect_right(leaf, address)
        if position:
            region = self._by_address[leaf[position - 1]]
        elif index:
            region = self._by_address[self._leaves[index - 1][-1]]
        else:
            return None
        return region if address < region.end else None

    def overlapping(self, address: int, size: int) -> Iterator[DmaRegion]:
        """Every region that shares a byte with the range, in address order.

        Args:
            address: first address of the range.
            size: its length in bytes; 0 yields nothing.

        Returns:
            An iterator; the map must not be changed while it is used.
        """
        end = address + size
        if size <= 0:
            return
        first = self.find(address)
        if first is not None:
            yield first
        for region in self._starting_after(address):
            if region.address >= end:
                return
            yield region

    def segments(
        self, address: int, count: int, write: bool, most: int = sys.maxsize
    ) -> list[tuple[DmaRegion, int, int]]:
        """Split one DMA access into a part per region.

        Args:
            address: DMA address of the first byte.
            count: bytes.
            write: True if the device writes client memory.
            most: parts that are looked for; what lies behind them is neither judged nor returned.

        Returns:
            (region, offset in the region, bytes) in address order; empty for a count of 0.

        Raises:
            DmaFault: EFAULT if a byte is not mapped, EPERM if a region does not allow the access. The whole
                access is judged before any part is used.

        Spec: DMA_READ/DMA_WRITE: an access may span adjacent regions, each checked for its own permission.
        """
        need = _WRITE if write else _READ
        end = address + count
        region = self.find(address)
        if region is not None and end <= region.end and region.flags & need and count > 0:
            return [(region, address - region.address, count)]
        what = f"DMA {'write' if write else 'read'} of {address:#x}+{count:#x}"
        parts: list[tuple[DmaRegion, int, int]] = []
        position = address
        while position < end and len(parts) < most:
            if region is None:
                raise DmaFault(f"{what}: {position:#x} is not mapped; nothing transferred")
            if not region.flags & need:
                raise DmaFault(f"{what}: {region!r} does not allow it; nothing transferred", errno.EPERM)
            step = min(end, region.end) - position
            parts.append((region, position - region.address, step))
            position += step
            region = self.find(position)
        return parts

    def __len__(self) -> int:
        return len(self._by_address)

    def __iter__(self) -> Iterator[DmaRegion]:
        regions = self._by_address
        return (regions[address] for leaf in self._leaves for address in leaf)

    def _neighbour_in_the_way(self, index: int, position: int, address: int, end: int) -> DmaRegion | None:
        """The region that overlaps a new one at this place; only its neighbours can, as no two regions overlap."""
        regions, leaves = self._by_address, self._leaves
        leaf = leaves[index]
        if position or index:
            before = regions[leaf[position - 1] if position else leaves[index - 1][-1]]
            if before.end > address:
                return before
        if position < len(leaf):
            after = leaf[position]
        elif index + 1 < len(leaves):
            after = leaves[index + 1][0]
        else:
            return None
        return regions[after] if after < end else None

    def _starting_after(self, address: int) -> Iterator[DmaRegion]:
        index = max(bisect_right(self._floors, address) - 1, 0)
        position = bisect_right(self._leaves[index], address)
        for leaf in self._leaves[index:]:
            for start in leaf[position:]:
                yield self._by_address[start]
            position = 0

    def _split(self, index: int) -> None:
        leaf = self._leaves[index]
        middle = len(leaf) // 2
        upper = leaf[middle:]
        del leaf[middle:]
        self._leaves.insert(index + 1, upper)
        self._floors.insert(index + 1, upper[0])
        for address in upper:
            self._by_address[address]._leaf = upper

    def _drop_leaf(self, address: int) -> None:
        if len(self._leaves) == 1:
            return
        index = bisect_right(self._floors, address) - 1
        del self._leaves[index]
        del self._floors[index]
        self._floors[0] = 0

    def _refuse(self, address: int, size: int, flags: int, offset: int, file: Hashable | None) -> NoReturn:
        what = f"DMA_MAP {address:#x}+{size:#x} flags {flags:#x} offset {offset:#x}"
        reasons = (
            (size <= 0, "a size of 0 cannot be mapped", errno.EINVAL),
            (not 0 <= address < address + size <= ADDRESS_SPACE, "the range must end at 2^64", errno.EINVAL),
            (flags & ~_KNOWN_FLAGS, f"only flags {_KNOWN_FLAGS:#x} are known", errno.EINVAL),
            (flags & _NEEDS_FILE and file is None, "MMAP and FILE_IO need a file descriptor", errno.EINVAL),
            (size > self.max_region_size, f"at most {self.max_region_size:#x} bytes fit", errno.ENOSPC),
            (True, "no file is that long", errno.EINVAL),
        )
        reason, number = next((reason, number) for applies, reason, number in reasons if applies)
        raise CommandError(f"{what}: {reason}; not mapped", number)

    def _refuse_full(self, address: int, size: int) -> NoReturn:
        raise CommandError(
            f"DMA_MAP {address:#x}+{size:#x}: {len(self)} regions are mapped, {self.max_regions} are allowed; refused",
            errno.ENOSPC,
        )

    def _refuse_overlap(self, address: int, size: int, other: DmaRegion) -> NoReturn:
        raise CommandError(
            f"DMA_MAP {address:#x}+{size:#x}: {other!r} is mapped there; not mapped, the old mapping stays",
            errno.EEXIST,
        )
