"""A VM in which the NVMe driver runs."""

from __future__ import annotations

import trio

from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.lab.vmm.attachment import Attachment, ConfigState, save_config
from vfiouser_oob.lab.vmm.live import VirtualMachine

#: How often, and after which pause in seconds, a moment with I/O in flight is looked for.
_TRIES = 5
_PAUSE_S = 0.0005


class NvmeMachine(VirtualMachine):
    """The VM of an NVMe driver: it goes on with the same queues wherever it arrives.

    Args:
        driver: the driver, bound to the source's function.
    """

    def __init__(self, driver: NvmeDriver) -> None:
        self._driver = driver

    async def stop(self) -> None:
        """Stop the processors; if there is I/O at all, at a moment when some is in flight."""
        for _ in range(_TRIES):
            await self._driver.processors.stop()
            if self._driver.outstanding:
                return
            self._driver.processors.go()
            await trio.sleep(_PAUSE_S)
        await self._driver.processors.stop()

    def go(self) -> None:
        """Let them go on here."""
        self._driver.processors.go()

    async def save(self) -> ConfigState:
        """Return the configuration that the driver has made."""
        return await save_config(self._driver.client, self._driver.vectors)

    async def arrive(self, place: Attachment) -> None:
        """Let the driver go on with the destination's function."""
        bar, eventfds = place.hand_over()
        await self._driver.move(place.client, place.memory, bar, eventfds)
