"""What functions write while their VM is being migrated: from arming to disarming, one task for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from vfiouser_oob.vm.jobs import QemuJobs
from vfiouser_oob.vm.movable import MovableFunction
from vfiouser_protocol.errors import VfioUserError

#: Seconds until a function has to be recorded.
ARM_S = 5.0


class Recording:
    """One arming.

    Args:
        functions: the VM's.
        jobs: where the tasks run.
        failed: told why a function cannot be recorded.
    """

    def __init__(
        self,
        functions: Mapping[str, MovableFunction],
        jobs: QemuJobs,
        failed: Callable[[str, str], None],
    ) -> None:
        self._failed = failed
        self._waited_for = len(functions)
        self._begun = trio.Event()
        self._scopes = [jobs.begin(self._record, function) for function in functions.values()]

    async def begun(self) -> None:
        """Wait until every function is recorded, or cannot be."""
        await self._begun.wait()

    async def _record(self, function: MovableFunction) -> None:
        try:
            async with trio.open_nursery() as nursery:
                with trio.fail_after(ARM_S):
                    await nursery.start(function.record)
                self._one_begun()
        except* (VfioUserError, trio.TooSlowError) as errors:
            self._failed(function.name, str(errors.exceptions[0]) or f"it was not done within {ARM_S:g} s")
            self._one_begun()

    def _one_begun(self) -> None:
        self._waited_for -= 1
        if self._waited_for <= 0:
            self._begun.set()

    def end(self) -> None:
        """Forget what was recorded."""
        for scope in self._scopes:
            scope.cancel()
        self._begun.set()
