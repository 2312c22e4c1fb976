"""Opening a function: by its IOMMU group and a type 1 container, or by its own node and an iommufd.

Both end in the same two things: a device descriptor and an address space for DMA. Everything here blocks.
"""

from __future__ import annotations

import abc
import errno
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from enum import IntEnum
from pathlib import Path
from typing import ClassVar

from vfiouser_oob.config.schema import VfioInterface
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio import uapi
from vfiouser_oob.devices.kernel_vfio.device import VfioDevice
from vfiouser_oob.devices.kernel_vfio.dma import DmaSpace, Type1Space
from vfiouser_oob.devices.kernel_vfio.iommufd import IommufdSpace
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_oob.devices.kernel_vfio.node import DeviceNode
from vfiouser_oob.devices.kernel_vfio.sysfs import find_node
from vfiouser_oob.devices.kernel_vfio.views import FileViews
from vfiouser_oob.transport.fds import LentFd, OwnedFd

IOMMUFD_NODE = "iommu"


class DeviceBusy(BackendUnavailable):
    """Somebody else holds the device; it may be free in a moment."""


class Handle(IntEnum):
    """What an open device consists of."""

    GROUP = 0
    CONTAINER = 1
    DEVICE = 2
    IOMMUFD = 3


class OpenDevice:
    """A device that this process holds.

    Args:
        device: the device.
        space: where the client's memory is mapped.
        resources: closes every descriptor.
        handles: they, for a process that goes on with the device.
    """

    def __init__(
        self, device: VfioDevice, space: DmaSpace, resources: ExitStack, handles: Mapping[Handle, LentFd]
    ) -> None:
        self.device = device
        self.space = space
        self.handles = handles
        self._resources = resources

    def close(self) -> None:
        """Close device, group and container, or device and iommufd."""
        self._resources.close()


