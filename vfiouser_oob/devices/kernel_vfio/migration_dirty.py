"""Who knows which pages of the client's memory a function has written, in the order in which they are asked.

A driver's own log is exact. The IOMMU's says "all of it" for real functions. Where there is neither, so do we.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from vfiouser_agents.api import Range
from vfiouser_oob.devices.kernel_vfio.dma import DmaSpace
from vfiouser_oob.devices.kernel_vfio.migration_device import MigrationDevice

PAGE_SIZE = 4096


class KernelPageLog(abc.ABC):
    """A log of written pages that has been started. Methods raise OSError."""

    #: Bytes per bit.
    page_size = PAGE_SIZE

    @abc.abstractmethod
    def report(self, iova: int, length: int) -> bytes:
        """Return a bitmap of the pages written in a range, and forget them."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Log no more."""


class DriverLog(KernelPageLog):
    """The function's own.

    Args:
        device: whose driver logs.
        ranges: what is logged, as pairs of address and length.
    """

    def __init__(self, device: MigrationDevice, ranges: Sequence[tuple[int, int]]) -> None:
        self._device = device
        device.start_logging(ranges, PAGE_SIZE)
        try:
            # Some kernels let a log be started that they cannot read.
            device.logged(ranges[0][0], PAGE_SIZE, PAGE_SIZE)
        except OSError:
            device.stop_logging()
            raise

    def report(self, iova: int, length: int) -> bytes:
        """Ask the driver; whatever it counts in, the kernel reports in the size that we ask for."""
        return self._device.logged(iova, length, PAGE_SIZE)

    def stop(self) -> None:
        """Log no more."""
        self._device.stop_logging()


class IommuLog(KernelPageLog):
    """The IOMMU driver's.

    Args:
        space: the device's address space.
    """

    def __init__(self, space: DmaSpace) -> None:
        self._space = space
        self.page_size = space.page_size
        space.start_log()

    def report(self, iova: int, length: int) -> bytes:
        """Ask the IOMMU driver."""
        return self._space.logged(iova, length)

    def stop(self) -> None:
        """Log no more."""
        self._space.stop_log()


class NoLog(KernelPageLog):
    """Nobody's: all pages, every time."""

    def report(self, iova: int, length: int) -> bytes:
        """All of it."""
        pages = length // PAGE_SIZE
        return ((1 << pages) - 1).to_bytes(-(-pages // 8), "little")

    def stop(self) -> None:
        """Nothing to do."""


def start_log(device: MigrationDevice, space: DmaSpace, ranges: Sequence[Range]) -> tuple[KernelPageLog, str]:
    """Start the best log that there is.

    Args:
        device: the function.
        space: its address space.
        ranges: what to log.

    Returns:
        The log, and what there is to say if it is not the driver's.

    Raises:
        OSError: the IOMMU's, which there is, cannot be started.
    """
    note = "the driver keeps no log of the pages that the function writes"
    if device.can_log:
        try:
            return DriverLog(device, [(part.iova, part.length) for part in ranges]), ""
        except OSError as error:
            note = f"the driver's log of the pages that the function writes cannot be used: {error.strerror}"
    if space.can_log:
        return IommuLog(space), f"{note}; the IOMMU's is used, which may name pages that were not written"
    return NoLog(), f"{note}, and the IOMMU keeps none; all pages are reported every time"
