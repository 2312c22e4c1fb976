"""What the agent tells without being asked, and what becomes of it: hints, about which it is then asked."""

from __future__ import annotations

from dataclasses import replace

import trio

from vfiouser_agents.api import AgentState, Event, EventKind, Status
from vfiouser_agents.errors import AgentError
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.backoff import Backoff
from vfiouser_oob.migration.events import Heard
from vfiouser_oob.migration.fence import REACTIONS, Reaction
from vfiouser_oob.migration.host import BackgroundJob, MigrationHost
from vfiouser_oob.migration.record import Certainty
from vfiouser_oob.migration.trace import Tracer

#: What the agent tells when it can be reached again, so that it is worth while to try again at once.
_BACK = frozenset({EventKind.RECONNECTED, EventKind.AGENT_RESTARTED})

#: Seconds before a lost contact is looked for: no call is repeated by that, so it need not wait as long as one.
_CONTACT_S = 0.1


class StatusListener:
    """Listens to the agent of one function.

    Args:
        host: whose record says where the function ought to be.
        link: the agent.
        tracer: where events are told.
        config: the function's migration settings.
        changing: held while somebody changes the state.
    """

    def __init__(
        self, host: MigrationHost, link: AgentLink, tracer: Tracer, config: MigrationConfig, changing: trio.Lock
    ) -> None:
        self._host = host
        self._link = link
        self._tracer = tracer
        self._config = config
        self._changing = changing
        #: The last thing that matters, until it is looked at.
        self._latest: Event | None = None
        self._came = trio.Event()
        self._looking = BackgroundJob(host.background)

    def heard(self, event: Event) -> bool:
        """Take an event; what it means is looked at when nothing is being changed.

        Args:
            event: what the agent has told.

        Returns:
            Whether the agent can be reached again.
        """
        if event.kind is EventKind.SIZE_CHANGED:
            return False
        self._tracer.heard(event)
        if event.status is not None or event.kind is EventKind.DEVICE_ERROR:
            self._latest = event
            self._came.set()
        return event.kind in _BACK

    async def listen(self) -> None:
        """Look at the last thing that the agent has told, as long as the function lives."""
        while True:
            await self._came.wait()
            self._came = trio.Event()
            async with self._changing:  # until nothing is being changed any more
                pass
            known = self._host.record.certainty is Certainty.KNOWN
            if self._latest is not None and known and self._link.is_open:
                await self._look_at(self._latest)

    async def _look_at(self, event: Event) -> None:
        """Find out whether an event says that the function is not where we think; it may be older than that."""
        failed = event.kind is EventKind.DEVICE_ERROR
        told = event.status or Status(AgentState.ERROR, detail=event.detail)
        before = self._host.record
        if not failed and REACTIONS[before.at_agent][told.state] is Reaction.NOTHING:
            return
        try:
            now = await self._link.status(trio.current_time() + self._config.call_s)
        except AgentError:  # traced
            if not failed:
                return
            now = Status(AgentState.ERROR)
        if before.changes != self._host.record.changes or self._changing.locked():
            self._came.set()
            return
        # A fault that was told meanwhile says more than what made us ask.
        last = self._latest if self._latest is not None and self._latest.kind is EventKind.DEVICE_ERROR else event
        self._host.feed(Heard(replace(now, detail=now.detail or last.detail)))

    def contact_lost(self) -> None:
        """A session was lost. Its events are, too, until there is another; while they matter, we see to that."""
        if self._missing:
            self._looking.begin(self._look_again)

    @property
    def _missing(self) -> bool:
        """Whether nobody hears the agent of a function that somebody might move, or that is to be brought back."""
        record = self._host.record
        moving = record.busy or record.begun is not None
        return moving and record.certainty is not Certainty.FAILED and not self._link.is_open

    async def _look_again(self) -> None:
        pauses = Backoff(min(self._config.retry_s, _CONTACT_S))
        while self._missing:
            await pauses.pause()
            if self._missing and not self._changing.locked():
                await self._ask()

    async def _ask(self) -> None:
        try:
            status = await self._link.status(trio.current_time() + self._config.call_s)
        except AgentError:  # traced
            return
        self._host.heard(Event(EventKind.RECONNECTED, "asked again", status))
