"""What another daemon takes down of a migration under way, and what this one makes of it.

The record says what the function does, and what is being done about it. How far a client has come with the stream is
taken down beside it, with every portion that it takes: that has to cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vfiouser_oob.migration.config_shadow import ConfigObserver
from vfiouser_oob.migration.record import MigrationRecord
from vfiouser_oob.migration.stream_format import HEAD, HEAD_SIZE, MAGIC


@dataclass(frozen=True, slots=True)
class StreamMark:
    """How far a client has come with a state that is being saved.

    Args:
        epoch: how often the stream was begun; 0 if none of it was made yet.
        taken: bytes of it that the client took.
        head: of the record that it took a part of; empty if it took only whole ones.
        done: bytes of that record which it took.
        undelivered: a portion behind it was made for the client, who did not get it.
    """

    epoch: int = 0
    taken: int = 0
    head: bytes = b""
    done: int = 0
    undelivered: bool = False

    @property
    def rest(self) -> bytes:
        """What stands for the rest of the record that the client took a part of: its digest proves that it is void."""
        if not self.head:
            return b""
        length = 0 if self.head.startswith(MAGIC) else HEAD.unpack_from(self.head)[3]
        return self.head[self.done :] + bytes(length - max(0, self.done - HEAD_SIZE))


class TransferNotes(ConfigObserver, Protocol):
    """Takes down what a client does; none of it has happened before the command under way is answered."""

    def stream_moved(self, before: StreamMark, after: StreamMark) -> None:
        """The client takes a portion of the state that is being saved."""


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
    """

    notes: TransferNotes
    goes_on: bool = False
    config: Mapping[int, bytes] = field(default_factory=dict)
    mark: StreamMark = StreamMark()


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