class Opener(abc.ABC):
    """A way to open a function.

    Args:
        kernel: the operating system.
        node: the function.
    """

    #: The kernel's interface that it goes by.
    interface: ClassVar[VfioInterface]

    def __init__(self, kernel: Kernel, node: DeviceNode) -> None:
        self._kernel = kernel
        self._node = node

    @abc.abstractmethod
    def open(self) -> OpenDevice:
        """Open the function.

        Raises:
            DeviceBusy: another process holds it.
            BackendUnavailable: it cannot be opened.
        """

    @abc.abstractmethod
    def probe(self) -> None:
        """Find out whether `open` could succeed, disturbing as little as possible; raises as `open` does."""

    def adopt(self, left: Mapping[int, OwnedFd], ioas: int) -> OpenDevice:
        """Go on with a device that another process has opened in this way; the client's memory is mapped already.

        Args:
            left: what it has opened, by `Handle`; taken.
            ioas: number of the address space.

        Raises:
            BackendUnavailable: it cannot be used.
        """
        with ExitStack() as resources:
            views = self._views(resources, keep=self._keeps_views)
            handles: dict[Handle, int] = {}
            for number in self.handles:
                if number not in left:
                    raise BackendUnavailable(f"{self._node.name}: its {number.name.lower()} was not kept")
                fd = handles[number] = self._kernel.adopt(left[number])
                resources.callback(self._kernel.close, fd)
            return self._made(handles, ioas, views, resources)
        raise AssertionError("unreachable")

    #: What it opens, in this order.
    handles: ClassVar[Sequence[Handle]]

    @property
    def _keeps_views(self) -> bool:
        """Whether what is mapped for the device stays mapped here."""
        return True

    def _made(self, handles: Mapping[Handle, int], ioas: int, views: FileViews, resources: ExitStack) -> OpenDevice:
        """Make what was opened an object; what `resources` closes goes with it."""
        try:
            device = VfioDevice(self._kernel, handles[Handle.DEVICE])
            space = self._space(handles, ioas, views)
        except OSError as error:
            raise BackendUnavailable(f"{self._node.name} cannot be described: {error.strerror}") from error
        lent = {handle: LentFd(fd) for handle, fd in handles.items()}
        return OpenDevice(device, space, resources.pop_all(), lent)

    @abc.abstractmethod
    def _space(self, handles: Mapping[Handle, int], ioas: int, views: FileViews) -> DmaSpace:
        """The address space of what was opened."""

    def _views(self, resources: ExitStack, *, keep: bool) -> FileViews:
        """Called first, so that what is mapped here ends after what the device has."""
        views = FileViews(self._kernel, keep=keep)
        resources.callback(views.drop_all)
        return views

    def _open_node(self, path: Path, resources: ExitStack) -> int:
        try:
            fd = self._kernel.open(path)
        except OSError as error:
            raise self._unavailable(path, error) from error
        resources.callback(self._kernel.close, fd)
        return fd

    def _unavailable(self, path: Path, error: OSError) -> BackendUnavailable:
        name, modules = self._node.name, "iommufd" if path.name == IOMMUFD_NODE else self._node.modules
        if error.errno == errno.EBUSY:
            return DeviceBusy(
                f"{path} is in use: another process holds {name} or another function of its IOMMU group, such as a VMM "
                f"that has not ended yet; see `fuser -v {path}`"
            )
        if error.errno in (errno.EACCES, errno.EPERM) and path.name == IOMMUFD_NODE:
            return BackendUnavailable(
                f"no permission to open {path}: let the daemon's user or group have it, by a udev rule such as "
                f'KERNEL=="iommu", GROUP="vfio-oob", MODE="0660"'
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return BackendUnavailable(
                f"no permission to open {path}: let the daemon's user or group own it, for example by "
                f"{self._node.ownership_advice}"
            )
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return BackendUnavailable(
                f"{path} is not there ({error.strerror}): load the kernel's modules with `modprobe {modules}`"
            )
        return BackendUnavailable(f"{path} cannot be opened: {error.strerror}")

    def _not_viable(self) -> BackendUnavailable:
        others = ", ".join(self._node.group_obstacles()) or "none that sysfs shows"
        return BackendUnavailable(
            f"IOMMU group {self._node.iommu_group} of {self._node.name} is not viable: these members are bound to "
            f"other drivers: {others}; bind each with `vfiouser-oob bind`"
        )

    def _no_remapping(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self._node.name}: the kernel refuses the IOMMU because it cannot remap interrupts; switch interrupt "
            f"remapping on in the firmware"
        )

    def _needs_token(self) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self._node.name} is a virtual function whose physical function is bound to vfio-pci too, and "
            f"needs that one's token; bind the physical function to its own driver or to pci-pf-stub"
        )

    def _step(self, what: str, call: Callable[[], int]) -> int:
        try:
            return call()
        except OSError as error:
            raise BackendUnavailable(f"{self._node.name}: {what} failed: {error.strerror}") from error


