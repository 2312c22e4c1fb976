"""The IOMMU side of a function: the client's memory at the client's addresses.

Two kinds of address space offer the same few calls: the type 1 container and the iommufd. All of them block, for as
long as it takes the kernel to allocate and pin what is mapped; the worker calls them.

What is mapped is named by a mapping of this process, or by the file itself; see `views` for how long that must stay.
"""

from __future__ import annotations

import abc
import errno
import os
from collections.abc import Sequence

from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_oob.devices.kernel_vfio.type1_log import Type1Log
from vfiouser_oob.devices.kernel_vfio.views import PAGE_SIZE, FileViews

#: Bytes mapped by one call: so much must be waited for before a mapping that nobody wants any more is given up.
CHUNK_SIZE = 1 << 30
_ALL = (1 << 64) - 1


class DmaSpace(abc.ABC):
    """An address space that a device accesses memory through. Methods raise OSError with the kernel's errno.

    Args:
        kernel: the operating system.
        fd: container or iommufd; it stays the opener's.
        views: this process's mappings of what is mapped for the device; the opener ends them.
    """

    #: What the IOMMU can address: first and last address of each window; none known means no limit known.
    windows: Sequence[tuple[int, int]] = ()
    #: Smallest page of the IOMMU, in bytes: addresses and sizes are multiples of it.
    page_size = PAGE_SIZE
    #: How many ranges can be mapped; None if there is no such limit.
    max_maps: int | None = None
    #: Who shares the limit of locked memory, where it is not this process alone.
    accounting = ""
    #: Number of the address space, where a file descriptor has several.
    ioas = 0
    #: Whether it can say which pages devices may have written.
    can_log = False

    def __init__(self, kernel: Kernel, fd: int, views: FileViews) -> None:
        self._kernel = kernel
        self._fd = fd
        self._views = views

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

    def start_log(self) -> None:
        """Begin to log which pages devices may write."""
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def stop_log(self) -> None:
        """Log no more."""
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def logged(self, iova: int, length: int) -> bytes:
        """Return a bitmap of the pages of `page_size` bytes that may have been written in a range, and forget them.

        What was unmapped since then counts as well, until something else is mapped there.
        """
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))


class Type1Space(DmaSpace):
    """A container with the type 1 (version 2) IOMMU driver."""

    def __init__(self, kernel: Kernel, fd: int, views: FileViews) -> None:
        super().__init__(kernel, fd, views)
        self._read_info()
        self._log = Type1Log(kernel, fd, self.page_size)

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
            elif cap_id == uapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION:
                self.can_log = True
            elif cap_id == uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
                self.max_maps = int.from_bytes(buffer[body : body + 4], "little")
            offset = following if following > offset else 0

    def map(self, fd: int, offset: int, iova: int, size: int, *, read: bool, write: bool) -> None:
        """Map memory."""
        flags = (uapi.VFIO_DMA_MAP_FLAG_READ if read else 0) | (uapi.VFIO_DMA_MAP_FLAG_WRITE if write else 0)
        with self._views.mapped(fd, offset, iova, size, write=write) as address:
            request = uapi.TYPE1_DMA_MAP.pack(uapi.TYPE1_DMA_MAP.size, flags, address, iova, size)
            self._kernel.ioctl(self._fd, uapi.VFIO_IOMMU_MAP_DMA, bytearray(request))
        self._log.mapped(iova, size)

    def unmap(self, iova: int, size: int) -> None:
        """Unmap memory; several whole mappings at once are allowed."""
        if self._log.active:
            self._log.unmap(iova, size)
        else:
            self._unmap(0, iova, size)
            self._log.unmapped(iova, size)
        self._views.drop(iova, size)

    def unmap_all(self) -> None:
        """Unmap everything."""
        self._unmap(uapi.VFIO_DMA_UNMAP_FLAG_ALL, 0, 0)
        self._log.unmapped(0, _ALL)
        self._views.drop_all()

    def _unmap(self, flags: int, iova: int, size: int) -> None:
        request = uapi.TYPE1_DMA_UNMAP.pack(uapi.TYPE1_DMA_UNMAP.size, flags, iova, size)
        self._kernel.ioctl(self._fd, uapi.VFIO_IOMMU_UNMAP_DMA, bytearray(request))

    def start_log(self) -> None:
        """Begin."""
        self._log.start()

    def stop_log(self) -> None:
        """End."""
        self._log.stop()

    def logged(self, iova: int, length: int) -> bytes:
        """Ask the kernel."""
        return self._log.report(iova, length)
