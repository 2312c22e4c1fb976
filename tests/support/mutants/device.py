"""The device behind the server: the documented test device, with a few regions more so that every case applies."""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

MAGIC = 0x75666F76
PAGE = 4096
BAR1_SIZE, BAR2_SIZE = 1 << 20, 64 << 10
CONFIG, MIGRATION, READ_ONLY = 7, 9, 10
READ, WRITE, MMAP, CAPS = 1, 2, 4, 8
#: BAR4 is a 64-bit one of 8 GiB, with nothing behind it.
BAR_SIZES = {0: 0x1000, 1: BAR1_SIZE, 2: BAR2_SIZE, 4: 8 << 30}
REGISTER_SIZES = {0x04: 4, 0x08: 8, 0x10: 4, 0x14: 4, 0x18: 8, 0x20: 4, 0x24: 4, 0x30: 4, 0x34: 4}
#: Vectors of INTx, MSI, MSI-X, ERR, REQ; the last has none.
IRQ_COUNTS = (1, 4, 16, 1, 0)
IRQ_FLAGS = (7, 1, 1, 1, 1)
#: Offset of the PCI Express capability.
EXPRESS = 0x80
#: Offset of the power management capability.
POWER = 0xC0
#: Places of config space that a fault lets a client write.
WRITABLE = {
    "pci/identity-written": (0x08,),
    "pci/headers-written": (0x51,),
    "pci/extended-headers-written": (0x140,),
    "pci/table-size-written": (0x72,),
    "pci/msi-vectors-beyond": (0x52,),
    "pci/power-written": (POWER + 2,),
    "pci/express-written": (EXPRESS + 4,),
    "pci/express-2-written": (EXPRESS + 0x2C,),
    "pci/extended-fields-written": (0x106,),
    "pci/device-control-2-beyond": (EXPRESS + 0x28,),
}


class Refused(Exception):
    """The command fails with this error number."""

    def __init__(self, number: int = 22) -> None:
        super().__init__(number)
        self.number = number


class Crash(BaseException):
    """The server dies."""


class Region(NamedTuple):
    """One region: size, flags, and what may be mapped of it."""

    size: int = 0
    flags: int = 0
    areas: tuple[tuple[int, int], ...] = ()
    kind: tuple[int, int] | None = None
    fd: int = -1
    offset: int = 0