class GroupOpener(Opener):
    """The way of every kernel: /dev/vfio/GROUP and /dev/vfio/vfio."""

    interface = VfioInterface.GROUP
    handles = (Handle.GROUP, Handle.CONTAINER, Handle.DEVICE)

    @property
    def _keeps_views(self) -> bool:
        return not self._node.pinned

    def _space(self, handles: Mapping[Handle, int], ioas: int, views: FileViews) -> DmaSpace:
        return Type1Space(self._kernel, handles[Handle.CONTAINER], views)

    def open(self) -> OpenDevice:
        """Open group and container, and the device in them."""
        with ExitStack() as resources:
            views = self._views(resources, keep=self._keeps_views)
            group = self._open_group(resources)
            container = self._open_node(self._kernel.dev / "vfio/vfio", resources)
            self._check_container(container)
            self._join(group, container)
            device_fd = self._get_device(group)
            resources.callback(self._kernel.close, device_fd)
            opened = {Handle.GROUP: group, Handle.CONTAINER: container, Handle.DEVICE: device_fd}
            return self._made(opened, 0, views, resources)
        raise AssertionError("unreachable")

    def probe(self) -> None:
        """Open and close the group's node: only one holder at a time is allowed."""
        with ExitStack() as resources:
            self._open_group(resources)

    def _open_group(self, resources: ExitStack) -> int:
        group = self._open_node(self._kernel.dev / f"vfio/{self._node.iommu_group}", resources)
        status = bytearray(uapi.GROUP_STATUS.pack(uapi.GROUP_STATUS.size, 0))
        self._step(
            "asking for its group's state", lambda: self._kernel.ioctl(group, uapi.VFIO_GROUP_GET_STATUS, status)
        )
        if not uapi.GROUP_STATUS.unpack(status)[1] & uapi.VFIO_GROUP_FLAGS_VIABLE:
            others = ", ".join(self._node.group_obstacles()) or "none that sysfs shows"
            raise BackendUnavailable(
                f"IOMMU group {self._node.iommu_group} of {self._node.name} is not viable: these members are bound to "
                f"other drivers: {others}; bind each with `vfiouser-oob bind`"
            )
        return group

    def _check_container(self, container: int) -> None:
        version = self._kernel.ioctl(container, uapi.VFIO_GET_API_VERSION)
        if version != uapi.VFIO_API_VERSION:
            raise BackendUnavailable(f"the kernel speaks version {version} of VFIO, this program version 0")
        if not self._kernel.ioctl(container, uapi.VFIO_CHECK_EXTENSION, uapi.VFIO_TYPE1V2_IOMMU):
            raise BackendUnavailable(
                "the kernel has no type 1 IOMMU driver for VFIO: load it with `modprobe vfio_iommu_type1`"
            )

    def _join(self, group: int, container: int) -> None:
        argument = bytearray(container.to_bytes(4, "little"))
        self._step(
            "putting its group into a container",
            lambda: self._kernel.ioctl(group, uapi.VFIO_GROUP_SET_CONTAINER, argument),
        )
        try:
            self._kernel.ioctl(container, uapi.VFIO_SET_IOMMU, uapi.VFIO_TYPE1V2_IOMMU)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise BackendUnavailable(f"{self._node.name}: the IOMMU cannot be used: {error.strerror}") from error
            raise self._no_remapping() from error

    def _get_device(self, group: int) -> int:
        name = bytearray(self._node.name.encode() + b"\0")
        try:
            return self._kernel.ioctl(group, uapi.VFIO_GROUP_GET_DEVICE_FD, name)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EAGAIN):
                raise DeviceBusy(f"{self._node.name} is in use by another process") from error
            if error.errno == errno.EACCES:
                raise self._needs_token() from error
            raise BackendUnavailable(f"{self._node.name} cannot be opened: {error.strerror}") from error


