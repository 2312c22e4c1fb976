"""One open vfio device: its description, registers, interrupts and reset, as the kernel's ioctls offer them."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_oob.devices.kernel_vfio.msix import capability_offsets
from vfiouser_protocol.constants import DeviceInfoFlags, IrqSetFlags, RegionIndex
from vfiouser_protocol.irq import IrqDescription
from vfiouser_protocol.regions import RegionDescription, parse_region_info

#: Room for every capability of a region. Asking with less makes the kernel answer CAPS with offset 0.
_REGION_INFO_ROOM = 4096
_COMMAND_REGISTER = 4
_BUS_MASTER = 1 << 2
_CAP_PM, _CAP_PCIE, _CAP_AF = 0x01, 0x10, 0x13
#: Registers whose writing makes the kernel sleep: power state, function-level reset (twice). Capability id to the
#: register's place in it and its bytes.
_SLOW_REGISTERS = {_CAP_PM: (4, 2), _CAP_PCIE: (8, 2), _CAP_AF: (4, 1)}


class VfioDevice:
    """A device descriptor and what it can do. Methods raise OSError with the kernel's errno.

    Args:
        kernel: the operating system.
        fd: the device's descriptor; it stays the opener's.
    """

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self.fd = fd
        self._kernel = kernel
        buffer = bytearray(uapi.DEVICE_INFO.pack(uapi.DEVICE_INFO.size, 0, 0, 0, 0, 0))
        kernel.ioctl(fd, uapi.VFIO_DEVICE_GET_INFO, buffer)
        _, self.flags, num_regions, num_irqs, *_ = uapi.DEVICE_INFO.unpack(buffer)
        if self.migration_flags():
            # A reset is the way out of every state of a migration, whether or not the driver says that it has one.
            self.flags |= DeviceInfoFlags.RESET
        self.regions = [self._region(index) for index in range(num_regions)]
        self.irqs = [self._irq(index) for index in range(num_irqs)]
        self._offsets = [region.offset for region in self.regions]
        self._slow = self._slow_registers()

    def fileno(self) -> int:
        """Return the device's descriptor number, to lend it."""
        return self.fd

    def _region(self, index: int) -> RegionDescription:
        room = _REGION_INFO_ROOM
        buffer = bytearray(room)
        uapi.REGION_INFO.pack_into(buffer, 0, room, 0, index, 0, 0, 0)
        try:
            self._kernel.ioctl(self.fd, uapi.VFIO_DEVICE_GET_REGION_INFO, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an index that this device has not, such as VGA
                raise
            return RegionDescription(index, 0, 0, 0, uapi.REGION_INFO.size)
        return parse_region_info(bytes(buffer))

    def migration_flags(self) -> int:
        """MigrationFlags; 0 if the driver cannot migrate."""
        head, body = uapi.DEVICE_FEATURE, uapi.FEATURE_U64
        flags = uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_MIGRATION
        buffer = bytearray(head.pack(head.size + body.size, flags) + bytes(body.size))
        try:
            self._kernel.ioctl(self.fd, uapi.VFIO_DEVICE_FEATURE, buffer)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return 0
            raise
        found: int = body.unpack_from(buffer, head.size)[0]
        return found

    def _irq(self, index: int) -> IrqDescription:
        buffer = bytearray(uapi.IRQ_INFO.pack(uapi.IRQ_INFO.size, 0, index, 0))
        try:
            self._kernel.ioctl(self.fd, uapi.VFIO_DEVICE_GET_IRQ_INFO, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL:  # ERR, on a device without PCI Express
                raise
            return IrqDescription(0)
        _, flags, _, count = uapi.IRQ_INFO.unpack(buffer)
        return IrqDescription(count, flags)

    def _slow_registers(self) -> list[range]:
        """Find the config registers whose writing may take a tenth of a second and more."""
        places = capability_offsets(self.config())
        return [
            range(places[kind] + start, places[kind] + start + size)
            for kind, (start, size) in _SLOW_REGISTERS.items()
            if kind in places
        ]

    def config(self) -> bytes:
        """The part of config space that PCI capabilities lie in."""
        return self.read(RegionIndex.CONFIG, 0, min(256, self.regions[RegionIndex.CONFIG].size))

    # Registers

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Read from a region; EIO while the device does not decode memory, where a mapping would be SIGBUS."""
        data = self._kernel.pread(self.fd, count, self._offsets[region] + offset)
        if len(data) != count:
            raise OSError(errno.EIO, f"only {len(data)} of {count} bytes could be read")
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write into a region."""
        written = self._kernel.pwrite(self.fd, data, self._offsets[region] + offset)
        if written != len(data):
            raise OSError(errno.EIO, f"only {written} of {len(data)} bytes could be written")

    def write_may_sleep(self, region: int, offset: int, count: int) -> bool:
        """Whether a write may start a reset or a change of the power state, which the kernel waits for."""
        return region == RegionIndex.CONFIG and any(
            offset < registers.stop and registers.start < offset + count for registers in self._slow
        )

    def clear_bus_master(self) -> None:
        """Forbid the device to access memory."""
        command = int.from_bytes(self.read(RegionIndex.CONFIG, _COMMAND_REGISTER, 2), "little")
        if command & _BUS_MASTER:
            self.write(RegionIndex.CONFIG, _COMMAND_REGISTER, (command & ~_BUS_MASTER).to_bytes(2, "little"))

    def reset(self) -> None:
        """Reset the function."""
        self._kernel.ioctl(self.fd, uapi.VFIO_DEVICE_RESET)

    # Interrupts

    def set_irqs(self, flags: int, index: int, start: int, count: int, data: bytes = b"") -> None:
        """VFIO_DEVICE_SET_IRQS with its data as it is."""
        size = uapi.IRQ_SET.size + len(data)
        buffer = bytearray(uapi.IRQ_SET.pack(size, flags, index, start, count) + data)
        self._kernel.ioctl(self.fd, uapi.VFIO_DEVICE_SET_IRQS, buffer)

    def set_eventfds(self, flags: int, index: int, start: int, fds: Sequence[int]) -> None:
        """VFIO_DEVICE_SET_IRQS with descriptors; -1 takes a vector's eventfd away."""
        self.set_irqs(flags, index, start, len(fds), struct.pack(f"={len(fds)}i", *fds))

    def disable_irqs(self, index: int) -> None:
        """Switch an IRQ index off."""
        self.set_irqs(int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER), index, 0, 0)

    # What newer kernels have

    def export_dma_buf(self, region: int, size: int, open_flags: int) -> int:
        """Return a descriptor of a region alone, as a dma-buf.

        Args:
            region: region index.
            size: bytes of the region.
            open_flags: O_RDWR and the like.
        """
        body = uapi.FEATURE_DMA_BUF.pack(region, open_flags, 0, 1, 0, size)
        flags = uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_DMA_BUF
        buffer = bytearray(uapi.DEVICE_FEATURE.pack(uapi.DEVICE_FEATURE.size + len(body), flags) + body)
        return self._kernel.ioctl(self.fd, uapi.VFIO_DEVICE_FEATURE, buffer)
