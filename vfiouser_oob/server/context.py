"""What a function gives to each of its connections: its limits, its books, and where errors are noted."""

from __future__ import annotations

import errno
import time
from typing import Any

from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.latency import CommandTimings
from vfiouser_oob.observability.log import Logger, RateLimited
from vfiouser_oob.observability.trouble import TroubleBook
from vfiouser_oob.server.containment import errno_of
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.constants import Command
from vfiouser_protocol.session import CommandReceived


class FunctionContext:
    """What all connections of one function share.

    Args:
        name: the function's name.
        reply_budget_s: seconds within which each client message is answered.
        activity: the daemon's sockets.
        events: where changes are announced.
        log: a logger; the function's name is added.
    """

    def __init__(self, name: str, reply_budget_s: float, activity: Activity, events: EventHub, log: Logger) -> None:
        self.name = name
        self.reply_budget_s = reply_budget_s
        self.activity = activity
        #: Descriptors of its clients, also of those that have gone.
        self.account = Account(f"the client of {name}")
        self.log = log.bind(function=name)
        #: What clients can provoke is limited per function: a limit per connection is none for who reconnects.
        self.noise = RateLimited(self.log)
        self.visits = RateLimited(self.log, burst=20, interval_s=2.0)
        #: Commands received, by number.
        self.counts = [0] * (max(Command) + 1)
        self.timings = CommandTimings(len(self.counts), time.monotonic())
        self.trouble = TroubleBook()
        #: Whom the function serves.
        self.client: Peer | None = None
        self._events = events

    def announce(self, kind: str, **fields: Any) -> None:
        """Tell watchers what has happened to the function."""
        self._events.publish(kind, function=self.name, **fields)

    def note_error(self, text: str) -> None:
        """Remember the last error, for `status`, until the function serves a client again."""
        self.trouble.note(text)

    def note_failed(self, event: CommandReceived, error: Exception) -> int:
        """Note why a command failed.

        Args:
            event: the command.
            error: what its handler raised.

        Returns:
            The error number for its reply.
        """
        name = Command(event.header.command).name
        number = errno_of(error, self.log, name)
        text = f"{name}: {error}"
        self.trouble.note(text, passing=True)
        self.noise.warning(
            "command refused",
            command=name,
            client=self.client,
            reason=str(error),
            errno=errno.errorcode.get(number, str(number)),
        )
        return number
