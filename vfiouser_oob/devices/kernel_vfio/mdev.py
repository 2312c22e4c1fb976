"""Mediated devices: functions that a kernel driver makes in software, one for each UUID that was written to it.

No IOMMU stands behind them. Their driver does the DMA itself, through the kernel, and asks for a page of the client's
memory when it needs that; so the client's memory has to stay mapped in this process for as long as it is mapped for the
device.

Spec: Linux, Documentation/driver-api/vfio-mediated-device.rst, and Documentation/ABI/testing/sysfs-bus-vfio-mdev.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio.node import DeviceNode

BUS = Path("bus/mdev")
#: What a driver says of devices that have the regions and interrupts of a PCI function.
_PCI_API = "vfio-pci"
#: So many names are listed in an error.
_MOST_NAMES = 8


class MdevNode(DeviceNode):
    """A mediated device's directory in sysfs.

    Args:
        sysfs: where sysfs is mounted.
        uuid: the device's name.
    """

    pinned = False
    modules = "vfio_iommu_type1"
    ownership = "`chown USER /dev/vfio/{group}` as root, or a udev rule"

    def __init__(self, sysfs: Path, uuid: str) -> None:
        super().__init__(sysfs, uuid, sysfs / BUS / "devices" / uuid)

    @property
    def device_api(self) -> str | None:
        """Which kind of device it looks like; None if its driver does not say."""
        try:
            return (self.path / "mdev_type" / "device_api").read_text().strip()
        except OSError:
            return None

    def group_obstacles(self) -> Sequence[str]:
        """A mediated device is alone in its group."""
        return ()

    def require_usable(self) -> None:
        """Check that it is there, is of the right kind, and has a driver that gives it to user space."""
        if not self.exists:
            raise BackendUnavailable(f"there is no mediated device {self.name}: {self._what_there_is()}")
        if self.driver is None:
            # The bus matches no driver to a device: only making a device binds it.
            raise BackendUnavailable(
                f"the mediated device {self.name} has no driver: remove it with "
                f"`echo 1 > {self.path}/remove` as root, and create it again"
            )
        if self.device_api not in (None, _PCI_API):
            raise BackendUnavailable(
                f"the mediated device {self.name} is of the kind {self.device_api}; only {_PCI_API} can be served"
            )
        if self.iommu_group is None:
            raise BackendUnavailable(
                f"the mediated device {self.name} has no IOMMU group: its driver {self.driver} does not give it to VFIO"
            )

    def _what_there_is(self) -> str:
        devices = sorted(path.name for path in (self.sysfs / BUS / "devices").glob("*"))
        if devices:
            return f"this machine has: {_listed(devices)}"
        types = sorted(str(path) for path in mdev_types(self.sysfs))
        if types:
            return (
                f"there is none at all; create it with `echo {self.name} > TYPE/create` as root, TYPE: {_listed(types)}"
            )
        return "no driver of this machine makes mediated devices; load the one that does"


def mdev_types(sysfs: Path) -> Iterator[Path]:
    """The directories where mediated devices can be made: one for each type that a parent device offers."""
    for parent in (sysfs / "class/mdev_bus").glob("*"):
        yield from (parent / "mdev_supported_types").glob("*")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
