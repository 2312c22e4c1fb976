"""What the openers need to know of a function, whether it is a PCI function or a mediated device."""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from pathlib import Path


class DeviceNode(abc.ABC):
    """A function's directory in sysfs.

    Args:
        sysfs: where sysfs is mounted.
        name: what the kernel calls it: a PCI address, or a UUID.
        path: the directory.
    """

    #: Whether the IOMMU keeps all memory that is mapped; if not, a driver asks for pages when it needs them.
    pinned = True
    #: What loads the modules that are needed.
    modules = "vfio-pci"
    #: How its node comes to belong to the daemon's user.
    ownership = "`vfiouser-oob bind {name} --owner USER`"

    def __init__(self, sysfs: Path, name: str, path: Path) -> None:
        self.name = name
        self.sysfs = sysfs
        self.path = path

    @property
    def exists(self) -> bool:
        """Whether there is such a function."""
        return self.path.is_dir()

    @property
    def driver(self) -> str | None:
        """Name of the driver that it is bound to."""
        return link_name(self.path / "driver")

    @property
    def iommu_group(self) -> str | None:
        """Number of its IOMMU group; None without one."""
        return link_name(self.path / "iommu_group")

    @property
    def ownership_advice(self) -> str:
        """How its node comes to belong to the daemon's user."""
        return self.ownership.format(name=self.name, group=self.iommu_group)

    @property
    def cdev(self) -> str | None:
        """Name of its own VFIO device node (``vfio3``), where the kernel makes such."""
        nodes = sorted(path.name for path in (self.path / "vfio-dev").glob("vfio*"))
        return nodes[0] if nodes else None

    @abc.abstractmethod
    def group_obstacles(self) -> Sequence[str]:
        """The other members of its group that another driver holds, each with that driver."""

    def has_vfio_siblings(self) -> bool:
        """Whether other members of its group are for user space, too, so that somebody may use them."""
        return False

    @abc.abstractmethod
    def require_usable(self) -> None:
        """Check what can be seen without opening anything.

        Raises:
            BackendUnavailable: with what is missing and the command that helps.
        """


def link_name(path: Path) -> str | None:
    """The last part of where a symbolic link leads; None if there is no link."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None
