"""What an agent says of dirty pages: believed if it is about what was asked, and everything is dirty if it is not."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio

from vfiouser_agents.api import Capabilities, DirtyReport, Range
from vfiouser_agents.operations import Op, Operation
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_oob.migration.host import MigrationHost
from vfiouser_oob.migration.trace import Tracer
from vfiouser_protocol.dma import DmaTable
from vfiouser_protocol.dma_logging import DmaLogging
from vfiouser_protocol.errors import CommandError

PAGE = 4096
TOP = 1 << 64


class Answers:
    """A link to an agent that logs, and has one answer to every question about pages."""

    def __init__(self, report: DirtyReport) -> None:
        self.report = report
        self.asked_for: list[tuple[int, ...]] = []
        self.asked, self.caps = True, Capabilities(dirty=True)

    async def call(self, op: Op[..., Any], deadline: float, *args: int) -> DirtyReport | int | None:
        """Answer."""
        await trio.lowlevel.checkpoint()
        if op is Operation.DIRTY_REPORT:
            self.asked_for.append(args)
            return self.report
        return PAGE if op is Operation.DIRTY_START else None


class Nobody:
    """Hears that the agent logs, and is not interested."""

    def feed(self, event: object) -> None:
        """Take it."""


async def reported(report: DirtyReport, first: int, length: int) -> tuple[bytes, list[tuple[int, ...]]]:
    """What a client is told of memory that is mapped by a file, and what the agent was asked for that."""
    memory = DmaTable()
    memory.map(first, length, 3, file="file")
    link = Answers(report)
    tracker = DirtyTracker(
        cast(AgentLink, link),
        cast(Tracer, None),
        cast(MigrationHost, Nobody()),
        memory,
        DmaLogging(),
        device_seen=False,
        by_message=False,
        call_s=1,
    )
    await tracker.start(PAGE, (), trio.current_time() + 1)
    return bytes(await tracker.report(first, length, PAGE, trio.current_time() + 1)), link.asked_for


@pytest.mark.parametrize(
    "report",
    [DirtyReport(bitmap=b"\2" + bytes(7)), DirtyReport(ranges=(Range(0x11000, PAGE),))],
    ids=["bitmap", "range"],
)
async def test_an_answer_is_believed(report: DirtyReport) -> None:
    """What is dirty is told, and nothing else."""
    assert (b"\2" + bytes(7), [(0x10000, 64 * PAGE)]) == await reported(report, 0x10000, 64 * PAGE)


@pytest.mark.parametrize(
    "report",
    [
        DirtyReport(bitmap=bytes(7)),
        DirtyReport(bitmap=bytes(9)),
        DirtyReport(ranges=(Range(0, PAGE),)),
        DirtyReport(ranges=(Range(0x10000, 65 * PAGE),)),
    ],
    ids=["short", "long", "below", "beyond"],
)
async def test_an_answer_about_something_else_makes_all_dirty(report: DirtyReport) -> None:
    """An agent that does not answer what it was asked knows nothing of it."""
    assert b"\xff" * 8 == (await reported(report, 0x10000, 64 * PAGE))[0]


async def test_the_last_page_of_all_is_dirty() -> None:
    """2^64 is no number that an agent can be told, so the page in front of it is dirty; the others are as it says."""
    clean = DirtyReport(bitmap=bytes(8))
    assert (bytes(7) + b"\x80", [(TOP - 64 * PAGE, 63 * PAGE)]) == await reported(clean, TOP - 64 * PAGE, 64 * PAGE)
    assert (b"\1" + bytes(7), []) == await reported(clean, TOP - PAGE, PAGE)


async def test_a_log_that_is_lent_goes_to_the_client_when_it_wants_it() -> None:
    """Whoever has borrowed it finds it gone, and cannot borrow one that the client uses."""
    tracker = DirtyTracker(
        cast(AgentLink, Answers(DirtyReport())),
        cast(Tracer, None),
        cast(MigrationHost, Nobody()),
        DmaTable(),
        DmaLogging(),
        device_seen=False,
        by_message=False,
        call_s=1,
    )
    await tracker.lend(PAGE, trio.current_time() + 1)
    assert (tracker.lent, tracker.log.active) == (True, True)
    await tracker.reclaim(trio.current_time() + 1)
    assert (tracker.lent, tracker.log.active) == (False, False)
    await tracker.start(PAGE, (), trio.current_time() + 1)
    await tracker.reclaim(trio.current_time() + 1)
    assert tracker.log.active, "what is the client's stays"
    with pytest.raises(CommandError, match="by itself"):
        await tracker.lend(PAGE, trio.current_time() + 1)