class CdevOpener(Opener):
    """The way of kernels with iommufd: /dev/vfio/devices/vfioN and /dev/iommu."""

    interface = VfioInterface.CDEV
    handles = (Handle.IOMMUFD, Handle.DEVICE)

    def _space(self, handles: Mapping[Handle, int], ioas: int, views: FileViews) -> DmaSpace:
        return IommufdSpace(self._kernel, handles[Handle.IOMMUFD], ioas, views)

    def open(self) -> OpenDevice:
        """Open the device's own node, bind it to an iommufd and attach it to a new address space."""
        with ExitStack() as resources:
            views = self._views(resources, keep=self._keeps_views)
            device_fd, iommufd = self._bind(resources)
            request = bytearray(uapi.IOAS_ALLOC.pack(uapi.IOAS_ALLOC.size, 0, 0))
            self._step("making an address space", lambda: self._kernel.ioctl(iommufd, uapi.IOMMU_IOAS_ALLOC, request))
            ioas: int = uapi.IOAS_ALLOC.unpack(request)[2]
            attach = bytearray(uapi.ATTACH_IOMMUFD_PT.pack(uapi.ATTACH_IOMMUFD_PT.size, 0, ioas))
            self._step(
                "attaching it to its address space",
                lambda: self._kernel.ioctl(device_fd, uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach),
            )
            return self._made({Handle.IOMMUFD: iommufd, Handle.DEVICE: device_fd}, ioas, views, resources)
        raise AssertionError("unreachable")

    def probe(self) -> None:
        """Bind and let go: a node can be opened by many, but bound by one."""
        with ExitStack() as resources:
            self._bind(resources)

    def _bind(self, resources: ExitStack) -> tuple[int, int]:
        # Closed in the opposite order: the device before the iommufd that it is bound to.
        iommufd = self._open_node(self._kernel.dev / IOMMUFD_NODE, resources)
        device_fd = self._open_node(self._path, resources)
        request = bytearray(uapi.BIND_IOMMUFD.pack(uapi.BIND_IOMMUFD.size, 0, iommufd, 0))
        try:
            self._kernel.ioctl(device_fd, uapi.VFIO_DEVICE_BIND_IOMMUFD, request)
        except OSError as error:
            raise self._not_bound(error) from error
        return device_fd, iommufd

    def _not_bound(self, error: OSError) -> BackendUnavailable:
        name = self._node.name
        # The answer to a device that another open file has bound, whoever holds that file, is EINVAL.
        if error.errno == errno.EINVAL:
            return DeviceBusy(
                f"{name} is in use: another process has bound it, such as a VMM that has not ended yet; see "
                f"`fuser -v {self._path}`"
            )
        # EBUSY: the group's node is open. EPERM: its IOMMU is another's, or cannot remap interrupts.
        if error.errno in (errno.EBUSY, errno.EPERM) and self._node.group_obstacles():
            return self._not_viable()
        if error.errno == errno.EBUSY or (error.errno == errno.EPERM and self._node.has_vfio_siblings()):
            return DeviceBusy(
                f"IOMMU group {self._node.iommu_group} of {name} is in use: another process holds it, or {name}, or "
                f"another function of its IOMMU group, such as a VMM that has not ended yet"
            )
        if error.errno == errno.EPERM:
            return self._no_remapping()
        if error.errno == errno.EACCES:
            return self._needs_token()
        return BackendUnavailable(f"{name} cannot be bound to an iommufd: {error.strerror}")

    @property
    def _path(self) -> Path:
        if self._node.cdev is None:
            raise BackendUnavailable(
                f"{self._node.name} has no device node: this kernel is built without CONFIG_VFIO_DEVICE_CDEV; leave "
                f'`interface` away or set it to "group"'
            )
        return self._kernel.dev / f"vfio/devices/{self._node.cdev}"

    def is_possible(self) -> bool:
        """Whether there are both nodes, and this process can open them: that alone disturbs nobody."""
        if self._node.cdev is None:
            return False
        return all(map(self._kernel.may_open, (self._kernel.dev / IOMMUFD_NODE, self._path)))


def opener_of(kernel: Kernel, name: str, left: Container[int]) -> Opener:
    """Return the way by which another process has opened a function.

    Args:
        kernel: the operating system.
        name: the function's address.
        left: what that process has opened, by `Handle`.
    """
    node = find_node(kernel.sysfs, name)
    return CdevOpener(kernel, node) if Handle.IOMMUFD in left else GroupOpener(kernel, node)


def choose_opener(kernel: Kernel, name: str, interface: VfioInterface = VfioInterface.AUTO) -> Opener:
    """Return the way to open a function on this machine.

    Args:
        kernel: the operating system.
        name: the function's address, or the UUID of a mediated device.
        interface: the kernel's interface to use.

    Raises:
        BackendUnavailable: sysfs says already that it cannot be used.
    """
    node = find_node(kernel.sysfs, name)
    node.require_usable()
    by_node = CdevOpener(kernel, node)
    if interface is VfioInterface.CDEV or (interface is VfioInterface.AUTO and by_node.is_possible()):
        return by_node
    return GroupOpener(kernel, node)
