"""What happens to functions, for whoever watches: `status --watch` now, more later."""

from __future__ import annotations

import time
from typing import Any

import trio

#: A watcher that does not read loses the oldest news, never slows the daemon down.
_BACKLOG = 256


class Events:
    """Announces changes to any number of watchers."""

    def __init__(self) -> None:
        self._watchers: set[trio.MemorySendChannel[dict[str, Any]]] = set()

    def announce(self, function: str, event: str, **fields: Any) -> None:
        """Tell every watcher.

        Args:
            function: name of the function it happened to.
            event: what happened, one word.
            fields: details, as JSON values.
        """
        news = {"event": event, "function": function, "time": time.time(), **fields}
        for watcher in tuple(self._watchers):
            try:
                watcher.send_nowait(news)
            except trio.WouldBlock:
                pass
            except trio.BrokenResourceError:
                self._watchers.discard(watcher)

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Watch from now on; closing the channel ends it."""
        sender, receiver = trio.open_memory_channel[dict[str, Any]](_BACKLOG)
        self._watchers.add(sender)
        return receiver
