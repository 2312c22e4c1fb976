"""What the parts of one function's migration share: its record, its tasks in the background, and who is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from vfiouser_agents.api import Event as AgentEvent
from vfiouser_oob.migration.events import Answer, MigrationEvent, Take
from vfiouser_oob.migration.record import MigrationRecord
from vfiouser_oob.persist.capabilities import Facts


class MigrationHost(Protocol):
    """The runner, as its parts see it."""

    @property
    def record(self) -> MigrationRecord:
        """What is known."""

    @property
    def background(self) -> Background:
        """Where tasks run that nobody waits for."""

    def feed(self, event: MigrationEvent) -> Take | Answer | None:
        """Take an event; returns what is to be done next about an errand, if anything is."""

    def learned(self, facts: Facts) -> None:
        """The agent has said what it can do."""

    def heard(self, event: AgentEvent) -> None:
        """The agent has told something without being asked."""

    def contact_lost(self) -> None:
        """A session was lost."""


class Background:
    """Tasks that nobody waits for; while it is not open, none is begun."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None

    @property
    def is_open(self) -> bool:
        """Whether tasks can be begun."""
        return self._nursery is not None

    def begin(self, work: Callable[..., Awaitable[object]], *args: Any) -> bool:
        """Begin a task.

        Args:
            work: what it does.
            args: for it.

        Returns:
            Whether it was begun.
        """
        if self._nursery is None:
            return False
        self._nursery.start_soon(work, *args)
        return True

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be open until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # Here, since others may still be ending when the nursery takes no more tasks.
                self._nursery = None


class BackgroundJob:
    """Something that at most one task in the background does at a time.

    Args:
        background: where.
    """

    def __init__(self, background: Background) -> None:
        self._background = background
        self._scope: trio.CancelScope | None = None

    def begin(self, work: Callable[[], Awaitable[None]]) -> None:
        """Begin, unless it is being done.

        Args:
            work: what is done.
        """
        if self._scope is None:
            scope = trio.CancelScope()
            if self._background.begin(self._run, work, scope):
                self._scope = scope

    def cancel(self) -> None:
        """Leave it; it can be begun anew at once."""
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None

    async def _run(self, work: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            with scope:
                await work()
        finally:
            if self._scope is scope:
                self._scope = None
