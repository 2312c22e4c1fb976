"""What every carrier does with its questions and their answers, whatever it is in QEMU."""

from __future__ import annotations

from vfiouser_oob.vm.carriers.desk import Desk
from vfiouser_oob.vm.carriers.interface import CarrierEvent, State


class CarrierAtDesk:
    """A carrier whose questions are asked at a desk; how they come there is its own affair."""

    name: str
    most_bytes: int

    def __init__(self) -> None:
        self._desk = Desk()

    async def next_event(self) -> CarrierEvent:
        """Wait for what comes next."""
        return await self._desk.next_event()

    def offer(self, state: State) -> bool:
        """Answer `SaveAsked` with the state; returns whether somebody waited for it.

        Raises:
            ValueError: it is larger than can be carried; nothing was answered.
        """
        self._check(len(state))
        return self._desk.offer(state)

    async def given(self) -> None:
        """Wait until QEMU has all of the state that was offered, or will not take it."""
        await self._desk.given()

    def answer(self) -> bool:
        """Answer any other question: it is done; returns whether somebody waited for it."""
        return self._desk.done()

    def refuse(self, reason: str) -> bool:
        """Answer a question with no; returns whether somebody waited for it."""
        return self._desk.refuse(reason)

    def _check(self, size: int) -> None:
        if size > self.most_bytes:
            raise ValueError(f"a state of {size} bytes is more than the {self.most_bytes} that {self.name} carries")
