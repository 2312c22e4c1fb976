"""Watches a function's record and tells what a migration was like once it is over. There is no I/O in here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from vfiouser_agents.api import Role
from vfiouser_oob.migration.record import RUNS, Certainty, MigrationRecord
from vfiouser_oob.observability.status import MigrationEntry
from vfiouser_protocol.constants import DeviceState

#: Characters of a reason that are kept: an agent chooses it.
_MAX_WHY = 500


class MigrationOutcome(Enum):
    """How a migration ended for one side."""

    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    #: The client had the whole state, and let the source run again.
    RETURNED = "returned"


@dataclass(slots=True)
class _UnderWay:
    """A migration that is not over; times are in seconds since 1970."""

    role: Role
    began: float
    way: str | None = None
    bytes: int = 0
    stopped: float | None = None
    moved: float | None = None
    handed: float | None = None
    committed: bool = False
    why: str | None = None

    def learn(self, before: MigrationRecord, after: MigrationRecord, now: float) -> None:
        """Take what a change of the record tells."""
        if after.owner is not None:
            self.way = after.owner.value
        if after.stream is not None and after.stream.position > self.bytes:
            self.bytes, self.moved = after.stream.position, now
        if self.role is Role.SOURCE and self.handed is None:
            if after.state in RUNS and after.stream is not None:
                self.stopped = None
            elif self.stopped is None and after.state not in RUNS:
                self.stopped = now
        if after.handed and self.handed is None:
            self.handed = now
        self.committed = self.committed or after.committed
        failed = after.load_failure or (after.last_error if after.last_error != before.last_error else None)
        self.why = failed or self.why

    def outcome(self, after: MigrationRecord) -> MigrationOutcome | None:
        """How it ended; None while it has not."""
        if after.certainty is Certainty.FAILED:
            return MigrationOutcome.FAILED
        returned = after.certainty is Certainty.KNOWN and after.state is DeviceState.RUNNING
        over = returned and after.stream is None and after.errand is None
        if self.role is Role.DESTINATION and over and self.committed:
            return MigrationOutcome.DONE
        if self.role is Role.SOURCE and self.handed is not None:
            if not after.attached:
                return MigrationOutcome.DONE
            return MigrationOutcome.RETURNED if over else None
        if not over and after.attached:
            return None
        return MigrationOutcome.CANCELLED if self.why is None else MigrationOutcome.FAILED

    def downtime(self, outcome: MigrationOutcome, now: float) -> float | None:
        """This side's part of the time in which the function stood still, in seconds."""
        if self.role is Role.DESTINATION:
            done = outcome is MigrationOutcome.DONE and self.moved is not None
            return now - self.moved if done and self.moved is not None else None
        if self.stopped is None:
            return None
        until = self.handed if outcome is MigrationOutcome.DONE and self.handed is not None else now
        return until - self.stopped


class MigrationWatch:
    """Watches one function's record.

    Args:
        function: its name.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        self._under_way: _UnderWay | None = None

    def follow(self, before: MigrationRecord, after: MigrationRecord, now: float) -> MigrationEntry | None:
        """Take a change of the record.

        Args:
            before: what it was.
            after: what it is.
            now: when, in seconds since 1970.

        Returns:
            The migration that is over with this change, if there is one.
        """
        under_way = self._under_way
        if under_way is None:
            if after.stream is None:
                return None
            under_way = self._under_way = _UnderWay(after.stream.role, now)
        under_way.learn(before, after, now)
        outcome = under_way.outcome(after)
        if outcome is None:
            return None
        self._under_way = None
        return self._entry(under_way, outcome, now)

    def _entry(self, under_way: _UnderWay, outcome: MigrationOutcome, now: float) -> MigrationEntry:
        duration = max(now - under_way.began, 0.0)
        downtime = under_way.downtime(outcome, now)
        failed = outcome in (MigrationOutcome.FAILED, MigrationOutcome.RETURNED)
        return MigrationEntry(
            function=self._function,
            direction="out" if under_way.role is Role.SOURCE else "in",
            way=under_way.way,
            began=_iso(under_way.began),
            ended=_iso(now),
            bytes=under_way.bytes,
            duration_s=round(duration, 6),
            bytes_per_s=round(under_way.bytes / duration, 1) if duration else 0.0,
            downtime_s=None if downtime is None else round(max(downtime, 0.0), 6),
            outcome=outcome.value,
            why=(under_way.why or "")[:_MAX_WHY] or None if failed else None,
        )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
