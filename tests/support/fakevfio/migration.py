"""The migration of a variant driver: its state machine, its streams and its dirty log."""

from __future__ import annotations

import ctypes
import errno
import struct

from fakevfio.iommu import fail

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
MAGIC = b"FAKEDRV1"
PAGE = 4096
#: What the driver can do directly, and whether a new stream begins; the kernel's core composes the rest of them.
ARCS: dict[tuple[int, int], bool] = {
    (RUNNING, RUNNING_P2P): False,
    (RUNNING_P2P, RUNNING): False,
    (RUNNING_P2P, STOP): False,
    (STOP, RUNNING_P2P): False,
    (RUNNING, STOP): False,
    (STOP, RUNNING): False,
    (RUNNING, PRE_COPY): True,
    (RUNNING_P2P, PRE_COPY_P2P): True,
    (PRE_COPY, PRE_COPY_P2P): False,
    (PRE_COPY_P2P, PRE_COPY): False,
    (PRE_COPY, RUNNING): False,
    (PRE_COPY_P2P, RUNNING): False,
    (PRE_COPY_P2P, RUNNING_P2P): False,
    (PRE_COPY, STOP_COPY): False,
    (PRE_COPY_P2P, STOP_COPY): False,
    (STOP, STOP_COPY): True,
    (STOP_COPY, STOP): False,
    (STOP_COPY, RUNNING): False,
    (STOP, RESUMING): True,
    (RESUMING, STOP): False,
}


class FakeMigration:
    """What a migrating driver keeps.

    Attributes:
        content: the function's state; what a migration carries.
        flags: VFIO_MIGRATION_*.
        busy: how many transitions fail with EBUSY from now on.
        dirty: addresses of pages that the device wrote.
        has_log: whether the driver logs them.
        log_errno: why the log cannot be read, if it cannot: kernels without the helper let it be started all the same.
        nothing_errno: what reading gives when pre-copy has nothing for now; None: no bytes.
        sticky: the state outlives the closing of the device.
    """

    def __init__(self) -> None:
        self.flags = 7
        self.has_log = True
        self.log_errno: int | None = None
        self.nothing_errno: int | None = errno.ENOMSG
        self.sticky = False
        self.state = RUNNING
        self.content = bytes(range(256)) * 40
        self.busy = 0
        self.dirty: set[int] = set()
        self.logging: list[tuple[int, int]] | None = None
        self.stream = b""
        self.read_so_far = 0
        self.open = False

    def released(self) -> None:
        """The device was closed: its streams end, and most drivers forget the rest."""
        self.open = False
        if not self.sticky:
            self.reset()

    def reset(self) -> None:
        """VFIO_DEVICE_RESET: it runs."""
        self.state = RUNNING
        self.open = False
        self.logging = None

    def go(self, target: int) -> bool:
        """Change the state; whether there is a new data descriptor."""
        if self.busy:
            self.busy -= 1
            raise fail(errno.EBUSY)
        if (self.state, target) not in ARCS:
            raise fail(errno.EINVAL)
        if (self.state, target) == (RESUMING, STOP):
            self._apply()
        fresh = ARCS[self.state, target]
        if target == PRE_COPY or (target == PRE_COPY_P2P and fresh):
            self.stream, self.read_so_far = MAGIC, 0
        if target == STOP_COPY:
            self.stream = MAGIC + struct.pack("<I", len(self.content)) + self.content
            self.read_so_far = 0 if fresh else len(MAGIC)
        if target == RESUMING:
            self.stream = b""
        self.state = target
        self.open = target in (STOP_COPY, RESUMING, PRE_COPY, PRE_COPY_P2P)
        return fresh

    def _apply(self) -> None:
        head = len(MAGIC) + 4
        if len(self.stream) < head:
            raise fail(errno.EINVAL)
        size: int = struct.unpack_from("<I", self.stream, len(MAGIC))[0]
        if len(self.stream) != head + size:
            raise fail(errno.EINVAL)
        self.content = self.stream[head:]

    def read(self, count: int) -> bytes:
        """Read the stream; pre-copy says that there is nothing for now by ENOMSG."""
        if not self.open:
            raise fail(errno.ENODEV)
        data = self.stream[self.read_so_far : self.read_so_far + count]
        self.read_so_far += len(data)
        if not data and self.state in (PRE_COPY, PRE_COPY_P2P) and self.nothing_errno is not None:
            raise fail(self.nothing_errno)
        return data

    def write(self, data: bytes) -> int:
        """Take a piece, at most a page at a time; a wrong beginning is refused."""
        if not self.open or self.state != RESUMING:
            raise fail(errno.ENODEV)
        data = data[:PAGE]
        size = struct.unpack_from("<I", self.stream, len(MAGIC))[0] if len(self.stream) >= len(MAGIC) + 4 else None
        if size is not None and len(self.stream) + len(data) > len(MAGIC) + 4 + size:
            raise fail(errno.ENOMEM)
        begun = (self.stream + data)[: len(MAGIC)]
        if begun != MAGIC[: len(begun)]:
            raise fail(errno.EFAULT)
        self.stream += data
        return len(data)

    def precopy_info(self, buffer: bytearray) -> None:
        """VFIO_MIG_GET_PRECOPY_INFO, in pre-copy only."""
        if self.state not in (PRE_COPY, PRE_COPY_P2P):
            raise fail(errno.EINVAL)
        struct.pack_into("<QQ", buffer, 8, len(self.stream) - self.read_so_far, 0)

    def feature(self, flags: int, body: bytearray) -> bool:
        """VFIO_DEVICE_FEATURE; whether a data descriptor has to be put into a SET of the state."""
        index, probe = flags & 0xFFFF, flags & 1 << 18
        known = (1, 2, 6, 7, 8, 9) if self.has_log else (1, 2, 9)
        if index not in known or (not self.flags and index <= 2):
            raise fail(errno.ENOTTY)
        if probe:
            return False
        if index == 1:
            struct.pack_into("<Q", body, 0, self.flags)
        elif index == 2 and flags & 1 << 16:
            struct.pack_into("<Ii", body, 0, self.state, -1)
        elif index == 2:
            return self.go(struct.unpack_from("<I", body)[0])
        elif index == 9:
            struct.pack_into("<Q", body, 0, len(MAGIC) + 4 + len(self.content))
        else:
            self._log(index, body)
        return False

    def _log(self, index: int, body: bytearray) -> None:
        if index == 6:
            if self.logging is not None:
                raise fail(errno.EINVAL)
            _, count, _, address = struct.unpack("<QIIQ", body)
            flat = (ctypes.c_uint64 * (2 * count)).from_address(address)
            self.logging = [(flat[2 * i], flat[2 * i + 1]) for i in range(count)]
            self.dirty.clear()
            return
        if self.logging is None:
            raise fail(errno.EINVAL)
        if index == 7:
            self.logging = None
            return
        if self.log_errno is not None:
            raise fail(self.log_errno)
        iova, length, page, address = struct.unpack("<QQQQ", body)
        bits = (ctypes.c_uint8 * -(-length // page // 8)).from_address(address)
        for written in sorted(self.dirty):
            if iova <= written < iova + length:
                bits[(written - iova) // page // 8] |= 1 << ((written - iova) // page % 8)
                self.dirty.discard(written)
