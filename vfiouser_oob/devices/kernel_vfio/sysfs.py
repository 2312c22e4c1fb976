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
#: Name of the groups that VFIO makes up for functions without an IOMMU, if it is told to.
_NOIOMMU_GROUP = "vfio-noiommu"
_SWITCH_ON = "switch the IOMMU on in the firmware (VT-d, AMD-Vi) and, for Intel, boot the kernel with intel_iommu=on"


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
        return [
            f"{other.bdf} ({other.driver})"
            for other in self._siblings()
            if other.driver is not None and not other.is_bound_to_vfio() and not other._is_bridge
        ]

    def has_vfio_siblings(self) -> bool:
        """Whether other members of its group are bound to vfio-pci, so that somebody may use them."""
        return any(other.is_bound_to_vfio() for other in self._siblings())

    def _siblings(self) -> Sequence[PciFunctionNode]:
        members = sorted((self.path / "iommu_group" / "devices").glob("*"))
        return [PciFunctionNode(self.sysfs, path.name) for path in members if path.name != self.bdf]

    @property
    def _is_bridge(self) -> bool:
        try:
            return (self.path / "class").read_text().startswith(_CLASS_BRIDGE)
        except OSError:
            return False

    def require_usable(self) -> None:
        """Check that it is there, is bound to vfio-pci, and has an IOMMU."""
        if not self.exists:
            raise BackendUnavailable(f"there is no PCI function {self.bdf}: `lspci -D` lists them")
        self.require_iommu()
        if not self.is_bound_to_vfio():
            holder = f"bound to the driver {self.driver}" if self.driver else "bound to no driver"
            raise BackendUnavailable(
                f"{self.bdf} is {holder}, not to vfio-pci: bind it with `vfiouser-oob bind {self.bdf}` as root"
            )

    def require_iommu(self) -> None:
        """Check that there is an IOMMU in front of it: without one, vfio-pci does not take it either.

        Raises:
            BackendUnavailable: there is none.
        """
        if self.iommu_group is None:
            raise BackendUnavailable(f"{self.bdf} has no IOMMU group: {_SWITCH_ON}")
        if self._group_name == _NOIOMMU_GROUP:
            raise BackendUnavailable(
                f"{self.bdf} is bound without an IOMMU (the module option enable_unsafe_noiommu_mode of vfio): its DMA "
                f"would not go to the client's memory but anywhere; {_SWITCH_ON}"
            )

    @property
    def _group_name(self) -> str:
        try:
            return (self.path / "iommu_group" / "name").read_text().strip()
        except OSError:
            return ""


def find_node(sysfs: Path, name: str) -> DeviceNode:
    """Return where a function stands in sysfs, whether or not it is there.

    Args:
        sysfs: where sysfs is mounted.
        name: a PCI address, or the UUID of a mediated device.
    """
    return MdevNode(sysfs, name) if _UUID.fullmatch(name) else PciFunctionNode(sysfs, name)