class Irq:
    """The eventfds of one IRQ type."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.fds: dict[int, int] = {}
        self.masked = False


def _config(bad: Callable[[str], bool]) -> tuple[bytearray, bytearray]:
    """Config space at power-on, and which of its bits can be written."""
    data, mask = bytearray(4096), bytearray(4096)
    struct.pack_into("<HHHHI", data, 0, 0x1B36, 0x00F0, 0, 0x10, 0xFF000000)
    mask[4:6] = b"\x07\x04"
    mask[0x3C] = 0xFF
    data[0x3D] = 1
    data[0x34] = 0x50
    for bar, size in BAR_SIZES.items():
        struct.pack_into("<Q", mask, 0x10 + 4 * bar, -size & (1 << 64) - 1 if bar == 4 else -size & 0xFFFFFFFF)
    data[0x20] = 0x4
    if bad("pci/large-bar-cut"):
        mask[0x20:0x28] = b"\xff" * 8
        mask[0x20] = 0
    struct.pack_into("<BBH", data, 0x50, 0x05, 0x70, 2 << 1)
    struct.pack_into("<BBHII", data, 0x70, 0x11, EXPRESS, IRQ_COUNTS[2] - 1, 0x800, 0xC00)
    struct.pack_into("<BBHI", data, EXPRESS, 0x10, POWER, 2, 1 << 28)
    struct.pack_into("<BBH", data, POWER, 0x01, 0, 3)
    struct.pack_into("<IIII", data, 0x100, 0x14010003, 1, 2, 0)
    struct.pack_into("<I", data, 0x140, 0x0001000B)
    mask[0x52] = 0x70
    mask[0x53] = 0
    mask[0x73] = 0xC0
    mask[EXPRESS + 9] = 0x70 | (0x80 if bad("pci/flr-stays-set") else 0)
    for name, places in WRITABLE.items():
        for place in places if bad(name) else ():
            mask[place] = 0xFF
    return data, mask


class Device:
    """State that outlives connections."""

    def __init__(self, bad: Callable[[str], bool]) -> None:
        self.bad = bad
        self.config, self.mask = _config(bad)
        self.memory_fd = os.memfd_create("mutants", os.MFD_CLOEXEC)
        os.ftruncate(self.memory_fd, BAR2_SIZE + PAGE)
        # The region begins a page into its file, so that a client that forgets the offset is caught.
        self.bar2 = mmap.mmap(self.memory_fd, BAR2_SIZE, offset=PAGE)
        self.regions = [Region() for _ in range(11)]
        for bar, size in BAR_SIZES.items():
            self.regions[bar] = Region(size, READ | WRITE)
        self.regions[2] = Region(
            BAR2_SIZE, READ | WRITE | MMAP, ((0, 0x4000), (0x6000, 0x2000)), None, self.memory_fd, PAGE
        )
        self.regions[CONFIG] = Region(4096, READ | WRITE)
        self.regions[READ_ONLY] = Region(4096, READ)
        self.state = 2
        self.pending: tuple[int, int, int] | None = None
        self.line = False
        #: Whether a stream was loaded.
        self.restored = False
        #: Function level resets that were done.
        self.resets = 0
        self.buffer = bytearray()
        self.registers = bytearray()
        self.power_on()

    def power_on(self) -> None:
        """Everything to its first value."""
        self.registers = bytearray(0x1000)
        struct.pack_into("<I", self.registers, 0, MAGIC)
        self.buffer = bytearray(BAR1_SIZE)
        self.bar2[:] = b"mutants\0".ljust(BAR2_SIZE, b"\0")
        self.config, self.mask = _config(self.bad)
        self.pending = None
        self.line = False

    def function_reset(self) -> None:
        """The function level reset of PCI Express."""
        if self.bad("pci/flr-nothing"):
            return
        control = self.config[EXPRESS + 9]
        self.power_on()
        if self.bad("pci/flr-stays-set"):
            self.config[EXPRESS + 9] = control
        self.resets += 1

    def get(self, offset: int) -> int:
        """A 32-bit register."""
        return int(struct.unpack_from("<I", self.registers, offset)[0])

    def set(self, offset: int, value: int) -> None:
        """Set a 32-bit register."""
        struct.pack_into("<I", self.registers, offset, value)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Bytes of a region; the caller has checked the range."""
        if region == CONFIG:
            return bytes(self.config[offset : offset + count])
        if region == 1:
            return bytes(self.buffer[offset : offset + count])
        if region == 2:
            return bytes(self.bar2[offset : offset + count])
        if region == 0:
            self._fail(offset, count)
            return bytes(self.registers[offset : offset + count])
        return bytes(count)

    def _fail(self, offset: int, count: int) -> None:
        number = self.get(0x30)
        if number and offset < 0x38 and offset + count > 0x34:
            raise Refused(number)

    def write(self, region: int, offset: int, data: bytes) -> int | None:
        """Write; returns the value of a 32-bit register of BAR0 that was written, for what it causes."""
        if region == CONFIG:
            for n, byte in enumerate(data, offset):
                self.config[n] = self.config[n] & ~self.mask[n] | byte & self.mask[n]
            if offset <= EXPRESS + 9 < offset + len(data) and data[EXPRESS + 9 - offset] & 0x80:
                self.function_reset()
        elif region == 1:
            self.buffer[offset : offset + len(data)] = data
        elif region == 2:
            self.bar2[offset : offset + len(data)] = data
        elif region == 0:
            self._fail(offset, len(data))
            if REGISTER_SIZES.get(offset) == len(data):
                self.registers[offset : offset + len(data)] = data
                return int.from_bytes(data, "little")
        return None

    def snapshot(self) -> bytes:
        """The state as a migration stream."""
        body = zlib.compress(bytes(self.config) + bytes(self.registers) + bytes(self.buffer) + bytes(self.bar2), 1)
        return struct.pack("<4sII", b"STRM", len(body), zlib.crc32(body)) + body

    def restore(self, stream: bytes) -> bool:
        """Take a stream; whether it was whole."""
        if len(stream) < 12:
            return False
        magic, length, crc = struct.unpack_from("<4sII", stream)
        body = stream[12:]
        if magic != b"STRM" or length != len(body) or zlib.crc32(body) != crc:
            return False
        data = zlib.decompress(body)
        self.config[:] = data[:4096]
        self.registers[:] = data[4096:8192]
        self.buffer[:] = data[8192 : 8192 + BAR1_SIZE]
        self.bar2[:] = data[8192 + BAR1_SIZE :]
        return True

    def close(self) -> None:
        """Give everything back."""
        self.bar2.close()
        os.close(self.memory_fd)
