"""What another daemon takes down of a migration under way, and what this one makes of it.

The record says what the function does, and what is being done about it. How far a client has come with the stream is
taken down beside it, with every portion that it takes: that has to cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from vfiouser_oob.migration.config_shadow import ConfigObserver
from vfiouser_oob.migration.record import MigrationRecord
from vfiouser_oob.migration.stream_format import HEAD, HEAD_SIZE, MAGIC
from vfiouser_protocol.migration_v1 import NO_ITERATION, IterationMark


@dataclass(frozen=True, slots=True)
class StreamMark:
    """How far a client has come with a state that is being saved.

    Args:
        epoch: how often the stream was begun; 0 if none of it was made yet.
        taken: bytes of it that the client took.
        head: of the record that it took a part of; empty if it took only whole ones.
        done: bytes of that record which it took.
        whole: it took all of it, trailer included.
    """

    epoch: int = 0
    taken: int = 0
    head: bytes = b""
    done: int = 0
    whole: bool = False

    @property
    def rest(self) -> bytes:
        """What stands for the rest of the record that the client took a part of: its digest proves that it is void."""
        if not self.head:
            return b""
        length = 0 if self.head.startswith(MAGIC) else HEAD.unpack_from(self.head)[3]
        return self.head[self.done :] + bytes(length - max(0, self.done - HEAD_SIZE))


NO_STREAM = StreamMark()


class V1Mark(NamedTuple):
    """What a client knows of the migration region.

    Args:
        iteration: how far it is with a chunk.
        state: what it wrote to device_state last.
    """

    iteration: IterationMark = NO_ITERATION
    state: int = 0


NO_V1_MARK = V1Mark()


@dataclass(frozen=True, slots=True)
class LogMark:
    """What a client has asked for when it began to log dirty pages.

    Args:
        page_size: wished for, bytes.
        ranges: what to log, address and length in bytes; nothing means everything.
        agent_page: bytes per page that the agent uses; 0 if it does not log.
        blind: nobody logs what should be logged, so everything is reported.
    """

    page_size: int
    ranges: tuple[tuple[int, int], ...] = ()
    agent_page: int = 0
    blind: bool = False


class TransferNotes(ConfigObserver, Protocol):
    """Takes down what a client does; none of it has happened before the command under way is answered."""

    def stream_moved(self, before: StreamMark, after: StreamMark) -> None:
        """The client takes a portion of the state that is being saved."""

    def logs(self, mark: LogMark | None) -> None:
        """Dirty pages are logged for the client, or not any more."""

    def iterated(self, before: V1Mark, after: V1Mark) -> None:
        """The client goes on in the migration region."""


class MigrationNotes(Protocol):
    """Takes a function's migration down for the daemon after this one."""

    def migration(self, record: MigrationRecord) -> None:
        """What the function's migration is from now on."""


@dataclass(frozen=True, slots=True)
class KeptClient:
    """A client that is not lost when its daemon ends.

    Args:
        notes: takes down what becomes of it.
        goes_on: another daemon has served it.
        config: what that one was told of configuration space, by offset.
        mark: how far it has come with a state that is being saved.
        v1: what it knows of the migration region.
        log: what it has asked for when it began to log dirty pages; None if it does not.
    """

    notes: TransferNotes
    goes_on: bool = False
    config: Mapping[int, bytes] = field(default_factory=dict)
    mark: StreamMark = NO_STREAM
    v1: V1Mark = NO_V1_MARK
    log: LogMark | None = None


def worth_noting(before: MigrationRecord, after: MigrationRecord) -> bool:
    """Whether it matters to the daemon after this one that state was moved: only whether any was, and all of it.

    Args:
        before: what was known.
        after: what is.
    """
    one, other = before.stream, after.stream
    if one is None or other is None:
        return one is not other
    return (before.handed, one.whole, one.position > 0) != (after.handed, other.whole, other.position > 0)
