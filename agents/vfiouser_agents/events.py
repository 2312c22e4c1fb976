"""Events from one place to several watchers, none of which can hold up the others or grow without bound."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from types import TracebackType

import trio

from .api import Event

#: Events that a watcher may be behind before it loses the oldest.
BACKLOG = 64


class _Watcher(AbstractAsyncContextManager[AsyncIterator[Event]], AsyncIterator[Event]):
    def __init__(self, feed: EventFeed) -> None:
        self._feed = feed
        self._events: deque[Event] = deque()
        self._lost = 0
        self._arrived = trio.Event()

    def put(self, event: Event) -> None:
        if len(self._events) == BACKLOG:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)
        self._arrived.set()

    async def __aenter__(self) -> AsyncIterator[Event]:
        self._feed._watchers.append(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._feed._watchers.remove(self)

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._events:
            self._arrived = trio.Event()
            await self._arrived.wait()
        event, lost, self._lost = self._events.popleft(), self._lost, 0
        return replace(event, lost=event.lost + lost) if lost else event


class EventFeed:
    """Where events are put in; `watch` is where they come out."""

    def __init__(self) -> None:
        self._watchers: list[_Watcher] = []

    @property
    def watched(self) -> bool:
        """Somebody would see an event that is put in now."""
        return bool(self._watchers)

    def put(self, event: Event) -> None:
        """Hand an event to every watcher; never waits."""
        for watcher in self._watchers:
            watcher.put(event)

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """All events put in while the block lasts."""
        return _Watcher(self)
