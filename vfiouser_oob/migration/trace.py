"""What a migration does, as events: each step started, then complete or failed, with its bytes and its duration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from vfiouser_agents.api import Event, EventKind
from vfiouser_agents.causes import words_of
from vfiouser_agents.errors import MAX_MESSAGE
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.observability.status import MigrationEntry

#: Seconds between two progress events of one function; data moves in thousands of chunks, and a watcher has a life.
PROGRESS_S = 0.25
#: The step that only asks.
_QUESTION = "status"
#: The error of a step whose caller has gone, or has something more urgent to do.
_GIVEN_UP = "given up"


@dataclass(slots=True)
class Span:
    """One step under way.

    Args:
        bytes: what it has moved; set by who runs the step.
    """

    bytes: int = 0


class Tracer:
    """Tells log, watchers and `status` what the migration of one function does.

    Args:
        function: its name.
        events: where watchers listen.
        log: a logger with the function's fields.
    """

    def __init__(self, function: str, events: EventHub, log: Logger) -> None:
        self._function = function
        self._events = events
        self._log = log
        #: The change of state that is under way, if there is one.
        self.arc = ""
        #: Steps under way, the latest last.
        self._doing: list[str] = []
        self._progress_due = 0.0
        #: The agent is known to be away, and people were told; what fails meanwhile is no news.
        self.agent_away = False
        self.steps = 0
        self.failures = 0
        #: The last failure that no success of the same step has followed: the step, why, and when (since 1970).
        self._failed: tuple[str, str, float] | None = None

    @property
    def last_failure(self) -> str | None:
        """The last step that failed, and why; None if none did, or it has succeeded since."""
        return None if self._failed is None else f"{self._failed[0]}: {self._failed[1]}"

    @property
    def last_failure_time(self) -> float | None:
        """When that was, in seconds since 1970."""
        return None if self._failed is None else self._failed[2]

    @property
    def doing(self) -> str | None:
        """The step under way that began last, if there is one."""
        return self._doing[-1] if self._doing else None

    @contextmanager
    def step(self, name: str, *, arc: str | None = None, quiet: bool = False) -> Iterator[Span]:
        """Trace a step; an exception makes it a failed one, and so does giving it up, which is nobody's failure.

        Args:
            name: what is done, for example `stop`.
            arc: the state change that it belongs to; None = the one that is under way.
            quiet: tell only of failures, for what happens with every chunk.
        """
        if arc is not None:
            self.arc = arc
        begun = trio.current_time()
        span = Span()
        self.steps += 1
        self._doing.append(name)
        if not quiet:
            self._tell("started", name)
        try:
            yield span
        except BaseException as error:
            reason = _GIVEN_UP
            if isinstance(error, Exception):
                reason = words_of(error)
                self.failures += 1
                # Whoever is away does not say where the function is; that is told as such, and is no failed step.
                if not (self.agent_away and name == _QUESTION):
                    self._failed = name, reason, time.time()
            duration = trio.current_time() - begun
            self._tell("failed", name, bytes=span.bytes, duration_s=round(duration, 6), error=reason)
            raise
        else:
            if self._failed is not None and self._failed[0] == name:
                self._failed = None
            if not quiet:
                duration = trio.current_time() - begun
                self._tell("complete", name, bytes=span.bytes, duration_s=round(duration, 6))
        finally:
            self._doing.remove(name)
            # Only who opened the arc closes it: chunks are fetched across the beginning and the end of arcs.
            if arc is not None:
                self.arc = ""

    def progress(self, phase: str, moved: int, remaining: int) -> None:
        """Tell how far the data is, now and then.

        Args:
            phase: the migration state.
            moved: bytes of the stream so far.
            remaining: bytes that are estimated to come.
        """
        now = trio.current_time()
        if now >= self._progress_due:
            self._progress_due = now + PROGRESS_S
            self._events.publish(
                "migration-progress", function=self._function, phase=phase, bytes=moved, remaining=remaining
            )
            self._log.debug("migration progress", phase=phase, bytes=moved, remaining=remaining)

    def state(self, old: str, new: str, why: str) -> None:
        """Tell that the migration state has changed."""
        self._events.publish("migration-state", function=self._function, old=old, state=new, reason=why)
        self._log.info("migration state", old=old, state=new, reason=why)

    def finished(self, entry: MigrationEntry) -> None:
        """Tell what a migration was like that is over."""
        fields = {key: value for key, value in entry.items() if key != "function"}
        self._events.publish("migration-finished", function=self._function, **fields)
        megabytes = round(entry["bytes_per_s"] / 1e6, 3)
        self._log.info(
            "migration finished",
            direction=entry["direction"],
            outcome=entry["outcome"],
            way=entry["way"],
            bytes=entry["bytes"],
            duration_s=entry["duration_s"],
            mb_per_s=megabytes,
            downtime_s=entry["downtime_s"],
            **({} if entry["why"] is None else {"why": entry["why"]}),
        )

    def heard(self, event: Event) -> None:
        """Tell what the agent has told without being asked."""
        state, detail = None if event.status is None else event.status.state.value, event.detail[:MAX_MESSAGE]
        self._events.publish(
            "agent-event", function=self._function, event=event.kind.value, agent_state=state, detail=detail
        )
        tell = self._log.debug if event.kind is EventKind.STATE_CHANGED else self._log.info
        tell("agent event", event_kind=event.kind.value, agent_state=state, detail=detail, lost=event.lost)

    def unwatched(self, reason: str) -> None:
        """Note that the agent's events are not heard; nothing depends on them."""
        self._log.debug("the agent's events are not watched", reason=reason)

    def note(self, text: str, **fields: Any) -> None:
        """Log something that went wrong and was dealt with."""
        self._log.warning(text, **fields)

    def tell(self, text: str, **fields: Any) -> None:
        """Log something that is as it should be again."""
        self._log.info(text, **fields)

    def _tell(self, phase: str, name: str, **fields: Any) -> None:
        self._events.publish("migration", function=self._function, step=name, arc=self.arc, phase=phase, **fields)
        if phase == "failed" and fields["error"] != _GIVEN_UP and not self.agent_away:
            self._log.warning("migration step failed", step=name, arc=self.arc, **fields)
        else:
            self._log.debug(f"migration step {phase}", step=name, arc=self.arc, **fields)
