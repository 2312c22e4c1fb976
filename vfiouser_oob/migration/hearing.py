"""What the agent tells without being asked, and what becomes of it: hints, about which it is then asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from vfiouser_agents.api import AgentState, Event, EventKind, Status
from vfiouser_agents.errors import AgentError
from vfiouser_oob.migration.backoff import Backoff
from vfiouser_oob.migration.fence import REACTIONS, Reaction
from vfiouser_oob.migration.standing import Standing, Truth
from vfiouser_protocol.constants import DeviceState

#: What the agent tells when it can be reached again, so that it is worth while to try again at once.
_BACK = frozenset({EventKind.RECONNECTED, EventKind.AGENT_RESTARTED})


class Hearing(Standing):
    """A standing whose agent is listened to; takes what `Standing` takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.link.heard = self._heard
        self.link.lost = self._contact_lost
        self._word: Event | None = None
        self._fault = ""
        self._word_came = trio.Event()
        self._looking = False

    @property
    def _at_agent(self) -> DeviceState:
        """Where the agent ought to have the function: a pause without it, it knows nothing of."""
        return DeviceState.RUNNING if self.paused_over_link else self.state

    def _heard(self, event: Event) -> None:
        """Take an event; what it means is looked at by a task, when nothing is being changed."""
        if event.kind is EventKind.SIZE_CHANGED:
            return
        self.tracer.heard(event)
        if event.kind in _BACK:
            self._hurry.set()
        self._fault = event.detail if event.kind is EventKind.DEVICE_ERROR else ""
        if event.status is not None or event.kind is EventKind.DEVICE_ERROR:
            self._word = event
            self._word_came.set()

    async def _listen(self) -> None:
        """Look at the last thing that the agent has told, as long as the function lives."""
        while True:
            await self._word_came.wait()
            self._word_came = trio.Event()
            async with self._lock:  # until nothing is being changed any more
                pass
            if self._word is not None and self.truth is Truth.KNOWN and self.link.is_open:
                await self._look_at(self._word)

    async def _look_at(self, event: Event) -> None:
        """Find out whether an event says that the function is not where we think; it may be older than that."""
        failed = event.kind is EventKind.DEVICE_ERROR
        told = event.status or Status(AgentState.ERROR, detail=event.detail)
        if not failed and REACTIONS[self._at_agent][told.state] is Reaction.NOTHING:
            return
        turn = self._turn
        try:
            now = await self.link.status(trio.current_time() + self.config.call_s)
        except AgentError:  # traced
            if not failed:
                return
            now = Status(AgentState.ERROR)
        if turn != self._turn or self._lock.locked():
            self._word_came.set()
        elif self.truth is Truth.KNOWN:
            self._react(now, self._fault or event.detail)

    def _react(self, status: Status, detail: str) -> None:
        """Take the agent's word about a function that nobody is changing."""
        reaction = REACTIONS[self._at_agent][status.state]
        if reaction is Reaction.NOTE:
            self.tracer.note("somebody else changes the function", agent_state=status.state.value)
        elif reaction is Reaction.ADOPT:
            self._stop_settling()
            self._adopt(replace(status, detail=status.detail or detail))

    def _contact_lost(self) -> None:
        """A session was lost. Its events are, too, until there is another; while they matter, we see to that."""
        if self._contact_missing and self._nursery is not None and not self._looking:
            self._looking = True
            self._nursery.start_soon(self._look_again)

    @property
    def _contact_missing(self) -> bool:
        """Whether nobody hears the agent of a function that somebody might move; what is not known is asked anyway."""
        moving = self._busy or self.link.begun is not None
        return moving and self.truth is Truth.KNOWN and not self.link.is_open

    async def _look_again(self) -> None:
        pauses = Backoff(self.config.retry_s)
        while self._contact_missing:
            await pauses.pause()
            if self._contact_missing and not self._lock.locked():
                await self._ask_again()
        self._looking = False

    async def _ask_again(self) -> None:
        try:
            status = await self.link.status(trio.current_time() + self.config.call_s)
        except AgentError:  # traced
            return
        self._heard(Event(EventKind.RECONNECTED, "asked again", status))
