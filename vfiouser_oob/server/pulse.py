"""Proof that every unit lives, for the service manager's watchdog.

A manager that hears nothing in time takes the whole process for dead. So it is told that we live only after a round of
all units: each of them has answered from its own tasks, or was taken out of service because it did not. One that hangs
costs itself, and an event loop that hangs costs the process, which is what the manager is there for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from vfiouser_oob.observability.log import Logger
from vfiouser_oob.server.unit import Unit

#: Seconds that a unit may take to answer, at most; all are asked at the same time.
PATIENCE_S = 5.0


class Pulse:
    """Rounds of all units, again and again.

    Args:
        units: those that there are, whenever it is asked.
        interval_s: seconds after which the manager loses patience.
        tell: tells the manager that we live.
        log: where it is said what hangs.
    """

    def __init__(
        self, units: Callable[[], Iterable[Unit]], interval_s: float, tell: Callable[[], object], log: Logger
    ) -> None:
        self._units = units
        self._interval_s = interval_s
        self._tell = tell
        self._log = log

    async def run(self) -> None:
        """Go round until cancelled."""
        while True:
            await self.round()
            self._tell()
            await trio.sleep(self._interval_s / 3)

    async def round(self) -> None:
        """Ask every unit that works, and take those that do not answer out of service."""
        async with trio.open_nursery() as asking:
            for unit in self._units():
                if unit.life is not None and unit.failed is None and not unit.life.ended.is_set():
                    asking.start_soon(self._ask, unit)

    async def _ask(self, unit: Unit) -> None:
        life = unit.life
        assert life is not None
        patience = min(PATIENCE_S, self._interval_s / 4)
        why = f"its tasks did not answer within {patience:g} s"
        with trio.move_on_after(patience):
            why = await life.prove() or ""
        if why and not life.ended.is_set() and life.failure is None:
            self._log.error(f"a {unit.kind.word} hangs", function=unit.name, reason=why)
            life.condemn(f"it hangs: {why}")
