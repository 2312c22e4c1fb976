"""The IOMMU side of a function: the client's memory at the client's addresses.

Two kinds of address space offer the same few calls: the type 1 container and the iommufd. All of them block, for as
long as it takes the kernel to allocate and pin what is mapped; the worker calls them.

The IOMMU keeps the pages, so the process's own mapping is only needed during the call: afterwards nothing of the
client's memory is mapped here, and a client that truncates its file cannot hurt us. (Where it must stay mapped, nobody
touches it, so that cannot hurt us either.)
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel

#: Bytes mapped by one call: so much must be waited for before a mapping that nobody wants any more is given up.
CHUNK_SIZE = 1 << 30
_PAGE_SIZE = 4096


class DmaSpace(abc.ABC):
    """An address space that a device accesses memory through. Methods raise OSError with the kernel's errno.

    Args:
        kernel: the operating system.
        fd: container or iommufd; it stays the opener's.
    """

    #: What the IOMMU can address: first and last address of each window; none known means no limit known.
    windows: Sequence[tuple[int, int]] = ()
    #: Smallest page of the IOMMU, in bytes: addresses and sizes are multiples of it.
    page_size = _PAGE_SIZE
    #: How many ranges can be mapped; None if there is no such limit.
    max_maps: int | None = None
    #: Who shares the limit of locked memory, where it is not this process alone.
    accounting = ""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self._kernel = kernel
        self._fd = fd

    @abc.abstractmethod
    def map(self, fd: int, offset: int, iova: int, size: int, *, read: bool, write: bool) -> None:
        """Let the device access a part of a file.

        Args:
            fd: the file; it stays the caller's.
            offset: start of the part, in bytes.
            iova: the device's address of it.
            size: bytes.
            read: whether the device may read it.
            write: whether the device may write it.
        """

    @abc.abstractmethod
    def unmap(self, iova: int, size: int) -> None:
        """Take back everything in a range; the device has stopped using it when this returns."""

    @abc.abstractmethod
    def unmap_all(self) -> None:
        """Take back everything."""

    @contextmanager
    def _mapped(self, fd: int, offset: int, size: int, *, write: bool) -> Iterator[int]:
        """Map a part of a file for the duration of a call; gives its address."""
        start, length = mapping_bounds(fd, offset, size)
        address = self._kernel.mmap(fd, length, start, writable=write)
        try:
            yield address + offset - start
        finally:
            self._kernel.munmap(address, length)


class Type1Space(DmaSpace):
    """A container with the type 1 (version 2) IOMMU driver."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        super().__init__(kernel, fd)
        self._read_info()

    def _read_info(self) -> None:
        room = uapi.IOMMU_TYPE1_INFO.size
        for _ in range(2):
            buffer = bytearray(room)
            uapi.IOMMU_TYPE1_INFO.pack_into(buffer, 0, room, 0, 0, 0)
            self._kernel.ioctl(self._fd, uapi.VFIO_IOMMU_GET_INFO, buffer)
            needed, flags, page_sizes, offset = uapi.IOMMU_TYPE1_INFO.unpack_from(buffer)
            if needed <= room:
                break
            room = needed
        if flags & uapi.VFIO_IOMMU_INFO_PGSIZES and page_sizes:
            self.page_size = page_sizes & -page_sizes
        if not flags & uapi.VFIO_IOMMU_INFO_CAPS:
            return
        while offset and offset + uapi.CAP_HEADER.size <= len(buffer):
            cap_id, _, following = uapi.CAP_HEADER.unpack_from(buffer, offset)
            body = offset + uapi.CAP_HEADER.size
            if cap_id == uapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                count = int.from_bytes(buffer[body : body + 4], "little")
                self.windows = [uapi.IOVA_RANGE.unpack_from(buffer, body + 8 + 16 * i) for i in range(count)]
            elif cap_id == uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
                self.max_maps = int.from_bytes(buffer[body : body + 4], "little")
            offset = following if following > offset else 0

    def map(self, fd: int, offset: int, iova: int, size: int, *, read: bool, write: bool) -> None:
        """Map memory."""
        flags = (uapi.VFIO_DMA_MAP_FLAG_READ if read else 0) | (uapi.VFIO_DMA_MAP_FLAG_WRITE if write else 0)
        with self._mapped(fd, offset, size, write=write) as address:
            request = uapi.TYPE1_DMA_MAP.pack(uapi.TYPE1_DMA_MAP.size, flags, address, iova, size)
            self._kernel.ioctl(self._fd, uapi.VFIO_IOMMU_MAP_DMA, bytearray(request))

    def unmap(self, iova: int, size: int) -> None:
        """Unmap memory; several whole mappings at once are allowed."""
        self._unmap(0, iova, size)

    def unmap_all(self) -> None:
        """Unmap everything."""
        self._unmap(uapi.VFIO_DMA_UNMAP_FLAG_ALL, 0, 0)

    def _unmap(self, flags: int, iova: int, size: int) -> None:
        request = uapi.TYPE1_DMA_UNMAP.pack(uapi.TYPE1_DMA_UNMAP.size, flags, iova, size)
        self._kernel.ioctl(self._fd, uapi.VFIO_IOMMU_UNMAP_DMA, bytearray(request))


def mapping_bounds(fd: int, offset: int, size: int) -> tuple[int, int]:
    """Return where a mapping that holds a part of a file begins in the file, and how long it is.

    Args:
        fd: the file; of huge pages, only whole ones can be mapped and unmapped.
        offset: start of the part, in bytes.
        size: bytes.
    """
    granule = max(_PAGE_SIZE, _block_size(fd))
    start = offset // granule * granule
    return start, -(-(offset + size - start) // granule) * granule


def _block_size(fd: int) -> int:
    """A file's page size, if it is of huge pages."""
    size = os.fstat(fd).st_blksize
    return size if size & (size - 1) == 0 else _PAGE_SIZE
