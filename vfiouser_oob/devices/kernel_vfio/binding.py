"""Binding a function to vfio-pci and back, by driver_override: one function, whatever its siblings do.

Spec: Linux, Documentation/ABI/testing/sysfs-bus-pci (driver_override, drivers_probe).
"""

from __future__ import annotations

import os
from pathlib import Path

from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio.sysfs import VFIO_DRIVER, PciFunctionNode


def bind(sysfs: Path, bdf: str) -> PciFunctionNode:
    """Bind a function to vfio-pci.

    Args:
        sysfs: where sysfs is mounted.
        bdf: the function's address.

    Returns:
        The function.

    Raises:
        BackendUnavailable: it does not exist or has no IOMMU, or the driver did not take it.
        OSError: sysfs refused.
    """
    node = _existing(sysfs, bdf)
    node.require_iommu()  # before anything changes: vfio-pci would refuse it, and its own driver have lost it
    if node.is_bound_to_vfio():
        return node
    if not (sysfs / "bus/pci/drivers" / VFIO_DRIVER).is_dir():
        raise BackendUnavailable("the kernel has no driver vfio-pci: load it with `modprobe vfio-pci`")
    (node.path / "driver_override").write_text(VFIO_DRIVER)
    _release(node)
    _probe(node)
    if not node.is_bound_to_vfio():
        raise BackendUnavailable(
            f"vfio-pci did not take {bdf} ({f'{node.driver} did' if node.driver else 'it has no driver now'}); the "
            f"kernel's log has the reason"
        )
    return node


def unbind(sysfs: Path, bdf: str) -> PciFunctionNode:
    """Take a function from vfio-pci and let the kernel find its own driver.

    Args:
        sysfs: where sysfs is mounted.
        bdf: the function's address.

    Returns:
        The function; it may have no driver now.

    Raises:
        BackendUnavailable: it does not exist.
        OSError: sysfs refused.
    """
    node = _existing(sysfs, bdf)
    (node.path / "driver_override").write_text("\n")
    if node.driver is None or node.is_bound_to_vfio():
        _release(node)
        _probe(node)
    return node


def vfio_nodes(node: PciFunctionNode, dev: Path) -> list[Path]:
    """Return the nodes that a daemon may open a bound function by: its own, where there are such, and its group's."""
    own = [dev / "vfio/devices" / node.cdev] if node.cdev else []
    group = [dev / "vfio" / node.iommu_group] if node.iommu_group else []
    return [path for path in (*own, *group) if path.exists()]


def give(path: Path, uid: int) -> None:
    """Let a user own a node; the group stays."""
    os.chown(path, uid, -1)


def _existing(sysfs: Path, bdf: str) -> PciFunctionNode:
    node = PciFunctionNode(sysfs, bdf)
    if not node.exists:
        raise BackendUnavailable(f"there is no PCI function {bdf}: `lspci -D` lists them")
    return node


def _release(node: PciFunctionNode) -> None:
    if node.driver is not None:
        (node.path / "driver" / "unbind").write_text(node.bdf)


def _probe(node: PciFunctionNode) -> None:
    (node.sysfs / "bus/pci/drivers_probe").write_text(node.bdf)
