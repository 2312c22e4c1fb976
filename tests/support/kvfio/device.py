"""A device descriptor in the hands of somebody who is not the daemon: what a client can do with the one it is given."""

from __future__ import annotations

import fcntl
import os
import struct

from vfiouser_oob.devices.kernel_vfio import uapi

ATTACH = struct.Struct("=III")
DETACH = struct.Struct("=II")
VFIO_DEVICE_DETACH_IOMMUFD_PT = uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT + 1


def export_dma_buf(device: int, region: int, size: int) -> int:
    """Make a dma-buf of a region."""
    body = uapi.FEATURE_DMA_BUF.pack(region, os.O_RDWR | os.O_CLOEXEC, 0, 1, 0, size)
    flags = uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_DMA_BUF
    buffer = bytearray(uapi.DEVICE_FEATURE.pack(uapi.DEVICE_FEATURE.size + len(body), flags) + body)
    return int(fcntl.ioctl(device, uapi.VFIO_DEVICE_FEATURE, buffer, True))


def detach(device: int) -> None:
    """Take the device from its address space."""
    fcntl.ioctl(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, bytearray(DETACH.pack(DETACH.size, 0)), True)


def attach(device: int, address_space: int) -> None:
    """Put the device into an address space of the iommufd that it is bound to."""
    fcntl.ioctl(device, uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, bytearray(ATTACH.pack(ATTACH.size, 0, address_space)), True)
