"""What a client may map of a real function's regions, and by which descriptor.

A device descriptor with the kernel's own offset works on every kernel, and gives its holder the whole device except DMA
mapping (docs/explanation/trust.md). A dma-buf gives one region and nothing else, where the kernel can map it. Trapping
gives nothing, and each access is a message.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vfiouser_oob.config.schema import RegionPolicy
from vfiouser_oob.devices.kernel_vfio.device import VfioDevice
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel, KernelFd
from vfiouser_oob.devices.kernel_vfio.msix import msix_areas, without_pages
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.transport.fds import HasFileno
from vfiouser_protocol.constants import REGION_TYPE_MIGRATION, RegionFlags
from vfiouser_protocol.regions import RegionDescription, RegionSpec, SparseArea

_ACCESS = int(RegionFlags.READ | RegionFlags.WRITE)


class RegionTable:
    """The regions as the client sees them, and their descriptors.

    Args:
        kernel: the operating system.
        device: the open device.
        policy: how regions may be mapped.
        log: where a policy that cannot be had is reported.
    """

    def __init__(self, kernel: Kernel, device: VfioDevice, policy: RegionPolicy, log: Logger) -> None:
        self._kernel = kernel
        self._device = device
        self._dma_bufs: dict[int, KernelFd] = {}
        self._msix = msix_areas(device.config())
        self.specs: Sequence[RegionSpec] = ()
        try:
            self.specs = [self._spec(region, policy, log) for region in device.regions]
        except BaseException:
            self.close()
            raise

    def fd(self, index: int) -> HasFileno | None:
        """Return the descriptor that maps a region; it stays this table's or the device's."""
        if not self.specs[index].mappable:
            return None
        return self._dma_bufs.get(index, self._device)

    def _spec(self, region: RegionDescription, policy: RegionPolicy, log: Logger) -> RegionSpec:
        if region.type is not None and region.type.type == REGION_TYPE_MIGRATION:
            return RegionSpec.absent(region.index)  # migration is ours to offer
        areas = self._areas(region)
        mappable = bool(areas) and policy is not RegionPolicy.TRAP
        offset = region.offset
        if mappable and policy in (RegionPolicy.AUTO, RegionPolicy.DMABUF):
            if self._export(region, areas, log):
                offset = 0
            elif policy is RegionPolicy.DMABUF:
                mappable = False
                log.warning(
                    "this kernel cannot map a dma-buf of a region; every access is a message", region=region.index
                )
        return RegionSpec(
            region.index,
            region.size,
            region.flags & _ACCESS,
            () if areas == ((0, region.size),) else areas,
            offset=offset,
            type=region.type,
            msix_mappable=region.msix_mappable,
            mappable=mappable,
        )

    def _areas(self, region: RegionDescription) -> tuple[SparseArea, ...]:
        """What may be mapped: the kernel's word, less the MSI-X table and pending bits unless it allows them."""
        if region.msix_mappable:
            return region.mappable_areas
        return without_pages(region.mappable_areas, [area for index, area in self._msix if index == region.index])

    def _export(self, region: RegionDescription, areas: tuple[SparseArea, ...], log: Logger) -> bool:
        """Make a dma-buf of a region; whether there is one that can be mapped."""
        if areas != ((0, region.size),):
            return False  # a dma-buf of several parts numbers its bytes otherwise than the region
        access = os.O_RDWR if region.flags & RegionFlags.WRITE else os.O_RDONLY
        try:
            fd = KernelFd(self._kernel, self._device.export_dma_buf(region.index, region.size, access | os.O_CLOEXEC))
        except OSError as error:  # the feature is younger than most kernels
            log.debug("this kernel makes no dma-buf of a region", region=region.index, error=error.strerror)
            return False
        try:
            # Mapped once and never touched: exporting has been there longer than mapping.
            address = self._kernel.mmap(fd.fileno(), region.size, 0, writable=access == os.O_RDWR)
            self._kernel.munmap(address, region.size)
        except OSError as error:
            log.debug("this kernel maps no dma-buf of a region", region=region.index, error=error.strerror)
            fd.close()
            return False
        self._dma_bufs[region.index] = fd
        return True

    def close(self) -> None:
        """Close the dma-bufs."""
        fds, self._dma_bufs = list(self._dma_bufs.values()), {}
        for fd in fds:
            fd.close()
