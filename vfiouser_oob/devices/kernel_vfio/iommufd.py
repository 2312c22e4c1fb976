"""An I/O address space of an iommufd: the client's memory at the client's addresses, without a container.

The kernel's rules differ from those of a type 1 container in two ways that matter for safety:

* A file that is mapped by its descriptor is pinned without a look at what the descriptor allows. A client that may only
  read a file could have its device write into it. So access is checked here, by the rules that mmap has.
* Memory that is mapped by a process's address may be looked up by that address again: whoever holds the device's
  descriptor can detach the device from its address space and attach it once more, and the kernel pins then what the
  process has there by that time. So such an address stays reserved for the client's memory until it is unmapped.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.dma import DmaSpace
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_oob.devices.kernel_vfio.views import FileViews

_MAX_IOVA_RANGES = 256
_ALL = (1 << 64) - 1
_SEALED = fcntl.F_SEAL_WRITE | getattr(fcntl, "F_SEAL_FUTURE_WRITE", 0x10)
#: What a file gets that cannot be mapped by its descriptor but perhaps by an address: it is no memfd or too short.
_NOT_BY_FILE = frozenset({errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP})


class IommufdSpace(DmaSpace):
    """An I/O address space (IOAS) of an iommufd.

    Args:
        kernel: the operating system.
        fd: the iommufd; it stays the opener's.
        ioas: the address space's id; the device is attached to it already, so that its windows are known.
        views: as for `DmaSpace`; they keep what is mapped.
    """

    accounting = "all processes of the daemon's user count together"

    def __init__(self, kernel: Kernel, fd: int, ioas: int, views: FileViews) -> None:
        super().__init__(kernel, fd, views)
        self.ioas = ioas
        self._by_file = True
        ranges = (ctypes.c_uint64 * (2 * _MAX_IOVA_RANGES))()
        buffer = bytearray(
            uapi.IOAS_IOVA_RANGES.pack(
                uapi.IOAS_IOVA_RANGES.size, ioas, _MAX_IOVA_RANGES, 0, ctypes.addressof(ranges), 0
            )
        )
        kernel.ioctl(fd, uapi.IOMMU_IOAS_IOVA_RANGES, buffer)
        _, _, count, _, _, alignment = uapi.IOAS_IOVA_RANGES.unpack(buffer)
        self.windows = [(ranges[2 * i], ranges[2 * i + 1]) for i in range(min(count, _MAX_IOVA_RANGES))]
        self.page_size = max(self.page_size, alignment)

    def map(self, fd: int, offset: int, iova: int, size: int, *, read: bool, write: bool) -> None:
        """Map memory: by its file where the kernel can, else by an address."""
        _require_access(fd, write=write)
        flags = uapi.IOMMU_IOAS_MAP_FIXED_IOVA
        flags |= (uapi.IOMMU_IOAS_MAP_READABLE if read else 0) | (uapi.IOMMU_IOAS_MAP_WRITEABLE if write else 0)
        if not (self._by_file and self._map_file(fd, offset, iova, size, flags)):
            self._map_address(fd, offset, iova, size, flags, write=write)

    def _map_file(self, fd: int, offset: int, iova: int, size: int, flags: int) -> bool:
        """Map a file by its descriptor; whether it could be."""
        layout = uapi.IOAS_MAP_FILE
        request = bytearray(layout.pack(layout.size, flags, self.ioas, fd, offset, size, iova))
        try:
            self._kernel.ioctl(self._fd, uapi.IOMMU_IOAS_MAP_FILE, request)
        except OSError as error:
            if error.errno == errno.ENOTTY:  # before Linux 6.13
                self._by_file = False
            elif error.errno not in _NOT_BY_FILE:
                raise
            return False
        return True

    def _map_address(self, fd: int, offset: int, iova: int, size: int, flags: int, *, write: bool) -> None:
        layout = uapi.IOAS_MAP
        with self._views.mapped(fd, offset, iova, size, write=write) as address:
            request = bytearray(layout.pack(layout.size, flags, self.ioas, 0, address, size, iova))
            self._kernel.ioctl(self._fd, uapi.IOMMU_IOAS_MAP, request)

    def unmap(self, iova: int, size: int) -> None:
        """Unmap memory; what was never mapped is no error."""
        layout = uapi.IOAS_UNMAP
        try:
            self._kernel.ioctl(
                self._fd, uapi.IOMMU_IOAS_UNMAP, bytearray(layout.pack(layout.size, self.ioas, iova, size))
            )
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        self._views.drop(iova, size)

    def unmap_all(self) -> None:
        """Unmap everything; where that fails, the addresses are given up for good rather than to something else."""
        try:
            self.unmap(0, _ALL)
        except OSError:
            self._views.forget()
            raise


def _require_access(fd: int, *, write: bool) -> None:
    """Refuse what mmap would refuse: to read what may not be read, to write what may not be written.

    Args:
        fd: a client's file.
        write: whether the device is to write it.

    Raises:
        OSError: EACCES for the descriptor's mode, EPERM for a seal.
    """
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == os.O_WRONLY or (write and mode != os.O_RDWR):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    if write and _seals(fd) & _SEALED:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # not a file that can be sealed
        return 0
