"""Whoever stands behind a carrier, played by a test: notes what it is told, and answers as it was told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from vfiouser_oob.vm.carriers.interface import (
    CarrierEvent,
    GoAsked,
    SaveAsked,
    StateLoaded,
    StopAsked,
    VmCarrier,
)

__all__ = ["Hand"]

E = TypeVar("E")
WAIT_S = 60.0


class Hand:
    """Reads a carrier's events and answers its questions, by itself.

    Args:
        carrier: the carrier.
        state: what to offer.
        refuses: questions that are answered with `reason`.
        ignores: questions that are not answered at all.
    """

    reason = "because the test says so"

    def __init__(
        self,
        carrier: VmCarrier,
        state: bytes = b"",
        *,
        refuses: tuple[type[CarrierEvent], ...] = (),
        ignores: tuple[type[CarrierEvent], ...] = (),
    ) -> None:
        self.carrier = carrier
        self.state = state
        self.refuses = refuses
        self.ignores = ignores
        self.events: list[CarrierEvent] = []
        self._changed = trio.Condition()

    async def run(self) -> None:
        """Read and answer until cancelled."""
        while True:
            event = await self.carrier.next_event()
            async with self._changed:
                self.events.append(event)
                self._changed.notify_all()
            self._answer(event)

    def _answer(self, event: CarrierEvent) -> None:
        if isinstance(event, self.ignores) or not isinstance(event, SaveAsked | StopAsked | StateLoaded | GoAsked):
            return
        if isinstance(event, self.refuses):
            self.carrier.refuse(self.reason)
        elif isinstance(event, SaveAsked):
            self.carrier.offer(self.state)
        else:
            self.carrier.answer()

    def told(self, kind: type[E]) -> list[E]:
        """The events of a kind that came so far."""
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind: type[E], count: int = 1, seconds: float = WAIT_S) -> E:
        """Wait for the `count`th event of a kind."""
        await self.when(lambda: len(self.told(kind)) >= count, seconds)
        return self.told(kind)[count - 1]

    async def when(self, condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
        """Wait until something is true, which changes with an event only."""
        with trio.fail_after(seconds):
            async with self._changed:
                while not condition():
                    await self._changed.wait()
