"""What is asked and told by a QEMU's monitor, which may be lost at any time, come again, and be slow to answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import trio

from vfiouser_oob.observability.log import Logger
from vfiouser_oob.vm.monitor import GoneError, MonitorError
from vfiouser_oob.vm.movable import VmMonitor
from vfiouser_oob.vm.questions import Carriers

T = TypeVar("T")
#: Seconds until what has failed is attempted again; they double up to the second figure.
AGAIN_S, AGAIN_MAX_S = 0.1, 2.0
#: Seconds for an answer of the monitor when QEMU's main loop may stand still.
PATIENCE_S = 30.0


class QemuContact:
    """The monitor of a VM's QEMU, whenever there is one.

    Args:
        carriers: whose ends QEMU makes.
        log: a logger.
    """

    def __init__(self, carriers: Carriers, log: Logger) -> None:
        self.monitor: VmMonitor | None = None
        self._carriers = carriers
        self._log = log
        self._came = trio.Event()
        self._repairing = trio.Lock()

    def came(self, monitor: VmMonitor) -> None:
        """It has come."""
        self.monitor = monitor
        self._came.set()

    def lost(self) -> None:
        """It has gone."""
        self.monitor = None
        self._came = trio.Event()

    async def present(self) -> VmMonitor | None:
        """Wait until it is there; None if it has gone at once."""
        await self._came.wait()
        return self.monitor

    async def command(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Have something done, if somebody is there.

        Args:
            command: what.
            arguments: by the names that QMP has for them.
        """
        if self.monitor is None:
            return
        try:
            await self.monitor.execute(command, arguments, seconds=PATIENCE_S)
        except MonitorError as error:
            self._log.warning("QEMU did not do what it was told", command=command, reason=error)

    async def asked(self, ask: Callable[[VmMonitor], Awaitable[T]]) -> T | None:
        """Ask QEMU until it answers, with pauses, since it may refuse at once; None if it has gone.

        Args:
            ask: asks it once.
        """
        pause_s = AGAIN_S
        while self.monitor is not None:
            try:
                return await ask(self.monitor)
            except GoneError:
                return None
            except MonitorError as error:
                self._log.warning("QEMU does not answer; it is asked again", reason=error)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, AGAIN_MAX_S)
        return None

    async def mend(self, allowed: Callable[[], bool]) -> None:
        """Have a QEMU that was there before us connect its end of the carrier again.

        Args:
            allowed: whether that may be done now.
        """
        if self.monitor is None or self._carriers.attached or not allowed():
            return
        try:
            objects = await self.monitor.execute("qom-list", {"path": "/objects"})
        except MonitorError:
            return
        kinds = {each.get("type") for each in objects if isinstance(each, dict)} if isinstance(objects, list) else set()
        if "child<dbus-vmstate>" in kinds and not self._carriers.attached and allowed():
            await self.repair()

    async def repair(self) -> None:
        """Have QEMU make those of its ends anew that are not connected."""
        async with self._repairing:  # else one takes out what another has made
            commands = self._carriers.repair()
            for command in commands:
                await self.command(command.execute, command.arguments)
            if commands:
                with trio.move_on_after(AGAIN_MAX_S):
                    await self._carriers.attachment()
