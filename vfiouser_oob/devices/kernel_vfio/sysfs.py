"""What sysfs says about a PCI function, and why it could not be used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio.mdev import MdevNode
from vfiouser_oob.devices.kernel_vfio.node import DeviceNode

#: The driver that hands functions to user space; variant drivers have other names and do the same.
VFIO_DRIVER = "vfio-pci"
#: Bridges never go to user space, and their presence in a group is no obstacle.
_CLASS_BRIDGE = "0x0604"


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class PciFunctionNode(DeviceNode):
    """A PCI function's directory in sysfs.

    Args:
        sysfs: where sysfs is mounted.
        bdf: address, such as ``0000:3b:00.2``.
    """

    def __init__(self, sysfs: Path, bdf: str) -> None:
        super().__init__(sysfs, bdf, sysfs / "bus/pci/devices" / bdf)
        self.bdf = bdf

    def is_bound_to_vfio(self) -> bool:
        """Whether its driver is vfio-pci or a variant of it."""
        return self.driver == VFIO_DRIVER or (self.driver is not None and (self.path / "vfio-dev").is_dir())

    def group_obstacles(self) -> Sequence[str]:
        """The other members of its group that another driver holds, each with that driver."""
        members = sorted((self.path / "iommu_group" / "devices").glob("*"))
        others = [PciFunctionNode(self.sysfs, path.name) for path in members if path.name != self.bdf]
        return [
            f"{other.bdf} ({other.driver})"
            for other in others
            if other.driver is not None and not other.is_bound_to_vfio() and not other._is_bridge
        ]

    @property
    def _is_bridge(self) -> bool:
        try:
            return (self.path / "class").read_text().startswith(_CLASS_BRIDGE)
        except OSError:
            return False

    def require_usable(self) -> None:
        """Check that it is there, is bound to vfio-pci, and has an IOMMU."""
        if not self.exists:
            raise BackendUnavailable(f"there is no PCI function {self.bdf}: see `lspci -D` for those that there are")
        if not self.is_bound_to_vfio():
            holder = f"bound to the driver {self.driver}" if self.driver else "bound to no driver"
            raise BackendUnavailable(
                f"{self.bdf} is {holder}, not to vfio-pci: bind it with `vfiouser-oob bind {self.bdf}` as root"
            )
        if self.iommu_group is None:
            raise BackendUnavailable(
                f"{self.bdf} has no IOMMU group: switch the IOMMU on in the firmware (VT-d, AMD-Vi) and, for Intel, "
                f"boot the kernel with intel_iommu=on"
            )


def find_node(sysfs: Path, name: str) -> DeviceNode:
    """Return where a function stands in sysfs, whether or not it is there.

    Args:
        sysfs: where sysfs is mounted.
        name: a PCI address, or the UUID of a mediated device.
    """
    return MdevNode(sysfs, name) if _UUID.fullmatch(name) else PciFunctionNode(sysfs, name)
