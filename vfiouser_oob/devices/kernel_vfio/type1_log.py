"""The type 1 driver's log of pages that devices may have written.

The driver cannot see what a device writes through an IOMMU, so it reports every mapped page of such a device, every
time: correct, and no help to a pre-copy. Of a mediated device it reports what its driver took hold of.

It reports whole mappings only, and forgets them with that. What of it nobody asked for is kept here.

Spec: linux/vfio.h: VFIO_IOMMU_DIRTY_PAGES, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator

from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_protocol.dirty import DirtyLog, bitmap_size


class Type1Log:
    """The log of one container. Methods raise OSError.

    Args:
        kernel: the operating system.
        fd: the container; it stays the opener's.
        page_size: bytes per bit: the smallest page of the IOMMU.
    """

    def __init__(self, kernel: Kernel, fd: int, page_size: int) -> None:
        self._kernel = kernel
        self._fd = fd
        self.page_size = page_size
        #: The container's mappings, by address, with their sizes.
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}
        self._rest: DirtyLog | None = None

    # The mappings

    def mapped(self, iova: int, size: int) -> None:
        """A mapping was made."""
        if iova not in self._sizes:
            bisect.insort(self._starts, iova)
        self._sizes[iova] = size
        if self._rest is not None:
            self._rest.discard(iova, size)

    def unmapped(self, iova: int, size: int) -> None:
        """A range was unmapped."""
        low, high = bisect.bisect_left(self._starts, iova), bisect.bisect_left(self._starts, iova + size)
        for start in self._starts[low:high]:
            del self._sizes[start]
        del self._starts[low:high]

    def unmap(self, iova: int, size: int) -> None:
        """Unmap a range, and keep what the driver then says was written there.

        Args:
            iova: first address.
            size: bytes; whole mappings.
        """
        assert self._rest is not None, "nothing is logged"
        layout = uapi.TYPE1_DMA_UNMAP
        flags = uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
        for start, length in list(self._between(iova, iova + size)):
            words, bitmap = self._bitmap(length)
            request = layout.pack(layout.size + len(bitmap), flags, start, length) + bitmap
            self._kernel.ioctl(self._fd, uapi.VFIO_IOMMU_UNMAP_DMA, bytearray(request))
            self.unmapped(start, length)
            self._rest.mark_bitmap(start, self.page_size, bytes(words))

    def _between(self, iova: int, end: int) -> Iterator[tuple[int, int]]:
        """The mappings that have a part in a range."""
        at = max(0, bisect.bisect_right(self._starts, iova) - 1)
        for start in self._starts[at:]:
            if start >= end:
                return
            if start + self._sizes[start] > iova:
                yield start, self._sizes[start]

    # The log

    @property
    def active(self) -> bool:
        """Whether the driver logs."""
        return self._rest is not None

    def start(self) -> None:
        """Begin to log, with nothing written yet."""
        self._call(uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
        self._rest = DirtyLog(self.page_size)

    def stop(self) -> None:
        """Log no more."""
        self._rest = None
        self._call(uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)

    def report(self, iova: int, length: int) -> bytes:
        """Return a bitmap of the pages written in a range, and forget them.

        Args:
            iova: first address, of a page.
            length: bytes, whole pages.
        """
        assert self._rest is not None, "nothing is logged"
        for start, size in self._between(iova, iova + length):
            words, bitmap = self._bitmap(size)
            self._call(uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, uapi.IOVA_RANGE.pack(start, size) + bitmap)
            self._rest.mark_bitmap(start, self.page_size, bytes(words))
        return self._rest.report(iova, length, self.page_size)[: -(-length // self.page_size // 8)]

    def _bitmap(self, size: int) -> tuple[ctypes.Array[ctypes.c_uint8], bytes]:
        """Room for a range's bitmap, and the structure that names it."""
        count = bitmap_size(size, self.page_size)
        words = (ctypes.c_uint8 * count)()
        return words, uapi.BITMAP.pack(self.page_size, count, ctypes.addressof(words))

    def _call(self, flags: int, body: bytes = b"") -> None:
        head = uapi.TYPE1_DIRTY_BITMAP
        self._kernel.ioctl(
            self._fd, uapi.VFIO_IOMMU_DIRTY_PAGES, bytearray(head.pack(head.size + len(body), flags) + body)
        )
