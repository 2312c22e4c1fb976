"""How a client's part of a migration is written down for another process: values of its own, as lists.

What cannot be read is damage, and nobody goes on with the client.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import msgpack

from vfiouser_oob.migration.inherited import NO_STREAM, NO_V1_MARK, LogMark, StreamMark, V1Mark
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.things import ProgressThing
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.migration_v1 import IterationPhase


class ProgressPart(IntEnum):
    """What is written down of it."""

    #: How far it has come with a state that is being saved.
    STREAM = 0
    #: What it knows of the migration region.
    REGISTERS = 1
    #: What it has asked for when it began to log dirty pages.
    LOG = 2


def write_stream(number: int, before: StreamMark, after: StreamMark) -> ProgressThing:
    """Write down how far it comes by a command.

    Args:
        number: of the command.
        before: how far it was.
        after: how far it is once that is answered.
    """
    return ProgressThing(ProgressPart.STREAM, number, _stream(before), _stream(after))


def write_registers(number: int, before: V1Mark, after: V1Mark) -> ProgressThing:
    """Write down what it knows of the migration region; arguments as for `write_stream`."""
    return ProgressThing(ProgressPart.REGISTERS, number, _registers(before), _registers(after))


def write_log(mark: LogMark | None) -> ProgressThing:
    """Write down what is logged for it, which does not depend on whether it knows that.

    Args:
        mark: what; None: nothing.
    """
    after = b"" if mark is None else _packed(mark.page_size, mark.ranges, mark.agent_page, mark.blind)
    return ProgressThing(ProgressPart.LOG, 0, b"", after)


class Progress:
    """What was written down of a client.

    Args:
        things: its records.
        number: of its first command that was not answered.
    """

    def __init__(self, things: list[ProgressThing], number: int) -> None:
        self._things = {thing.part: thing for thing in things}
        self._number = number

    def _written(self, part: ProgressPart) -> tuple[Any, ...] | None:
        thing = self._things.get(part)
        if thing is None:
            return None
        undone = part is not ProgressPart.LOG and thing.number == self._number
        data = thing.before if undone else thing.after
        if not data:
            return None
        try:
            values = msgpack.unpackb(data, use_list=False)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise UnusableRecord(f"how far its client has come is damaged: {error}") from error
        return values if isinstance(values, tuple) else (values,)

    @property
    def stream(self) -> StreamMark:
        """How far it has come with a state that is being saved.

        Raises:
            UnusableRecord: that is damaged, as for the others.
        """
        values = self._written(ProgressPart.STREAM)
        if values is None:
            return NO_STREAM
        return StreamMark(*_checked(values, int, int, bytes, int, bool))

    @property
    def registers(self) -> V1Mark:
        """What it knows of the migration region."""
        values = self._written(ProgressPart.REGISTERS)
        if values is None:
            return NO_V1_MARK
        state, phase, chunk, written, register = _checked(values, int, str, int, int, int)
        try:
            return V1Mark((DeviceState(state), IterationPhase(phase), chunk, written), register)
        except ValueError as error:
            raise UnusableRecord(f"what its client knows of the migration region is damaged: {error}") from error

    @property
    def log(self) -> LogMark | None:
        """What it has asked for when it began to log dirty pages; None if it did not."""
        values = self._written(ProgressPart.LOG)
        if values is None:
            return None
        page_size, ranges, agent_page, blind = _checked(values, int, tuple, int, bool)
        return LogMark(page_size, tuple(_checked(item, int, int) for item in ranges), agent_page, blind)


def _stream(mark: StreamMark) -> bytes:
    return _packed(mark.epoch, mark.taken, mark.head, mark.done, mark.whole)


def _registers(mark: V1Mark) -> bytes:
    (state, phase, chunk, written), register = mark
    return _packed(int(state), phase.value, chunk, written, register)


def _packed(*values: Any) -> bytes:
    data: bytes = msgpack.packb(values)
    return data


def _checked(values: Any, *kinds: type) -> Any:
    """Values of the kinds that they have to be of."""
    if not isinstance(values, tuple) or tuple(map(type, values)) != kinds:
        raise UnusableRecord(f"how far its client has come is damaged: {values!r}")
    return values
