"""Functions that are armed for a migration, each in its turn with what else is done to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from vfiouser_oob.vm.jobs import QemuJobs
from vfiouser_oob.vm.movable import FunctionTrouble, MovableFunction, VmMonitor
from vfiouser_protocol.errors import VfioUserError

#: Seconds until a function has to be armed.
ARM_S = 10.0


class Arming:
    """One arming of a VM's functions.

    Args:
        functions: the VM's.
        jobs: where it is done.
        monitor: its QEMU's.
        began: when the migration began, in seconds since 1970; None if that is not known.
    """

    def __init__(
        self,
        functions: Mapping[str, MovableFunction],
        jobs: QemuJobs,
        monitor: Callable[[], VmMonitor | None],
        began: float | None,
    ) -> None:
        self._monitor = monitor
        self._began = began
        self._open = len(functions)
        self._done = trio.Event()
        #: Why functions could not be armed, in words.
        self.failures: list[str] = []
        for function in functions.values():
            jobs.begin_in_lane(function.name, self._arm, function)

    async def done(self) -> None:
        """Wait until every function is armed, or cannot be."""
        await self._done.wait()

    async def _arm(self, function: MovableFunction) -> None:
        monitor = self._monitor()
        try:
            if monitor is None:
                raise FunctionTrouble("QEMU's monitor is not connected")
            with trio.fail_after(ARM_S):
                await function.arm(monitor, self._began)
        except (FunctionTrouble, VfioUserError, trio.TooSlowError) as error:
            self.failures.append(f"{function.name}: {error}" if str(error) else f"{function.name} could not be armed")
        self._open -= 1
        if not self._open:
            self._done.set()
