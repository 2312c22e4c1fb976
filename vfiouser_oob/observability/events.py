"""One place to announce a change, any number of watchers, none of whom can hold up the daemon."""

from __future__ import annotations

import time
from typing import Any

import trio

# A watcher that is this far behind loses events and is told how many.
QUEUE_MAX = 256


class EventHub:
    """Hands events to subscribers without ever waiting for one.

    Args:
        queue_max: events that one subscriber may be behind.
    """

    def __init__(self, queue_max: int = QUEUE_MAX) -> None:
        self._queue_max = queue_max
        # Per subscriber: the number of events that it missed since the last one that it got.
        self._subscribers: dict[trio.MemorySendChannel[dict[str, Any]], int] = {}

    def __len__(self) -> int:
        return len(self._subscribers)

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """A channel of all later events; close it to unsubscribe."""
        send, receive = trio.open_memory_channel[dict[str, Any]](self._queue_max)
        self._subscribers[send] = 0
        return receive

    def publish(self, kind: str, **fields: Any) -> None:
        """Announce a change.

        Args:
            kind: what happened, for example ``client-connected``.
            fields: its particulars, fit for JSON; normally `function`.
        """
        if not self._subscribers:
            return
        event = {"type": kind, "time": time.time(), **fields}
        for send, lost in tuple(self._subscribers.items()):
            try:
                send.send_nowait({**event, "lost": lost} if lost else event)
                self._subscribers[send] = 0
            except trio.WouldBlock:
                self._subscribers[send] = lost + 1
            except trio.BrokenResourceError:
                del self._subscribers[send]
                send.close()

    def close(self) -> None:
        """End all subscriptions: watchers see the end of their stream once they have read what is queued."""
        for send in self._subscribers:
            send.close()
        self._subscribers.clear()
