"""A PCI function as vfio-pci shows it: config space, two BARs, interrupts and their rules."""

from __future__ import annotations

import errno
import os
import struct

from fakevfio.iommu import fail

CONFIG = 7
BAR0_SIZE = 0x4000
BAR2_SIZE = 0x10000
PM, PCIE, MSIX = 0x40, 0x60, 0xA0
INTX_INDEX, MSI_INDEX, MSIX_INDEX, ERR_INDEX, REQ_INDEX = range(5)
NORESIZE = 8
#: Region index to size, flags and capabilities: (id, body).
REGIONS: dict[int, tuple[int, int, tuple[tuple[int, bytes], ...]]] = {
    0: (BAR0_SIZE, 0x7, ((3, b""),)),
    2: (BAR2_SIZE, 0x7, ((1, struct.pack("<IIQQQQ", 2, 0, 0, 0x1000, 0x8000, 0x2000)),)),
    4: (32, 0x3, ()),
    CONFIG: (256, 0x3, ()),
}


class FakeDevice:
    """The function behind a device descriptor.

    Attributes:
        dynamic_msix: whether MSI-X vectors can be added while others are on (Linux 6.5 and later).
        has_reset: whether the kernel knows a reset for it.
        tells_reset: whether the driver says so in the device's flags.
        resets: how often it was reset.
        layout: region index to size, flags and capabilities.
    """

    def __init__(self) -> None:
        self.dynamic_msix = True
        self.has_reset = True
        self.tells_reset = True
        self.resets = 0
        self.layout = dict(REGIONS)
        self.config = bytearray(256)
        self.config[0:4] = b"\x36\x1b\x10\x00"
        self.config[0x34] = PM
        self.config[PM : PM + 2] = bytes([0x01, PCIE])
        self.config[PCIE : PCIE + 2] = bytes([0x10, MSIX])
        self.config[MSIX : MSIX + 2] = bytes([0x11, 0])
        self.bars = {0: bytearray(BAR0_SIZE), 2: bytearray(BAR2_SIZE), 4: bytearray(32)}
        self.vectors: dict[int, dict[int, int]] = {}
        self.enabled: dict[int, int] = {}
        self.irq_calls: list[tuple[int, int, int, int]] = []
        self.virqfds: dict[int, int] = {}
        self.counts = {INTX_INDEX: 1, MSI_INDEX: 8, MSIX_INDEX: 65, ERR_INDEX: 1, REQ_INDEX: 1}

    # Registers

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self.config[4:6], "little")

    def access(self, region: int, offset: int, count: int, data: bytes | None) -> bytes:
        """Read or write; EIO for memory that is not decoded."""
        if region == CONFIG:
            if data is None:
                return bytes(self.config[offset : offset + count])
            self.config[offset : offset + len(data)] = data
            if offset <= PCIE + 9 < offset + len(data) and self.config[PCIE + 9] & 0x80:
                self.reset()
            return b""
        if region not in self.bars:
            raise fail(errno.EINVAL)
        if not self.command & 2:
            raise fail(errno.EIO)
        memory = self.bars[region]
        if data is None:
            return bytes(memory[offset : offset + count])
        memory[offset : offset + len(data)] = data
        return b""

    def reset(self) -> None:
        """Power-on state, but for interrupts and the command register, which the kernel restores."""
        if not self.has_reset:
            raise fail(errno.EINVAL)
        self.resets += 1
        self.config[PCIE + 9] &= 0x7F
        for memory in self.bars.values():
            memory[:] = bytes(len(memory))

    # Description

    def region_info(self, buffer: bytearray) -> None:
        """VFIO_DEVICE_GET_REGION_INFO."""
        argsz, _, index = struct.unpack_from("<III", buffer)
        if index == 8:
            raise fail(errno.EINVAL)
        size, flags, capabilities = self.layout.get(index, (0, 0, ()))
        chain, cap_offset = b"", 0
        for number, (cap_id, body) in enumerate(capabilities, 1):
            following = 32 + len(chain) + 8 + len(body) if number < len(capabilities) else 0
            chain += struct.pack("<HHI", cap_id, 1, following) + body
        if chain:
            flags |= 8
            if argsz >= 32 + len(chain):
                cap_offset = 32
                buffer[32 : 32 + len(chain)] = chain
            else:
                argsz = 32 + len(chain)
        struct.pack_into("<IIIIQQ", buffer, 0, argsz, flags, index, cap_offset, size, index << 40)

    def irq_info(self, buffer: bytearray) -> None:
        """VFIO_DEVICE_GET_IRQ_INFO."""
        index: int = struct.unpack_from("<I", buffer, 8)[0]
        if index not in self.counts:
            raise fail(errno.EINVAL)
        flags = 7 if index == INTX_INDEX else 1 if index == MSIX_INDEX and self.dynamic_msix else 1 | NORESIZE
        struct.pack_into("<IIII", buffer, 0, 16, flags, index, self.counts[index])

    # Interrupts

    def set_irqs(self, buffer: bytearray) -> None:
        """VFIO_DEVICE_SET_IRQS, refusing what vfio-pci refuses."""
        argsz, flags, index, start, count = struct.unpack_from("<IIIII", buffer)
        data = bytes(buffer[20:argsz])
        self.irq_calls.append((flags, index, start, count))
        if index not in self.counts or start >= self.counts[index] or start + count > self.counts[index]:
            raise fail(errno.EINVAL)
        if flags & 0x18:
            self._mask(flags, index, data)
        elif flags & 1 and not count:
            self._disable(index)
        elif flags & 4:
            self._assign(index, start, struct.unpack(f"<{count}i", data))
        else:
            self._loop_back(flags, index, start, count, data)

    def _mask(self, flags: int, index: int, data: bytes) -> None:
        if index != INTX_INDEX:
            raise fail(errno.ENOTTY)
        if index not in self.enabled:
            raise fail(errno.EINVAL)
        if flags & 4:
            fd: int = struct.unpack("<i", data)[0]
            old = self.virqfds.pop(flags & 0x18, None)
            if old is not None:
                os.close(old)
            if fd >= 0:
                self.virqfds[flags & 0x18] = os.dup(fd)

    def _disable(self, index: int) -> None:
        if index not in self.enabled:
            raise fail(errno.EINVAL)
        del self.enabled[index]
        for fd in self.vectors.pop(index).values():
            os.close(fd)
        if index == INTX_INDEX:
            for fd in self.virqfds.values():
                os.close(fd)
            self.virqfds.clear()

    def _assign(self, index: int, start: int, fds: tuple[int, ...]) -> None:
        exclusive = {INTX_INDEX, MSI_INDEX, MSIX_INDEX}
        if index in exclusive and (exclusive & self.enabled.keys()) - {index}:
            raise fail(errno.EINVAL)
        end = start + len(fds)
        fixed = index == MSI_INDEX or (index == MSIX_INDEX and not self.dynamic_msix)
        if fixed and index in self.enabled and end > self.enabled[index]:
            raise fail(errno.EINVAL)
        for fd in fds:
            if fd >= 0 and "eventfd" not in os.readlink(f"/proc/self/fd/{fd}"):
                raise fail(errno.EINVAL)
        self.enabled[index] = max(end, self.enabled.get(index, 0))
        vectors = self.vectors.setdefault(index, {})
        for vector, fd in enumerate(fds, start):
            if vector in vectors:
                os.close(vectors.pop(vector))
            if fd >= 0:
                vectors[vector] = os.dup(fd)

    def _loop_back(self, flags: int, index: int, start: int, count: int, data: bytes) -> None:
        if index not in self.enabled:
            raise fail(errno.EINVAL)
        for vector in range(start, start + count):
            if flags & 1 or data[vector - start]:
                self.fire(index, vector)

    def fire(self, index: int, vector: int) -> None:
        """Raise an interrupt."""
        fd = self.vectors.get(index, {}).get(vector)
        if fd is not None:
            os.eventfd_write(fd, 1)

    def released(self) -> None:
        """The last descriptor was closed: interrupts off, device reset."""
        for index in tuple(self.enabled):
            self._disable(index)
        if self.has_reset:
            self.reset()
