"""The migration features of an open device, as the kernel's ioctls offer them. Methods raise OSError.

Spec: linux/vfio.h: VFIO_DEVICE_FEATURE_MIGRATION, _MIG_DEVICE_STATE, _MIG_DATA_SIZE, _DMA_LOGGING_*.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence

from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.device import VfioDevice
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_protocol.constants import DeviceInfoFlags, DeviceState, RegionIndex

_GET = uapi.VFIO_DEVICE_FEATURE_GET
_SET = uapi.VFIO_DEVICE_FEATURE_SET
_PROBE = uapi.VFIO_DEVICE_FEATURE_PROBE
_WORD_PAGES = 64


class MigrationDevice:
    """A device that may be able to migrate.

    Args:
        kernel: the operating system.
        device: the open device.
    """

    def __init__(self, kernel: Kernel, device: VfioDevice) -> None:
        self._kernel = kernel
        self._device = device

    @property
    def identity(self) -> tuple[int, int, int]:
        """Vendor, device and class code."""
        head = self._device.read(RegionIndex.CONFIG, 0, 12)
        return (
            int.from_bytes(head[0:2], "little"),
            int.from_bytes(head[2:4], "little"),
            int.from_bytes(head[9:12], "little"),
        )

    def flags(self) -> int:
        """MigrationFlags; 0 if the driver cannot migrate."""
        return self._device.migration_flags()

    @property
    def can_log(self) -> bool:
        """Whether the device logs the pages that it writes."""
        for index in (
            _SET | uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
            _SET | uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
            _GET | uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
        ):
            try:
                self._feature(_PROBE | index, b"")
            except OSError:
                return False
        return True

    @property
    def can_reset(self) -> bool:
        """Whether the kernel knows a reset for it."""
        return bool(self._device.flags & DeviceInfoFlags.RESET)

    def state(self) -> int:
        """DeviceState."""
        body = uapi.FEATURE_MIG_STATE.pack(0, -1)
        answer = self._feature(_GET | uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, body)
        state: int = uapi.FEATURE_MIG_STATE.unpack(answer)[0]
        return state

    def set_state(self, state: DeviceState) -> int:
        """Change the state; returns the data descriptor, to be closed by the caller, or -1 if there is no new one."""
        body = uapi.FEATURE_MIG_STATE.pack(state, -1)
        answer = self._feature(_SET | uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, body)
        fd: int = uapi.FEATURE_MIG_STATE.unpack(answer)[1]
        return fd

    def data_size(self) -> int:
        """Bytes that a stop-copy would give now, as far as the driver knows."""
        return self._get_u64(uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)

    def precopy_info(self, fd: int) -> tuple[int, int]:
        """Initial and dirty bytes that pre-copy has to give."""
        buffer = bytearray(uapi.PRECOPY_INFO.pack(uapi.PRECOPY_INFO.size, 0, 0, 0))
        self._kernel.ioctl(fd, uapi.VFIO_MIG_GET_PRECOPY_INFO, buffer)
        _, _, initial, dirty = uapi.PRECOPY_INFO.unpack(buffer)
        return initial, dirty

    def reset(self) -> None:
        """Reset the function: it runs then, as after power-on, and is no bus master."""
        self._device.clear_bus_master()
        self._device.reset()

    def settle(self) -> bool:
        """Bring a device that was just opened to its running state.

        Closing a device ends its migration streams, but not all drivers leave the state of the migration then: a daemon
        that was killed leaves such a function behind.

        Returns:
            Whether it had to be reset for that.
        """
        if not self.flags() or self.state() == DeviceState.RUNNING:
            return False
        self.reset()
        return True

    # Data

    def read(self, fd: int, count: int) -> bytes:
        """Read state; nothing at its end, or when pre-copy has nothing for now."""
        try:
            return self._kernel.read(fd, count)
        except OSError as error:
            if error.errno == errno.ENOMSG:  # how drivers say "nothing for now"
                return b""
            raise

    def write(self, fd: int, data: bytes) -> None:
        """Write state, all of it."""
        view = memoryview(data)
        while view:
            view = view[self._kernel.write(fd, bytes(view)) :]

    def close(self, fd: int) -> None:
        """Close a data descriptor."""
        self._kernel.close(fd)

    # Dirty pages

    def start_logging(self, ranges: Sequence[tuple[int, int]], page_size: int) -> int:
        """Log writes to ranges of (address, length); returns the page size that the device chose."""
        flat = [number for pair in ranges for number in pair]
        array = (ctypes.c_uint64 * len(flat))(*flat)
        body = uapi.FEATURE_DMA_LOGGING_CONTROL.pack(page_size, len(ranges), 0, ctypes.addressof(array))
        answer = self._feature(_SET | uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, body)
        chosen: int = uapi.FEATURE_DMA_LOGGING_CONTROL.unpack(answer)[0]
        return chosen or page_size

    def stop_logging(self) -> None:
        """Forget."""
        self._feature(_SET | uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, b"")

    def logged(self, iova: int, length: int, page_size: int) -> bytes:
        """Return a bitmap of the pages written in a range, and forget them."""
        pages = -(-length // page_size)
        words = (ctypes.c_uint64 * -(-pages // _WORD_PAGES))()
        body = uapi.FEATURE_DMA_LOGGING_REPORT.pack(iova, length, page_size, ctypes.addressof(words))
        self._feature(_GET | uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, body)
        return bytes(words)[: -(-pages // 8)]

    def _get_u64(self, index: int) -> int:
        answer = self._feature(_GET | index, bytes(uapi.FEATURE_U64.size))
        value: int = uapi.FEATURE_U64.unpack(answer)[0]
        return value

    def _feature(self, flags: int, body: bytes) -> bytes:
        head = uapi.DEVICE_FEATURE
        buffer = bytearray(head.pack(head.size + len(body), flags) + body)
        self._kernel.ioctl(self._device.fd, uapi.VFIO_DEVICE_FEATURE, buffer)
        return bytes(buffer[head.size :])
