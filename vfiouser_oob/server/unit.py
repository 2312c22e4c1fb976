"""What a daemon serves: units of life, such as functions, each of which comes, goes, changes and fails on its own.

A unit is there from the moment that it is configured until it is removed, whether it lives or not: one that could not
be opened stays as a failed one, with its reason, until somebody tries again. What a unit is made of is the business of
its kind; the registry knows no more of it than what stands here.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import trio

from vfiouser_oob.config.schema import DaemonConfig
from vfiouser_oob.config.tables import keys


class UnitConfig(Protocol):
    """A section of the configuration that describes a unit."""

    @property
    def name(self) -> str:
        """Its name, unique among those of its kind."""


class RollCall:
    """Answers from a unit's own tasks, which shows that they run."""

    def __init__(self) -> None:
        self._ask, self._questions = trio.open_memory_channel[trio.Event](1)

    async def run(self) -> None:
        """Answer until cancelled; belongs among the unit's tasks."""
        async for question in self._questions:
            question.set()

    async def answered(self) -> None:
        """Wait for an answer."""
        question = trio.Event()
        await self._ask.send(question)
        await question.wait()


class UnitLife(Protocol):
    """A unit that was opened: it is run as one task, and stopped by its handle."""

    #: Whether nobody can use it any more, now or later.
    exhausted: bool
    #: Set when nothing of it is left.
    ended: trio.Event

    @property
    def failure(self) -> str | None:
        """Why it is of no use any more; None while it is."""

    @property
    def user(self) -> str | None:
        """Who uses it now, in words; None if nobody does."""

    async def run(
        self, exhausted: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Live; raises only before the start was told."""

    def drain(self) -> None:
        """Take no new user."""

    def reopen(self) -> None:
        """Take users again."""

    async def vacated(self) -> None:
        """Wait until nobody uses it."""

    def adopt(self, config: Any) -> None:
        """Go on with a configuration that differs in what can be changed while it lives."""

    async def prove(self) -> str | None:
        """Answer from its own tasks; returns what hangs, None if nothing does."""

    def condemn(self, reason: str) -> None:
        """Take it out of service; its user learns that it is of no use."""

    async def leave(self) -> None:
        """Leave its user to the daemon after this one, if that is possible; `stop` then does not turn it out."""

    def stop(self) -> None:
        """Turn users out and end."""

    def close(self) -> None:
        """Give back what was opened, if it never ran."""


@dataclass(frozen=True, slots=True)
class UnitKind:
    """A kind of unit.

    Args:
        word: what one is called, for people.
        header: how the configuration file calls it.
        of: those that a configuration names.
        open: opens one; it does nothing yet. It may refuse by an exception, whose text is for people.
        describe: what `status` says of one.
        live_keys: keys of its section that can be changed while it lives.
        vital: whether a daemon that can have none of them is of no use.
        check: finds what would be in the way of a migration, given what the destination says of itself; None where
            that is no question.
    """

    word: str
    header: str
    of: Callable[[DaemonConfig], Sequence[UnitConfig]]
    open: Callable[[Any], UnitLife]
    describe: Callable[[Unit], Any]
    live_keys: Collection[str] = ()
    vital: bool = False
    check: Callable[[Unit, str | None], Awaitable[dict[str, Any]]] | None = None


class Origin(StrEnum):
    """Where a unit comes from."""

    FILE = "file"
    ADDED = "added"


@dataclass(frozen=True, slots=True)
class UnitFailure:
    """A unit cannot be had.

    Args:
        reason: why, for people.
        since: when that was found, in seconds since 1970.
    """

    reason: str
    since: float = field(default_factory=time.time)


class UnitHangs(Exception):
    """A unit was stopped, and something of it is still there; the text says so to people."""


@dataclass(eq=False)
class Unit:
    """One unit.

    Args:
        kind: what it is.
        name: its name.
        config: what it is to be; None if that cannot be told.
        origin: who wants it.
        life: it, as long as it was opened.
        failure: why it was not.
        drained: whether it takes no new user, because an administrator said so.
        waiting: cancels a change that waits for its user to go.
    """

    kind: UnitKind
    name: str
    config: UnitConfig | None
    origin: Origin = Origin.FILE
    life: UnitLife | None = None
    failure: UnitFailure | None = None
    drained: bool = False
    waiting: trio.CancelScope | None = field(default=None)

    @property
    def failed(self) -> str | None:
        """Why it is of no use; None if it is of use."""
        if self.life is not None and self.life.failure is not None:
            return self.life.failure
        return None if self.failure is None else self.failure.reason

    @property
    def user(self) -> str | None:
        """Who uses it."""
        return None if self.life is None else self.life.user


def changed_keys(old: UnitConfig, new: UnitConfig) -> tuple[str, ...]:
    """The keys in which two sections of one kind differ."""
    declared: Mapping[str, Any] = keys(type(new))
    return tuple(name for name in declared if getattr(old, name) != getattr(new, name))
