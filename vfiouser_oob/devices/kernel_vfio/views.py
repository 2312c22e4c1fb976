"""The daemon's own mappings of client memory: what tells the kernel which pages are meant.

With an IOMMU and a container the kernel takes hold of the pages during the call, so a mapping ends with it, and a
client that truncates its file cannot hurt us. Without an IOMMU (mediated devices) the kernel looks pages up when a
driver wants them, and with an iommufd it may look again, so mappings have to stay. The kernel alone looks: this process
never touches them, so nothing here can end in SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vfiouser_oob.devices.kernel_vfio.kernel import Kernel

PAGE_SIZE = 4096


class FileViews:
    """Mappings of client files, by the device's address of what they show.

    Args:
        kernel: the operating system.
        keep: whether mappings outlive the call that they are made for.
    """

    def __init__(self, kernel: Kernel, *, keep: bool = False) -> None:
        self._kernel = kernel
        self._keep = keep
        #: By device address: address here, and bytes.
        self._kept: dict[int, tuple[int, int]] = {}

    @contextmanager
    def mapped(self, fd: int, offset: int, iova: int, size: int, *, write: bool) -> Iterator[int]:
        """Map a part of a file for a call, and longer if that has to be and the call succeeds.

        Args:
            fd: the file.
            offset: start of the part, in bytes.
            iova: the device's address of it.
            size: bytes.
            write: whether the device may write.

        Returns:
            Its address in this process.
        """
        # Huge pages can be mapped and unmapped as a whole only.
        granule = max(PAGE_SIZE, _block_size(fd))
        start = offset // granule * granule
        length = -(-(offset + size - start) // granule) * granule
        address = self._kernel.mmap(fd, length, start, writable=write)
        kept = False
        try:
            yield address + offset - start
            if self._keep:
                self._kept[iova] = (address, length)
                kept = True
        finally:
            if not kept:
                self._kernel.munmap(address, length)

    def drop(self, iova: int, size: int) -> None:
        """End what was kept of a range, after the device has lost it."""
        for first in [first for first in self._kept if iova <= first < iova + size]:
            self._kernel.munmap(*self._kept.pop(first))

    def forget(self) -> None:
        """Leave everything that was kept as it is, for as long as this process lives."""
        self._kept.clear()

    def drop_all(self) -> None:
        """End everything that was kept."""
        while self._kept:
            self._kernel.munmap(*self._kept.popitem()[1])


def _block_size(fd: int) -> int:
    """A file's page size, if it is of huge pages."""
    size = os.fstat(fd).st_blksize
    return size if size & (size - 1) == 0 else PAGE_SIZE
