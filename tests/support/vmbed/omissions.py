"""`python -m vmbed.omissions WHAT …`: the daemon without one of the things that a VM's migration is made of.

What is left out must be missed at the destination, else a test that finds it there proves nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from vfiouser_oob.cli.main import main
from vfiouser_oob.vm.bundle import FunctionState
from vfiouser_oob.vm.hosted import HostedFunction
from vfiouser_oob.vm.movable import VmMonitor
from vfiouser_oob.vm.page_contents import PageContents
from vfiouser_oob.vm.untracked import FunctionMemory

__all__ = ["OMISSIONS", "SAVED_EARLY"]

#: What the daemon's log has once the state was taken that is given away later.
SAVED_EARLY = "the state was taken"


def without_journal() -> None:
    """Nobody keeps what the functions write, nor has them write so that QEMU knows."""

    async def arm(self: FunctionMemory, *_: Any) -> None:
        return

    async def take(self: FunctionMemory, limit: int) -> PageContents:
        return PageContents(())

    FunctionMemory.arm, FunctionMemory.take = arm, take  # type: ignore[method-assign,assignment]


def without_replay() -> None:
    """Nobody writes what QEMU keeps of the functions."""

    class Nothing:
        async def finish(self, may_write: Callable[[], bool]) -> None:
            return

    def replay(self: HostedFunction, state: FunctionState, *, sent: bool = False) -> Nothing:
        return Nothing()

    HostedFunction.replay = replay  # type: ignore[method-assign]


def without_stop() -> None:
    """The functions' state is taken when the migration begins, and they go on."""
    arm, save = HostedFunction.arm, HostedFunction.save
    early: dict[str, FunctionState] = {}

    async def save_and_arm(self: HostedFunction, monitor: VmMonitor, began: float | None) -> None:
        await arm(self, monitor, began)
        async with self._still():
            early[self.name] = await save(self)
        print(SAVED_EARLY, flush=True)  # noqa: T201

    async def nothing(self: HostedFunction) -> None:
        return

    async def what_was_saved(self: HostedFunction) -> FunctionState:
        return early[self.name]

    HostedFunction.arm, HostedFunction.save = save_and_arm, what_was_saved  # type: ignore[method-assign]
    HostedFunction.stop = nothing  # type: ignore[method-assign]
    HostedFunction.handed = lambda self: None  # type: ignore[method-assign]


OMISSIONS: Mapping[str, Callable[[], None]] = {
    "": lambda: None,
    "journal": without_journal,
    "replay": without_replay,
    "stop": without_stop,
}

if __name__ == "__main__":
    OMISSIONS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
