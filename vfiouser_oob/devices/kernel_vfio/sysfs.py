"""What sysfs says about a PCI function, and why it could not be used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vfiouser_oob.devices.base import BackendUnavailable

#: The driver that hands functions to user space; variant drivers have other names and do the same.
VFIO_DRIVER = "vfio-pci"
#: Bridges never go to user space, and their presence in a group is no obstacle.
_CLASS_BRIDGE = "0x0604"
#: Name of the groups that VFIO makes up for functions without an IOMMU, if it is told to.
_NOIOMMU_GROUP = "vfio-noiommu"
_SWITCH_ON = "switch the IOMMU on in the firmware (VT-d, AMD-Vi) and, for Intel, boot the kernel with intel_iommu=on"


class PciFunctionNode:
    """A PCI function's directory in sysfs.

    Args:
        sysfs: where sysfs is mounted.
        bdf: address, such as ``0000:3b:00.2``.
    """

    def __init__(self, sysfs: Path, bdf: str) -> None:
        self.bdf = bdf
        self.sysfs = sysfs
        self.path = sysfs / "bus/pci/devices" / bdf

    @property
    def exists(self) -> bool:
        """Whether there is such a function."""
        return self.path.is_dir()

    @property
    def driver(self) -> str | None:
        """Name of the driver that it is bound to."""
        return _link_name(self.path / "driver")

    @property
    def iommu_group(self) -> str | None:
        """Number of its IOMMU group; None without an IOMMU."""
        return _link_name(self.path / "iommu_group")

    def is_bound_to_vfio(self) -> bool:
        """Whether its driver is vfio-pci or a variant of it."""
        return self.driver == VFIO_DRIVER or (self.driver is not None and (self.path / "vfio-dev").is_dir())

    @property
    def cdev(self) -> str | None:
        """Name of its own VFIO device node (``vfio3``), where the kernel makes such."""
        nodes = sorted(path.name for path in (self.path / "vfio-dev").glob("vfio*"))
        return nodes[0] if nodes else None

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
        """Check what can be seen without opening anything.

        Raises:
            BackendUnavailable: with what is missing and the command that helps.
        """
        if not self.exists:
            raise BackendUnavailable(f"there is no PCI function {self.bdf}: see `lspci -D` for those that there are")
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


def _link_name(path: Path) -> str | None:
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None
