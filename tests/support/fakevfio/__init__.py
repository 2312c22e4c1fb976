"""A kernel with vfio-pci in it, played by Python: sysfs, nodes, ioctls and their errnos as Linux has them.

It stands behind the same interface as the real one, takes the same bytes, and keeps real descriptors, so that eventfds
and memory that went through it work.
"""

from __future__ import annotations

from fakevfio.device import FakeDevice
from fakevfio.iommu import FakeIommu
from fakevfio.kernel import FakeKernel
from fakevfio.migration import FakeMigration

__all__ = ["FakeDevice", "FakeIommu", "FakeKernel", "FakeMigration"]
