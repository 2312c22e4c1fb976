"""How far a client has come with a migration, written down and read by another process, damage included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgpack
import pytest

from vfiouser_oob.migration.inherited import NO_STREAM, NO_V1_MARK, LogMark, StreamMark, V1Mark
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.things import ProgressThing
from vfiouser_oob.server.progress import Progress, ProgressPart, write_log, write_registers, write_stream
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.migration_v1 import IterationPhase

STREAMS = [NO_STREAM, StreamMark(2, 12345, b"head" * 10, 41), StreamMark(1, 1 << 40, whole=True)]
REGISTERS = [
    NO_V1_MARK,
    *(V1Mark((DeviceState.STOP_COPY, phase, 4096, 12), 0xFFFFFFF2) for phase in IterationPhase),
]
LOGS = [None, LogMark(4096), LogMark(65536, ((0, 4096), (1 << 40, 1 << 30)), 2 << 20, blind=True)]


@pytest.mark.parametrize("mark", STREAMS)
def test_the_stream(mark: StreamMark) -> None:
    """What was before counts until the command is answered."""
    thing = write_stream(7, NO_STREAM, mark)
    assert mark == Progress([thing], 8).stream
    assert NO_STREAM == Progress([thing], 7).stream
    assert replace(mark, whole=False) == Progress([write_stream(7, mark, NO_STREAM)], 7).stream or mark.whole


@pytest.mark.parametrize("mark", REGISTERS)
def test_the_registers(mark: V1Mark) -> None:
    """Likewise."""
    thing = write_registers(7, NO_V1_MARK, mark)
    assert mark == Progress([thing], 8).registers
    assert NO_V1_MARK == Progress([thing], 7).registers


@pytest.mark.parametrize("mark", LOGS)
def test_the_log(mark: LogMark | None) -> None:
    """It counts at once."""
    for number in (0, 1):
        assert mark == Progress([write_log(mark)], number).log


def test_nothing() -> None:
    """Of a client that never migrated."""
    done = Progress([], 1)
    assert (NO_STREAM, NO_V1_MARK, None) == (done.stream, done.registers, done.log)


@pytest.mark.parametrize(
    ("part", "data"),
    [
        (ProgressPart.STREAM, b"\xc1"),
        (ProgressPart.STREAM, msgpack.packb((1, 2, 3))),
        (ProgressPart.STREAM, msgpack.packb((1, 2, "text", 0, False))),
        (ProgressPart.REGISTERS, msgpack.packb((99, "initial", 0, 0, 0))),
        (ProgressPart.REGISTERS, msgpack.packb((1, "nowhere", 0, 0, 0))),
        (ProgressPart.LOG, msgpack.packb((4096, (1, 2), 0, False))),
        (ProgressPart.LOG, msgpack.packb(7)),
    ],
)
def test_damage(part: ProgressPart, data: bytes) -> None:
    """It is said to be."""
    done = Progress([ProgressThing(part, 0, data, data)], 1)
    ask: dict[ProgressPart, Callable[[], object]] = {
        ProgressPart.STREAM: lambda: done.stream,
        ProgressPart.REGISTERS: lambda: done.registers,
        ProgressPart.LOG: lambda: done.log,
    }
    with pytest.raises(UnusableRecord, match="damaged"):
        ask[part]()
