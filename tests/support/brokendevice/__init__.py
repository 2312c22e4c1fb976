"""A device with a bug: its task dies when the guest asks for DMA."""

from __future__ import annotations

from vfiouser_oob.devices.model import DeviceModel
from vfiouser_oob.devices.models.test_device import TestDevice


class BrokenDevice(TestDevice):
    """A test device whose task dies at the first transfer."""

    async def run(self) -> None:
        """Wait for work and stumble over it."""
        await self._start.wait()
        raise ZeroDivisionError("a bug in the device")


def build(name: str, options: object) -> DeviceModel:
    """Build one."""
    return BrokenDevice(name)
